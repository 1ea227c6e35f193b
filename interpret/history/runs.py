"""What each model of the page is, trained, measured and sampled: a piece of work a model, each with plain figures.

Letters: B rows, T sequence, V vocabulary, D model.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from weft.inference.generate import generate
from weft.inference.run import open_run
from weft.inference.sampling import Sampling
from weft.interpret.history import gradients, word2vec
from weft.interpret.history.corpus import Corpus, lend, pieces
from weft.interpret.history.kneser_ney import KneserNey
from weft.interpret.history.net_training import Trained, bits_per_byte, continued, train
from weft.interpret.history.nets import Elman, Net, PlainDecoder, Statistics, Weights
from weft.model import cost
from weft.runtime.signals import Stopped
from weft.storage.files import output_file
from weft.training.config import RunConfig
from weft.training.loop import train as train_run
from weft.training.metrics import read

Figures = dict[str, Any]
Say = Callable[[str], None]
PROMPT = 'class Queue:\n    def __init__(self'
SAMPLE_TOKENS = 60
TEMPERATURE = 0.7
ORDERS = (1, 2, 3, 4, 5)
GRADIENT_ROWS = 64
TOLD = ('continuing', 'step', 'SIG', 'stopped')  # what lines of a training begin with that are told
ASKED = ('self', ' self', ' None', ' True', ' int', ' str', ' import', ' for', ' and', ' 0')


def n_grams(corpus: Corpus, say: Say) -> Figures:
    """N-gram models of each order on the rows that all models read."""
    texts, validation = corpus.texts(corpus.batches()), corpus.validation()
    asked, bytes_ = corpus.texts([validation]), corpus.bytes_of(validation)
    V, found = corpus.dataset.tokenizer.vocabulary, list[Figures]()
    for order in ORDERS:
        began = time.perf_counter()
        model = KneserNey(texts, order, V, V + 1)
        seconds = time.perf_counter() - began
        p = model.probabilities(asked)
        worst = max(
            abs(float(model.next_token(text[:order].tolist()).sum()) - 1) for text in pieces([validation])[:200]
        )
        figures = {
            'order': order,
            'bits_per_byte': float(-np.log2(p).sum() / bytes_),
            'parameters': model.grams,
            'seconds': seconds,
            'discounts': [one.discount_4[1:].tolist() for one in model.orders],
            'fallback': [length for length, one in enumerate(model.orders, start=1) if one.fallback],
            'sum_error': worst,
        }
        found.append(figures)
        say(f'order {order}: {figures["bits_per_byte"]:.4f} bits/byte, {model.grams:,} n-grams in {seconds:.1f} s')
    ids, choose = prompt(corpus), chooser(0)
    for _ in range(SAMPLE_TOKENS):
        ids.append(choose(model.next_token(ids[1 - ORDERS[-1] :])))
        if ids[-1] == corpus.dataset.tokenizer.eos:
            break
    best = min(found, key=lambda one: one['bits_per_byte'])
    tokens = int(texts.predicted_S.sum())
    text = corpus.dataset.tokenizer.decode(ids[len(prompt(corpus)) :])
    return {
        'orders': found,
        'tokens': tokens,
        'sample': text,
        **{k: best[k] for k in ('bits_per_byte', 'seconds', 'parameters')},
    }


def words(corpus: Corpus, say: Say) -> Figures:
    """word2vec's nearest neighbours on the rows that all models read."""
    tokenizer = corpus.dataset.tokenizer
    config = word2vec.SkipGram(vocabulary=tokenizer.vocabulary, seed=corpus.config.seed)
    began = time.perf_counter()
    texts = pieces(corpus.batches())
    x_VD = word2vec.train(config, texts)
    seconds = time.perf_counter() - began
    count_V = np.bincount(np.concatenate(texts), minlength=tokenizer.vocabulary)
    among = np.flatnonzero(count_V >= 50)
    named = lambda token: tokenizer.decode([token])
    asked = {text: token for text in ASKED if (token := corpus.piece(text)) is not None}
    near = {
        text: [named(other) for other, _ in word2vec.nearest(x_VD, token, 6, among)] for text, token in asked.items()
    }
    say(f'word2vec: {len(texts)} texts in {seconds:.0f} s')
    return {'nearest': near, 'seconds': seconds, 'parameters': 2 * config.vocabulary * config.dim}


