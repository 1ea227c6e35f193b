"""GGUF files as llama.cpp's converters write them: the format from its description, names from the package `gguf`.

`of_folder` takes a published config and tensors through the steps of the converter of that model: its keys, its names, and what
it does to tensors on the way.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np

TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(jnp.bfloat16): 30}
LETTERS = {'u8': (0, 'B'), 'i8': (1, 'b'), 'u16': (2, 'H'), 'i16': (3, 'h'), 'u32': (4, 'I'), 'i32': (5, 'i')}
LETTERS |= {'f32': (6, 'f'), 'bool': (7, '?'), 'u64': (10, 'Q'), 'i64': (11, 'q'), 'f64': (12, 'd')}


class Packed:
    """A tensor in blocks: uint8 [..., bytes], of a type by its number."""

    def __init__(self, raw: np.ndarray, kind: int, numbers: int, size: int):
        self.raw, self.kind = raw, kind
        self.shape = (*raw.shape[:-1], raw.shape[-1] // size * numbers)


class Typed:
    """A value of a type by its name, such as u16."""

    def __init__(self, kind: str, value: Any):
        self.kind, self.value = kind, value


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack('<Q', len(raw)) + raw


def value(of: Any) -> bytes:
    """A value with its type: whole numbers as u32 and others as f32, as converters write them, unless `Typed`."""
    if isinstance(of, Typed):
        number, letter = LETTERS[of.kind]
        return struct.pack(f'<I{letter}', number, of.value)
    if isinstance(of, bool):
        return value(Typed('bool', of))
    if isinstance(of, int):
        return value(Typed('u32', of))
    if isinstance(of, float):
        return value(Typed('f32', of))
    if isinstance(of, str | bytes):
        return struct.pack('<I', 8) + text(of)
    inner = [value(one) for one in of]
    kind = inner[0][:4] if inner else struct.pack('<I', 4)
    return struct.pack('<I', 9) + kind + struct.pack('<Q', len(inner)) + b''.join(one[4:] for one in inner)


def entries(tensors: Mapping[str, Any], alignment: int = 32) -> tuple[bytes, bytes]:
    """What a header says of tensors, and their numbers."""
    head = data = b''
    for name, x in tensors.items():
        raw, kind = (x.raw, x.kind) if isinstance(x, Packed) else (x, TYPES[x.dtype])
        head += text(name) + struct.pack(f'<I{len(x.shape)}QIQ', len(x.shape), *x.shape[::-1], kind, len(data))
        data += raw.tobytes()
        data += bytes(-len(data) % alignment)
    return head, data


def content(values: Mapping[str, Any], tensors: Mapping[str, Any], made: tuple[bytes, bytes] | None = None) -> bytes:
    """A file of keys and tensors; `made` are the `entries` of these."""
    infos, data = made or entries(tensors)
    head = b'GGUF' + struct.pack('<IQQ', 3, len(tensors), len(values))
    head += b''.join(text(key) + value(one) for key, one in values.items()) + infos
    return head + bytes(-len(head) % 32) + data


def write(path: Path, values: Mapping[str, Any], tensors: Mapping[str, Any]) -> Path:
    path.write_bytes(content(values, tensors))
    return path


# A published model's keys and tensors --------------------------------------------------------------------------------------

# By model_type.
ARCHITECTURES = {
    'llama': 'llama',
    'mistral': 'llama',
    'mixtral': 'llama',
    'qwen2': 'qwen2',
    'qwen3': 'qwen3',
    'qwen3_moe': 'qwen3moe',
    'gemma2': 'gemma2',
    'gemma3_text': 'gemma3',
    'gpt_oss': 'gpt-oss',
    'phi3': 'phi3',
    'gpt2': 'gpt2',
    'deepseek_v2': 'deepseek2',
    'deepseek_v3': 'deepseek2',
    'glm4_moe': 'glm4moe',
}
HAS_HEADLESS = ('gemma2', 'gpt2')  # whose converter has no name for a head


def of_folder(config: dict[str, Any], found: Mapping[str, np.ndarray], split: bool = True) -> tuple[dict, dict]:
    """The keys and the tensors of a file of a model; `split` whether latent keys and values are two tensors."""
    arch = ARCHITECTURES[config['model_type']]
    said = Said(config, arch, split)
    return said.keys(), said.tensors(found)


class Said:
    def __init__(self, config: dict[str, Any], arch: str, split: bool):
        self.config, self.arch, self.split = config, arch, split
        self.layers = self('num_hidden_layers', 'n_layer')
        self.heads = self('num_attention_heads', 'n_head')
        self.width = self('hidden_size', 'n_embd')
        rope = dict(config.get('rope_parameters') or config.get('rope_scaling') or {})
        if 'full_attention' not in rope:
            if 'rope_local_base_freq' in config:
                rope['sliding_attention'] = {'rope_theta': config['rope_local_base_freq']}
            if 'rope_theta' in config:
                rope.setdefault('rope_theta', config['rope_theta'])
            if 'type' in rope:
                rope.setdefault('rope_type', rope['type'])
            for name in ('partial_rotary_factor', 'original_max_position_embeddings'):
                if name in config:
                    rope.setdefault(name, config[name])
        self.rope = rope

    def __call__(self, *names: str) -> Any:
        return next((self.config[name] for name in names if self.config.get(name) is not None), None)

    def keys(self) -> dict[str, Any]:
        own = self.base() | getattr(self, self.arch.replace('-', '_'))()
        own = {f'{self.arch}.{key}': one for key, one in own.items() if one is not None}
        return {'general.architecture': self.arch, 'general.type': 'model', 'general.name': 'tiny'} | own

    def base(self) -> dict[str, Any]:
        """What every converter writes."""
        rope = self.rope.get('full_attention', self.rope)
        keys: dict[str, Any] = {
            'block_count': self.layers,
            'context_length': self('max_position_embeddings', 'n_ctx', 'n_positions'),
            'embedding_length': self.width,
            'feed_forward_length': self('intermediate_size', 'n_inner'),
            'attention.head_count': self.heads,
            'attention.head_count_kv': self('num_key_value_heads'),
            'attention.layer_norm_rms_epsilon': self('rms_norm_eps'),
            'attention.layer_norm_epsilon': self('layer_norm_epsilon'),
            'rope.freq_base': rope.get('rope_theta') and float(rope['rope_theta']),
            'rope.freq_base_swa': (self.rope.get('sliding_attention') or {}).get('rope_theta'),
            'expert_count': self('num_local_experts', 'num_experts', 'n_routed_experts'),
            'expert_used_count': self('num_experts_per_tok'),
            'expert_group_count': self('n_group'),
            'expert_group_used_count': self('topk_group'),
            'attention.key_length': self('head_dim'),
            'attention.value_length': self('head_dim'),
        }
        if keys['rope.freq_base_swa'] is not None:
            keys['rope.freq_base_swa'] = float(keys['rope.freq_base_swa'])
        if self('scoring_func'):
            keys['expert_gating_func'] = {'softmax': 1, 'sigmoid': 2}[self('scoring_func')]
        if rope.get('rope_type') in ('linear', 'yarn'):
            keys['rope.scaling.type'] = rope['rope_type']
            keys['rope.scaling.factor'] = float(rope['factor'])
        if rope.get('rope_type') == 'yarn':
            keys['rope.scaling.original_context_length'] = rope['original_max_position_embeddings']
            for key, field in (('attn_factor', 'attention_factor'), ('beta_fast',) * 2, ('beta_slow',) * 2):
                keys[f'rope.scaling.yarn_{key}'] = float(rope[field]) if field in rope else None
        if rope.get('rope_type') in ('longrope', 'su'):
            keys['rope.scaling.type'] = 'longrope'
        return keys

    @property
    def head_dim(self) -> int:
        return self('head_dim') or self.width // self.heads

    def llama(self) -> dict[str, Any]:
        return {'vocab_size': self('vocab_size'), 'rope.dimension_count': self.head_dim}

    def qwen2(self) -> dict[str, Any]:
        return {}

    qwen3 = qwen2

    def qwen3moe(self) -> dict[str, Any]:
        return {'expert_feed_forward_length': self('moe_intermediate_size')}

    def gemma2(self) -> dict[str, Any]:
        return {
            'attention.sliding_window': self('sliding_window'),
            'attn_logit_softcapping': self('attn_logit_softcapping'),
            'final_logit_softcapping': self('final_logit_softcapping'),
            'rope.freq_base': None,  # the published model's, which is llama.cpp's default
        }

    def gemma3(self) -> dict[str, Any]:
        types = self('layer_types')
        return {
            'attention.sliding_window': self('sliding_window'),
            'final_logit_softcapping': self('final_logit_softcapping'),
            'attention.sliding_window_pattern': types and [kind == 'sliding_attention' for kind in types],
        }

    def gpt_oss(self) -> dict[str, Any]:
        return {
            'attention.sliding_window': self('sliding_window'),
            'expert_feed_forward_length': self('intermediate_size'),
        }

    @property
    def turning(self) -> int:
        """Dims of a head of Phi-3 that turn."""
        return int(self.rope.get('partial_rotary_factor', 1.0) * self.width) // self.heads

    def phi3(self) -> dict[str, Any]:
        keys: dict[str, Any] = {
            'rope.scaling.type': None,  # its converter does not say it
            'rope.dimension_count': self.turning,
            'rope.scaling.original_context_length': self.rope['original_max_position_embeddings'],
            'rope.freq_base': float(self.rope.get('rope_theta', 1e4)),
            'attention.sliding_window': self('sliding_window') or 0,
        }
        if 'long_factor' in self.rope:
            grown = self('max_position_embeddings') / self.rope['original_max_position_embeddings']
            old = self.rope['original_max_position_embeddings']
            keys['rope.scaling.attn_factor'] = float(np.sqrt(1 + np.log(grown) / np.log(old))) if grown > 1 else 1.0
        return keys

    def gpt2(self) -> dict[str, Any]:
        return {
            'feed_forward_length': 4 * self.width,
            'attention.layer_norm_epsilon': self('layer_norm_epsilon') or 1e-5,
        }

    def deepseek2(self) -> dict[str, Any]:
        rank, turning, values = (self(name) for name in ('kv_lora_rank', 'qk_rope_head_dim', 'v_head_dim'))
        width = self('qk_nope_head_dim') + turning
        keys: dict[str, Any] = {
            'leading_dense_block_count': self('first_k_dense_replace'),
            'vocab_size': self('vocab_size'),
            'attention.q_lora_rank': self('q_lora_rank'),
            'attention.kv_lora_rank': rank,
            'attention.key_length': rank + turning if self.split else width,
            'attention.value_length': rank if self.split else values,
            'expert_feed_forward_length': self('moe_intermediate_size'),
            'expert_shared_count': self('n_shared_experts'),
            'expert_weights_scale': self('routed_scaling_factor'),
            'expert_weights_norm': self('norm_topk_prob') or None,
            'rope.dimension_count': turning,
        }
        if self.split:
            keys |= {
                'attention.head_count_kv': 1,
                'attention.key_length_mla': width,
                'attention.value_length_mla': values,
            }
        if 'mscale_all_dim' in self.rope:
            keys['rope.scaling.yarn_log_multiplier'] = 0.1 * self.rope['mscale_all_dim']
        return keys

    def glm4moe(self) -> dict[str, Any]:
        return {
            'block_count': self.layers + self('num_nextn_predict_layers'),
            'rope.dimension_count': int(self.head_dim * self.rope.get('partial_rotary_factor', 0.5)),
            'expert_feed_forward_length': self('moe_intermediate_size'),
            'expert_shared_count': self('n_shared_experts'),
            'leading_dense_block_count': self('first_k_dense_replace'),
            'expert_gating_func': 2,
            'expert_weights_scale': self('routed_scaling_factor'),
            'expert_weights_norm': self('norm_topk_prob'),
            'nextn_predict_layers': self('num_nextn_predict_layers'),
        }

    # Tensors ---------------------------------------------------------------------------------------------------------------

    def tensors(self, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        names = gguf.get_tensor_name_map(kinds[self.arch], self.layers + (self('num_nextn_predict_layers') or 0))
        out = dict(self.extra())
        for name, x in self.stacked(found).items():
            for published, y in self.changed(name, x):
                new = names.get_name(published, try_suffixes=('.weight', '.bias'))
                assert new is not None, published
                assert new not in out, new
                out[new] = np.ascontiguousarray(y)
        return out

    def stacked(self, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Experts' matrices as one tensor."""
        out: dict[str, Any] = {}
        for name, x in found.items():
            before, among, after = name.partition('.experts.')
            number, _, rest = after.partition('.')
            if among and number.isdigit():
                out.setdefault(f'{before}.experts.{rest}', []).append(x)
            else:
                out[name] = x
        return {name: np.stack(x) if isinstance(x, list) else x for name, x in out.items()}

    def changed(self, name: str, x: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """A tensor as the converter of its model gives it on, under a name that the map knows."""
        if self.arch == 'llama' and 'q_proj' in name:
            x = self.pairs(x, self.heads)
        if self.arch == 'llama' and 'k_proj' in name:
            x = self.pairs(x, self('num_key_value_heads') or self.heads)
        if self.arch.startswith('gemma') and name.endswith('norm.weight'):
            x = x + np.float32(1)
        if self.arch == 'gpt2' and name.endswith(('.c_attn.weight', '.c_proj.weight', '.c_fc.weight')):
            x = x.T
        if name.endswith('e_score_correction_bias'):
            name = name.replace('e_score_correction_bias', 'e_score_correction.bias')
        if self.arch == 'gpt-oss':
            return self.of_gpt_oss(name, x)
        if self.arch == 'deepseek2' and self.split and name.endswith('kv_b_proj.weight'):
            plain = self('qk_nope_head_dim')
            both = x.reshape(self.heads, plain + self('v_head_dim'), x.shape[-1])
            return [
                (name.replace('kv_b_proj', 'k_b_proj'), both[:, :plain].swapaxes(1, 2)),
                (name.replace('kv_b_proj', 'v_b_proj'), both[:, plain:]),
            ]
        return [(name, x)]

    def of_gpt_oss(self, name: str, x: np.ndarray) -> list[tuple[str, np.ndarray]]:
        if name.endswith('sinks'):
            return [(f'{name}.weight', x)]
        if name.endswith('down_proj_bias'):
            return [(name.replace('down_proj_bias', 'down_proj.bias'), x)]
        if name.endswith('down_proj'):
            return [(f'{name}.weight', x.swapaxes(-1, -2))]
        if name.endswith('gate_up_proj_bias'):
            of = lambda part: name.replace('gate_up_proj_bias', f'{part}_proj.bias')
            return [(of('gate'), x[..., ::2]), (of('up'), x[..., 1::2])]
        if name.endswith('gate_up_proj'):
            of = lambda part: name.replace('gate_up_proj', f'{part}_proj.weight')
            x = x.swapaxes(-1, -2)
            return [(of('gate'), x[:, ::2]), (of('up'), x[:, 1::2])]
        return [(name, x)]

    def pairs(self, x: np.ndarray, heads: int) -> np.ndarray:
        """Rows whose pairs for the rotation are half a head apart, as neighbours."""
        return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    def extra(self) -> dict[str, np.ndarray]:
        """Tensors that stand for fields of the config."""
        if self.arch == 'phi3' and 'long_factor' in self.rope:
            return {
                f'rope_factors_{kind}.weight': np.array(self.rope[f'{kind}_factor'], np.float32)
                for kind in ('long', 'short')
            }
        if self.rope.get('rope_type') != 'llama3':
            return {}
        low, high = self.rope['low_freq_factor'], self.rope['high_freq_factor']
        old, factor = self.rope['original_max_position_embeddings'], self.rope['factor']
        factors = []
        for i in range(0, self.head_dim, 2):
            wave = 2 * np.pi * self.rope['rope_theta'] ** (i / self.head_dim)
            if wave < old / high:
                factors.append(1)
            elif wave > old / low:
                factors.append(factor)
            else:
                smooth = (old / wave - low) / (high - low)
                factors.append(1 / ((1 - smooth) / factor + smooth))
        return {'rope_freqs.weight': np.array(factors, np.float32)}
