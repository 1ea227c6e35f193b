"""The architectures of GGUF files: what gives the fields of their config.json, and what their tensors are called.

Each `Architecture` has a function from a header's keys to the fields (hub/gguf/fields.py), and a table from the names of its
tensors to those of a published folder. Names and transforms are those of llama.cpp's converters.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from weft.hub.gguf.blocks import Numbers
from weft.hub.gguf.fields import deepseek2, gemma2, gemma3, glm4moe, gpt2, gpt_oss, llama, phi3, qwen2, qwen3, qwen3moe
from weft.hub.gguf.keys import Config, Keys
from weft.hub.gguf.sources import Regrouped, Shifted, Turned, Undone, Unsplit, Woven
from weft.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Changed:
    """A tensor that a converter has changed; `undo` is given it, config.json's fields and its name in the file."""

    name: str
    undo: Callable[[Numbers, Config, str], Undone]


@dataclasses.dataclass(frozen=True)
class Experts:
    """A tensor that holds a matrix for each expert {e}."""

    name: str


@dataclasses.dataclass(frozen=True)
class Pair:
    """The first of two tensors that are one in a published folder; names with their last part."""

    name: str
    second: str
    undo: Callable[[Numbers, Numbers], Undone]
    check: Callable[[Numbers, Numbers, str, str], None]


