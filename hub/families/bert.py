"""BERT (Devlin et al. 2018, arXiv:1810.04805): an encoder alone, norms after each part, a head for masked tokens.

Published files have it as BertForMaskedLM or BertForPreTraining; the second has a pooler and two more logits, which files of
the first may have too: no logit of a token depends on them. BertModel is it without a head, with a pooler or not.
"""

from typing import Any

from weft.hub.families import Family, Fields
from weft.hub.families.fields import Table, read_fields, write_fields
from weft.model.config import ModelConfig, PoolerConfig, changed, model_of

HEADLESS = 'BertModel'  # as models that embed texts come
# By published name.
ACTIVATIONS: dict[str, Any] = {'gelu': 'gelu_exact', 'gelu_new': 'gelu', 'relu': 'relu', 'silu': 'silu'}
EMBEDDING = {
    'bert.embeddings.word_embeddings.weight': 'embed_VD',
    'bert.embeddings.position_embeddings.weight': 'position_PD',
    'bert.embeddings.token_type_embeddings.weight': 'token_type_YD',
    'bert.embeddings.LayerNorm.weight': 'embedding_norm.scale_D',
    'bert.embeddings.LayerNorm.bias': 'embedding_norm.bias_D',
}
LAYER = {
    'bert.encoder.layer.{i}.attention.self.query.weight': 'attention.q.w_IO',
    'bert.encoder.layer.{i}.attention.self.query.bias': 'attention.q.b_O',
    'bert.encoder.layer.{i}.attention.self.key.weight': 'attention.k.w_IO',
    'bert.encoder.layer.{i}.attention.self.key.bias': 'attention.k.b_O',
    'bert.encoder.layer.{i}.attention.self.value.weight': 'attention.v.w_IO',
    'bert.encoder.layer.{i}.attention.self.value.bias': 'attention.v.b_O',
    'bert.encoder.layer.{i}.attention.output.dense.weight': 'attention.o.w_OI',
    'bert.encoder.layer.{i}.attention.output.dense.bias': 'attention.o.b_O',
    'bert.encoder.layer.{i}.attention.output.LayerNorm.weight': 'attention_norm.scale_D',
    'bert.encoder.layer.{i}.attention.output.LayerNorm.bias': 'attention_norm.bias_D',
    'bert.encoder.layer.{i}.intermediate.dense.weight': 'mlp.up.w_IO',
    'bert.encoder.layer.{i}.intermediate.dense.bias': 'mlp.up.b_O',
    'bert.encoder.layer.{i}.output.dense.weight': 'mlp.down.w_OI',
    'bert.encoder.layer.{i}.output.dense.bias': 'mlp.down.b_O',
    'bert.encoder.layer.{i}.output.LayerNorm.weight': 'mlp_norm.scale_D',
    'bert.encoder.layer.{i}.output.LayerNorm.bias': 'mlp_norm.bias_D',
}
HEAD = {
    'cls.predictions.transform.dense.weight': 'head_mlp.dense.w_IO',
    'cls.predictions.transform.dense.bias': 'head_mlp.dense.b_O',
    'cls.predictions.transform.LayerNorm.weight': 'head_mlp.norm.scale_D',
    'cls.predictions.transform.LayerNorm.bias': 'head_mlp.norm.bias_D',
    'cls.predictions.bias': 'head_bias_V',
}
POOLER = {
    'bert.pooler.dense.weight': 'pooler.dense.w_IO',
    'bert.pooler.dense.bias': 'pooler.dense.b_O',
    'cls.seq_relationship.weight': 'pooler.next.w_OI',
    'cls.seq_relationship.bias': 'pooler.next.b_O',
}
FIELDS: Table = {
    'vocab_size': ('vocabulary', 30522),
    'num_hidden_layers': ('layers', 12),
    'hidden_size': ('model_dim', 768),
    'num_attention_heads': ('attention.heads', 12),
    'intermediate_size': ('mlp.dim', 3072),
    'hidden_act': ('mlp.activation', ACTIVATIONS),
    'layer_norm_eps': ('norm.epsilon', 1e-12),
    'max_position_embeddings': ('positions.max', 512),
    'type_vocab_size': ('embedding.token_types', 2),
}


def read(f: Fields) -> ModelConfig:
    for name, value in (('is_decoder', False), ('add_cross_attention', False), ('position_embedding_type', 'absolute')):
        f.only(name, value)
    for name in ('embedding_size', 'pooler_fc_size', 'pooler_num_attention_heads', 'pooler_num_fc_layers'):
        f.skip(name)  # of other models' code, which BERT's does not read
    f.skip('pooler_size_per_head', 'pooler_type', 'directionality')
    architecture = (f('architectures', None) or [''])[0]
    pretraining = architecture == 'BertForPreTraining'
    tied = True if architecture == HEADLESS else f.only('tie_word_embeddings', True)
    f.skip('tie_word_embeddings')
    fields = read_fields(f, FIELDS) | {
        'attention.qkv_bias': True,
        'attention.o_bias': True,
        'mlp.bias': True,
        'norm.kind': 'layernorm',
        'norm.order': 'post',
        'norm.bias': True,
        'positions.kind': 'learned',
        'causal': False,
        'embedding.norm': True,
        'embedding.tied': tied,
        'head.mlp': True,
        'head.bias': True,
    }
    return model_of(fields | ({'pooler.next_sentence': True} if pretraining else {}))


def with_pooler(c: ModelConfig) -> ModelConfig:
    return c if c.pooler else changed(c, {'pooler': PoolerConfig()})


def with_next_sentence(c: ModelConfig) -> ModelConfig:
    return changed(c, {'pooler.next_sentence': True}) if c.head else c


def write(c: ModelConfig) -> dict[str, Any]:
    own = {'architectures': ['BertForPreTraining' if c.next_sentence else 'BertForMaskedLM'], 'model_type': 'bert'}
    return own | write_fields(c, FIELDS) | {'pad_token_id': 0}


FAMILY = Family(
    'bert',
    ('BertForMaskedLM', 'BertForPreTraining'),
    read,
    write,
    EMBEDDING | LAYER | HEAD | POOLER,
    (r'bert\.embeddings\.(position_ids|token_type_ids)',),
    prefix='bert.',
    old_names=((r'LayerNorm\.gamma$', 'LayerNorm.weight'), (r'LayerNorm\.beta$', 'LayerNorm.bias')),
    tied={
        'cls.predictions.decoder.weight': 'bert.embeddings.word_embeddings.weight',
        'cls.predictions.decoder.bias': 'cls.predictions.bias',
    },
    told={'bert.pooler.dense.weight': with_pooler, 'cls.seq_relationship.weight': with_next_sentence},
    headless=HEADLESS,
)
