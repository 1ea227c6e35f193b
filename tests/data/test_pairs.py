"""Pairs: read from files, split by their source, packed so that each target has its own source beside it."""

import gzip
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from weft.data.config import DataConfig
from weft.data.examples import reversed_digits
from weft.data.pairs import Pair, pack_pairs, read_pairs
from weft.data.prepare import load, prepare
from weft.data.tokenizer import Tokenizer
from weft.inference.prompts import read_prompts
from weft.model.config import AttentionConfig, EncoderConfig, MLPConfig, ModelConfig
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig, make_mesh

PAIRS = [Pair(*pair) for pair in reversed_digits(600)]


def write(path: Path) -> Path:
    path.write_text(''.join(f'{source}\t{target}\n' for source, target in PAIRS), encoding='utf-8')
    return path


def test_both_kinds_of_file_give_the_same_pairs(tmp_path):
    write(tmp_path / 'a.tsv')
    lines = '\n'.join(json.dumps({'target': pair.target, 'more': 1, 'source': pair.source}) for pair in PAIRS)
    (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(lines.encode()))
    assert list(read_pairs([str(tmp_path / 'a.tsv')], 'x')) == PAIRS
    assert list(read_pairs([str(tmp_path / '*.gz')], 'x')) == PAIRS


@pytest.mark.parametrize(
    ('name', 'text', 'message'),
    [
        ('a.tsv', 'a\tb\nab\n', 'a.tsv:2: 0 tabs; a line must be a source, one tab, and a target'),
        ('a.tsv', 'a\tb\tc\n', 'a.tsv:1: 2 tabs'),
        ('a.jsonl', '{"source": "a"}', "a.jsonl:1: no field 'target'"),
        ('a.txt', 'a\tb', r'a.txt: an encoder–decoder learns from pairs, in .tsv or .jsonl files'),
    ],
)
def test_a_line_that_is_no_pair_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as found:
        list(read_pairs([str(tmp_path / name)], 'data.source'))
    assert '\n' not in str(found.value)


def test_a_long_path_keeps_its_line_in_a_message(tmp_path):
    path = tmp_path / ('long' * 50) / 'a.tsv'
    path.parent.mkdir()
    path.write_text('a\tb\nab')
    with pytest.raises(UserError, match='…:2: 0 tabs'):
        list(read_pairs([str(path)], 'data.source'))


def test_each_target_lies_in_the_segment_of_its_source_and_every_pair_once(tmp_path):
    tokenizer = Tokenizer.train((side for pair in PAIRS for side in pair), 300)
    rows, left_out = pack_pairs(tokenizer, [*PAIRS, Pair('1 ' * 40, '1')], 24)
    assert left_out == 1
    found = []
    for row in range(len(rows)):
        batch = rows.take([row])
        for segment in range(1, batch.segment_BT.max() + 1):
            tokens_T, target_T, position_T = (a_BT[batch.segment_BT == segment] for a_BT in batch[:3])
            source_S, place_S = (a_BS[batch.source.segment_BS == segment] for a_BS in batch.source[:2])
            assert source_S[-1] == target_T[-1] == tokenizer.eos
            assert tokens_T[0] == tokenizer.bos
            assert (tokens_T[1:] == target_T[:-1]).all()
            for place in (position_T, place_S):
                assert (place == np.arange(len(place))).all()
            found.append(Pair(tokenizer.decode(source_S[:-1].tolist()), tokenizer.decode(tokens_T.tolist())))
    assert sorted(found) == sorted(PAIRS)
    assert rows.tokens == sum((rows.take([row]).segment_BT > 0).sum() for row in range(len(rows)))
    assert tokenizer.decode(rows.predicted()) == ''.join(pair.target for pair in found)


def test_a_target_begins_with_what_decoding_begins_with():
    tokenizer = Tokenizer.train((side for pair in PAIRS for side in pair), 300)
    for start in (None, 0, 7):
        rows, _ = pack_pairs(tokenizer, PAIRS[:9], 24, start)
        c = ModelConfig(
            layers=1,
            model_dim=8,
            attention=AttentionConfig(heads=1),
            mlp=MLPConfig(dim=8),
            encoder=EncoderConfig(layers=1, start_token=start),
        )
        with jax.set_mesh(make_mesh(MeshConfig())):
            first = read_prompts(c, tokenizer, ['1 2'], 24).tokens_BT[0, 0]
        batch = rows.take(range(len(rows)))
        assert set(batch.tokens_BT[(batch.position_BT == 0) & (batch.segment_BT > 0)].tolist()) == {int(first)}


def test_prepared_pairs_come_back_and_no_source_is_on_both_sides(tmp_path):
    source = write(tmp_path / 'a.tsv')
    source.write_text(source.read_text() * 2)  # each pair twice
    config = DataConfig(source=str(source), vocabulary=300)
    made = prepare(config, tmp_path / 'run', 24, say=lambda text: None, pairs=True)
    again = load(tmp_path / 'run')
    sides = []
    for rows, same in ((made.train, again.train), (made.validation, again.validation)):
        jax.tree.map(np.testing.assert_array_equal, rows.take([0]), same.take([0]))
        found = [rows.take([row]) for row in range(len(rows))]
        cut = [
            row.source.tokens_BS[row.source.segment_BS == segment].tolist()
            for row in found
            for segment in range(1, row.segment_BT.max() + 1)
        ]
        sides.append({made.tokenizer.decode(ids) for ids in cut})
    assert sides[0] | sides[1] == {pair.source for pair in PAIRS}
    assert not sides[0] & sides[1]
    assert 0.02 < made.validation.bytes / (made.train.bytes + made.validation.bytes) < 0.06
    assert made.validation_bytes().decode().count(' ') > 10


def test_text_is_refused_where_pairs_are_needed(tmp_path):
    with pytest.raises(UserError, match=r'data\.source=stdlib holds no pairs'):
        prepare(DataConfig(), tmp_path / 'run', 24, say=lambda text: None, pairs=True)
