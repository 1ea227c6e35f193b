"""The architectures of GGUF files: what gives the fields of their config.json, and what their tensors are called.

Each `Architecture` has a function from a header's keys to the fields (hub/gguf/fields.py), and a table from the names of its
tensors to those of a published folder. Names and transforms are those of llama.cpp's converters.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from weft.hub.gguf.blocks import Numbers
from weft.hub.gguf.fields import deepseek2, gemma2, gemma3, glm4moe, gpt2, gpt_oss, llama, phi3, qwen2, qwen3, qwen3moe
from weft.hub.gguf.keys import Config, Keys
from weft.hub.gguf.sources import Regrouped, Shifted, Turned, Undone, Unsplit, Woven


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
    undo: Callable[[Numbers, Numbers, str, str], Undone]  # of both tensors and their names in the file


Entry = str | Changed | Experts | Pair


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How files of an architecture are read."""

    name: str  # in general.architecture
    config: Callable[[Keys], dict[str, Any]]  # the fields of config.json by the keys
    # Names in a file, mostly without `.weight` and `.bias`, to those in a published folder; {i} is the layer, {e} the expert.
    names: Mapping[str, Entry]
    # Patterns of tensors that `config` has read, or that follow from it.
    consumed: tuple[str, ...] = (r'rope_freqs\.weight',)
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
            raise numbers.file.error(
                f'tensor {name} has {numbers.shape[0]} rows, which are no pairs in each of {heads} heads'
            )
        return Regrouped(numbers, heads)

    return undo


def turned(numbers: Numbers, config: Config, name: str) -> Undone:
    if len(numbers.shape) < 2:
        raise numbers.file.error(f'tensor {name} is {list(numbers.shape)} and must be a matrix')
    return Turned(numbers)


def shifted(numbers: Numbers, config: Config, name: str) -> Undone:
    return Shifted(numbers)


def woven(first: Numbers, second: Numbers, name: str, other: str) -> Woven:
    if first.shape != second.shape:
        raise first.file.error(
            f'tensors {name} {list(first.shape)} and {other} {list(second.shape)} must have one shape'
        )
    return Woven(first, second, turned=name.endswith('.weight'))


def unsplit(first: Numbers, second: Numbers, name: str, other: str) -> Unsplit:
    fits = len(first.shape) == len(second.shape) == 3 and first.shape[:2] == (second.shape[0], second.shape[2])
    if not fits:
        raise first.file.error(
            f'tensors {name} {list(first.shape)} and {other} {list(second.shape)} do not fit each other: they '
            'must be [heads, rank, keys] and [heads, values, rank]'
        )
    return Unsplit(first, second)


LAYER = 'model.layers.{i}'


def layer(parent: str, entry: Callable[[str], Entry] = str, /, **names: str) -> dict[str, Entry]:
    """Tensors of each layer, by their names in a file: those of `parent` in a published layer, each as an `entry`."""
    return {f'blk.{{i}}.{name}': entry(f'{LAYER}{parent}.{published}') for name, published in names.items()}


