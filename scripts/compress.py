"""Compresses a run: its linear maps in fewer bits, as factors, rounded, pruned, or a model with fewer parts.

python scripts/compress.py runs/demo --method gptq-int4 --out runs/demo-int4
python scripts/compress.py runs/demo --method svd --budget 0.5 --spread sensitivity --out runs/demo-svd
python scripts/compress.py runs/smollm2 --method int8 --data README.md --out runs/smollm2-int8
python scripts/compress.py study            the study of docs/compression.md, cell by cell; see study --help

The new run decodes, evaluates and goes on training like any other (scripts/train.py runs/demo-svd/config.yaml). The budget is a
share of the bits of all weights as float32, scales and indices included, also of what no method touches.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from weft.runtime.errors import UserError
from weft.scripts.entry import as_json, run
from weft.scripts.options import Parser, finite, whole

if TYPE_CHECKING:
    import numpy as np

    from weft.data.packing import Samples
    from weft.inference.run import TrainedRun


def main() -> None:
    if sys.argv[1:2] == ['study']:
        from weft.scripts.compression_study import study

        study(sys.argv[2:])
        return
    make(arguments(sys.argv[1:]))


def quantise(source: str, target: str, kind: str, mesh: str | None) -> None:
    """What convert.py calls: rounds to the nearest, without calibration text."""
    make(arguments([source, '--method', kind, '--out', target, *(['--mesh', mesh] if mesh else [])]))


def make(options: argparse.Namespace) -> None:
    """Makes the run that options ask for."""
    from weft.compress.transform import NAMES
    from weft.runtime.errors import nearest
    from weft.storage.staged import refuse_existing
    from weft.training.importing import check_local

    if options.method not in NAMES:
        raise UserError(f'--method {options.method!r}: no such method{nearest(options.method, NAMES)}')
    check_local(Path(options.out))
    refuse_existing(Path(options.out))

    from weft.inference.run import open_run

    compress(open_run(options.run, options.mesh, needs_text=False, stacked=True), options)


def arguments(words: list[str]) -> argparse.Namespace:
    """The options, checked."""
    parser = Parser(description=__doc__)
    parser.add_argument('run', metavar='RUN', help='a folder such as runs/demo')
    parser.add_argument('--method', required=True, metavar='NAME', help='--list names them all')
    parser.add_argument('--budget', type=share, metavar='SHARE', help='of all bits, such as 0.5')
    parser.add_argument('--out', metavar='RUN2', help='the run to make')
    parser.add_argument(
        '--spread',
        choices=('uniform', 'sensitivity', 'middle'),
        default='uniform',
        help='all maps alike, as calibration text says, or a few layers hard from the middle outward',
    )
    parser.add_argument('--hard', type=share, default=0.1, metavar='SHARE', help='what --spread middle leaves of a map')
    parser.add_argument(
        '--layers', type=whole(0), metavar='N', help='that --spread middle compresses, whatever the budget'
    )
    parser.add_argument(
        '--objective',
        choices=('whitened', 'frobenius'),
        default='whitened',
        help='whose error is made small: outputs or weights',
    )
    parser.add_argument(
        '--maps', nargs='+', default=['*'], metavar='PATTERN', help="such as 'layers.*.mlp.*'; all otherwise"
    )
    parser.add_argument('--order', type=whole(2), default=3, metavar='N', help='cores of a tensor train')
    parser.add_argument('--rank', type=whole(1), metavar='R', help='of tensor trains, whatever the budget')
    parser.add_argument('--group', type=whole(2), default=32, metavar='N', help='inputs that share a scale of int4')
    parser.add_argument(
        '--compute',
        choices=('auto', 'factors', 'rebuild'),
        default='auto',
        help='how the new run multiplies by factors',
    )
    parser.add_argument('--data', nargs='+', metavar='PATH', help='calibration text; the run’s training data otherwise')
    parser.add_argument(
        '--tokens', type=whole(256), default=16384, metavar='N', help='of calibration text, and of what is evaluated'
    )
    parser.add_argument('--mesh', metavar='AXES', help='such as data=2; the run’s own otherwise')
    parser.add_argument('--json', action='store_true', help='one JSON object instead of lines')
    parser.add_argument('--list', action='store_true', help='the methods, and nothing else')
    if '--list' in words:
        list_methods()
        raise SystemExit(0)
    options = parser.parse_args(words)
    if options.out is None:
        raise UserError('--out is missing: the run to make, such as runs/demo-int8')
    return options


def share(text: str) -> float:
    """The type of an option: a share above 0."""
    found = finite(text)
    if not 0 < found <= 1:
        raise argparse.ArgumentTypeError(f'{found}: it must be above 0 and at most 1, such as 0.5')
    return found


def list_methods() -> None:
    """Prints all methods, a line each."""
    from weft.compress.transform import METHODS, STRUCTURES

    about = {name: one.about for name, one in METHODS.items()} | {name: one.about for name, one in STRUCTURES.items()}
    for name, line in about.items():
        print(f'{name:14} {line}')


def quiet(*words: Any, **how: Any) -> None:
    """Says nothing."""


def compress(opened: 'TrainedRun', options: argparse.Namespace) -> None:
    """Does it, with progress; what became of each map is kept in the new run."""
    import dataclasses

    import jax

    from weft.compress.activations import input_statistics
    from weft.compress.compressed_run import REPORT, write_run
    from weft.compress.methods.base import METHODS, Options
    from weft.compress.transform import STRUCTURES, MapRow, compress_model
    from weft.compress.weights import layer_arrays
    from weft.storage import files as disk

    say = quiet if options.json else print
    method = METHODS.get(options.method)
    whitens = options.objective == 'whitened' and method is not None and not method.fixed
    measures = options.method in STRUCTURES or whitens or (method is not None and method.measures)
    begun = time.monotonic()
    c = opened.config.model
    calibration, held_out = texts(opened, options, measures or options.spread == 'sensitivity')
    statistics = None

    def progress(done: int, of: int) -> None:
        if done == of:
            say(f'calibration: {of} rows read')

    if measures:
        assert calibration is not None
        statistics = input_statistics(
            opened,
            calibration.tokens(),
            progress=progress,
        )
    arrays = layer_arrays(c, opened.model)

    def tell(done: int, of: int, row: MapRow) -> None:
        weighted = '' if math.isnan(row.weighted) else f', of outputs {row.weighted:.4f}'
        say(
            f'{done}/{of}  {row.name}: {row.bits / row.bits_before:.3f} of the bits, error of weights '
            f'{row.frobenius:.4f}{weighted}',
            flush=True,
        )

    loss = None
    if options.spread == 'sensitivity':
        from weft.compress.loss import loss_of

        assert calibration is not None
        loss = loss_of(opened, calibration.rows, calibration.numbers)
    fit = Options(options.objective, options.order, options.rank, options.group, options.compute)
    found = compress_model(
        c,
        arrays,
        options.method,
        options.budget,
        fit,
        statistics,
        options.spread,
        options.hard,
        options.maps,
        options.layers,
        loss,
        tell,
    )
    before = held_out and math.exp(held_out.nats(opened))
    report: dict[str, Any] = {
        'of': str(opened.folder),
        'step': opened.step,
        'method': options.method,
        'budget': options.budget,
        'spread': options.spread,
        'objective': options.objective,
        'bits': found.bits,
        'bits_before': found.bits_before,
        'share': found.share,
        'maps': [dataclasses.asdict(row) for row in found.maps],
    }
    target = Path(options.out)
    write_run(opened, target, found.config, found.arrays, report)

    from weft.inference.run import open_run

    new = open_run(target, options.mesh, needs_text=False, stacked=True)
    after = held_out and math.exp(held_out.nats(new))
    held = sum(x.nbytes for x in jax.tree.leaves(new.model))
    stored = sum(path.stat().st_size for path in (target / 'checkpoints').rglob('*') if path.is_file())
    report |= {'bytes_stored': stored, 'bytes_held': held, 'seconds': time.monotonic() - begun}
    report |= {'perplexity_before': before, 'perplexity': after}
    disk.write(target / REPORT, (json.dumps(report, indent=1) + '\n').encode())
    if options.json:
        print(as_json(report))
        return
    print(f'{target}: {found.share:.4f} of the bits of float32, {stored / 1e6:.1f} MB stored, {held / 1e6:.1f} MB held')
    if after is not None and before is not None:
        print(f'perplexity {after:.3f}, of {opened.folder} {before:.3f} ({after / before - 1:+.2%})')


class Text(NamedTuple):
    """Rows of text, of which some are read."""

    rows: 'Samples'
    numbers: 'np.ndarray'

    def tokens(self) -> list[list[int]]:
        """Each row's tokens, without padding."""
        batch = self.rows.take(self.numbers)
        return [row[live > 0].tolist() for row, live in zip(batch.tokens_BT, batch.segment_BT, strict=True)]

    def nats(self, of: 'TrainedRun') -> float:
        """A token."""
        import jax

        from weft.training.evaluation import evaluate

        assert of.tokenizer is not None, 'rows are its tokens'
        with jax.set_mesh(of.mesh):
            return evaluate(of.model, of.tokenizer, self.rows, self.numbers, of.config.training.batch).nats_per_token


