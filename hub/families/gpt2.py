"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, biases everywhere, matrices kept in × out.

Fields of config.json as transformers has them, with its defaults, which published configs rely on.
"""

from typing import Any

from weft.hub.families import Entry, Family, Fields, Flipped, Joined
from weft.model.config import AttentionConfig, EmbeddingConfig, LearnedConfig, MLPConfig, ModelConfig, NormConfig

ACTIVATIONS: dict[str, Any] = {  # transformers' names, of which three are one function
    'gelu_new': 'gelu',
    'gelu_pytorch_tanh': 'gelu',
    'gelu_fast': 'gelu',
    'gelu': 'gelu_exact',
    'relu': 'relu',
    'silu': 'silu',
    'swish': 'silu',
}
QKV = ('attention.q.w_IO', 'attention.k.w_IO', 'attention.v.w_IO')
LAYER: dict[str, Entry] = {
    'ln_1.weight': 'attention_norm.scale_D',
    'ln_1.bias': 'attention_norm.bias_D',
    'attn.c_attn.weight': Joined(QKV, dim=1, flip=True),
    'attn.c_attn.bias': Joined(('attention.q.b_O', 'attention.k.b_O', 'attention.v.b_O')),
    'attn.c_proj.weight': Flipped('attention.o.w_OI'),
    'attn.c_proj.bias': 'attention.o.b_O',
    'ln_2.weight': 'mlp_norm.scale_D',
    'ln_2.bias': 'mlp_norm.bias_D',
    'mlp.c_fc.weight': Flipped('mlp.up.w_IO'),
    'mlp.c_fc.bias': 'mlp.up.b_O',
    'mlp.c_proj.weight': Flipped('mlp.down.w_OI'),
    'mlp.c_proj.bias': 'mlp.down.b_O',
}
NAMES: dict[str, Entry] = {
    'transformer.wte.weight': 'embed_VD',
    'transformer.wpe.weight': 'position_PD',
    **{f'transformer.h.{{i}}.{name}': entry for name, entry in LAYER.items()},
    'transformer.ln_f.weight': 'norm.scale_D',
    'transformer.ln_f.bias': 'norm.bias_D',
    'lm_head.weight': 'head_DV',
}


def read(f: Fields) -> ModelConfig:
    f.only('add_cross_attention', False)
    f.skip('reorder_and_upcast_attn')  # the softmax is float32 either way
    f.skip('n_special', 'predict_special_tokens', 'output_past')  # of the first published configs; nothing reads them
    model_dim = f.either(('n_embd', 'hidden_size'), 768)
    return ModelConfig(
        vocabulary=f('vocab_size', 50257),
        layers=f.either(('n_layer', 'num_hidden_layers'), 12),
        model_dim=model_dim,
        attention=AttentionConfig(
            heads=f.either(('n_head', 'num_attention_heads'), 12),
            scale=None if f('scale_attn_weights', True) else 1.0,
            scale_by_layer=f('scale_attn_by_inverse_layer_idx', False),
            qkv_bias=True,
            o_bias=True,
        ),
        mlp=MLPConfig(
            dim=f('n_inner', 4 * model_dim),
            activation=ACTIVATIONS[f.only('activation_function', *ACTIVATIONS)],
            bias=True,
        ),
        norm=NormConfig(kind='layernorm', epsilon=f('layer_norm_epsilon', 1e-5), bias=True),
        positions=LearnedConfig(max=f.either(('n_positions', 'max_position_embeddings', 'n_ctx'), 1024)),
        embedding=EmbeddingConfig(tied=f('tie_word_embeddings', True)),
    )


def write(c: ModelConfig) -> dict[str, Any]:
    return {
        'model_type': 'gpt2',
        'vocab_size': c.vocabulary,
        'n_layer': c.layers,
        'n_embd': c.model_dim,
        'n_head': c.attention.heads,
        'n_inner': c.mlp.dim,
        'n_positions': c.max_positions,
        'activation_function': next(
            (name for name, ours in ACTIVATIONS.items() if ours == c.mlp.activation), 'gelu_new'
        ),
        'layer_norm_epsilon': c.norm.epsilon,
        'scale_attn_weights': c.attention.scale is None,
        'scale_attn_by_inverse_layer_idx': c.attention.scale_by_layer,
        'tie_word_embeddings': c.embedding.tied,
    }


FAMILY = Family(
    'gpt2',
    ('GPT2LMHeadModel',),
    read,
    write,
    NAMES,
    buffers=(r'(transformer\.)?h\.\d+\.attn\.(masked_)?bias',),
    prefix='transformer.',
    headless='GPT2Model',
)
