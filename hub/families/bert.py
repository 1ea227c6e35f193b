"""BERT (Devlin et al. 2018, arXiv:1810.04805): an encoder alone, norms after each part, a head for masked tokens.

Published files have it as BertForMaskedLM or BertForPreTraining; the second has a pooler and two more logits, which files of
the first may have too: no logit of a token depends on them. BertModel is it without a head, with a pooler or not.
"""

from typing import Any

from weft.hub.families import Family, Fields, layer_norm, linear
from weft.hub.families.fields import Table, read_fields, write_fields
from weft.hub.families.gpt2 import BIASES
from weft.model.config import ModelConfig, PoolerConfig, changed, model_of

HEADLESS = 'BertModel'  # as models that embed texts come
# By published name.
ACTIVATIONS: dict[str, Any] = {'gelu': 'gelu_exact', 'gelu_new': 'gelu', 'relu': 'relu', 'silu': 'silu'}
EMBEDDING = {
    'bert.embeddings.word_embeddings.weight': 'embed_VD',
    'bert.embeddings.position_embeddings.weight': 'position_PD',
    'bert.embeddings.token_type_embeddings.weight': 'token_type_YD',
    **layer_norm('bert.embeddings.LayerNorm', 'embedding_norm'),
}
LAYER = {
    **linear('bert.encoder.layer.{i}.attention.self.query', 'attention.q'),
    **linear('bert.encoder.layer.{i}.attention.self.key', 'attention.k'),
    **linear('bert.encoder.layer.{i}.attention.self.value', 'attention.v'),
    **linear('bert.encoder.layer.{i}.attention.output.dense', 'attention.o', 'w_OI'),
    **layer_norm('bert.encoder.layer.{i}.attention.output.LayerNorm', 'attention_norm'),
    **linear('bert.encoder.layer.{i}.intermediate.dense', 'mlp.up'),
    **linear('bert.encoder.layer.{i}.output.dense', 'mlp.down', 'w_OI'),
    **layer_norm('bert.encoder.layer.{i}.output.LayerNorm', 'mlp_norm'),
}
HEAD = {
    **linear('cls.predictions.transform.dense', 'head_mlp.dense'),
    **layer_norm('cls.predictions.transform.LayerNorm', 'head_mlp.norm'),
    'cls.predictions.bias': 'head_bias_V',
}
POOLER = linear('bert.pooler.dense', 'pooler.dense') | linear('cls.seq_relationship', 'pooler.next', 'w_OI')
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
    fields = read_fields(f, FIELDS) | BIASES
    fields |= {
        'norm.order': 'post',
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