Entry = str | Changed | Experts | Pair


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How files of an architecture are read."""

    name: str  # in general.architecture
    config: Callable[[Keys], dict[str, Any]]  # the fields of config.json by the keys
    # Names in a file, mostly without `.weight` and `.bias`, to those in a published folder; {i} is the layer, {e} the expert.
    names: Mapping[str, Entry]
    consumed: tuple[str, ...] = ()  # patterns of tensors that `config` has read, or that follow from it
    # Patterns of tensors that repeat another; where a file has blocks of few bits, the two may differ by rounding.
    copies: tuple[str, ...] = ()

    @property
    def seconds(self) -> dict[str, str]:
        """The second tensors of pairs, and the first ones."""
        return {entry.second: first for first, entry in self.names.items() if isinstance(entry, Pair)}

    def experts(self, config: Config) -> int:
        """Experts of a layer, as config.json says it; 0 if none."""
        return next(
            (config[name] for name in ('num_local_experts', 'num_experts', 'n_routed_experts') if name in config), 0
        )


def regrouped(field: str) -> Callable[[Numbers, Config, str], Undone]:
    """Rows by heads, of which `field` says how many."""

    def undo(numbers: Numbers, config: Config, name: str) -> Undone:
        heads = config[field]
        if numbers.shape[0] % (2 * heads):
            raise UserError(
                f'{numbers.path}: tensor {name} has {numbers.shape[0]} rows, which are no pairs in each of {heads} heads'
            )
        return Regrouped(numbers, heads)

    return undo


def turned(numbers: Numbers, config: Config, name: str) -> Undone:
    if len(numbers.shape) < 2:
        raise UserError(f'{numbers.path}: tensor {name} is {list(numbers.shape)} and must be a matrix')
    return Turned(numbers)


def shifted(numbers: Numbers, config: Config, name: str) -> Undone:
    return Shifted(numbers)


def same_shape(first: Numbers, second: Numbers, name: str, other: str) -> None:
    if first.shape != second.shape:
        raise UserError(
            f'{first.path}: tensors {name} {list(first.shape)} and {other} {list(second.shape)} must have one shape'
        )


def same_latent(first: Numbers, second: Numbers, name: str, other: str) -> None:
    fits = len(first.shape) == len(second.shape) == 3 and first.shape[:2] == (second.shape[0], second.shape[2])
    if not fits:
        raise UserError(
            f'{first.path}: tensors {name} {list(first.shape)} and {other} {list(second.shape)} do not fit each other: they '
            'must be [heads, rank, keys] and [heads, values, rank]'
        )


LAYER = 'model.layers.{i}'
OUTER: dict[str, Entry] = {
    'token_embd': 'model.embed_tokens',
    'output_norm': 'model.norm',
    'output': 'lm_head',
}
ATTENTION: dict[str, Entry] = {
    'blk.{i}.attn_q': f'{LAYER}.self_attn.q_proj',
    'blk.{i}.attn_k': f'{LAYER}.self_attn.k_proj',
    'blk.{i}.attn_v': f'{LAYER}.self_attn.v_proj',
    'blk.{i}.attn_output': f'{LAYER}.self_attn.o_proj',
}
QK_NORMS: dict[str, Entry] = {
    'blk.{i}.attn_q_norm': f'{LAYER}.self_attn.q_norm',
    'blk.{i}.attn_k_norm': f'{LAYER}.self_attn.k_norm',
}
NORMS: dict[str, Entry] = {
    'blk.{i}.attn_norm': f'{LAYER}.input_layernorm',
    'blk.{i}.ffn_norm': f'{LAYER}.post_attention_layernorm',
}
MLP: dict[str, Entry] = {
    'blk.{i}.ffn_gate': f'{LAYER}.mlp.gate_proj',
    'blk.{i}.ffn_up': f'{LAYER}.mlp.up_proj',
    'blk.{i}.ffn_down': f'{LAYER}.mlp.down_proj',
}
EXPERTS: dict[str, Entry] = {
    'blk.{i}.ffn_gate_inp': f'{LAYER}.mlp.gate',
    'blk.{i}.ffn_gate_exps': Experts(f'{LAYER}.mlp.experts.{{e}}.gate_proj'),
    'blk.{i}.ffn_up_exps': Experts(f'{LAYER}.mlp.experts.{{e}}.up_proj'),
    'blk.{i}.ffn_down_exps': Experts(f'{LAYER}.mlp.experts.{{e}}.down_proj'),
}
SHARED: dict[str, Entry] = {
    'blk.{i}.exp_probs_b.bias': f'{LAYER}.mlp.gate.e_score_correction_bias',
    'blk.{i}.ffn_gate_shexp': f'{LAYER}.mlp.shared_experts.gate_proj',
    'blk.{i}.ffn_up_shexp': f'{LAYER}.mlp.shared_experts.up_proj',
    'blk.{i}.ffn_down_shexp': f'{LAYER}.mlp.shared_experts.down_proj',
}
ROPE_FREQS = r'rope_freqs\.weight'


MIXTRAL: dict[str, Entry] = {
    'blk.{i}.ffn_gate_inp': f'{LAYER}.block_sparse_moe.gate',
    'blk.{i}.ffn_gate_exps': Experts(f'{LAYER}.block_sparse_moe.experts.{{e}}.w1'),
    'blk.{i}.ffn_down_exps': Experts(f'{LAYER}.block_sparse_moe.experts.{{e}}.w2'),
    'blk.{i}.ffn_up_exps': Experts(f'{LAYER}.block_sparse_moe.experts.{{e}}.w3'),
    # Files of early 2024 have a tensor for each expert.
    'blk.{i}.ffn_gate.{e}': f'{LAYER}.block_sparse_moe.experts.{{e}}.w1',
    'blk.{i}.ffn_down.{e}': f'{LAYER}.block_sparse_moe.experts.{{e}}.w2',
    'blk.{i}.ffn_up.{e}': f'{LAYER}.block_sparse_moe.experts.{{e}}.w3',
}
REGROUPED: dict[str, Entry] = {
    'blk.{i}.attn_q': Changed(f'{LAYER}.self_attn.q_proj', regrouped('num_attention_heads')),
    'blk.{i}.attn_k': Changed(f'{LAYER}.self_attn.k_proj', regrouped('num_key_value_heads')),
}
GEMMA_NORMS: dict[str, Entry] = {
    'output_norm': Changed('model.norm', shifted),
    'blk.{i}.attn_norm': Changed(f'{LAYER}.input_layernorm', shifted),
    'blk.{i}.post_attention_norm': Changed(f'{LAYER}.post_attention_layernorm', shifted),
    'blk.{i}.ffn_norm': Changed(f'{LAYER}.pre_feedforward_layernorm', shifted),
    'blk.{i}.post_ffw_norm': Changed(f'{LAYER}.post_feedforward_layernorm', shifted),
}
GEMMA_QK_NORMS: dict[str, Entry] = {
    'blk.{i}.attn_q_norm': Changed(f'{LAYER}.self_attn.q_norm', shifted),
    'blk.{i}.attn_k_norm': Changed(f'{LAYER}.self_attn.k_norm', shifted),
}
GPT_OSS: dict[str, Entry] = {
    'blk.{i}.post_attention_norm': f'{LAYER}.post_attention_layernorm',
    'blk.{i}.attn_sinks.weight': f'{LAYER}.self_attn.sinks',
    'blk.{i}.attn_sinks': f'{LAYER}.self_attn.sinks',
    'blk.{i}.ffn_gate_inp': f'{LAYER}.mlp.router',
    'blk.{i}.ffn_gate_exps.weight': Pair(
        f'{LAYER}.mlp.experts.gate_up_proj',
        'blk.{i}.ffn_up_exps.weight',
        lambda gate, up: Woven(gate, up, turned=True),
        same_shape,
    ),
    'blk.{i}.ffn_gate_exps.bias': Pair(
        f'{LAYER}.mlp.experts.gate_up_proj_bias',
        'blk.{i}.ffn_up_exps.bias',
        lambda gate, up: Woven(gate, up, turned=False),
        same_shape,
    ),
    'blk.{i}.ffn_down_exps.weight': Changed(f'{LAYER}.mlp.experts.down_proj', turned),
    'blk.{i}.ffn_down_exps.bias': f'{LAYER}.mlp.experts.down_proj_bias',
}
PHI3: dict[str, Entry] = {
    'blk.{i}.attn_qkv': f'{LAYER}.self_attn.qkv_proj',
    'blk.{i}.attn_output': f'{LAYER}.self_attn.o_proj',
    'blk.{i}.ffn_up': f'{LAYER}.mlp.gate_up_proj',
    'blk.{i}.ffn_down': f'{LAYER}.mlp.down_proj',
}
GPT2_LAYER = 'transformer.h.{i}'
GPT2: dict[str, Entry] = {
    'token_embd': 'transformer.wte',
    'position_embd': 'transformer.wpe',
    'output_norm': 'transformer.ln_f',
    'output': 'lm_head',
    'blk.{i}.attn_norm': f'{GPT2_LAYER}.ln_1',
    'blk.{i}.attn_qkv.weight': Changed(f'{GPT2_LAYER}.attn.c_attn.weight', turned),
    'blk.{i}.attn_qkv.bias': f'{GPT2_LAYER}.attn.c_attn.bias',
    'blk.{i}.attn_output.weight': Changed(f'{GPT2_LAYER}.attn.c_proj.weight', turned),
    'blk.{i}.attn_output.bias': f'{GPT2_LAYER}.attn.c_proj.bias',
    'blk.{i}.ffn_norm': f'{GPT2_LAYER}.ln_2',
    'blk.{i}.ffn_up.weight': Changed(f'{GPT2_LAYER}.mlp.c_fc.weight', turned),
    'blk.{i}.ffn_up.bias': f'{GPT2_LAYER}.mlp.c_fc.bias',
    'blk.{i}.ffn_down.weight': Changed(f'{GPT2_LAYER}.mlp.c_proj.weight', turned),
    'blk.{i}.ffn_down.bias': f'{GPT2_LAYER}.mlp.c_proj.bias',
}
LATENT: dict[str, Entry] = {
    'blk.{i}.attn_q': f'{LAYER}.self_attn.q_proj',
    'blk.{i}.attn_q_a': f'{LAYER}.self_attn.q_a_proj',
    'blk.{i}.attn_q_a_norm': f'{LAYER}.self_attn.q_a_layernorm',
    'blk.{i}.attn_q_b': f'{LAYER}.self_attn.q_b_proj',
    'blk.{i}.attn_kv_a_mqa': f'{LAYER}.self_attn.kv_a_proj_with_mqa',
    'blk.{i}.attn_kv_a_norm': f'{LAYER}.self_attn.kv_a_layernorm',
    'blk.{i}.attn_kv_b': f'{LAYER}.self_attn.kv_b_proj',
    'blk.{i}.attn_k_b.weight': Pair(
        f'{LAYER}.self_attn.kv_b_proj.weight', 'blk.{i}.attn_v_b.weight', Unsplit, same_latent
    ),
    'blk.{i}.attn_output': f'{LAYER}.self_attn.o_proj',
}
AHEAD: dict[str, Entry] = {
    'blk.{i}.post_attention_norm': f'{LAYER}.post_attention_layernorm',
    'blk.{i}.nextn.eh_proj': f'{LAYER}.eh_proj',
    'blk.{i}.nextn.embed_tokens': f'{LAYER}.embed_tokens',
    'blk.{i}.nextn.enorm': f'{LAYER}.enorm',
    'blk.{i}.nextn.hnorm': f'{LAYER}.hnorm',
    'blk.{i}.nextn.shared_head_head': f'{LAYER}.shared_head.head',
    'blk.{i}.nextn.shared_head_norm': f'{LAYER}.shared_head.norm',
}
GEMMA = OUTER | ATTENTION | MLP | GEMMA_NORMS
LLAMA = OUTER | NORMS | ATTENTION | MLP
ARCHITECTURES = {
    one.name: one
    for one in (
        Architecture('llama', llama, LLAMA | REGROUPED | MIXTRAL, (ROPE_FREQS,)),
        Architecture('qwen2', qwen2, LLAMA, (ROPE_FREQS,)),
        Architecture('qwen3', qwen3, LLAMA | QK_NORMS, (ROPE_FREQS,)),
        Architecture('qwen3moe', qwen3moe, OUTER | NORMS | ATTENTION | QK_NORMS | EXPERTS, (ROPE_FREQS,)),
        Architecture('gemma2', gemma2, GEMMA, (ROPE_FREQS,)),
        Architecture('gemma3', gemma3, GEMMA | GEMMA_QK_NORMS, (ROPE_FREQS,)),
        Architecture('gpt-oss', gpt_oss, OUTER | NORMS | ATTENTION | GPT_OSS, (ROPE_FREQS,)),
        Architecture('phi3', phi3, OUTER | NORMS | PHI3, (r'rope_factors_(long|short)\.weight',)),
        Architecture('gpt2', gpt2, GPT2),
        Architecture('deepseek2', deepseek2, OUTER | NORMS | LATENT | MLP | EXPERTS | SHARED, (ROPE_FREQS,)),
        Architecture(
            'glm4moe',
            glm4moe,
            LLAMA | QK_NORMS | EXPERTS | SHARED | AHEAD,
            (ROPE_FREQS,),
            (r'blk\.\d+\.nextn\.(embed_tokens|shared_head_head)\.weight',),
        ),
    )
}
