"""docs/history.md: what the pieces of work came to, in words, tables and pictures."""

import datetime
import itertools
import os
import platform
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from weft.interpret.history import pictures
from weft.interpret.history.kept import ROOT
from weft.interpret.history.markdown import code, fenced, listed, power, prose, table
from weft.interpret.history.runs import PROMPT, TEMPERATURE
from weft.interpret.history.scaling import fit, without_one
from weft.interpret.history.suite import DEPTHS, NET_RATE, NORMS, WIDTHS, Suite
from weft.storage.files import make_folder, output_file

MODELS = {  # by the name of the piece, what the page calls it
    'elman': 'Elman’s network (1990)',
    'lstm': 'the LSTM (1997)',
    'decoder-2017': 'the decoder of 2017',
    'dense': 'today’s dense decoder',
    'mixture': 'a mixture of experts',
}
SAMPLED = {'n-gram': 'n-grams up to 5', **MODELS}
NAMES = {'layer': 'layer norm', 'batch': 'batch norm', 'none': 'no norm'}
COUNTS = (
    'So few tokens are little for a model that must learn first that code repeats itself; counts have that at once.'
)
NOTHING = 0.03  # bits per byte, a difference that says nothing of one seed
DISTANCES = (1, 2, 5, 10, 20, 50, 100, 200)
Figures = Mapping[str, Any]


def write_page(suite: Suite, path: Path) -> None:
    """Writes the page, and its pictures into a folder of its name beside it. All pieces must be there."""
    found = {name: figures for name in suite.pieces if (figures := suite.find(name)) is not None}
    assert found.keys() == suite.pieces.keys(), 'the script has run them'
    folder = path.with_suffix('')
    make_folder(folder)
    root = os.path.relpath(ROOT.resolve(), path.parent.resolve())  # ROOT may be reached by a link
    blocks = [
        *opening(suite, root),
        *budget_section(found, folder),
        *samples_section(found),
        *n_gram_section(found['n-gram'], root),
        *words_section(found, root),
        *gradient_section(found['gradients'], folder, root),
        *scaling_section(suite, found, folder, root),
        *norm_section(found, folder, root),
    ]
    with output_file('--out', path) as file:
        file.write(('\n\n'.join(blocks) + '\n').encode())


def opening(suite: Suite, root: str) -> list[str]:
    """What was done, with what, and what it cannot tell."""
    config, facts = suite.corpus.config, suite.corpus.dataset.facts
    t, rows, pieces = config.training, facts['validation'], facts['tokenizer']
    stdlib = f"The running Python's own standard library (Python {platform.python_version()})"
    source = stdlib if config.data.source == 'stdlib' else ', '.join(map(code, config.data.paths))
    return [
        '# How did models of language come to be transformers, and what did each step bring?',
        prose(
            f"""This is a picture of small budgets: each model here reads at most {t.steps * t.batch * t.sequence_length:,}
            tokens, once, on a CPU. What is so at this size need not be so at a thousand times as much, least of all of depth
            and of experts. There is one seed ({config.seed}) a model: differences of less than about {NOTHING} bits say
            nothing."""
        ),
        fenced(shlex.join(['python', 'scripts/history.py', *suite.overrides])),
        prose(
            """makes this page and its pictures again, in about half an hour on two cores that do nothing else. It goes on
            where it was stopped: figures are kept in `.cache/history/` with a hash of the config and the code that they came
            from. Every curve is of a run that this command repeats.""",
            f"""**Corpus.** {source}:
            {facts['documents']} files, {facts['bytes'] / 1e6:.2f} MB, SHA-256 `{facts['sha256'][:16]}`. Whole packages are
            held out for validation, {rows['bytes']:,} bytes. One tokenizer for all, learnt from the training split:
            {pieces['vocabulary']:,} pieces of {pieces['bytes_per_token']:.2f} bytes on average.""",
            f"""**Budget.** {t.steps:,} steps of {t.batch} rows of {t.sequence_length} tokens, the same rows in the same order
            for every model; n-grams are counted over exactly these. The measure is bits per byte on the whole validation
            split; before the end of a curve, on {config.metrics.validation_rows} rows spread over it. Decoders are ordinary
            runs of `scripts/train.py` with [configs/history/]({root}/configs/history); recurrent nets, and the decoder in
            which norms are compared, have [code of their own]({root}/interpret/history/nets.py), the same optimizer, and a
            learning rate of {NET_RATE:g}. No learning rate was searched for.""",
            f"""**Machine.** {cpu()}, {os.cpu_count()} cores, float32, jax {jax.__version__},
            {datetime.date.today().isoformat()}. Seconds are of training alone, without compiling and validating. They tell as
            much of what else the machine did meanwhile; FLOPs do not.""",
        ),
    ]


