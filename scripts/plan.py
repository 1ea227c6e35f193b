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
from typing import Any

from scripts.entry import as_json
from scripts.entry import run as run_script
from scripts.options import Parser
from sharding.mesh import BATCH, MeshConfig
from storage.files import Output, check_output

POSITIVE = ('chips', 'tokens', 'price', 'watts', 'rows', 'length', 'prompt', 'latency', 'throughput', 'timeout')


def main() -> None:
    options = parse()
    if options.html is not None:
        check_output('--html', options.html, [options.config])
    plan = make(options)
    if options.html is not None:
        from analysis.plan_page import page

        with Output('--html', options.html) as file:
            file.write(page(plan).encode())
    if options.json:
        print(as_json(plan))
        return
    from rich.console import Console

    from analysis.plan_text import show

    show(plan, Console(soft_wrap=False, width=None if sys.stdout.isatty() else 160))
    if options.html is not None:
        print(options.html)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of a command line."""
    parser = Parser(description=__doc__)
    parser.add_argument('config', help='a YAML file, such as configs/models/llama-3.1-8b.yaml')
    parser.add_argument('overrides', nargs='*', metavar='key=value', help='such as training.batch=512')
    parser.add_argument('--chip', required=True, help='h100, h200, b200, gb200, a100, mi300x, v4, v5e, v5p, v6e, v7x …')
    parser.add_argument('--chips', type=int, required=True, help='how many (of v7x: devices, two a chip)')
    parser.add_argument(
        '--mesh',
        help="such as data=8,tensor=4; auto searches; left out: to train the config's where it has as many devices, else auto",
    )
    parser.add_argument('--tokens', type=float, help="to train on (default: the config's steps)")
    parser.add_argument('--price', type=float, help='of a chip for an hour')
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
    compiling.add_argument(
        '--timeout', type=float, default=1800, metavar='SECONDS', help='of the compiler (default: 1800)'
    )
    parser.add_argument('--json', action='store_true', help='all figures as JSON')
    parser.add_argument('--html', type=Path, metavar='FILE', help='a page with pictures')
    return parser.parse_intermixed_args(arguments)


def make(options: argparse.Namespace) -> dict[str, Any]:
    """The plan that the options ask for."""
    from sharding.chips import named
    from sharding.errors import UserError

    chip = named(options.chip)
    for name in POSITIVE:
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f'--{name} is {value:g}: it must be above 0')

    from analysis import plan
    from training.config import load

    config = load(options.config, options.overrides)
    config = config if config.model.vocabulary else config.with_vocabulary(config.data.vocabulary)
    config, searched = settle_mesh(options, config)
    terms = plan.Terms(tokens=options.tokens, price=options.price, watts=options.watts)
    length = (options.length if options.serve else None) or config.training.sequence_length
    if not (config.model.causal and config.model.head):  # what is only scored, nobody waits for
        found, chosen = None, {'what': 'bill'}
    elif options.serve:
        found, chosen = serve(options, config, chip, length, terms, searched)
    else:
        found, chosen = train(options, config, chip, terms, searched)
    compiled = compiling(options, config, chosen) if options.compile and 'time' in chosen else None
    return {
        'run': plan.run_part(config),
        'chip': plan.chip_part(options.chip.lower(), chip, options.chips),
        **plan.model_part(config.model, length),
        'search': plan.search_part(found) if found else None,
        **chosen,
        **({'compiled': compiled} if compiled else {}),
    }


def compiling(options, config, chosen: dict[str, Any]) -> dict[str, Any]:
    """What the compiler makes of the step that was planned."""
    from analysis.aot import compile_step
    from analysis.plan import compiled_part, settled

    what = {'train': 'train', 'serve': 'decode'}[chosen['what']]
    sizes = {'rows': chosen['serving']['rows'], 'length': chosen['serving']['length']} if what == 'decode' else {}
    run = settled(config, chosen)
    return compiled_part(compile_step(run, options.chip.lower(), what, timeout=options.timeout, **sizes), chosen)


def train(options, config, chip, terms, searched: bool):
    """What a search found, if there was one, and the plan's part on training."""
    from analysis.plan import training_part
    from analysis.search import Choice, search

    dataclasses.replace(config, mesh=MeshConfig() if searched else config.mesh).check_sizes()
    found = search(config, chip, options.chips) if searched else None
    return found, training_part(found.ranked[0] if found else Choice(config, chip), chip, terms)


def serve(options, config, chip, length: int, terms, searched: bool):
    """The same on serving."""
    from analysis.plan import serving_part
    from analysis.serving import Serving, Target, check_serves, search_serving

    target = Target(latency=None if options.latency is None else options.latency / 1e3, throughput=options.throughput)
    rows = options.rows or (None if options.latency or options.throughput else 64)
    prompt = options.prompt or max(1, length // 2)
    if searched:
        ways = search_serving(config.model, chip, options.chips, rows, length, prompt, target)
        return ways, serving_part(ways.ranked[0], chip, terms)
    one = Serving(config.model, config.mesh, chip, rows or config.mesh.span(BATCH), length, prompt, target)
    check_serves(one)
    return None, serving_part(one, chip, terms)


def settle_mesh(options: argparse.Namespace, config):
    """The config with its mesh, and whether one is to be searched. Raises UserError for one of another size."""
    from sharding.errors import UserError
    from sharding.mesh import parse_mesh

    if options.mesh == 'auto':
        return config, True
    if options.mesh is not None:
        config = dataclasses.replace(config, mesh=parse_mesh(options.mesh))
    elif not any(key.startswith('mesh.') for key in options.overrides) and (
        options.serve or config.mesh.size != options.chips  # a config's mesh is one to train on
    ):
        return config, True
    if config.mesh.size != options.chips:
        raise UserError(
            f'--chips is {options.chips} and the mesh ({config.mesh}) has {config.mesh.size} devices: they must be as many; '
            f'nearest that works: --chips {config.mesh.size}, or --mesh auto'
        )
    return config, False


if __name__ == '__main__':
    run_script(main)