def texts(opened: 'TrainedRun', options: argparse.Namespace, needed: bool) -> tuple[Text | None, Text | None]:
    """Calibration text, and text to evaluate: of --data both halves, else of the run's training and validation data."""
    import contextlib

    from weft.data.packing import pack_documents
    from weft.data.prepare import load
    from weft.data.sources import texts as read
    from weft.hub.published_tokenizer import load_tokenizer
    from weft.storage.local_copy import LocalCopy
    from weft.training.evaluation import spread

    folder, config = opened.folder, opened.config
    length = min(config.training.sequence_length, 512)
    count = max(options.tokens // length, 1)
    if options.data:
        if opened.tokenizer is None:
            raise UserError(f'--data: {folder} was imported without a tokenizer, and text cannot become its tokens')
        found = [text for _, text in read(options.data, 'text', [])]
        rows = pack_documents(opened.tokenizer, found, length, config.data.special_tokens)
        if len(rows) < 2:
            raise UserError(
                f'--data: {len(rows)} rows of {length} tokens: calibration and evaluation need one each at least'
            )
        chosen = spread(2 * count, len(rows))
        return Text(rows, chosen[::2]), Text(rows, chosen[1::2])
    if not (folder / 'data').exists():
        if needed:
            raise UserError(f'{folder} has no training data to calibrate with: give text with --data PATH')
        return None, None
    with contextlib.closing(LocalCopy(folder)) as local_copy:
        local_copy.fetch()
        dataset = load(local_copy.local, lambda line: None, load_tokenizer)
    both = dataset.train, dataset.validation
    calibration, held_out = (Text(rows, spread(count, len(rows))) for rows in both)
    return calibration, held_out


if __name__ == '__main__':
    run(main, lasting=True)