def budget_section(found: Figures, folder: Path) -> list[str]:
    """Bits per byte against time, FLOPs and parameters."""
    pictures.budgets(folder / 'budgets.png', found)
    orders, rows = found['n-gram']['orders'], list[tuple[object, ...]]()
    for one in orders:
        rows.append((f'n-grams up to {one["order"]}', *spent(one, '0')))
    for name, label in MODELS.items():
        one = found[name]
        rows.append((label, *spent(one, power(one['flops_per_token'] * one['tokens']))))
    best = min(MODELS, key=lambda name: found[name]['bits_per_byte'])
    grams, lowest = found['n-gram']['bits_per_byte'], found[best]['bits_per_byte']
    above = [label for name, label in MODELS.items() if found[name]['bits_per_byte'] > grams]
    if len(above) == len(MODELS):
        beside = f'which no trained model reaches on this budget. {COUNTS}'
    elif above:
        beside = f'fewer than {listed(above)}. {COUNTS}'
    else:
        beside = 'more than any trained model.'
    last, before = orders[-1], orders[-2]
    return [
        '## What did each cost, and how well did it predict?',
        f'![Bits per byte against seconds, FLOPs and parameters]({folder.name}/budgets.png)',
        table(('model', 'parameters; n-grams kept', 'FLOPs of training', 'seconds', 'bits per byte'), rows),
        prose(
            f"""Of the trained models {MODELS[best]} comes lowest, with {lowest:.3f} bits per byte. The best of the n-grams,
            which are only counted, have {grams:.3f}, {beside} What they lack is a way to do better with the same text: from
            order {before['order']} to order {last['order']} the bits change by
            {last['bits_per_byte'] - before['bits_per_byte']:+.3f}, and the n-grams kept grow by
            {last['parameters'] / before['parameters'] - 1:.0%}. FLOPs are those of matmuls, forward and backward, a
            multiplication and an addition being 2."""
        ),
    ]


def spent(one: Figures, flops: str) -> tuple[str, ...]:
    """A model's cells of the table."""
    return f'{one["parameters"]:,}', flops, f'{one["seconds"]:,.1f}', f'{one["bits_per_byte"]:.3f}'


def samples_section(found: Figures) -> list[str]:
    """What each model writes."""
    about = f'After {code(PROMPT)}, at a temperature of {TEMPERATURE:g}, seed 0; the prompt is shown with it.'
    parts = [f'**{label}**\n\n{fenced(PROMPT + found[name]["sample"])}' for name, label in SAMPLED.items()]
    return ['## What does each write?', about, *parts]


def n_gram_section(figures: Figures, root: str) -> list[str]:
    """The n-grams' discounts."""
    longest = figures['orders'][-1]
    rows = [
        (length, *(f'{d:.3f}' for d in discounts), 'no' if length in longest['fallback'] else 'yes')
        for length, discounts in enumerate(longest['discounts'], start=1)
    ]
    worst = max(one['sum_error'] for one in figures['orders'])
    return [
        '## N-grams: what is taken off a count?',
        prose(
            f"""Modified Kneser–Ney smoothing (Chen and Goodman 1999) takes a discount off each count and gives what it took
            to shorter contexts, where a word counts by how many different words it followed. Of the model of order
            {longest['order']}, by counts of 1, 2, and 3 or more:"""
        ),
        table(('n-gram of', 'D₁', 'D₂', 'D₃', 'by the formula'), rows),
        prose(
            f"""Where the formula has no answer the discounts are 0.5, 1 and 1.5: so it may be of single pieces, which are too
            few. After 200 contexts of the validation split the probabilities of all pieces add up to 1 within {power(worst)}.
            [Tests]({root}/tests/interpret/history/test_kneser_ney.py) hold the model to a published worked example, to
            fractions worked out from the definition, and to what KenLM's `lmplz` writes."""
        ),
    ]


def words_section(found: Figures, root: str) -> list[str]:
    """word2vec's neighbours and analogies."""
    words, planted = found['word2vec'], found['word2vec-planted']
    rows = [(code(word), ', '.join(map(code, near))) for word, near in words['nearest'].items()]
    shares = listed([f'{share:.1%}' for share in planted['shares']])
    return [
        '## word2vec: what stands near what?',
        prose(
            f"""Skip-gram with negative sampling (Mikolov et al. 2013) predicts no text and has no bits per byte. It has a
            table of vectors, learnt in {words['seconds']:.0f} seconds from the same rows. The pieces with the largest
            cosines:"""
        ),
        table(('piece', 'nearest'), rows),
        prose(
            f"""King − man + woman, where such relations are certain to be in the text: of {planted['questions']:,} analogies
            that are planted in a small corpus ([`planted`]({root}/interpret/history/word2vec.py)) it answers {shares}, a
            share a seed. Code has few words with relations of that kind: here none are asked for."""
        ),
    ]


