"""What a model costs before it is paid for: parameters, FLOPs, memory, links, time, money; on a machine without accelerators.

python scripts/plan.py configs/models/llama-3.1-70b.yaml --chip h100 --chips 256            the search's best mesh
python scripts/plan.py configs/models/llama-3.1-405b.yaml --chip v5p --chips 512 --mesh data=64,tensor=8 training.batch=512
python scripts/plan.py configs/models/gpt-oss-120b.yaml --chip h100 --chips 8 --serve --rows 64 --length 8192
python scripts/plan.py configs/models/llama-3.1-8b.yaml --chip v6e --chips 64 --html plan.html --price 2.7 --tokens 15e12
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.runtime.errors import LONGEST, UserError, shown
from weft.scripts.entry import as_json
from weft.scripts.entry import run as run_script
from weft.scripts.options import Parser
from weft.sharding.mesh import BATCH, MeshConfig
from weft.storage.files import check_output, output_file

if TYPE_CHECKING:
    from weft.planner.chips import Chip
    from weft.planner.fewest import FewestChips
    from weft.planner.plan import Terms
    from weft.planner.search import SearchResult
    from weft.training.config import RunConfig

# Which mesh it is, what a search found, the plan's part on it, and how many chips hold it where these do not.
Planned = tuple[str, 'SearchResult | None', dict[str, Any], 'FewestChips | None']

MOST = {  # of an option at most: beyond it figures mean nothing
    'chips': 2**18,  # no machine has more
    'tokens': 1e18,
    'price': 1e6,
    'watts': 1e6,
    'rows': 2**24,
    'length': 2**30,
    'prompt': 2**30,
    'latency': 1e9,
    'throughput': 1e15,
    'timeout': 1e7,
}
OWN, GIVEN, SEARCHED = 'the config’s; --mesh auto searches', 'as given', 'found by a search'  # which mesh a plan has


def main() -> None:
    options = parse()
    if options.html is not None:
        check_output('--html', options.html, [options.config])
    plan = make(options)
    if options.html is not None:
        from weft.planner.plan_page import plan_page

        with output_file('--html', options.html) as file:
            file.write(plan_page(plan).encode())
    if options.json:
        print(as_json(plan))
        return
    from rich.console import Console

    from weft.planner.plan_text import print_plan

    print_plan(plan, Console(soft_wrap=False, width=None if sys.stdout.isatty() else 160))
    if options.html is not None:
        print(shown(options.html, LONGEST))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument('config', help='a YAML file, such as configs/models/llama-3.1-8b.yaml')
    parser.add_argument('overrides', nargs='*', metavar='key=value', help='such as training.batch=512')
    parser.add_argument('--chip', required=True, help='h100, h200, b200, gb200, a100, mi300x, v4, v5e, v5p, v6e, v7x …')
    parser.add_argument('--chips', type=int, required=True, help='how many (of v7x: devices, two a chip)')
    mesh = "such as data=8,tensor=4; auto searches; left out: to train the config's if it fits these devices, else auto"
    parser.add_argument('--mesh', help=mesh)
    parser.add_argument('--tokens', type=float, help="to train on (default: the config's steps)")
    parser.add_argument('--price', type=float, help='of a chip for an hour')
    parser.add_argument('--currency', default='USD', metavar='NAME', help='of --price; %(default)s')
    parser.add_argument('--watts', type=float, help='of a chip (default: its data sheet)')
    serving = parser.add_argument_group('serving')
    serving.add_argument('--serve', action='store_true', help='plans decoding instead of training')
    serving.add_argument('--rows', type=int, help='sequences at once (default: 64, or as many as reach a target best)')
    serving.add_argument('--length', type=int, help="of each with its prompt (default: the config's sequence_length)")
    serving.add_argument('--prompt', type=int, help='tokens of each (default: half of --length)')
    target = serving.add_mutually_exclusive_group()
    target.add_argument('--latency', type=float, metavar='MS', help='between two tokens of a row at most')
    target.add_argument('--throughput', type=float, metavar='TOKENS/S', help='of all rows together at least')
    compiling = parser.add_argument_group('compiling, by compilers that `make compilers` installs')
    compiling.add_argument(
        '--compile', action='store_true', help='compiles the real step for these chips, and compares'
    )
    compiling.add_argument('--timeout', type=float, default=1800, metavar='SECONDS', help='of the compiler')
    parser.add_argument('--json', action='store_true', help='all figures as JSON')
    parser.add_argument('--html', type=Path, metavar='FILE', help='a page with pictures')
    return parser.parse_intermixed_args(arguments)


def make(options: argparse.Namespace) -> dict[str, Any]:
    from weft.planner.chips import chip_named

    chip = chip_named(options.chip)
    for name, most in MOST.items():
        value = getattr(options, name)
        if value is not None and not 0 < value <= most:
            bound = f'at most {as_written(most)}' if value > 0 else 'above 0'
            raise UserError(f'--{name} is {shown(as_written(value), 40)}: it must be {bound}')

    from weft.planner import plan
    from weft.training.config import load_config

    config = load_config(options.config, options.overrides).with_planned_vocabulary()
    config, mesh = settle_mesh(options, config)
    terms = plan.Terms(tokens=options.tokens, price=options.price, currency=options.currency, watts=options.watts)
    length = (options.length if options.serve else None) or config.training.sequence_length
    bill = {
        'run': plan.run_part(config),
        'chip': plan.chip_part(options.chip.lower(), chip, options.chips),
        **plan.model_part(config.model, length),
        'search': None,
    }
    if not (config.model.causal and config.model.head):  # what is only scored, nobody waits for
        return bill | {'what': 'bill'}
    if options.serve:
        mesh, found, chosen, fits_from = serve(options, config, chip, length, terms, mesh)
    else:
        mesh, found, chosen, fits_from = train(options, config, chip, terms, mesh)
    more = {'compiled': compiling(options, config, chosen)} if options.compile else {}
    if not chosen['fits']:
        chosen = plan.without_speed(chosen)
    search = {'search': plan.search_part(found) if found else None}
    return bill | search | chosen | {'mesh_is': mesh, 'fits_from': fits_from and fits_from._asdict()} | more


def as_written(value: float) -> str:
    """An option's number as a user writes it."""
    return str(value) if isinstance(value, int) else f'{value:g}'


