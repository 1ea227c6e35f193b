"""A config says what it looks like, on the command line as in a file; anything else is refused in one line with its place."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import pytest

from tests.scripts.runs import ROOT
from weft.model.parts.attention import MixerConfig
from weft.model.parts.numbers import nearest_divisor
from weft.model.parts.registry import MIXERS
from weft.runtime.errors import UserError
from weft.training import yaml_text
from weft.training.config import RunConfig, dump, load_config, parse
from weft.training.renamed import RENAMED, RENAMED_VALUES

BASE = """
name: tiny
model: {layers: 2, model_dim: 64, attention: {heads: 4}, mlp: {dim: 128}}
training: {steps: 2, batch: 4, sequence_length: 64}
"""
ALL_PLAIN = BASE + 'data: {source: *, vocabulary: 400}\n'


def told(content: str | bytes, *overrides: str) -> str:
    """The one line that refuses a config."""
    begin = time.process_time()
    with pytest.raises(UserError) as caught:
        parse(content, 'a.yaml', overrides)
    line = str(caught.value)
    assert line.isprintable(), line
    assert len(line) <= 700
    assert time.process_time() - begin < 2
    return line


def value_of(text: str) -> object:
    return yaml_text.read(f'x: {text}', 'a.yaml')['x']


@pytest.mark.parametrize(
    ('text', 'wanted'),
    [
        ('010', '010'), ('1:30', '1:30'), ('yes', 'yes'), ('off', 'off'), ('0x10', '0x10'), ('0o7', '0o7'),
        ('1_000_000', 1000000), ('-1_0', -10), ('1_0.5_0', 10.5), ('1_0e-1_0', 1e-9), ('.2_5', 0.25), ('_1', '_1'),
        ('1_', '1_'), ('1__0', '1__0'), ('0_1', '0_1'), ('1_.5', '1_.5'), ('1._5', '1._5'), ('1_e5', '1_e5'), ('1e_5', '1e_5'),
        ('_', '_'), ('2020-01-02', '2020-01-02'), ('2020-13-45', '2020-13-45'), ('0x_', '0x_'), ('a#b', 'a#b'), ('a b', 'a b'),
        ('=', '='),
        ('7', 7), ('-7', -7), ('+7', 7), ('0', 0), ('1e-3', 1e-3), ('1.5', 1.5), ('.5', 0.5), ('5.', 5.0), ('1E+2', 100.0),
        ('true', True), ('False', False), ('null', None), ('~', None), ('', None), ("'7'", '7'), ('"true"', 'true'),
        ('[1, a, [], {}]', [1, 'a', [], {}]), ('{a: {b: 1}}', {'a': {'b': 1}}), ('1 # one', 1), ('<<', '<<'), ('.', '.'),
        ('e5', 'e5'), ('1e', '1e'), ('--1', '--1'), ('"\\u00e9"', 'é'),
    ],
)  # fmt: skip
def test_a_scalar_is_what_it_looks_like(text: str, wanted: object) -> None:
    found = value_of(text)
    assert found == wanted
    assert type(found) is type(wanted)
    assert yaml_text.read(yaml_text.dump({'x': wanted}), 'a.yaml') == {'x': wanted}


REFUSED = {
    'a key that stands twice': (BASE + 'training: {steps: 3}\n', ["'training' stands on line 4 and on line 5"]),
    'a key that stands twice within': ('name: {a: 1,\n b: 2,\n a: 3}', ["'a' stands on line 1 and on line 3"]),
    'an alias': ('name: *a', ['line 1: *a', 'quotes']),
    'a star': (ALL_PLAIN, ['line 5', 'quotes']),
    'an anchor': ('name: &a x', ['line 1: &a', 'quotes']),
    'an anchor that holds itself': ('name: &a [*a]', ['line 1: &a']),
    'laughs': ('a: &a [x, x]\nb: &b [*a, *a]\n', ['line 1: &a']),
    'a tag': ('name: !!python/object:os.system x', ['line 1: tag', 'quotes']),
    'a number by a tag': ('name: !!int abc', ['line 1: tag']),
    'a date by a tag': ('\n\nname: !!timestamp abc', ['line 3: tag']),
    'a tag of ones own': ('name: !x y', ['line 1: tag !x']),
    'nested lists': ('a: ' + '[' * 2000, ['nested more than 32 deep']),
    'nested mappings': ('{a: ' * 2000, ['nested more than 32 deep']),
    'nested by lines': ('\n'.join(' ' * n + '- -' for n in range(50)), ['line']),
    'thousands of digits': ('name: ' + '9' * 5000, ['line 1: a number of 5,000 digits']),
    'a second document': (BASE + '---\nname: other\n', ['line 5: a second document']),
    'a list': ('- a\n- b\n', ['holds a list; a config is a mapping']),
    'a text': ('hello', ["holds 'hello'; a config is a mapping"]),
    'a number': ('7', ['holds 7']),
    'nothing': ('', ['is empty; a config is a mapping']),
    'a comment': ('# nothing\n', ['is empty']),
    'a NUL': ('name: a\0b', ['character 7 is 0x00']),
    'an escape': ('name: a\x1b[2J', ['character 7 is 0x1b']),
    'not UTF-8': (b'name: a\nseed: \xff\n', ['line 2: not UTF-8 at byte 14']),
    'UTF-16': (BASE.encode('utf-16'), ['is UTF-16 text', 'iconv']),
    'a tab': ('name:\n\tx: 1', ['line 2: not valid YAML']),
    'an open quote': ('name: "a', ['not valid YAML']),
    'an open list': ('name: [a\nseed: 1', ['not valid YAML']),
    'a colon too many': ('name: a: b', ['line 1: not valid YAML']),
    'a key that is a number': ('1: a', ['line 1: key 1 is no text']),
    'a key that is a list': ('? [a]\n: b', ['line 1: a key must be text']),
    'a key that is null': ('~: a', ['key None is no text']),
    'an unknown key with signs': (BASE + '"na\\e[2Jme\\n": a', ['no key']),
    'half a pair': (BASE + 'data: {source: "\\ud800"}', ['data.source is', 'not UTF-8', 'glob']),
    'a long key of no number': (BASE + 'x' * 1000 + ': .nan', ['… is nan: it must be a finite number']),
    'far too long': ('#' * 300_000, ['300,000 characters', 'at most 262,144']),
    'a number that is no size': (BASE.replace('steps: 2', f'steps: {10**20}'), ['training.steps is 1', 'at most 2^48']),
    'a batch without divisors': (BASE.replace('batch: 4', 'batch: 1000000000039, accumulation: 7'), ['accumulation is 7']),
    'a float where a whole number is due': (BASE.replace('steps: 2', 'steps: 1e3'), ['training.steps is 1000.0', '1000']),
    'an octal number': (BASE.replace('steps: 2', 'steps: 010'), ['training.steps is "010"', 'integer']),
}  # fmt: skip


@pytest.mark.parametrize('name', REFUSED)
def test_what_is_no_config_is_refused_by_its_line(name: str) -> None:
    content, words = REFUSED[name]
    line = told(content)
    assert line.startswith('a.yaml')
    assert all(word in line for word in words), line


def test_a_byte_order_mark_is_no_text() -> None:
    assert parse(b'\xef\xbb\xbf' + BASE.encode(), 'a.yaml') == parse(BASE, 'a.yaml')


@pytest.mark.parametrize(
    'name', ['010', '1e3', '1.5', 'true', 'null', 'yes', '2020-01-02', '7', 'a.b', '0x10', '1.', '1_0']
)
def test_a_run_may_have_any_name_and_keeps_it(name: str) -> None:
    config = parse(BASE, 'a.yaml', [f'name={name}'])
    assert config.name == name
    assert parse(dump(config), 'b.yaml') == config


@pytest.mark.parametrize(
    'source',
    ['*.txt', 'a #b', 'a#b', '&x', '!x', '010', '1:30', 'yes', '[ab]*', '{a,b}', "it's", '"q"', ' a', '- a', 'a: b', '%x', '@'],
)  # fmt: skip
def test_text_on_the_command_line_stays_as_it_is(source: str) -> None:
    config = parse(BASE, 'a.yaml', [f'data.source={source}'])
    assert config.data.source == source
    assert parse(dump(config), 'b.yaml') == config


def test_overrides_are_read_as_their_fields_are() -> None:
    config = parse(
        BASE,
        'a.yaml',
        [
            'data.source=[010, b c]',
            'training.steps=7',
            'training.batch=1_0',
            'training.steps=8',
            'optimizer.learning_rate=1e-3',
            'optimizer.grad_clip=null',
            'model.embedding.tied=false',
            'model.attention.window=8',
            'model.attention.window_pattern=[true, false]',
            'model.attention.qk_norm=full',
            'model.moe={experts: 4, top_k: 2, mlp_dim: 16}',
            'model.moe.experts=8',
            'compute.dtype=bfloat16',
            'compute.weight_dtype=null',
            'mesh={data: 2}',
            'mesh.tensor=2',
        ],
    )
    assert config.data.source == ('010', 'b c')
    assert (config.training.steps, config.optimizer.learning_rate, config.optimizer.grad_clip) == (8, 1e-3, None)
    assert config.training.batch == 10
    assert (config.model.attention.window_pattern, config.model.attention.qk_norm, config.model.embedding.tied) == (
        (True, False),
        'full',
        False,
    )
    assert (config.model.moe.experts, config.compute.dtype, config.compute.weight_dtype) == (8, 'bfloat16', None)
    assert (config.mesh.data, config.mesh.tensor) == (2, 2)
    assert parse(BASE, 'a.yaml', ['data.source=null']).data.source is None


OVERRIDES = {
    '=x': ["'=x'", 'dotted.key=value'],
    'a.b': ["'a.b'", 'dotted.key=value'],
    '': ['dotted.key=value'],
    'training..steps=1': ['dotted.key=value'],
    '.steps=1': ['dotted.key=value'],
    'tra\x1bining.steps=1': [r'tra\x1bining', 'dotted.key=value'],
    '--steps=1': ['dotted.key=value'],
    'training.steps=': ['training.steps=: has no value; null is for none'],
    'name=': ['name=: has no value'],
    'name.x=1': ['name is a value'],
    'training.steps.x=1': ['training.steps is a value'],
    'training=3': ['training is 3'],
    'mesh=[1]': ['mesh'],
    'model.moe=&a [*a]': ['&a', 'quotes'],
    'model.moe={a: 1, a: 2}': ["'a' stands on line 1"],
    'training.steps=' + '9' * 5000: ['a number of 5,000 digits'],
    'training.steps=1e3': ['training.steps is 1000.0', 'written as one: 1000'],
    'training.steps=010': ['training.steps is "010"'],
    'training.steps=many': ['training.steps is "many"', 'integer'],
    'training.batch=true': ['training.batch is true'],
    'model.causal=yes': ['model.causal is "yes"', 'boolean'],
    'optimizer.learning_rate=.inf': ['inf', 'finite'],
    'seed=-1': ['seed is -1'],
    f'seed={2**63}': ['seed is', '2^48'],
    'name=' + 'a' * 300: ['name is', '100'],
    'name=a/b': ["for example 'a-b'"],
    'name=..': ["for example 'run'"],
    'data.source=\udcff': [r"'\udcff'", 'not UTF-8', 'glob'],
    'data.source=' + 'x' * 100_000 + '\udcff': ['not UTF-8'],
    'x' * 100_000 + '=1': ['no key'],
    # Only what is close is proposed: of the same section, else of another.
    'training.stepz=3': ["did you mean 'training.steps'?"],
    'modle.layers=3': ["no key 'modle'", "did you mean 'model'?"],
    'steps=5': ["did you mean 'training.steps'?"],
    'layers=5': ["did you mean 'model.layers'?"],
    'training.layers=5': ["did you mean 'model.layers'?"],
    'training.clip=1': ["no key 'training.clip'; did you mean 'optimizer.grad_clip'?"],
    'training.optimizer=muon': ["no key 'training.optimizer'; did you mean 'optimizer'?"],
    'training.schedule=wsd': ["no key 'training.schedule'; known:"],
    'mesh.fsdp=4': ["no key 'mesh.fsdp'; known: mesh.context"],
    'model.moe.expert=4': ["did you mean 'model.moe.experts'?"],
}


@pytest.mark.parametrize('override', OVERRIDES, ids=lambda text: ascii(text)[:40])
def test_a_mistaken_override_is_named(override: str) -> None:
    base = BASE.replace('mlp: {dim: 128}', 'mlp: {dim: 128}, moe: {experts: 4, top_k: 2, mlp_dim: 16}')
    line = told(base, override)
    assert all(word in line for word in OVERRIDES[override]), line


def nested(key: str, value: str) -> str:
    """A key in YAML."""
    *sections, field = key.split('.')
    return ''.join(f'{section}: {{' for section in sections) + f'{field}: {value}' + '}' * len(sections)


@pytest.mark.parametrize('key', RENAMED)
def test_a_key_that_was_renamed_is_answered_with_its_new_name(key: str) -> None:
    said = f"no key '{key}'; did you mean '{RENAMED[key]}'?"
    assert told(BASE, f'{key}=1').endswith(said)
    assert told(nested(key, '1')).endswith(said)


@pytest.mark.parametrize('key', RENAMED_VALUES)
def test_a_value_that_became_a_section_is_answered_with_its_new_place(key: str) -> None:
    said = f"{key} is a section; did you mean '{RENAMED_VALUES[key]}'?"
    assert told(BASE, f'{key}=true').endswith(said)
    assert told(nested(key, 'true')).endswith(said)


def test_every_new_name_of_a_key_exists() -> None:
    from weft.training.overrides import kind_of

    for name in {**RENAMED, **RENAMED_VALUES}.values():
        for key in name.removesuffix(', which is null for none').replace(' and ', ', ').split(', '):
            assert kind_of(RunConfig, key.split('.')) is not None, key


def test_kinds_of_a_part_are_told_and_another_file_may_add_one() -> None:
    """A config names a kind; what it may say is that kind's, and a wrong one is answered with those that exist."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Toy(MixerConfig):
        kind: Literal['toy'] = 'toy'
        heads: int
        decay: float = 0.9

    line = told(BASE, 'model.attention={kind: mqa, heads: 4}')
    assert "model.attention.kind is 'mqa': no such kind" in line
    assert 'gqa' in line
    assert "no key 'model.attention.decay'" in told(BASE, 'model.attention.decay=0.5')
    MIXERS.register('toy', Toy)
    try:
        config = parse(BASE, 'a.yaml', ['model.attention={kind: toy, heads: 4}', 'model.attention.decay=0.5'])
        assert config.model.attention == Toy(heads=4, decay=0.5)
        assert parse(dump(config), 'b.yaml') == config
        wrong = told(BASE, 'model.attention={kind: toy, heads: 4, kv_heads: 2}')
        assert "no key 'model.attention.kv_heads'" in wrong
        assert 'model.attention.heads is missing' in told(BASE, 'model.attention={kind: toy}')
    finally:
        del MIXERS.configs['toy']


