"""Marian (Junczys-Dowmunt et al. 2018, arXiv:1804.00344): the encoder–decoder of "Attention Is All You Need".

Norms after each part, sinusoidal positions, one embedding for both sides and the head (Vaswani et al. 2017, arXiv:1706.03762).
"""

import math
from typing import Any

import numpy as np

from weft.hub.families import AsRow, Family, Fields, layer_norm, linear
from weft.hub.families.fields import Table, read_fields, write_fields
from weft.hub.families.gpt2 import BIASES
from weft.model.config import ModelConfig, model_of
from weft.model.layers.positions import sinusoids
from weft.runtime.errors import UserError

# By published name; the first of two is the one that is written.
ACTIVATIONS = {'gelu': 'gelu_exact', 'swish': 'silu', 'silu': 'silu', 'relu': 'relu', 'gelu_new': 'gelu'}


def attention(published: str, stack: str, part: str) -> dict[str, str]:
    ours = stack + part
    return {
        **linear(f'{published}.q_proj', f'{ours}.q'),
        **linear(f'{published}.k_proj', f'{ours}.k'),
        **linear(f'{published}.v_proj', f'{ours}.v'),
        **linear(f'{published}.out_proj', f'{ours}.o', 'w_OI'),
        **layer_norm(f'{published}_layer_norm', f'{ours}_norm'),
    }


def mlp(published: str, stack: str) -> dict[str, str]:
    return {
        **linear(f'{published}.fc1', f'{stack}mlp.up'),
        **linear(f'{published}.fc2', f'{stack}mlp.down', 'w_OI'),
        **layer_norm(f'{published}.final_layer_norm', f'{stack}mlp_norm'),
    }


NAMES: dict[str, str | AsRow] = {
    'model.shared.weight': 'embed_VD',
    'final_logits_bias': AsRow('head_bias_V'),
    **attention('model.encoder.layers.{i}.self_attn', 'encoder.layers.', 'attention'),
    **mlp('model.encoder.layers.{i}', 'encoder.layers.'),
    **attention('model.decoder.layers.{i}.self_attn', '', 'attention'),
    **attention('model.decoder.layers.{i}.encoder_attn', '', 'cross'),
    **mlp('model.decoder.layers.{i}', ''),
}
OF_TRAINING = ('activation_dropout', 'classif_dropout', 'decoder_layerdrop', 'encoder_layerdrop', 'init_std')
OF_OTHERS = ('add_bias_logits', 'extra_pos_embeddings', 'force_bos_token_to_be_generated')
FIELDS: Table = {
    'vocab_size': ('vocabulary', 58101),
    'd_model': ('model_dim', 1024),
    'encoder_layers': ('encoder.layers', 12),
    'encoder_attention_heads': ('encoder.heads', 16),
    'encoder_ffn_dim': ('encoder.mlp_dim', 4096),
    'decoder_layers': ('layers', 12),
    'decoder_attention_heads': ('attention.heads', 16),
    'decoder_ffn_dim': ('mlp.dim', 4096),
    'activation_function': ('mlp.activation', ACTIVATIONS),
    'max_position_embeddings': ('positions.max', 1024),
}


def read(f: Fields) -> ModelConfig:
    always = {'is_encoder_decoder': True, 'share_encoder_decoder_embeddings': True, 'tie_word_embeddings': True}
    # Of the code that these configs were first written for.
    always |= {'static_position_embeddings': True, 'normalize_before': False, 'normalize_embedding': False}
    for name, value in (always | {'add_final_layer_norm': False}).items():
        f.only(name, value)
    f.skip(*OF_TRAINING, *OF_OTHERS, 'num_hidden_layers')  # the last is encoder_layers
    fields = read_fields(f, FIELDS)
    f.only('decoder_vocab_size', fields['vocabulary'])
    width = fields['model_dim']
    return model_of(
        fields
        | BIASES
        | {
            'norm.order': 'post',
            'positions.kind': 'sinusoidal',
            'encoder.start_token': f('decoder_start_token_id', 58100),
            'encoder.kv_heads': fields['encoder.heads'],
            'encoder.head_dim': width // fields['encoder.heads'],
            'embedding.scale': math.sqrt(width) if f('scale_embedding', False) else 1.0,
            'head.bias': True,
        }
    )


def write(c: ModelConfig) -> dict[str, Any]:
    if c.encoder is None:
        raise UserError('model.encoder is null: Marian has one')
    e = c.of_encoder
    return {
        'model_type': 'marian',
        'is_encoder_decoder': True,
        'vocab_size': c.vocabulary,
        'decoder_vocab_size': c.vocabulary,
        **write_fields(c, FIELDS),
        'encoder_attention_heads': e.attention.heads,
        'encoder_ffn_dim': e.mlp.dim,
        'scale_embedding': c.embedding.scale != 1,
        'decoder_start_token_id': c.encoder.start_token,
        'pad_token_id': c.encoder.start_token,
    }


def positions(c: ModelConfig) -> np.ndarray:
    return sinusoids(c).astype(np.float32)


FAMILY = Family(
    'marian',
    ('MarianMTModel',),
    read,
    write,
    NAMES,
    fixed={'model.encoder.embed_positions.weight': positions, 'model.decoder.embed_positions.weight': positions},
    tied={
        'model.encoder.embed_tokens.weight': 'model.shared.weight',
        'model.decoder.embed_tokens.weight': 'model.shared.weight',
        'lm_head.weight': 'model.shared.weight',
    },
)