def planted_words(corpus: Corpus, say: Say) -> Figures:
    """The share of analogies that word2vec answers on a corpus with planted relations, for three seeds."""
    shares = []
    for seed in range(3):
        texts, question_N4, vocabulary = word2vec.planted(seed=seed)
        config = word2vec.SkipGram(
            vocabulary=vocabulary, dim=32, window=4, subsample=0, epochs=3, pairs=256, learning_rate=2e-2, seed=seed
        )
        right = word2vec.analogies(word2vec.train(config, texts), question_N4) == question_N4[:, 3]
        shares.append(float(right.mean()))
        say(f'planted relations, seed {seed}: {shares[-1]:.1%} of {len(question_N4)} analogies')
    return {'shares': shares, 'questions': len(question_N4)}


def small_net(corpus: Corpus, net: Net, rate: float, weights: Path, say: Say) -> Figures:
    """A net of `history.nets`; its weights go into a file for pieces that look into it."""
    plan = corpus.plan(rate)
    trained = train(net, plan, say)
    weights.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {f'weight {name}': np.asarray(x) for name, x in trained.weights.items()}
    with output_file('the weights', weights) as file:
        np.savez(file, **arrays | {f'seen {name}': np.asarray(x) for name, x in trained.seen.items()})
    figures = curve_figures([list(point) for point in trained.curve], net.parameters)
    figures['flops_per_token'] = net.training_flops(corpus.config.training.sequence_length)
    if isinstance(net, PlainDecoder):
        everything = range(len(plan.validation))
        figures['bits_of_batch'] = bits_per_byte(
            net, trained.weights, trained.seen, plan, list(everything), learns=True
        )
        return figures
    return figures | {'sample': sample_net(corpus, net, trained)}


def sample_net(corpus: Corpus, net: Net, trained: Trained) -> str:
    """What a net writes after PROMPT."""
    tokenizer, ids = corpus.dataset.tokenizer, prompt(corpus)
    choose = chooser(0)
    return tokenizer.decode(continued(net, trained.weights, trained.seen, ids, choose, SAMPLE_TOKENS, [tokenizer.eos]))


def decoder(corpus: Corpus, config: RunConfig, runs: Path, say: Say) -> Figures:
    """A run of the project's own training, in `runs`, which goes on where it was if it was stopped."""
    lend(corpus, runs / config.name)
    console = Console(soft_wrap=True, width=120, file=cast(IO[str], Lines(say)), force_terminal=False)
    code = train_run(config, runs, console=console)
    if code:
        raise Stopped(code - 128)  # it has saved; the script ends as any that a signal stops
    rows, _ = read(runs / config.name / 'metrics.jsonl')
    t, c = config.training, corpus.config.model.vocabulary
    model = config.with_vocabulary(corpus.dataset.tokenizer.embedded).model
    assert c == model.vocabulary
    figures = curve_figures(curve_of(rows), sum(cost.parameters(model).values()))
    figures['flops_per_token'] = cost.training_flops(model, t.sequence_length)
    return figures


def sampled_decoder(corpus: Corpus, config: RunConfig, runs: Path, say: Say) -> Figures:
    """As `decoder`, with a sample."""
    figures = decoder(corpus, config, runs, say)
    run = open_run(runs / config.name)
    assert run.tokenizer is not None, 'learnt with the run'
    with jax.set_mesh(run.mesh):
        sampling = Sampling(temperature=TEMPERATURE)
        (answer,) = generate(
            run.model, run.tokenizer, [PROMPT], sampling, SAMPLE_TOKENS, config.training.sequence_length
        )
    return figures | {'sample': answer.text}


