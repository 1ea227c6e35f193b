"""Words to tokens, rows of tables and activations of words: against whole texts read one by one.

Letters: N words, T tokens, D model.
"""

import json
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from tests.inference.test_embed import hidden, published
from tests.interpret import planted_tables as planted
from weft.data.tokenizer import Tokenizer
from weft.hub.tokenizers.json_tokenizer import JsonTokenizer
from weft.inference.run import open_run
from weft.interpret import word_vectors
from weft.interpret.embeddings import solve_analogies
from weft.interpret.word_files import Section
from weft.interpret.word_sets import Choice, WordSet
from weft.interpret.word_vectors import (
    Context,
    Placed,
    check_layer,
    context_of,
    layer_vectors,
    place_words,
    single_token_words,
    token_names,
)
from weft.model.capture import capture
from weft.model.forward import place
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig
from weft.training.importing import import_run


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Path:
    return planted.planted_run(tmp_path_factory.mktemp('words') / 'planted', MeshConfig(data=2, tensor=2))


def bytewise() -> Tokenizer:
    """Bytes and whole words with a space before them, as GPT-2's kind has them."""
    vocab = {name: i for i, name in enumerate(['<end>', 'a', 'b', 'c', 's', 'Ġ', 'Ġa', 'Ġab', 'Ġc', 'Ġs'])}
    merges = [('Ġ', 'a'), ('Ġa', 'b'), ('Ġ', 'c'), ('Ġ', 's')]
    fields = {
        'model': {'type': 'BPE', 'vocab': vocab, 'merges': merges},
        'added_tokens': [],
        'pre_tokenizer': {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True},
        'decoder': {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True},
    }
    return JsonTokenizer(json.dumps(fields).encode())


def test_words_of_one_token_are_told_by_form():
    tokenizer = bytewise()
    assert single_token_words(tokenizer, tokenizer.vocabulary, 'spaced') == {'a': 6, 'ab': 7, 'c': 8, 's': 9}
    assert single_token_words(tokenizer, tokenizer.vocabulary, 'bare') == {'a': 1, 'b': 2, 'c': 3, 's': 4}
    assert single_token_words(tokenizer, tokenizer.vocabulary, 'spaced', 2) == {'a': 6, 'ab': 7}
    assert single_token_words(tokenizer, tokenizer.vocabulary, 'spaced', 2, letters=2) == {'ab': 7}
    assert single_token_words(tokenizer, 8, 'spaced') == {'a': 6, 'ab': 7}, 'the others have no row in the model'


def test_a_word_has_the_tokens_that_the_whole_text_has():
    tokenizer = bytewise()
    assert tokenizer.encode('c ab s') == [3, 7, 9]
    found = place_words(tokenizer, ['ab', 'b', 'cs'], Context('c ', ' s'))
    assert found == [Placed((3, 7, 9), 1, 2), Placed((3, 5, 2, 9), 1, 3), Placed((3, 8, 4, 9), 1, 3)]
    assert place_words(tokenizer, ['a', 'c', ''], Context('s ', 'b')) == [None, Placed((4, 8, 2), 1, 2), None], (
        'one joins'
    )
    assert place_words(tokenizer, ['ab'], Context('', '')) == [Placed((1, 2), 0, 2)]


def test_the_place_of_a_word_in_a_text():
    assert context_of('the {} runs') == ('the ', ' runs')
    assert context_of('the bank of banks', 'bank') == ('the ', ' of banks')
    assert context_of('a {}, the bank', 'bank') == ('a ', ', the bank')
    for text, word, told in (
        ('no place', None, r'has {} 0 times: it must stand there exactly once'),
        ('{} and {}', 'x', r"has 'x' or {} 2 times"),
        ('banks', 'bank', r"has 'bank' or {} 0 times"),
    ):
        with pytest.raises(UserError, match=told):
            context_of(text, word)


