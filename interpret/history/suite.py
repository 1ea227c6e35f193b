"""All pieces of work behind docs/history.md: which models there are, what each rests on, in the order in which they run."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from weft.interpret.history import runs
from weft.interpret.history.corpus import Corpus, check_shared, open_corpus
from weft.interpret.history.kept import ROOT, Kept
from weft.interpret.history.nets import LSTM, Elman, Net, NormKind, PlainDecoder
from weft.runtime.errors import UserError
from weft.training.config import RunConfig, dump, load_config

CONFIGS = ROOT / 'configs' / 'history'
RECURRENT = 128  # hidden units of the recurrent nets
NET_RATE = 3e-3  # learning rate of the small nets
WIDTHS = (16, 32, 128)  # of the scaling curve, beside the dense model's own
DEPTHS = (1, 2, 8)
NORMS: tuple[NormKind, ...] = ('layer', 'batch', 'none')
NORM_NAMES = tuple(f'norm-{kind}' for kind in NORMS)
# What figures rest on, beside the config and the version of jax: of any piece, of small nets, of the project's own decoder.
DATA = ('data', 'interpret/history/corpus.py', 'interpret/history/runs.py')
NETS = ('interpret/history/nets.py', 'interpret/history/net_training.py', 'training/optimizers.py')
DECODER = ('model', 'sharding', 'training', 'inference')


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of work: its figures, and what they are made from."""

    compute: Callable[[runs.Say], runs.Figures]
    config: Any  # plain values
    code: tuple[str, ...]
    leaves: Path | None = None  # a file or folder that other pieces look into: without it the figures are made anew
    needs: tuple[str, ...] = ()  # pieces that it looks into


@dataclasses.dataclass(frozen=True)
class Suite:
    """The pieces by name, and where figures, weights and runs stand."""

    corpus: Corpus
    pieces: dict[str, Piece]
    kept: Kept
    overrides: Sequence[str] = ()  # of all configs, as the command has them

    def key(self, name: str) -> str:
        """What a piece's figures are kept by."""
        piece = self.pieces[name]
        return self.kept.key([piece.config, jax.__version__], piece.code)

    def find(self, name: str) -> runs.Figures | None:
        """A piece's figures, where they are there and hold still."""
        leaves = self.pieces[name].leaves
        return None if leaves is not None and not leaves.exists() else self.kept.find(name, self.key(name))

    def run(self, name: str, say: runs.Say) -> tuple[runs.Figures, bool]:
        """A piece's figures, and whether they were there already. Raises UserError where pieces that it needs are missing."""
        if (found := self.find(name)) is not None:
            return found, True
        missing = [one for one in self.pieces[name].needs if self.find(one) is None]
        if missing:
            raise UserError(
                f'{name} looks into {", ".join(missing)}: do them first, with --only {missing[0]} and so on'
            )
        return self.kept.put(name, self.key(name), self.pieces[name].compute(say)), False


def suite(work: Path, overrides: Sequence[str], say: runs.Say) -> Suite:
    """The pieces of work, after the corpus is prepared in `work`; `overrides` are those of all configs.

    Raises UserError for configs that do not share one corpus and one budget.
    """
    configs = {name: load_config(CONFIGS / f'{name}.yaml', overrides) for name in ('dense', 'decoder-2017', 'mixture')}
    dense = configs['dense']
    for other in configs.values():
        check_shared(dense, other)
        other.check_sizes()
    scaled = scaling_configs(overrides)
    corpus = open_corpus(dense, work / 'corpus', say)
    about = {'config': plain(dense), 'corpus': corpus.dataset.facts['sha256']}
    pieces = {
        'n-gram': Piece(partial(runs.n_grams, corpus), about, (*DATA, 'interpret/history/kneser_ney.py')),
        'word2vec': Piece(partial(runs.words, corpus), about, (*DATA, 'interpret/history/word2vec.py')),
        'word2vec-planted': Piece(partial(runs.planted_words, corpus), {}, (*DATA, 'interpret/history/word2vec.py')),
    }
    kept = Kept(work / 'figures')

    def add_net(name: str, net: Net) -> Path:
        config = {**about, 'net': said(net), 'rate': NET_RATE}
        path = work / 'weights' / f'{name}-{kept.key(config, NETS)}.npz'
        compute = partial(runs.small_net, corpus, net, NET_RATE, path)
        pieces[name] = Piece(compute, config, (*DATA, *NETS), path)
        return path

    def add_decoder(name: str, config: RunConfig, compute: Callable[..., runs.Figures]) -> Path:
        of = {**about, 'config': plain(config)}
        code = (*DATA, *DECODER)
        config = dataclasses.replace(config, name=f'{name}-{kept.key(of, code)}')
        pieces[name] = Piece(partial(compute, corpus, config, work / 'runs'), of, code, work / 'runs' / config.name)
        return work / 'runs' / config.name

    V = corpus.dataset.tokenizer.vocabulary
    nets: dict[str, tuple[Net, Path]] = {}
    for name, net in (('elman', Elman(vocabulary=V, dim=RECURRENT)), ('lstm', LSTM(vocabulary=V, dim=RECURRENT))):
        nets[name] = net, add_net(name, net)
    folders = {
        name: add_decoder(name, configs[name], runs.sampled_decoder) for name in ('decoder-2017', 'dense', 'mixture')
    }
    of = {**about, 'nets': [[said(net), path.name] for net, path in nets.values()], 'dense': folders['dense'].name}
    code = (*DATA, *NETS, *DECODER, 'interpret/history/gradients.py')
    pieces['gradients'] = Piece(
        partial(runs.gradient_norms, corpus, nets, folders['dense']), of, code, needs=(*nets, 'dense')
    )
    for name, config in scaled.items():
        add_decoder(name, config, runs.decoder)
    for name, kind in zip(NORM_NAMES, NORMS, strict=True):
        c = dense.model
        plain_decoder = PlainDecoder(vocabulary=V, dim=c.model_dim, layers=c.layers, heads=c.attention.heads, norm=kind)
        add_net(name, plain_decoder)
    return Suite(corpus, pieces, kept, overrides)


def scaling_configs(overrides: Sequence[str]) -> dict[str, RunConfig]:
    """Dense models of other widths, and of other depths: the dense model stands in both rows."""
    load = lambda *more: load_config(CONFIGS / 'dense.yaml', [*overrides, *more])
    dense = load()
    c, rate = dense.model, dense.optimizer.learning_rate
    found = {}
    for width in WIDTHS:
        # Wider models want smaller steps: as the square root here, between none and the µP's inverse.
        mine = rate * min(1.0, (c.model_dim / width) ** 0.5)
        hidden = 4 * round(width * c.mlp.dim / c.model_dim / 4)
        more = f'model.model_dim={width}', f'model.mlp.dim={hidden}', f'optimizer.learning_rate={mine:.6g}'
        found[f'width-{width}'] = load(*more)
    for depth in DEPTHS:
        found[f'depth-{depth}'] = load(f'model.layers={depth}')
    return found


SCALING_NAMES = (*(f'width-{width}' for width in WIDTHS), *(f'depth-{depth}' for depth in DEPTHS))


def said(net: Net) -> str:
    """A net's fields as text that is the same in every process: a function's address is not."""
    return re.sub(r' at 0x[0-9a-f]+', '', str(net))


def plain(config: RunConfig) -> str:
    """A config as text, without its name."""
    return json.dumps(dump(dataclasses.replace(config, name='x')))
