"""A mistake on the command line is one line with what may have been meant, before anything else is looked at."""

import argparse
import importlib

import pytest

from tests.house import ROOT
from weft.runtime.errors import UserError
from weft.runtime.processes import detect_launch
from weft.scripts.command import NOT_COMMANDS
from weft.scripts.options import Parser, finite, whole
from weft.sharding.mesh import LARGEST, MeshConfig, configure_jax, parse_mesh

SCRIPTS = {
    path.stem: importlib.import_module(f'weft.scripts.{path.stem}')
    for path in sorted((ROOT / 'scripts').glob('*.py'))
    if path.stem not in NOT_COMMANDS
}
X = ['runs/x', '--prompt', 'x']
NINES = '9' * 5000


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch):
    """Calls a script's main in this process."""

    def call(name: str, *arguments: str) -> None:
        monkeypatch.setattr('sys.argv', [f'{name}.py', *arguments])
        SCRIPTS[name].main()

    return call


MISTAKES = [
    ('decode', ['runs/x', 'class'], "'class': a text to go on with is given as --prompt TEXT"),
    ('decode', [*X, '--temp', '0.5'], "there is no option --temp; did you mean '--temperature'?"),
    ('decode', [*X, '--max-tokens', '5'], "there is no option --max-tokens; did you mean '--max-new-tokens'?"),
    ('decode', [*X, '--n', '4'], "there is no option --n; did you mean '-n'?"),
    ('decode', [*X, '--nothing-like-it'], 'there is no option --nothing-like-it; --help'),
    ('decode', [*X, '--esc\x1b[2J'], r'there is no option --esc\x1b[2J'),
    ('decode', ['runs/x', '--prompt', '-x'], 'argument --prompt: expected one argument (one that begins with a dash'),
    ('decode', [], 'required: RUN'),
    ('decode', [*X, '--top-k', '3000000000'], '--top-k: 3000000000: it must be at least 0 and at most 2,147,483,647'),
    ('decode', [*X, '--top-k', '1.5'], "--top-k: '1.5' is no whole number"),
    ('decode', [*X, '--top-k', NINES], '--top-k: 999'),
    ('decode', [*X, '--temperature', 'nan'], "--temperature: 'nan' is no finite number"),
    ('decode', [*X, '--temperature', 'inf'], "--temperature: 'inf' is no finite number"),
    ('decode', [*X, '--top-p', '1e999'], '--top-p'),
    ('decode', [*X, '--length-penalty', 'nan'], '--length-penalty'),
    ('decode', [*X, '--length-penalty', '1e9'], '--length-penalty 1000000000.0: it must be between -10 and 10'),
    ('decode', [*X, '--seed', '-1'], '--seed: -1'),
    ('decode', [*X, '--seed', str(2**63)], '--seed: 9223372036854775808'),
    ('decode', [*X, '--beams', '1000000000'], '--beams: 1000000000: it must be at least 0 and at most 1,024'),
    ('decode', [*X, '--batch', '0'], '--batch: 0: it must be at least 1'),
    ('decode', [*X, '--max-new-tokens', '1' + '0' * 30], '--max-new-tokens: 1000'),
    ('decode', [*X, '-n', '0'], '-n: 0: it must be at least 1'),
    ('decode', [*X, '--step', '-1'], '--step: -1'),
    ('train', ['configs/demo.yaml', '--steps', '5'], 'there is no option --steps; did you mean training.steps=5?'),
    ('train', ['configs/demo.yaml', '--learning-rate=3'], 'did you mean optimizer.learning_rate=3?'),
    ('train', ['configs/demo.yaml', '--frehs'], "did you mean '--fresh'?"),
    ('convert', ['runs/demo', 'out'], "invalid choice: 'runs/demo'"),
    ('convert', ['export', 'a', 'b', '--famly', 'x'], "did you mean '--family'?"),
    ('embeddings', ['runs/x', '--nearest', 'x', '--laier', '2'], "did you mean '--layer'?"),
    ('xray', ['runs/x', '--texts', 'x'], "did you mean '--text'?"),
    ('xray', ['index', 'runs/x', '--token', '5'], "did you mean '--tokens'?"),
    ('evaluate', ['runs/x', 'more'], "'more': one argument too many"),
    ('history', ['--onyl', 'lstm'], "did you mean '--only'?"),
    ('plan', ['a.yaml', '--chip', 'h100', '--chips', '8', '--pirce', '3'], "did you mean '--price'?"),
    ('benchmark', ['train', 'a.yaml', '--step', '3'], "did you mean '--steps'?"),
    ('benchmark', ['train', 'a.yaml', '--steps', 'x'], "'x' is no whole number"),
]