def test_planted_tables_answer_every_question_on_any_mesh(run):
    questions = [tuple(line.split()) for line in planted.QUESTIONS.splitlines()[1:]]
    for mesh in (None, 'data=1'):
        opened = open_run(run, mesh, stacked=True)
        with jax.set_mesh(opened.mesh):
            words = WordSet(opened, Choice())
            table = words.vectors(words.most_frequent(None))
            assert set(planted.WORDS) < set(table.words)
            found = solve_analogies(table.x_VD, table.words, [Section('gender', questions)])
            assert found.total.right == {'3CosAdd': 12, '3CosMul': 12}
            head = WordSet(opened, Choice('output'))
            rows = head.vectors(head.known(planted.WORDS)).x_VD
        np.testing.assert_array_equal(rows, np.stack(list(planted.output_vectors().values())))


def test_activations_of_words_are_those_of_their_texts_alone(run, monkeypatch):
    """Packed into rows on a mesh, some at a time, against each text by itself on one device."""
    texts = {word: f'a {word} the river' for word in planted.WORDS[:9]} | {'zebra': 'a zebra the river'}
    opened = open_run(run, stacked=True)
    placed = place_words(opened.tokenizer, list(texts), Context('a ', ' the river'))
    assert all(one is not None for one in placed)
    assert len(placed[-1].own) > 1, 'a mean of several tokens'
    monkeypatch.setattr(word_vectors, 'WIDTH', 16)
    monkeypatch.setattr(word_vectors, 'TOKENS', {'cpu': 16})
    monkeypatch.setattr(word_vectors, 'PAUSE', 0)
    said = []
    with jax.set_mesh(opened.mesh):
        found = {layer: layer_vectors(opened, placed, layer, said.append) for layer in (1, 2)}
    assert len(said) > 2, 'more than one batch'
    assert said[-1] == 'layer 2: 10 of 10 words'
    one = open_run(run, 'data=1', stacked=True)
    ids = [[one.tokenizer.bos, *one.tokenizer.encode(text)] for text in texts.values()]
    longest = max(map(len, ids))
    read = jax.jit(lambda model, *rows: capture(model, [word_vectors.STREAM], *rows)[word_vectors.STREAM])
    for number, (row, word) in enumerate(zip(ids, placed, strict=True)):
        tokens = np.array([row + [0] * (longest - len(row))], np.int32)
        position = np.arange(longest, dtype=np.int32)[None]
        with jax.set_mesh(one.mesh):
            x_LTD = np.asarray(read(one.model, *place((tokens, position, (position < len(row)).astype(np.int32)))))[
                :, 0
            ]
        for layer in (1, 2):
            expected_D = x_LTD[layer - 1, 1 + word.begin : 1 + word.end].mean(0)
            np.testing.assert_allclose(found[layer][number], expected_D, atol=1e-5)


def test_an_encoder_decoder_has_tables_and_no_layers():
    with pytest.raises(
        UserError, match=r'--layer 1: model\.encoder is given: activations of words are of models without'
    ):
        check_layer(mock.Mock(layers=2, encoder=mock.Mock()), 1)


def test_each_token_has_a_name_of_its_own(run):
    tokenizer = open_run(run).tokenizer
    names = token_names(tokenizer, tokenizer.vocabulary)
    assert len(set(names)) == len(names) == tokenizer.vocabulary
    assert names[tokenizer.encode(' king')[0]] == ' king'
    assert names[tokenizer.encode('A')[0]] == 'A'


def test_an_encoder_reads_both_sides_and_its_own_ends(tmp_path):
    """BERT's last layer is what transformers' goldens hold it to: its [CLS] and [SEP] around each text."""
    import_run(published(tmp_path / 'source'), tmp_path / 'bert', MeshConfig(data=2, tensor=2), say=str)
    opened = open_run(tmp_path / 'bert', stacked=True)
    nouns = ['river', 'money', 'dog', 'the']
    placed = place_words(opened.tokenizer, [*nouns, 'unheard'], Context('the bank of ', ' house'))
    assert placed.pop() is None, 'a word that the tokenizer does not know'
    assert placed[0] == Placed((4, 6, 5, 7, 9), 3, 4)
    layers = opened.config.model.layers
    with jax.set_mesh(opened.mesh):
        found = layer_vectors(opened, placed, layers)
        with pytest.raises(UserError, match=r'--table output: model\.head is null: this model has no LM head'):
            WordSet(opened, Choice('output'))
    expected = [x_TD[4] for x_TD in hidden([[1, *one.ids, 2] for one in placed])]
    np.testing.assert_allclose(found, expected, atol=1e-5)