def test_every_key_is_known_and_its_typo_is_found() -> None:
    from weft.training.overrides import keys, kind_of, unknown

    everything = list(keys(RunConfig))
    assert {'name', 'mesh.tensor', 'model.moe.experts', 'model.positions.scaling.kind', 'optimizer.grad_clip'} <= set(
        everything
    )
    for key in everything:
        assert kind_of(RunConfig, key.split('.')) is not None
        *parents, last = key.split('.')
        if len(last) > 4:
            assert f"'{key}'" in unknown(RunConfig, [*parents, last[:2] + last[3:]])


def test_what_is_no_file_is_no_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'configs').mkdir()
    for name in ('demo', 'llama-3.1-8b', 'llama-3.1-70b'):
        (tmp_path / f'configs/{name}.yaml').write_text(BASE)
    (tmp_path / 'huge.yaml').write_text('#' * 2_000_000)
    (tmp_path / 'loop.yaml').symlink_to('loop.yaml')
    os.mkfifo(tmp_path / 'pipe.yaml')
    for path, words in {
        'configs': ['configs: is a folder'],
        'pipe.yaml': ['pipe.yaml: is a pipe'],
        '/dev/zero': ['/dev/zero: is a device'],
        'huge.yaml': ['huge.yaml: 1,048,577 characters', 'at most'],
        'loop.yaml': ['loop.yaml: cannot be read', 'symbolic links'],
        'config/demo.yaml': ["no such config; did you mean 'configs/demo.yaml'?"],
        'demo.yaml': ["did you mean 'configs/demo.yaml'?"],
        'configs/dmeo.yaml': ["did you mean 'configs/demo.yaml'?"],
        'configs/llama-3.1-70b': ["did you mean 'configs/llama-3.1-70b.yaml'?"],
        'llama-3.1-70': ["did you mean 'configs/llama-3.1-70b.yaml'?"],
        'configs/zzz.yaml': ['no such config; known: configs/demo.yaml, configs/llama'],
        'configs/demo': ["did you mean 'configs/demo.yaml'?"],
        'a\0b': [r'a\x00b: no such config'],
        'x' * 300: ['no such config'],
        'configs/demo.yaml/x': ['no such config'],
    }.items():
        with pytest.raises(UserError) as caught:
            load_config(path)
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert str(caught.value).isprintable()


def test_the_nearest_divisor_is_found_at_once() -> None:
    for n in range(1, 60):
        for wanted in range(-3, 70):
            divisors = [d for d in range(1, n + 1) if n % d == 0]
            assert nearest_divisor(n, wanted) == min(divisors, key=lambda d: (abs(d - wanted), d))


def test_a_mistake_in_a_config_ends_the_script_with_2(tmp_path: Path) -> None:
    (tmp_path / 'twice.yaml').write_text(BASE + 'training: {steps: 3}\n')
    command = [sys.executable, str(ROOT / 'scripts/train.py'), 'twice.yaml']
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {'PYTHONPATH': str(ROOT)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr == "error: twice.yaml: key 'training' stands on line 4 and on line 5: leave one of them out\n"
    assert os.listdir(tmp_path) == ['twice.yaml']
