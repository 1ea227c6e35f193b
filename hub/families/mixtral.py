"""Mixtral (Jiang et al. 2024, arXiv:2401.04088): Mistral with experts, whose weights are a softmax over the chosen ones."""

from typing import Any

from weft.hub.families import Fields
from weft.hub.families.llama import ATTENTION, NORMS, OUTER, causal_family, common, write_common
from weft.hub.families.rope import read_rope, write_rope
from weft.model.config import ModelConfig, MoEConfig, model_of

EXPERTS = {
    'model.layers.{i}.block_sparse_moe.gate.weight': 'mlp.router.w_IO',
    'model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight': 'mlp.gate.w_EIO',
    'model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight': 'mlp.down.w_EOI',
    'model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight': 'mlp.up.w_EIO',
}


def read(f: Fields) -> ModelConfig:
    fields = common(f, epsilon=1e-5, kv_heads=8)
    # A softmax over the chosen logits is a softmax over all of them, made to add up to 1 over the chosen.
    moe = MoEConfig(experts=f('num_local_experts', 8), top_k=f('num_experts_per_tok', 2), mlp_dim=fields['mlp.dim'])
    return model_of(fields | read_rope(f, 1e6) | {'attention.window': f('sliding_window', None), 'moe': moe})


def write(c: ModelConfig) -> dict[str, Any]:
    m = c.moe
    experts = {}
    if m:
        experts = {'num_local_experts': m.experts, 'num_experts_per_tok': m.top_k, 'intermediate_size': m.mlp_dim}
    return write_common(c) | write_rope(c) | {'model_type': 'mixtral', 'sliding_window': c.attention.window} | experts


FAMILY = causal_family('mixtral', 'Mixtral', read, write, OUTER | NORMS | ATTENTION | EXPERTS)
