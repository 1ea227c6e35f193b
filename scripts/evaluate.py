"""How well a run's model predicts text: nats a token and bits a byte, beside what xz needs for the same bytes.

python scripts/evaluate.py runs/demo --data notes.md src/ 'more/*.jsonl'
"""

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.runtime.errors import UserError
from weft.scripts.entry import as_json, run
from weft.scripts.options import Parser

if TYPE_CHECKING:
    from weft.data.packing import Samples
    from weft.data.tokenizer import Tokenizer
    from weft.storage.buckets import Bucket
    from weft.training.config import RunConfig


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument('run', metavar='RUN', help='a folder such as runs/demo')
    parser.add_argument(
        '--data', nargs='+', metavar='PATH', help='files, folders or globs; the run’s own validation split otherwise'
    )
    parser.add_argument('--field', default='text', help='the field of a JSONL object that holds the text')
    parser.add_argument('--mesh', metavar='AXES', help='such as expert=2,tensor=2; the run’s own otherwise')
    parser.add_argument('--json', action='store_true', help='one JSON object')
    options = parser.parse_args()

    from weft.training.run_folder import run_folder

    folder = run_folder(options.run)
    # A wrong path is told before a model is read.
    found = read_data(options, folder) if options.data else None

    from weft.data.prepare import load
    from weft.hub.published_tokenizer import load_tokenizer
    from weft.storage.local_copy import LocalCopy
    from weft.training.config import RECORD

    dataset, has_data = None, (folder / 'data').exists()
    if found is None and (folder / RECORD).is_file() and not has_data:
        raise UserError(
            f'{folder} is an imported model, which no validation split comes with: give text to predict with --data PATH'
        )
    if has_data or found is None:
        with contextlib.closing(LocalCopy(folder)) as local_copy:
            local_copy.fetch()
            # What it says is none of the results; of a bucket's, mapped files stay readable without a name.
            dataset = load(local_copy.local, lambda line: print(line, file=sys.stderr), load_tokenizer)

    from weft.inference.run import open_run

    opened = open_run(options.run, options.mesh, stacked=True)

    import jax
    import numpy as np

    from weft.data.baseline import xz_bits_per_byte
    from weft.runtime.device_memory import explain_oom
    from weft.training.evaluation import evaluate

    t, tokenizer = opened.config.training, opened.tokenizer
    assert tokenizer is not None, 'open_run sees to it'
    rows: Samples
    if found is None:
        assert dataset is not None, '`load` refuses a run without'
        rows, content = dataset.validation, dataset.validation_bytes()
    else:
        rows, content = packed(opened.config, tokenizer, found)
    tell = f'out of memory on a device: activations of {t.batch} rows of {t.sequence_length} tokens; split them with --mesh'
    with jax.set_mesh(opened.mesh), explain_oom(lambda: tell):
        read = evaluate(opened.model, tokenizer, rows, np.arange(len(rows)), t.batch)
    assert read.bytes == rows.bytes, 'every byte is predicted once'
    figures = {
        'nats_per_token': read.nats_per_token,
        'bits_per_byte': read.bits_per_byte,
        'tokens': read.tokens,
        'bytes': read.bytes,
        'xz_bits_per_byte': xz_bits_per_byte(content),
        'xz_given_training_bits_per_byte': xz_bits_per_byte(content, dataset.train_bytes()) if dataset else None,
        'step': opened.step,
    }
    if options.json:
        print(as_json(figures))
        return
    print(f'{read.tokens:,} tokens of {read.bytes:,} bytes, after step {opened.step}')
    print(f'  model                       {read.bits_per_byte:.4f} bits/byte   ({read.nats_per_token:.4f} nats/token)')
    print(f'  xz -9, these bytes alone    {figures["xz_bits_per_byte"]:.4f} bits/byte')
    if dataset:
        print(f'  xz -9, given the training   {figures["xz_given_training_bits_per_byte"]:.4f} bits/byte')


def read_data(options: argparse.Namespace, folder: 'Path | Bucket') -> list[Any]:
    """The texts of --data, or its pairs where the run is an encoder–decoder; says on stderr what is left out of folders."""
    from weft.data.pairs import read_pairs
    from weft.data.sources import texts
    from weft.data.walk import LeftOut, left_out_text
    from weft.training.config import parse

    skipped: list[LeftOut] = []
    config = folder / 'config.yaml'
    if parse(config.read_bytes(), str(config)).model.encoder is not None:
        found: list[Any] = list(read_pairs(options.data, '--data', skipped))
    else:
        found = [text for _, text in texts(options.data, options.field, skipped)]
    if skipped:
        print(f'--data: {len(found)} texts{left_out_text(skipped)}', file=sys.stderr)
    return found


def packed(config: 'RunConfig', tokenizer: 'Tokenizer', found: list[Any]) -> tuple['Samples', bytes]:
    """The rows and the bytes that the model is to predict of other files than the run's own."""
    from weft.data.packing import pack_documents
    from weft.data.pairs import pack_pairs

    length, names = config.training.sequence_length, config.data.special_tokens
    if config.model.encoder is None:
        return pack_documents(tokenizer, found, length, names), ''.join(found).encode()
    rows, too_long = pack_pairs(tokenizer, found, length, config.model.encoder.start_token, names)
    if too_long:
        share = f'{too_long} of {len(found)} pairs'
        raise UserError(f'--data: {share} have more than {length} tokens on a side; leave them out')
    return rows, ''.join(pair.target for pair in found).encode()


if __name__ == '__main__':
    run(main)