def gradient_section(figures: Figures, folder: Path, root: str) -> list[str]:
    """Vanishing gradients."""
    pictures.gradients(folder / 'gradients.png', figures['shares'])
    at = [distance for distance in DISTANCES if distance < len(next(iter(figures['shares'].values())))]
    rows = [(name, *(power(share[distance]) for distance in at)) for name, share in figures['shares'].items()]
    lost = any(share[distance] == 0 for share in figures['shares'].values() for distance in at)
    small = 'A share of 0 is one that float32 cannot hold. ' if lost else ''
    born, trained = (figures['radius'][state] for state in ('at birth', 'trained'))
    return [
        '## How far back does a prediction listen?',
        f'![The norm of the gradient by distance]({folder.name}/gradients.png)',
        table(('tokens back', *map(str, at)), rows),
        prose(
            f"""The norm of the gradient of the last token's loss with respect to the vector of the token so many places
            before it, as a share of that of the last token itself: medians of {figures['rows']} rows of the validation
            split. {small}In a recurrent net it passes through one more Jacobian with each token (Bengio et al. 1994;
            Pascanu et al. 2013, arXiv:1211.5063), so it goes like a power of the distance. The LSTM's cell has a way back on
            which gates alone multiply; attention reaches every token in one step. The largest eigenvalue of Elman's
            recurrent matrix is {born:.2f} in size at birth and {trained:.2f} when trained; the slope of tanh, below 1, is
            multiplied in with it. [A test]({root}/tests/interpret/history/test_gradients.py) has a linear net whose gradient
            is known."""
        ),
    ]


def scaling_section(suite: Suite, found: Figures, folder: Path, root: str) -> list[str]:
    """The dense decoder's size."""
    c, dense = suite.corpus.config.model, found['dense']
    point = lambda one: (one['parameters'], one['bits_per_byte'])
    widths = {width: point(found[f'width-{width}']) for width in WIDTHS} | {c.model_dim: point(dense)}
    depths = {depth: point(found[f'depth-{depth}']) for depth in DEPTHS} | {c.layers: point(dense)}
    widths, depths = ({label: of[label] for label in sorted(of)} for of in (widths, depths))
    named = {f'{width} wide, {c.layers} layers': one for width, one in widths.items()}
    named |= {f'{c.model_dim} wide, {depth} layer{"s" * (depth > 1)}': one for depth, one in depths.items()}
    sizes, bits = map(list, zip(*named.values(), strict=True))
    law, (low, high) = fit(sizes, bits), without_one(sizes, bits)
    pictures.scaling(folder / 'scaling.png', widths, depths, law)
    N = dense['parameters']
    once, twice, four = law(np.array([N, 2 * N, 4 * N]))
    trust = 'more than that the fit cannot say' if high <= 2 * low else 'so the exponent is hardly known'
    return [
        '## Is bigger better?',
        f'![Bits per byte by parameters, and the fitted law]({folder.name}/scaling.png)',
        table(
            ('dense decoder', 'parameters', 'bits per byte'),
            [(name, f'{n:,}', f'{b:.3f}') for name, (n, b) in named.items()],
        ),
        prose(
            f"""Fitted to these {len(named)} runs, by least squares of the logarithm
            ([`fit`]({root}/interpret/history/scaling.py)):"""
        ),
        f'    bits per byte = {law.offset:.3f} + {law.factor:.4g} · N^−{law.exponent:.3f}',
        prose(
            f"""The root mean square error of the fit is {law.error:.2%}. With any one of the runs left out the exponent comes
            out between {low:.2f} and {high:.2f}: {trust}. By the law twice the dense decoder's parameters bring
            {once - twice:.3f} bits, and twice those {twice - four:.3f} more: returns diminish. All sizes read the same few
            tokens, which the offset is as much a sign of as of the corpus; embeddings count as parameters, and are most of a
            narrow model's. Learning rates of wider models are smaller, by the square root of the width."""
        ),
    ]


def norm_section(found: Figures, folder: Path, root: str) -> list[str]:
    """Norms."""
    pictures.norms(folder / 'norms.png', found)
    bits = {kind: found[f'norm-{kind}']['bits_per_byte'] for kind in NORMS}
    rows = [(NAMES[kind], f'{bits[kind]:.3f}') for kind in NORMS]
    rows.append(
        ('batch norm, with the statistics of the batch that is measured', f'{found["norm-batch"]["bits_of_batch"]:.3f}')
    )
    alike = max(bits.values()) - min(bits.values()) < NOTHING
    told = 'So few layers learn as well without one at such a learning rate: what a norm does cannot be seen here.'
    first, *others = sorted(NORMS, key=bits.__getitem__)
    order = NAMES[first]
    for better, worse in itertools.pairwise((first, *others)):
        order += f' {"≈" if bits[worse] - bits[better] < NOTHING else "<"} {NAMES[worse]}'
    return [
        '## What does a norm do?',
        f'![Bits per byte with layer norm, batch norm, and none]({folder.name}/norms.png)',
        table(('norm', 'bits per byte'), rows),
        prose(
            f"""One decoder of the dense model's width and depth ([`PlainDecoder`]({root}/interpret/history/nets.py)), x +
            f(norm(x)), with three norms and one learning rate. In bits: {order} (≈: less than {NOTHING} apart).
            {told if alike else ''} Batch norm measures each number over all tokens of a batch, later ones too: while it
            learns, a token is told a little of what follows, and what is predicted depends on what else is in the batch. To
            predict it takes running means and variances instead, as the curve does; the last row is with the batch's own.
            Layer norm looks at one token alone, and is the same in both."""
        ),
    ]


def cpu() -> str:
    """What the machine calls its processor."""
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except FileNotFoundError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.machine()
