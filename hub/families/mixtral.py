"""Mixtral (Jiang et al. 2024, arXiv:2401.04088): Mistral with experts, whose weights are a softmax over the chosen ones."""

from typing import Any

from weft.hub.families import Fields
from weft.hub.families.fields import Table, read_fields, write_fields
from weft.hub.families.llama import ATTENTION, NORMS, OUTER, causal_family, common, write_common
from weft.hub.families.rope import read_rope
from weft.model.config import ModelConfig, model_of

EXPERTS = {
    'model.layers.{i}.block_sparse_moe.gate.weight': 'mlp.router.w_IO',
    'model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight': 'mlp.gate.w_EIO',
    'model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight': 'mlp.down.w_EOI',
    'model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight': 'mlp.up.w_EIO',
}
MIXTURE: Table = {
    'num_local_experts': ('moe.experts', 8),
    'num_experts_per_tok': ('moe.top_k', 2),
    'intermediate_size': ('moe.mlp_dim', ...),
}


def read(f: Fields) -> ModelConfig:
    # A softmax over the chosen logits is a softmax over all of them, made to add up to 1 over the chosen.
    fields = common(f, 8, read_rope(f, 1e6), rms_norm_eps=1e-5) | read_fields(f, MIXTURE)
    return model_of(fields | {'attention.window': f('sliding_window', None)})


def write(c: ModelConfig) -> dict[str, Any]:
    own = {'model_type': 'mixtral', 'sliding_window': c.attention.window}
    return write_common(c) | own | write_fields(c, MIXTURE)


FAMILY = causal_family('mixtral', 'Mixtral', read, write, OUTER | NORMS | ATTENTION | EXPERTS)