@pytest.mark.parametrize(('name', 'arguments', 'message'), MISTAKES, ids=lambda part: ascii(part)[:40])
def test_a_mistake_is_one_line(call, name: str, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        call(name, *arguments)
    line = str(caught.value)
    assert message in line, line
    assert line.isprintable()
    assert len(line) < 600


@pytest.mark.parametrize('name', SCRIPTS)
def test_every_script_says_its_version_and_its_options(call, capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as ended:
        call(name, '--version')
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.count('\n') == 1
    assert all(f'{part} ' in out for part in ('weft', 'jax', 'jaxlib', 'Python'))
    with pytest.raises(SystemExit):
        call(name, '--help')
    assert '--version' in capsys.readouterr().out


def test_help_says_each_default_once(call, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call('decode', '--help')
    said = ' '.join(capsys.readouterr().out.split())
    for words in ('of an answer (default: 128)', 'answers to each prompt (default: 1)', 'at once (default: 16)'):
        assert words in said
    assert 'default: None' not in said
    assert 'default: []' not in said
    assert 'default: False' not in said


def test_numbers_have_bounds_and_no_other_letters() -> None:
    assert (whole(0)('12'), whole(-3)('-3'), whole(1, 5)('+5')) == (12, -3, 5)
    for text in ('', '1_0', '١', '1e3', '0x1', ' 1', '1.0', NINES, '6', '-1', 'nan'):
        with pytest.raises(argparse.ArgumentTypeError):
            whole(1, 5)(text)
    assert finite('1e-3') == 1e-3
    for text in ('', 'nan', '-inf', '1e999', '١', 'x'):
        with pytest.raises(argparse.ArgumentTypeError):
            finite(text)


def test_flags_are_not_shortened() -> None:
    parser = Parser()
    parser.add_argument('--steps')
    with pytest.raises(UserError, match='no option --st; did you mean'):
        parser.parse_args(['--st', '3'])


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('tensor', 'tensor needs a whole number'),
        ('tensor=2,tensor=1', 'tensor stands twice'),
        (f'tensor={NINES}', 'at most 9 digits'),
        ('tensor=２', 'whole number'),
        ('tensor=-2', 'whole number'),
        ('tensor=0', 'at least 1 device'),
        ('tp=2', "no axis 'tp'"),
        ('a\x1b[2J=1', r"no axis 'a\\x1b\[2J'"),
        ('replica=99999999', f'at most {LARGEST}'),
        ('replica=99999,data=99999', f'at most {LARGEST}'),
    ],
)
def test_a_mesh_that_is_none_is_told(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_mesh(text)
    assert str(caught.value).isprintable()


def test_spaces_in_a_mesh_are_passed_over() -> None:
    assert parse_mesh(' tensor = 2 , ') == MeshConfig(tensor=2)
    assert parse_mesh('') == MeshConfig()


def test_more_devices_than_a_cpu_plays_are_refused_before_jax_starts() -> None:
    with pytest.raises(UserError, match=r'5,000 devices of this machine: at most 1,024 work'):
        configure_jax(5000, 'float32')
    with pytest.raises(UserError, match=r'50,000 devices of this machine'):
        configure_jax(100_000, 'float32', processes=2)


SLURM = {
    'SLURM_JOB_ID': '1',
    'SLURM_STEP_NODELIST': 'a',
    'SLURM_NTASKS': '2',
    'SLURM_PROCID': '1',
    'SLURM_LOCALID': '0',
}


@pytest.mark.parametrize(
    ('variables', 'message'),
    [
        (SLURM | {'SLURM_NTASKS': 'two'}, "SLURM_NTASKS is 'two'"),
        (SLURM | {'SLURM_NTASKS': ''}, "SLURM_NTASKS is ''"),
        (SLURM | {'SLURM_NTASKS': NINES}, 'SLURM_NTASKS is .* at most 9 digits'),
        (SLURM | {'SLURM_NTASKS': '0'}, "SLURM_NTASKS is '0': it must be a whole number of at least 1"),
        (SLURM | {'SLURM_PROCID': '-1'}, "SLURM_PROCID is '-1'"),
        (SLURM | {'SLURM_LOCALID': 'x\x1b'}, r"SLURM_LOCALID is 'x\\x1b'"),
        ({'WEFT_COORDINATOR': 'h:99999', 'WEFT_PROCESSES': '2', 'WEFT_PROCESS': '0'}, 'must be HOST:PORT'),
        ({'WEFT_COORDINATOR': 'h:1', 'WEFT_PROCESSES': NINES, 'WEFT_PROCESS': '0'}, 'WEFT_PROCESSES is'),
    ],
)  # fmt: skip
def test_what_a_cluster_says_is_checked(variables: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        detect_launch({}, variables)
