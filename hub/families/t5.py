"""T5 v1.1 and T5 (Raffel et al. 2020, arXiv:1910.10683; Shazeer 2020, arXiv:2002.05202): an encoder–decoder.

Positions are biases on scores by distance, which a stack's layers share; scores are not scaled. v1.1 has gated units and a head
of its own; before it one relu and the embedding as the head, on activations scaled down.
"""

from typing import Any

from weft.hub.families import Family, Fields, Where, head_of
from weft.hub.families.fields import Table, read_fields, write_fields
from weft.model.config import ModelConfig, model_of
from weft.runtime.errors import UserError

# By published name; the first of two is the one that is written.
ACTIVATIONS: dict[str, Any] = {
    'gated-gelu': 'geglu',
    'gated-gelu_new': 'geglu',
    'gated-silu': 'swiglu',
    'relu': 'relu',
    'gelu': 'gelu_exact',
    'gelu_new': 'gelu',
    'silu': 'silu',
}
UP, GATED = 'mlp.up.w_IO', 'mlp.gate.w_IO'


def attention(published: str, ours: str) -> dict[str, str]:
    return {
        f'{published}.q.weight': f'{ours}.q.w_IO',
        f'{published}.k.weight': f'{ours}.k.w_IO',
        f'{published}.v.weight': f'{ours}.v.w_IO',
        f'{published}.o.weight': f'{ours}.o.w_OI',
    }


def mlp(published: str, stack: str) -> dict[str, str | Where]:
    return {
        f'{published}.wi.weight': Where(stack + UP, stack + GATED, has=False),
        f'{published}.wi_0.weight': stack + GATED,
        f'{published}.wi_1.weight': Where(stack + UP, stack + GATED, has=True),
        f'{published}.wo.weight': f'{stack}mlp.down.w_OI',
    }


OUTER = {
    'shared.weight': 'embed_VD',
    'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight': 'encoder.relative_RN',
    'encoder.final_layer_norm.weight': 'encoder.norm.scale_D',
    'decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight': 'relative_RN',
    'decoder.final_layer_norm.weight': 'norm.scale_D',
    'lm_head.weight': 'head_DV',
}
ENCODER = {
    **attention('encoder.block.{i}.layer.0.SelfAttention', 'encoder.layers.attention'),
    'encoder.block.{i}.layer.0.layer_norm.weight': 'encoder.layers.attention_norm.scale_D',
    **mlp('encoder.block.{i}.layer.1.DenseReluDense', 'encoder.layers.'),
    'encoder.block.{i}.layer.1.layer_norm.weight': 'encoder.layers.mlp_norm.scale_D',
}
DECODER = {
    **attention('decoder.block.{i}.layer.0.SelfAttention', 'attention'),
    'decoder.block.{i}.layer.0.layer_norm.weight': 'attention_norm.scale_D',
    **attention('decoder.block.{i}.layer.1.EncDecAttention', 'cross'),
    'decoder.block.{i}.layer.1.layer_norm.weight': 'cross_norm.scale_D',
    **mlp('decoder.block.{i}.layer.2.DenseReluDense', ''),
    'decoder.block.{i}.layer.2.layer_norm.weight': 'mlp_norm.scale_D',
}
FIELDS: Table = {
    'vocab_size': ('vocabulary', 32128),
    'num_layers': ('encoder.layers', 6),
    'num_decoder_layers': ('layers', None),
    'd_model': ('model_dim', 512),
    'num_heads': ('attention.heads', 8),
    'd_kv': ('attention.head_dim', 64),
    'd_ff': ('mlp.dim', 2048),
    'feed_forward_proj': ('mlp.activation', ACTIVATIONS),
    'layer_norm_epsilon': ('norm.epsilon', 1e-6),
    'relative_attention_num_buckets': ('positions.buckets', 32),
    'relative_attention_max_distance': ('positions.max_distance', 128),
}


def read(f: Fields) -> ModelConfig:
    f.only('is_encoder_decoder', True)
    f.skip('is_gated_act', 'dense_act_fn')  # follow from feed_forward_proj
    f.skip('n_positions', 'output_past')  # of other models' code, which T5's does not read
    # transformers 5 writes tie_word_embeddings true of every T5, and in scale_decoder_outputs what it was.
    tied = f('tie_word_embeddings', True)
    scaled = f('scale_decoder_outputs', tied)
    fields = read_fields(f, FIELDS, feed_forward_proj='relu')
    return model_of(
        fields
        | {
            'layers': fields['layers'] or fields['encoder.layers'],
            'attention.scale': 1.0,
            'positions.kind': 'relative',
            'encoder.start_token': f('decoder_start_token_id', f('pad_token_id', 0)),
            'embedding.tied': tied and scaled,
            'head.scale': fields['model_dim'] ** -0.5 if scaled else 1.0,
        }
    )


def write(c: ModelConfig) -> dict[str, Any]:
    if c.encoder is None:
        raise UserError('model.encoder is null: T5 has one')
    start = c.encoder.start_token or 0
    return {
        'model_type': 't5',
        'is_encoder_decoder': True,
        **write_fields(c, FIELDS),
        'tie_word_embeddings': c.embedding.tied,
        'scale_decoder_outputs': head_of(c).scale != 1,
        'decoder_start_token_id': start,
        'pad_token_id': start,
    }


FAMILY = Family(
    't5',
    ('T5ForConditionalGeneration',),
    read,
    write,
    OUTER | ENCODER | DECODER,
    (r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight',),  # no code reads it
    tied={
        'encoder.embed_tokens.weight': 'shared.weight',
        'decoder.embed_tokens.weight': 'shared.weight',
        'lm_head.weight': 'shared.weight',
    },
    tied_unless_stored=True,
)