shifted_norm = functools.partial(Changed, undo=shifted)
OUTER: dict[str, Entry] = {'token_embd': 'model.embed_tokens', 'output_norm': 'model.norm', 'output': 'lm_head'}
ATTENTION = layer('.self_attn', attn_q='q_proj', attn_k='k_proj', attn_v='v_proj', attn_output='o_proj')
QK_NORMS = layer('.self_attn', attn_q_norm='q_norm', attn_k_norm='k_norm')
NORMS = layer('', attn_norm='input_layernorm', ffn_norm='post_attention_layernorm')
MLP = layer('.mlp', ffn_gate='gate_proj', ffn_up='up_proj', ffn_down='down_proj')
EXPERTS = layer('.mlp', ffn_gate_inp='gate') | layer(
    '.mlp.experts.{e}', Experts, ffn_gate_exps='gate_proj', ffn_up_exps='up_proj', ffn_down_exps='down_proj'
)
SHARED = {'blk.{i}.exp_probs_b.bias': f'{LAYER}.mlp.gate.e_score_correction_bias'} | layer(
    '.mlp.shared_experts', ffn_gate_shexp='gate_proj', ffn_up_shexp='up_proj', ffn_down_shexp='down_proj'
)
MIXTRAL = {
    **layer('.block_sparse_moe', ffn_gate_inp='gate'),
    **layer('.block_sparse_moe.experts.{e}', Experts, ffn_gate_exps='w1', ffn_down_exps='w2', ffn_up_exps='w3'),
    # Files of early 2024 have a tensor for each expert.
    **layer('.block_sparse_moe.experts.{e}', **{'ffn_gate.{e}': 'w1', 'ffn_down.{e}': 'w2', 'ffn_up.{e}': 'w3'}),
}
REGROUPED: dict[str, Entry] = {
    'blk.{i}.attn_q': Changed(f'{LAYER}.self_attn.q_proj', regrouped('num_attention_heads')),
    'blk.{i}.attn_k': Changed(f'{LAYER}.self_attn.k_proj', regrouped('num_key_value_heads')),
}
GEMMA_NORMS = {'output_norm': shifted_norm('model.norm')} | layer(
    '',
    shifted_norm,
    attn_norm='input_layernorm',
    post_attention_norm='post_attention_layernorm',
    ffn_norm='pre_feedforward_layernorm',
    post_ffw_norm='post_feedforward_layernorm',
)
GEMMA_QK_NORMS = layer('.self_attn', shifted_norm, attn_q_norm='q_norm', attn_k_norm='k_norm')
GPT_OSS: dict[str, Entry] = {
    **layer('', post_attention_norm='post_attention_layernorm'),
    **layer('.self_attn', **{'attn_sinks.weight': 'sinks', 'attn_sinks': 'sinks'}),
    **layer('.mlp', ffn_gate_inp='router'),
    'blk.{i}.ffn_gate_exps.weight': Pair(f'{LAYER}.mlp.experts.gate_up_proj', 'blk.{i}.ffn_up_exps.weight', woven),
    'blk.{i}.ffn_gate_exps.bias': Pair(f'{LAYER}.mlp.experts.gate_up_proj_bias', 'blk.{i}.ffn_up_exps.bias', woven),
    'blk.{i}.ffn_down_exps.weight': Changed(f'{LAYER}.mlp.experts.down_proj', turned),
    'blk.{i}.ffn_down_exps.bias': f'{LAYER}.mlp.experts.down_proj_bias',
}
PHI3 = {
    **layer('.self_attn', attn_qkv='qkv_proj', attn_output='o_proj'),
    **layer('.mlp', ffn_up='gate_up_proj', ffn_down='down_proj'),
}
GPT2: dict[str, Entry] = {
    'token_embd': 'transformer.wte',
    'position_embd': 'transformer.wpe',
    'output_norm': 'transformer.ln_f',
    'output': 'lm_head',
    'blk.{i}.attn_norm': 'transformer.h.{i}.ln_1',
    'blk.{i}.attn_qkv.weight': Changed('transformer.h.{i}.attn.c_attn.weight', turned),
    'blk.{i}.attn_qkv.bias': 'transformer.h.{i}.attn.c_attn.bias',
    'blk.{i}.attn_output.weight': Changed('transformer.h.{i}.attn.c_proj.weight', turned),
    'blk.{i}.attn_output.bias': 'transformer.h.{i}.attn.c_proj.bias',
    'blk.{i}.ffn_norm': 'transformer.h.{i}.ln_2',
    'blk.{i}.ffn_up.weight': Changed('transformer.h.{i}.mlp.c_fc.weight', turned),
    'blk.{i}.ffn_up.bias': 'transformer.h.{i}.mlp.c_fc.bias',
    'blk.{i}.ffn_down.weight': Changed('transformer.h.{i}.mlp.c_proj.weight', turned),
    'blk.{i}.ffn_down.bias': 'transformer.h.{i}.mlp.c_proj.bias',
}
LATENT = layer(
    '.self_attn',
    attn_q='q_proj',
    attn_q_a='q_a_proj',
    attn_q_a_norm='q_a_layernorm',
    attn_q_b='q_b_proj',
    attn_kv_a_mqa='kv_a_proj_with_mqa',
    attn_kv_a_norm='kv_a_layernorm',
    attn_kv_b='kv_b_proj',
    attn_output='o_proj',
) | {'blk.{i}.attn_k_b.weight': Pair(f'{LAYER}.self_attn.kv_b_proj.weight', 'blk.{i}.attn_v_b.weight', unsplit)}
AHEAD = layer('', post_attention_norm='post_attention_layernorm') | {
    f'blk.{{i}}.nextn.{name}': f'{LAYER}.{name.replace("head_", "head.")}'
    for name in ('eh_proj', 'embed_tokens', 'enorm', 'hnorm', 'shared_head_head', 'shared_head_norm')
}
GEMMA = OUTER | ATTENTION | MLP | GEMMA_NORMS
LLAMA = OUTER | NORMS | ATTENTION | MLP
ARCHITECTURES = {
    one.name: one
    for one in (
        Architecture('llama', llama, LLAMA | REGROUPED | MIXTRAL),
        Architecture('qwen2', qwen2, LLAMA),
        Architecture('qwen3', qwen3, LLAMA | QK_NORMS),
        Architecture('qwen3moe', qwen3moe, OUTER | NORMS | ATTENTION | QK_NORMS | EXPERTS),
        Architecture('gemma2', gemma2, GEMMA),
        Architecture('gemma3', gemma3, GEMMA | GEMMA_QK_NORMS),
        Architecture('gpt-oss', gpt_oss, OUTER | NORMS | ATTENTION | GPT_OSS),
        Architecture('phi3', phi3, OUTER | NORMS | PHI3, (r'rope_factors_(long|short)\.weight',)),
        Architecture('gpt2', gpt2, GPT2, consumed=()),
        Architecture('deepseek2', deepseek2, OUTER | NORMS | LATENT | MLP | EXPERTS | SHARED),
        Architecture(
            'glm4moe',
            glm4moe,
            LLAMA | QK_NORMS | EXPERTS | SHARED | AHEAD,
            copies=(r'blk\.\d+\.nextn\.(embed_tokens|shared_head_head)\.weight',),
        ),
    )
}
