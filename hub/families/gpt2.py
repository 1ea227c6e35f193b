"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, biases everywhere, matrices kept in × out.

Fields of config.json as transformers has them, with its defaults, which published configs rely on.
"""

from typing import Any

from weft.hub.families import Entry, Family, Fields, Flipped, Joined, layer_norm
from weft.hub.families.fields import Table, read_fields, write_fields
from weft.model.config import ModelConfig, model_of

ACTIVATIONS: dict[str, Any] = {  # transformers' names, of which three are one function
    'gelu_new': 'gelu',
    'gelu_pytorch_tanh': 'gelu',
    'gelu_fast': 'gelu',
    'gelu': 'gelu_exact',
    'relu': 'relu',
    'silu': 'silu',
    'swish': 'silu',
}
BIASES = {  # everywhere
    'attention.qkv_bias': True,
    'attention.o_bias': True,
    'mlp.bias': True,
    'norm.kind': 'layernorm',
    'norm.bias': True,
}
QKV = ('attention.q.w_IO', 'attention.k.w_IO', 'attention.v.w_IO')
LAYER: dict[str, Entry] = {
    **layer_norm('ln_1', 'attention_norm'),
    'attn.c_attn.weight': Joined(QKV, dim=1, flip=True),
    'attn.c_attn.bias': Joined(('attention.q.b_O', 'attention.k.b_O', 'attention.v.b_O')),
    'attn.c_proj.weight': Flipped('attention.o.w_OI'),
    'attn.c_proj.bias': 'attention.o.b_O',
    **layer_norm('ln_2', 'mlp_norm'),
    'mlp.c_fc.weight': Flipped('mlp.up.w_IO'),
    'mlp.c_fc.bias': 'mlp.up.b_O',
    'mlp.c_proj.weight': Flipped('mlp.down.w_OI'),
    'mlp.c_proj.bias': 'mlp.down.b_O',
}
NAMES: dict[str, Entry] = {
    'transformer.wte.weight': 'embed_VD',
    'transformer.wpe.weight': 'position_PD',
    **{f'transformer.h.{{i}}.{name}': entry for name, entry in LAYER.items()},
    **layer_norm('transformer.ln_f', 'norm'),
    'lm_head.weight': 'head_DV',
}


FIELDS: Table = {
    'vocab_size': ('vocabulary', 50257),
    'n_layer': ('layers', 12, 'num_hidden_layers'),
    'n_embd': ('model_dim', 768, 'hidden_size'),
    'n_head': ('attention.heads', 12, 'num_attention_heads'),
    'n_inner': ('mlp.dim', None),
    'n_positions': ('positions.max', 1024, 'max_position_embeddings', 'n_ctx'),
    'activation_function': ('mlp.activation', ACTIVATIONS),
    'layer_norm_epsilon': ('norm.epsilon', 1e-5),
    'scale_attn_weights': ('attention.scale', {True: None, False: 1.0}),
    'scale_attn_by_inverse_layer_idx': ('attention.scale_by_layer', False),
    'tie_word_embeddings': ('embedding.tied', True),
}


def read(f: Fields) -> ModelConfig:
    f.only('add_cross_attention', False)
    f.skip('reorder_and_upcast_attn')  # the softmax is float32 either way
    f.skip('n_special', 'predict_special_tokens', 'output_past')  # of the first published configs; nothing reads them
    fields = read_fields(f, FIELDS)
    fields['mlp.dim'] = fields['mlp.dim'] or 4 * fields['model_dim']
    return model_of(fields | BIASES | {'positions.kind': 'learned'})


def write(c: ModelConfig) -> dict[str, Any]:
    return {'model_type': 'gpt2'} | write_fields(c, FIELDS) | {'scale_attn_weights': c.attention.scale is None}


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
