"""Measures speed and memory of real steps on this machine.

python scripts/benchmark.py train configs/demo.yaml --steps 20
python scripts/benchmark.py decode configs/demo.yaml --rows 4 --prompt 128 --new 64
python scripts/benchmark.py start runs/demo --turns 3         to the first token, compiled anew and not
python scripts/benchmark.py experts
python scripts/benchmark.py nanogpt configs/nanogpt-cpu.yaml --repository nanoGPT/ --python torchenv/bin/python
python scripts/benchmark.py transformers runs/smollm2 --python torchenv/bin/python --rows 1
python scripts/benchmark.py standard             the set of benchmarks/, as Markdown

Tokens a second are those of all rows on all devices together, but for tokens_per_second_per_row.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from weft.scripts.entry import as_json, run
from weft.scripts.options import Parser, whole

# Of each benchmark the options that are counts, with their defaults.
COUNTS = {
    'train': {'steps': 20},
    'decode': {'rows': 1, 'prompt': 128, 'new': 64},
    'start': {'turns': 3},
    'experts': {'rows': 8192, 'experts': 8, 'dim': 256, 'hidden': 512},
    'transformers': {'rows': 1, 'prompt': 64, 'new': 33, 'turns': 7},
}
HELP = {'rows': 'worked on together', 'prompt': 'tokens of each prompt', 'new': 'tokens decoded after it'}
HELP |= dict.fromkeys(('steps', 'turns'), 'whose median is reported')
CPU = (
    ('train', 'configs/demo.yaml', '--steps', '10'),
    ('train', 'configs/demo.yaml', 'mesh.expert=1', 'mesh.tensor=1', '--steps', '10'),
    ('train', 'configs/nanogpt-cpu.yaml', '--steps', '50'),
    ('decode', 'configs/demo.yaml', '--rows', '4', '--prompt', '128', '--new', '64'),
    ('decode', 'configs/demo.yaml', 'mesh.expert=1', 'mesh.tensor=1', '--rows', '1', '--prompt', '128', '--new', '64'),
    ('experts',),
    ('experts', '--rows', '4096', '--experts', '4', '--hidden', '256'),
)
LLAMA = ('configs/models/llama-3.1-8b.yaml', 'mesh.data=1')
OLMOE = ('configs/models/olmoe-1b-7b.yaml', 'mesh.expert=1')
EIGHT = ('model.layers=8', 'training.batch=4', 'training.sequence_length=4096')
ACCELERATOR = (  # one device with 80 GB or more
    ('train', 'configs/models/gpt2.yaml'),
    ('train', *LLAMA, *EIGHT, 'compute.remat=none'),
    ('train', *OLMOE, *EIGHT, 'model.layers=4'),
    ('decode', *LLAMA, '--rows', '1', '--prompt', '1024', '--new', '64'),
    ('decode', *LLAMA, '--rows', '64', '--prompt', '1024', '--new', '64'),
    ('decode', *OLMOE, '--rows', '8', '--prompt', '1024', '--new', '64'),
    ('experts', '--rows', '65536', '--experts', '64', '--dim', '2048', '--hidden', '1024', '--dtype', 'bfloat16'),
    ('experts', '--rows', '16384', '--experts', '8', '--dim', '4096', '--hidden', '14336', '--dtype', 'bfloat16'),
)


def main() -> None:
    parser = Parser(description=__doc__)
    what = parser.add_subparsers(dest='what', required=True)
    options = {name: what.add_parser(name) for name in (*COUNTS, 'nanogpt', 'standard')}
    for name in ('train', 'decode', 'nanogpt'):
        options[name].add_argument('config')
        options[name].add_argument('overrides', nargs='*', metavar='key=value')
    for name, counts in COUNTS.items():
        for flag, default in counts.items():
            least = 8 if flag == 'new' else 1
            options[name].add_argument(f'--{flag}', type=whole(least), default=default, help=HELP.get(flag))
    for name in ('train', 'decode'):
        options[name].add_argument('--profile', type=whole(0), default=0, metavar='N', help='lists the longest kernels')
    options['train'].add_argument(
        '--taps',
        nargs='+',
        default=(),
        metavar='PATTERN',
        help='activations to capture, as residual.*: what that costs',
    )
    for name in ('start', 'transformers'):
        options[name].add_argument('run', metavar='RUN', help='a folder such as runs/demo')
    options['start'].add_argument('--prompt', default='The capital of France is', metavar='TEXT')
    options['experts'].add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
    options['experts'].add_argument('--backend', default='auto', help='of the grouped matmul: compute.grouped_matmul')
    options['nanogpt'].add_argument('--repository', type=Path, required=True, help='a checkout of nanoGPT')
    for name in ('nanogpt', 'transformers'):
        options[name].add_argument('--python', default=sys.executable, help='with torch; of transformers, with it too')
    options['transformers'].add_argument('--mesh', metavar='AXES', help='such as tensor=2; the run’s own otherwise')
    for option in options.values():
        option.add_argument('--json', action='store_true', help='one JSON object')
    given = _parse(parser)
    if given.what == 'standard':
        standard()
        return
    figures = measured(given)
    lines = (f'{name:>20}  {_show(name, value)}' for name, value in figures.items())
    print(as_json(figures) if given.json else '\n'.join(lines))


def measured(given: argparse.Namespace) -> dict[str, Any]:
    if given.what == 'experts':
        from weft.proof.speed import measure_experts

        return measure_experts(given.rows, given.experts, given.dim, given.hidden, given.dtype, given.backend)
    if given.what == 'start':
        from weft.proof.startup import measure_start

        return measure_start(given.run, given.prompt, given.turns)
    if given.what == 'transformers':
        from weft.proof.peers import beside_transformers

        sizes = given.rows, given.prompt, given.new
        return beside_transformers(given.run, given.python, *sizes, rounds=given.turns, mesh=given.mesh)

    from weft.training.config import load_config

    config = load_config(given.config, given.overrides)

    from weft.sharding.mesh import configure_jax

    configure_jax(config.mesh.size, config.compute.dtype)

    from weft.proof import peers
    from weft.proof import speed as measure

    if given.what == 'train':
        return measure.measure_training(config, given.steps, given.profile, given.taps)
    if given.what == 'decode':
        return measure.measure_decoding(config, given.rows, given.prompt, given.new, given.profile)
    return peers.beside_nanogpt(config, given.repository, given.python)


def standard() -> None:
    """Runs the platform's standard set, each in a process of its own, and prints one Markdown table for each kind."""
    # This process must leave the device alone.
    asking = [sys.executable, '-c', 'import jax; print(jax.default_backend())']
    platform = subprocess.run(asking, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    rows: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for arguments in CPU if platform == 'cpu' else ACCELERATOR:
        command = [sys.executable, __file__, *arguments, '--json']
        print(' '.join(arguments), file=sys.stderr)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.setdefault(arguments[0], []).append((' '.join(arguments), json.loads(done.stdout.splitlines()[-1])))
    for kind, found in rows.items():
        print(f'\n| {kind} | ' + ' | '.join(arguments for arguments, _ in found) + ' |')
        print('|---|' + '---:|' * len(found))
        for name, value in found[0][1].items():
            if not isinstance(value, dict) and not name.endswith('basis'):
                print(f'| {name} | ' + ' | '.join(_show(name, figures[name]) for _, figures in found) + ' |')


def _parse(parser: Parser) -> argparse.Namespace:
    # argparse stops reading overrides at the first option; what follows it is gathered here.
    given, rest = parser.parse_known_args()
    if not hasattr(given, 'overrides') or any(part.startswith('-') for part in rest):
        parser.none_left(rest)
    if rest:
        given.overrides += rest
    return given


def _show(name: str, value: Any) -> str:
    if value is None:
        return 'unknown'
    if isinstance(value, dict):
        return ', '.join(f'{key} {_show(name, part)}' for key, part in value.items())
    if not isinstance(value, float):
        return f'{value:,}' if isinstance(value, int) else str(value)
    if name.endswith('seconds'):
        return f'{value * 1e3:.2f} ms'
    if 'share' in name or name.endswith('ratio'):
        return f'{value:.3f}'
    return f'{value:,.0f}' if value < 1e6 else f'{value:.4g}'


if __name__ == '__main__':
    run(main)
