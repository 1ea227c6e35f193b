"""The cases of families with an encoder (tests/families/cases.py holds them all), and what such models read."""

import numpy as np

from tests.families import weights
from tests.families.cases import LENGTH, ROWS, VOCABULARY, case, family

LENGTHS = [LENGTH, LENGTH, 150, 60]  # of the rows that an encoder reads: what follows is padding
MASK = 3  # the token that BERT is to replace
ENCODERS, BOTH = ('bert',), ('t5', 'marian')  # families that read a row at once; that do, and then write another

BERT = {
    'vocab_size': VOCABULARY,
    'hidden_size': 64,
    'num_hidden_layers': 3,
    'num_attention_heads': 4,
    'intermediate_size': 96,
    'max_position_embeddings': 192,
    'pad_token_id': 0,
}
case('bert-plain', 'BertForMaskedLM', 'bert', BERT)
case('bert-tanh-gelu-many-kinds', 'BertForMaskedLM', 'bert', BERT, hidden_act='gelu_new', type_vocab_size=5)
case('bert-relu-wide-epsilon', 'BertForMaskedLM', 'bert', BERT, hidden_act='relu', layer_norm_eps=1e-2)
case('bert-silu', 'BertForMaskedLM', 'bert', BERT, hidden_act='silu', num_attention_heads=8)
case('bert-headless', 'BertModel', 'bert', BERT, hidden_act='gelu_new', layer_norm_eps=1e-5)
case('bert-pretraining', 'BertForPreTraining', 'bert', BERT, num_attention_heads=2)

T5 = {
    'vocab_size': VOCABULARY,
    'd_model': 64,
    'd_kv': 16,
    'd_ff': 96,
    'num_layers': 2,
    'num_heads': 4,
    'decoder_start_token_id': 0,
}
V1_1 = T5 | {'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False}
case('t5-v1.1', 'T5ForConditionalGeneration', 't5', V1_1)
case('t5-before-v1.1', 'T5ForConditionalGeneration', 't5', T5, num_decoder_layers=3, d_kv=8)
case(
    't5-few-near-buckets-silu',
    'T5ForConditionalGeneration',
    't5',
    V1_1,
    num_decoder_layers=1,
    feed_forward_proj='gated-silu',
    relative_attention_num_buckets=16,
    relative_attention_max_distance=40,
    layer_norm_epsilon=1e-3,
    decoder_start_token_id=5,
)
case('t5-exact-gelu', 'T5ForConditionalGeneration', 't5', V1_1, feed_forward_proj='gelu', num_heads=2)

MARIAN = {
    'vocab_size': VOCABULARY,
    'd_model': 64,
    'encoder_layers': 2,
    'decoder_layers': 2,
    'encoder_attention_heads': 4,
    'decoder_attention_heads': 4,
    'encoder_ffn_dim': 96,
    'decoder_ffn_dim': 96,
    'max_position_embeddings': 192,
    'pad_token_id': 199,
    'decoder_start_token_id': 199,
}
case('marian-published', 'MarianMTModel', 'marian', MARIAN, activation_function='swish', scale_embedding=True)
case('marian-as-in-2017', 'MarianMTModel', 'marian', MARIAN, activation_function='relu', scale_embedding=True)
case(
    'marian-sides-differ',
    'MarianMTModel',
    'marian',
    MARIAN,
    decoder_layers=3,
    encoder_attention_heads=8,
    decoder_attention_heads=2,
    encoder_ffn_dim=64,
)


def not_saved(config: dict) -> dict[str, tuple[int, ...]]:
    """Shapes of tensors that published files have and that transformers does not write of a new model."""
    untied = config['model_type'] == 't5' and not config.get('tie_word_embeddings', True)
    return {'lm_head.weight': (config['vocab_size'], config['d_model'])} if untied else {}


def rows(name: str, config: dict, seed: int) -> dict[str, np.ndarray]:
    """int32 [ROWS, LENGTH] each: 'ids', of an encoder some masked, and the 'kinds' of text; 'source' of an encoder–decoder."""
    draw = lambda below, what: weights.ids(seed, ROWS, LENGTH, below, what)
    ids = draw(config['vocab_size'], 'ids')
    if family(name) in ENCODERS:
        kinds = draw(config.get('type_vocab_size', 2), 'kinds')
        return {'ids': np.where(draw(8, 'masks') == 0, np.int32(MASK), ids), 'kinds': kinds}
    return {'ids': ids, 'source': draw(config['vocab_size'], 'source')} if family(name) in BOTH else {'ids': ids}


def live() -> np.ndarray:
    """bool [ROWS, LENGTH]: which tokens of an encoder's rows are no padding."""
    return np.arange(LENGTH)[None] < np.array(LENGTHS)[:, None]


def masked(ids: np.ndarray) -> np.ndarray:
    """bool [ROWS, LENGTH]: which tokens are to be predicted."""
    return (ids == MASK) & live()


def arguments(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows by what transformers calls them."""
    if 'kinds' in rows:
        return {'input_ids': rows['ids'], 'token_type_ids': rows['kinds'], 'attention_mask': live()}
    if 'source' in rows:
        return {'input_ids': rows['source'], 'attention_mask': live(), 'decoder_input_ids': rows['ids']}
    return {'input_ids': rows['ids']}
