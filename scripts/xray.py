"""Looks inside a model while it reads a text, or two texts side by side, and writes what it finds as one page.

python scripts/xray.py runs/smollm2 --text 'The capital of France is' --out report.html
python scripts/xray.py runs/smollm2 --text 'He ate an apple' --against 'He works for Apple' --out report.html
python scripts/xray.py index runs/demo --tokens 200000     which of the run's own texts fire each cell most
python scripts/xray.py induction runs/smollm2              the heads that make it repeat, beside random ones

docs/interpret.md explains each instrument.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from weft.runtime.errors import LONGEST, UserError, shown
from weft.scripts.entry import as_json, run
from weft.scripts.options import Parser, finite, version, whole
from weft.storage.files import check_output, output_file, writing

MOST_DRAWS = 10_000
EVERY = 5.0  # seconds between lines that say how far the work is


def main() -> None:
    others: dict[str, Callable[[Sequence[str]], None]] = {'index': make_index, 'induction': test_induction}
    if (name := (sys.argv[1:] or [''])[0]) in others:
        others[name](sys.argv[2:])
    else:
        examine()


def examine() -> None:
    """Writes the report of a text."""
    parser = Parser(description=__doc__)
    parser.add_argument('run', metavar='RUN', help='a folder such as runs/demo')
    parser.add_argument('--text', metavar='TEXT', help='what the model reads')
    parser.add_argument('--against', metavar='TEXT', help='another text, to be put beside it')
    cell = 'a cell to ablate and to tell of beside those that fire most, both from 0; may be given several times'
    parser.add_argument('--cell', action='append', type=layer_and_cell, default=[], metavar='LAYER:CELL', help=cell)
    parser.add_argument('--out', metavar='FILE.html', help='the page to write')
    parser.add_argument('--json', metavar='FILE.json', help='the page’s numbers to write')
    add_run_options(parser)
    options = parser.parse_args()
    if options.text is None:
        raise UserError('give --text TEXT, which the model is to read')
    if not (options.out or options.json):
        raise UserError('give --out FILE.html, the page to write, or --json FILE.json, its numbers')
    for option in ('out', 'json'):
        if getattr(options, option):
            check_output(f'--{option}', Path(getattr(options, option)))
    opened = open_stacked(options)

    import jax

    from weft.interpret.xray.report import Made, report
    from weft.runtime.device_memory import explain_oom

    texts = options.text if options.against is None else f'“{options.text}” and “{options.against}”'
    title = f'X-ray of {opened.config.name}: {texts}'
    command = shlex.join(['python', 'scripts/xray.py', *sys.argv[1:]])
    made = Made(command, version().split(',')[0].removeprefix('weft '), str(options.run), title)
    tell = 'out of memory on a device: the activations of a text; give a shorter one, or use --mesh'
    with jax.set_mesh(opened.mesh), explain_oom(lambda: tell):
        found = report(opened, options.text, options.against, made, say_stage, options.cell)
    if options.json:
        write_text('--json', options.json, as_json(found) + '\n')
    if options.out:
        from weft.interpret.page.build import build

        write_text('--out', options.out, build(found))


def make_index(arguments: Sequence[str]) -> None:
    """Writes the index of the texts that fire each cell most."""
    parser = Parser(prog='xray.py index', description=make_index.__doc__)
    parser.add_argument('run', metavar='RUN', help='a folder such as runs/demo')
    parser.add_argument('--tokens', type=whole(1), default=200_000, metavar='N', help='to read, about')
    data = 'files, folders or globs; the run’s own training data otherwise, which an imported model has not'
    parser.add_argument('--data', nargs='+', metavar='PATH', help=data)
    parser.add_argument('--field', default='text', help='the field of a JSONL object that holds the text')
    add_run_options(parser)
    options = parser.parse_args(arguments)

    from weft.interpret.xray import index, rows
    from weft.training.run_folder import run_folder

    folder = run_folder(options.run)
    if not isinstance(folder, Path):
        raise UserError(f'{options.run} is in a bucket: an index is written into a folder; fetch the run first')
    found = rows.given(options.data, options.field) if options.data else None
    if found is None:
        rows.check_own(folder)
    opened = open_stacked(options)

    import jax

    from weft.interpret.xray.cells import dense_layers
    from weft.interpret.xray.observed import check_model
    from weft.runtime.device_memory import explain_oom
    from weft.storage.lock import Lock

    check_model(opened.kind)
    layers = dense_layers(opened.kind)
    index.check_cells(layers)
    samples, source, digest = rows.own(folder) if found is None else rows.packed(opened, found, options.data)
    about = {'step': opened.step, 'layers': layers, 'source': source, 'digest': digest}
    numbers = index.numbers_of(samples, opened.config.seed, options.tokens)
    tell = 'out of memory on a device: hidden units of some rows; use --mesh'
    with Lock(folder / index.FOLDER), jax.set_mesh(opened.mesh), explain_oom(lambda: tell):
        told = say_stage('index, in rows', len(numbers))
        made = index.build(opened.model, samples, numbers, about, folder, lambda done, _: told(done))
    where = shown(folder / index.FOLDER, LONGEST)
    print(f'{where}: {made.tokens:,} tokens in {made.done} rows of {source}; {len(layers)} layers of cells')


def test_induction(arguments: Sequence[str]) -> None:
    """Finds the heads that look like induction heads, and ablates them beside as many random heads of the same layers."""
    parser = Parser(prog='xray.py induction', description=test_induction.__doc__)
    parser.add_argument('run', metavar='RUN', help='a folder such as runs/demo')
    parser.add_argument('--draws', type=whole(2, MOST_DRAWS), default=20, metavar='N', help='of random heads')
    least = 'score, of 1, from which on a head is taken for an induction head'
    parser.add_argument('--least', type=finite, default=0.3, metavar='SCORE', help=least)
    parser.add_argument('--seed', type=whole(0), default=0, metavar='S', help='of the random tokens and the draws')
    parser.add_argument('--json', action='store_true', help='one JSON object')
    add_run_options(parser)
    options = parser.parse_args(arguments)
    if not 0 < options.least <= 1:
        raise UserError(f'--least {options.least:g}: it must be above 0 and at most 1')
    opened = open_stacked(options)

    import jax

    from weft.interpret.xray.induction import induction_test
    from weft.interpret.xray.observed import check_model, without_text
    from weft.runtime.device_memory import explain_oom

    check_model(opened.kind)
    tokenizer = opened.tokenizer
    tell = 'out of memory on a device: activations and logits of 8 rows; use --mesh'
    with jax.set_mesh(opened.mesh), explain_oom(lambda: tell):
        found = induction_test(
            opened.model,
            tokenizer.prefix,
            opened.context,
            draws=options.draws,
            least=options.least,
            seed=options.seed,
            leave_out=without_text(tokenizer, opened.config.model),
            stage=say_stage,
        )
    if options.json:
        print(as_json(found.figures()))
        return
    heads = ', '.join(
        f'{layer}.{head} ({score:.2f})' for (layer, head), score in zip(found.heads, found.scores, strict=True)
    )
    mean = sum(found.random) / len(found.random)
    print(f'induction heads, layer.head (score): {heads}')
    print('loss on random tokens, nats a token')
    print(f'  first half                   {found.first_half:.4f}')
    print(f'  second half                  {found.loss:.4f}')
    print(f'  without these {len(found.heads):3} heads       {found.without:.4f}   (+{found.without - found.loss:.4f})')
    print(f'  without as many random ones  {mean:.4f}   (+{mean - found.loss:.4f}, mean of {len(found.random)} draws)')
    low, high = found.interval
    print(f'ratio of the rises {found.ratio:.2f}, 95 % interval {low:.2f} to {high:.2f} over draws and texts')


def layer_and_cell(text: str) -> tuple[int, int]:
    """The type of an option: two whole numbers."""
    layer, colon, cell = text.partition(':')
    if not colon:
        raise argparse.ArgumentTypeError(f'{shown(text, 40, quoted=True)}: give LAYER:CELL, such as 2:17')
    return whole(0)(layer), whole(0)(cell)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """What all three take."""
    parser.add_argument('--step', type=whole(0), metavar='N', help='the checkpoint of this step; the newest otherwise')
    parser.add_argument('--mesh', metavar='AXES', help='such as expert=2,tensor=2; the run’s own otherwise')


def open_stacked(options: argparse.Namespace) -> Any:
    """The run of a command."""
    from weft.inference.run import open_run

    return open_run(options.run, options.mesh, stacked=True, step=options.step)


def say_stage(what: str, count: int) -> Callable[[int], None]:
    """Says on stderr what begins and, every few seconds, how far it is."""
    print(f'{what}' if count == 1 else f'{what}: {count}', file=sys.stderr, flush=True)
    last = time.monotonic()

    def done(number: int) -> None:
        nonlocal last
        if number < count and time.monotonic() - last > EVERY:
            last = time.monotonic()
            print(f'{what}: {number} of {count}', file=sys.stderr, flush=True)

    return done


def write_text(option: str, path: str, text: str) -> None:
    """Writes a result, whole or not at all, and says so."""
    with output_file(option, path, 'w') as file, writing(Path(path)):
        file.write(text)
    print(f'{shown(path, LONGEST)}: {len(text.encode()):,} bytes')


if __name__ == '__main__':
    run(main, lasting=True)
