"""Logits of token ids, for comparison from outside: int32 [B, T] in, float32 [B, T, V] out, V the real vocabulary.

python scripts/score.py runs/demo --tokens ids.npy --logits logits.npy
"""

import argparse
import os
from pathlib import Path

from scripts.entry import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', metavar='RUN', help='a folder such as runs/demo')
    parser.add_argument(
        '--tokens',
        required=True,
        metavar='FILE',
        help='.npy, whole numbers [B, T]: each row is one document from its start',
    )
    parser.add_argument(
        '--sources',
        metavar='FILE',
        help='.npy, whole numbers [B, S]: what the encoder of an encoder–decoder reads; -1 fills up',
    )
    parser.add_argument(
        '--logits',
        required=True,
        metavar='FILE',
        help='.npy to write: [b, t] holds the logits of the token after t; of an encoder alone, of t',
    )
    parser.add_argument('--mesh', metavar='AXES', help='such as expert=2,tensor=2; the run’s own otherwise')
    options = parser.parse_args()

    from decoding.run import open_run
    from sharding.errors import UserError

    tokens_BT = read_ids('--tokens', options.tokens)
    source_BS = read_ids('--sources', options.sources) if options.sources else None
    target = Path(options.logits)
    if not target.parent.is_dir():
        raise UserError(f'--logits {target}: there is no folder {target.parent}')
    opened = open_run(options.run, options.mesh, needs_text=False, stacked=True)
    c = opened.config.model
    check_ids('--tokens', options.tokens, tokens_BT, 0, c)
    if (source_BS is None) != (c.encoder is None):
        raise UserError(
            f'--sources {options.sources}: {options.run} has no encoder, which alone reads sources; leave it out'
            if source_BS is not None
            else f'{options.run} is an encoder–decoder: --tokens is what its decoder reads, and --sources FILE, whole numbers '
            '[B, S], what its encoder reads'
        )
    if source_BS is not None:
        check_ids('--sources', options.sources, source_BS, -1, c)
        if len(source_BS) != len(tokens_BT):
            raise UserError(
                f'--sources {options.sources}: {len(source_BS)} rows; --tokens has {len(tokens_BT)}: one each'
            )

    import jax
    import numpy as np

    from decoding.score import score
    from sharding.memory import explaining

    partial = target.with_name(target.name + '.partial')
    out = np.lib.format.open_memmap(partial, mode='w+', dtype=np.float32, shape=(*tokens_BT.shape, c.vocabulary))
    tell = f'out of memory on a device: logits of {tokens_BT.shape[1]} tokens a row; give shorter rows, or use --mesh'
    with jax.set_mesh(opened.mesh), explaining(lambda: tell):
        for begin, logit_BTV in score(opened.model, tokens_BT, source_BS):
            out[begin : begin + len(logit_BTV)] = logit_BTV
    out.flush()
    os.replace(partial, target)
    print(f'{target}: float32 {list(out.shape)} (step {opened.step})')


def read_ids(option: str, path: str):
    """The whole numbers of a .npy file, [B, T]."""
    import numpy as np

    from sharding.errors import UserError

    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f'{option} {path}: not a readable .npy file of numbers: {error}') from None
    if not isinstance(found, np.ndarray):
        raise UserError(f'{option} {path}: an archive of several arrays; save the one with np.save')
    if found.ndim != 2 or found.dtype.kind not in 'iu' or not found.size:
        raise UserError(
            f'{option} {path}: {found.dtype} {list(found.shape)}: it must hold whole numbers [B, T], not none'
        )
    return found


def check_ids(option: str, path: str, ids, least: int, c) -> None:
    """Raises UserError for an id that the run does not have, and for a row that is longer than its table of positions."""
    from sharding.errors import UserError

    if ids.min() < least or ids.max() >= c.vocabulary:
        bad = ids[(ids < least) | (ids >= c.vocabulary)][0]
        raise UserError(f'{option} {path}: token {bad}: ids of this run are 0 to {c.vocabulary - 1}')
    if c.max_positions is not None and ids.shape[1] > c.max_positions:
        raise UserError(
            f'{option} {path}: rows of {ids.shape[1]} tokens: this run has {c.max_positions} positions (model.max_positions)'
        )


if __name__ == '__main__':
    run(main)
