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
        '--logits', required=True, metavar='FILE', help='.npy to write: [b, t] holds the logits of the token after t'
    )
    parser.add_argument('--mesh', metavar='AXES', help='such as expert=2,tensor=2; the run’s own otherwise')
    options = parser.parse_args()

    import numpy as np

    from decoding.run import open_run
    from sharding.errors import UserError

    try:
        tokens_BT = np.load(options.tokens, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f'--tokens {options.tokens}: not a readable .npy file of numbers: {error}') from None
    if not isinstance(tokens_BT, np.ndarray):
        raise UserError(f'--tokens {options.tokens}: an archive of several arrays; save the one with np.save')
    if tokens_BT.ndim != 2 or tokens_BT.dtype.kind not in 'iu' or not tokens_BT.size:
        raise UserError(
            f'--tokens {options.tokens}: {tokens_BT.dtype} {list(tokens_BT.shape)}: it must hold whole numbers [B, T], not none'
        )
    target = Path(options.logits)
    if not target.parent.is_dir():
        raise UserError(f'--logits {target}: there is no folder {target.parent}')
    opened = open_run(options.run, options.mesh, needs_text=False)
    vocabulary = opened.config.model.vocabulary
    if tokens_BT.min() < 0 or tokens_BT.max() >= vocabulary:
        bad = tokens_BT[(tokens_BT < 0) | (tokens_BT >= vocabulary)][0]
        raise UserError(f'--tokens {options.tokens}: token {bad}: ids of this run are 0 to {vocabulary - 1}')

    import jax

    from decoding.score import score
    from sharding.memory import explaining

    partial = target.with_name(target.name + '.partial')
    out = np.lib.format.open_memmap(partial, mode='w+', dtype=np.float32, shape=(*tokens_BT.shape, vocabulary))
    tell = f'out of memory on a device: logits of {tokens_BT.shape[1]} tokens a row; give shorter rows, or use --mesh'
    with jax.set_mesh(opened.mesh), explaining(lambda: tell):
        for begin, logit_BTV in score(opened.model, tokens_BT):
            out[begin : begin + len(logit_BTV)] = logit_BTV
    out.flush()
    os.replace(partial, target)
    print(f'{target}: float32 {list(out.shape)} (step {opened.step})')


if __name__ == '__main__':
    run(main)