def compiling(options: argparse.Namespace, config: 'RunConfig', chosen: dict[str, Any]) -> dict[str, Any]:
    """What the compiler makes of the step that was planned."""
    from weft.planner.aot import compile_step
    from weft.planner.plan import as_planned, compiled_part

    what = {'train': 'train', 'serve': 'decode'}[chosen['what']]
    sizes = {'rows': chosen['serving']['rows'], 'length': chosen['serving']['length']} if what == 'decode' else {}
    run = as_planned(config, chosen)
    return compiled_part(compile_step(run, options.chip.lower(), what, timeout=options.timeout, **sizes), chosen)


def train(options: argparse.Namespace, config: 'RunConfig', chip: 'Chip', terms: 'Terms', mesh: str) -> Planned:
    """Which mesh it is, what a search found, the plan's part on training, and how many chips hold it where these do not."""
    from weft.model.block import has_costs
    from weft.planner.fewest import fewest_to_train
    from weft.planner.plan import training_part
    from weft.planner.search import TrainingCandidate, search_training

    if mesh != SEARCHED:
        config.check_sizes()
        chosen, found = TrainingCandidate(config, chip), None
        if mesh == OWN and not chosen.fits:
            mesh = SEARCHED
    if mesh == SEARCHED:
        dataclasses.replace(config, mesh=MeshConfig()).check_sizes()
        if not has_costs(config.model):
            print(
                'plan: a step is traced on each mesh that is tried, which takes minutes; --mesh names one',
                file=sys.stderr,
            )
        found = search_training(config, chip, options.chips)
        chosen = found.ranked[0]
    fits_from = None if chosen.fits else fewest_to_train(config, chip)
    return mesh, found, training_part(chosen, chip, terms), fits_from


def serve(
    options: argparse.Namespace, config: 'RunConfig', chip: 'Chip', length: int, terms: 'Terms', mesh: str
) -> Planned:
    """Which mesh serves it, what a search found, the plan's part on serving, and how many chips hold it where these do not."""
    from weft.planner.fewest import fewest_to_serve
    from weft.planner.plan import serving_part
    from weft.planner.serving import ServingCandidate, ServingTarget, check_serves, search_serving

    most = config.model.max_positions
    if most is not None and length > most:
        raise UserError(f'--length is {length}: this model has {most} positions (model.positions.max)')
    prompt = options.prompt or max(1, length // 2)
    if prompt > length:
        raise UserError(f'--prompt is {prompt}: it must be at most --length, which is {length}')
    latency = None if options.latency is None else options.latency / 1e3
    target = ServingTarget(latency=latency, throughput=options.throughput)
    rows = options.rows or (None if options.latency or options.throughput else 64)
    held = rows or config.mesh.span(BATCH)
    chosen = ServingCandidate(config.model, config.compute, config.mesh, chip, held, length, prompt, target)
    if mesh == SEARCHED:
        found = search_serving(chosen, options.chips, rows)
        chosen = found.ranked[0]
    else:
        found = None
        check_serves(chosen)
    fits_from = None if chosen.fits else fewest_to_serve(chosen, rows)
    return mesh, found, serving_part(chosen, chip, terms), fits_from


def settle_mesh(options: argparse.Namespace, config: 'RunConfig') -> tuple['RunConfig', str]:
    """The config with its mesh, and which that is. Raises UserError for one of another size."""
    from weft.sharding.mesh import parse_mesh

    if options.mesh == 'auto':
        return config, SEARCHED
    given = options.mesh is not None or any(key.startswith('mesh.') for key in options.overrides)
    if options.mesh is not None:
        config = dataclasses.replace(config, mesh=parse_mesh(options.mesh))
    elif not given and (options.serve or config.mesh.size != options.chips):  # a config's mesh is one to train on
        return config, SEARCHED
    size = config.mesh.size
    if size != options.chips:
        works = f'--chips {size}, or --mesh auto' if size <= MOST['chips'] else '--mesh auto'
        raise UserError(
            f'--chips is {options.chips} and the mesh ({config.mesh}) has {size} devices: they must be as many; nearest that '
            f'works: {works}'
        )
    return config, GIVEN if given else OWN


if __name__ == '__main__':
    run_script(main)