def gradient_norms(corpus: Corpus, nets: dict[str, tuple[Net, Path]], dense: Path, say: Say) -> Figures:
    """The gradient by distance of recurrent nets, trained and as they begin, and of the dense decoder."""
    whole = gradients.single_documents(corpus.validation())[:GRADIENT_ROWS]
    batch = corpus.dataset.validation.take(whole)
    found = {}
    for name, (net, path) in nets.items():
        weights, seen = weights_in(path)
        first = net.initial(jax.random.key(corpus.config.seed))
        for state, w in (('trained', weights), ('at birth', first)):
            found[f'{name}, {state}'] = gradients.beside_the_last(gradients.of_net(net, w, seen, batch)).tolist()
        if isinstance(net, Elman):
            radius = {state: spectral_radius(w) for state, w in (('trained', weights), ('at birth', first))}
    run = open_run(dense, stacked=True)
    with jax.set_mesh(run.mesh):
        found['dense decoder, trained'] = gradients.beside_the_last(gradients.of_decoder(run.model, batch)).tolist()
    say(f'gradients of {len(whole)} rows')
    return {'shares': found, 'rows': len(whole), 'radius': radius}


def spectral_radius(w: Weights) -> float:
    """Of an Elman net's recurrent matrix the largest absolute value of an eigenvalue."""
    return float(np.abs(np.linalg.eigvals(np.asarray(w['recurrent_HH'], np.float64))).max())


def weights_in(path: Path) -> tuple[Weights, Statistics]:
    """Weights and statistics that `small_net` wrote."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: jnp.asarray(file[name]) for name in file}
    of = lambda kind: {name.removeprefix(kind): x for name, x in arrays.items() if name.startswith(kind)}
    return of('weight '), of('seen ')


def prompt(corpus: Corpus) -> list[int]:
    """PROMPT's tokens, after the mark that begins a document."""
    return [corpus.dataset.tokenizer.bos, *corpus.dataset.tokenizer.encode(PROMPT)]


def chooser(seed: int) -> Callable[[np.ndarray], int]:
    """Draws tokens by their probabilities at TEMPERATURE."""
    random = np.random.default_rng(seed)

    def choose(p_V: np.ndarray) -> int:
        p_V = p_V ** (1 / TEMPERATURE)
        return int(random.choice(len(p_V), p=p_V / p_V.sum()))

    return choose


def curve_figures(curve: list[list[float]], parameters: int) -> Figures:
    """What all curves tell: of each point tokens, seconds and bits per byte; the last of them; parameters."""
    tokens, seconds, bits = curve[-1]
    return {'curve': curve, 'tokens': tokens, 'seconds': seconds, 'bits_per_byte': bits, 'parameters': parameters}


def curve_of(rows: list[dict[str, Any]]) -> list[list[float]]:
    """Tokens, seconds of training and bits per byte at each validation of a run, from its metrics."""
    curve, tokens, seconds = [], 0, 0.0
    for row in rows:
        seconds += (row['tokens'] - tokens) / row['tokens_per_second']
        tokens = row['tokens']
        if 'validation_bits_per_byte' in row:
            curve.append([tokens, seconds, row['validation_bits_per_byte']])
    return curve


class Lines:
    """A file that tells the lines written to it which say how far a training is."""

    encoding = 'utf-8'

    def __init__(self, say: Say) -> None:
        self.say, self.begun = say, ''

    def write(self, text: str) -> int:
        """Tells the lines that are whole now."""
        *lines, self.begun = (self.begun + text).split('\n')
        for line in lines:
            if line.startswith(TOLD):
                self.say(line.rstrip())
        return len(text)

    def flush(self) -> None:
        """Nothing: a line that is not whole waits."""
