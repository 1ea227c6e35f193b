"""Logits of token ids, for comparison from outside, or vectors of texts.

python scripts/score.py runs/demo --tokens ids.npy --logits logits.npy          int32 [B, T] in, float32 [B, T, V] out
python scripts/score.py runs/minilm --texts lines.txt --embeddings vectors.npy  a text a line in, float32 [lines, D] out

V is the real vocabulary. Of a model without an LM head --logits writes its last hidden states, float32 [B, T, D].
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from weft.runtime.errors import LONGEST, MachineError, UserError, shown
from weft.scripts.entry import run
from weft.scripts.options import Parser
from weft.storage.files import check_output, output_file, writing

if TYPE_CHECKING:
    import numpy as np

    from weft.model.config import ModelConfig

MOST_TEXTS = 1 << 26  # characters of a file of texts: all of them are held


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument('run', metavar='RUN', help='a folder such as runs/demo')
    for flag, text in (
        ('--tokens', '.npy, whole numbers [B, T]: each row is one document from its start'),
        ('--sources', '.npy, whole numbers [B, S]: what the encoder of an encoder–decoder reads; -1 fills up'),
        ('--logits', '.npy to write: [b, t] holds the logits of the token after t; of an encoder alone, of t'),
        ('--texts', 'UTF-8, a text a line, to embed'),
        ('--embeddings', '.npy to write: a vector of length 1 for each text'),
    ):
        parser.add_argument(flag, metavar='FILE', help=text)
    pooling = 'mean of a text’s tokens, cls (its first) or last; what the model was published with otherwise'
    parser.add_argument('--pooling', metavar='NAME', help=pooling)
    parser.add_argument('--mesh', metavar='AXES', help='such as expert=2,tensor=2; the run’s own otherwise')
    options = parser.parse_args()

    wanted = [name for name in ('tokens', 'logits', 'texts', 'embeddings') if getattr(options, name) is not None]
    if wanted == ['texts', 'embeddings'] and options.sources is None:
        embed_texts(options)
    elif wanted == ['tokens', 'logits'] and options.pooling is None:
        score_tokens(options)
    else:
        raise UserError(
            'give --tokens FILE and --logits FILE, or --texts FILE and --embeddings FILE, with which --pooling goes; given: '
            + (', '.join(f'--{name}' for name in wanted) or 'none of them')
        )


def embed_texts(options: argparse.Namespace) -> None:
    """Writes a vector for each line of a file."""

    target = Path(options.embeddings)
    check_output('--embeddings', target, [options.texts])
    texts = read_texts(options.texts)

    from weft.inference.run import open_run

    opened = open_run(options.run, options.mesh, stacked=True)

    import jax
    import numpy as np

    from weft.inference.embed import embed
    from weft.runtime.device_memory import explain_oom

    tell = 'out of memory on a device: activations of some texts at once; give shorter ones, or use --mesh'
    with jax.set_mesh(opened.mesh), explain_oom(lambda: tell):
        vectors = embed(opened, texts, options.pooling)
    if not np.isfinite(vectors).all():
        row = int(np.argmin(np.isfinite(vectors).all(1)))
        raise MachineError(f'the vector of line {row + 1} is not finite: none are written')
    with output_file('--embeddings', target) as file, writing(target):
        np.save(file, vectors)
    print(f'{shown(target, LONGEST)}: float32 {list(vectors.shape)} (step {opened.step})')


def score_tokens(options: argparse.Namespace) -> None:
    """Writes the logits of rows of token ids."""
    from weft.data.ids import read_ids
    from weft.inference.run import open_run

    target = Path(options.logits)
    check_output('--logits', target, [options.tokens, *filter(None, [options.sources])])
    tokens_BT = read_ids('--tokens', options.tokens)
    source_BS = read_ids('--sources', options.sources) if options.sources else None
    opened = open_run(options.run, options.mesh, needs_text=False, stacked=True)
    c = opened.config.model
    check_ids('--tokens', options.tokens, tokens_BT, 0, c)
    if (source_BS is None) != (c.encoder is None):
        raise UserError(
            f'--sources {shown(options.sources)}: {options.run} has no encoder, which alone reads sources; leave it out'
            if source_BS is not None
            else f'{options.run} is an encoder–decoder: --tokens is what its decoder reads, and --sources FILE, whole numbers '
            '[B, S], what its encoder reads'
        )
    if source_BS is not None:
        check_ids('--sources', options.sources, source_BS, -1, c)
        if len(source_BS) != len(tokens_BT):
            rows = f'{len(source_BS)} rows; --tokens has {len(tokens_BT)}'
            raise UserError(f'--sources {shown(options.sources)}: {rows}: one each')

    import jax
    import numpy as np

    from weft.inference.score import score
    from weft.runtime.device_memory import explain_oom

    what, width = ('logits', c.vocabulary) if c.head else ('last hidden states', c.model_dim)
    shape = (*tokens_BT.shape, width)
    tell = f'out of memory on a device: {what} of {tokens_BT.shape[1]} tokens a row; give shorter rows, or use --mesh'
    # Written and not mapped: where a disk is full, writing is an error and a mapping ends the process.
    with output_file('--logits', target) as file, writing(target), jax.set_mesh(opened.mesh), explain_oom(lambda: tell):
        np.lib.format.write_array_header_1_0(file, {'descr': '<f4', 'fortran_order': False, 'shape': shape})
        for begin, logit_BTV in score(opened.model, tokens_BT, source_BS):
            if not np.isfinite(logit_BTV).all():
                rows = f'rows {begin} to {begin + len(logit_BTV) - 1}'
                raise MachineError(f'{what} of {rows} are not all finite: none are written')
            file.write(np.ascontiguousarray(logit_BTV, '<f4'))
    print(f'{shown(target, LONGEST)}: {what}, float32 {list(shape)} (step {opened.step})')


def read_texts(path: str) -> list[str]:
    """The lines of a file, empty ones among them, so that each has its row. Only line feeds end a line."""
    from weft.data.reading import joined, pieces

    text = joined(pieces(Path(path), '--texts ', streams=True), f'--texts {shown(path)}', MOST_TEXTS)
    if not text:
        raise UserError(f'--texts {shown(path)}: is empty; write a text a line')
    return text.removesuffix('\n').split('\n')


def check_ids(option: str, path: str, ids: 'np.ndarray', least: int, c: 'ModelConfig') -> None:
    """Raises UserError for an id that the run does not have, and for a row that is longer than its table of positions."""
    assert c.vocabulary is not None, 'that of a run that is saved is known'
    if ids.min() < least or ids.max() >= c.vocabulary:
        bad = ids[(ids < least) | (ids >= c.vocabulary)][0]
        raise UserError(f'{option} {shown(path)}: token {bad}: ids of this run are 0 to {c.vocabulary - 1}')
    if c.max_positions is not None and ids.shape[1] > c.max_positions:
        raise UserError(
            f'{option} {shown(path)}: rows of {ids.shape[1]} tokens: this run has {c.max_positions} '
            'positions (model.positions.max)'
        )


if __name__ == '__main__':
    run(main, lasting=True)
