"""What the linear maps of a model read of some text: second moments of their inputs, and what layers and experts do with it.

Whitened decompositions and GPTQ need the Gram matrix XᵀX of a map's inputs, Wanda the norms on its diagonal, REAP what each
expert adds to its tokens, ShortGPT how far a layer turns the residual stream. One pass over the text gives them all, in
batches: of a batch there are sums alone (compress/input_sums.py), which are added up in float64 on the host.

Maps are those of the decoder's layers; neither the LM head nor the layers of `mtp` are among them.

Letters: N rows of text, T their columns, B rows of a batch, I inputs of a map, E experts, L layers.
"""

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax import P

from weft.compress.input_sums import (
    AFTER,
    BEFORE,
    CHOICES,
    COSINE,
    EXPERT_INPUT,
    HIDDEN_UNITS,
    LAYOUTS,
    MLP_INPUT,
    OUTPUTS,
    VISITS,
    batch_sums,
    layers_by_group,
    sums_of,
)
from weft.inference.prompts import BUCKET, pad_rows
from weft.inference.run import TrainedRun
from weft.model.config import ModelConfig
from weft.model.decoder import Decoder, declared_decoder
from weft.model.forward import TOKENS, needs_no_stages, one_device, place, row_ways
from weft.model.layers.attention import Attention
from weft.model.layers.mla import LatentAttention
from weft.model.layers.mlp import Mlp
from weft.model.layers.moe import MoE
from weft.model.linear_forms import linear_maps
from weft.runtime.errors import UserError, nearest
from weft.sharding.mesh import SEQUENCE

TOKENS_AT_ONCE = 4096  # of a batch, all devices together
# The tap at which each map of a layer reads, of the modules whose maps these are.
READ: dict[type, dict[str, str]] = {
    Attention: {
        'attention.q': 'attention.input',
        'attention.k': 'attention.input',
        'attention.v': 'attention.input',
        'attention.o': 'attention.head_outputs',
    },
    LatentAttention: {
        'attention.q': 'attention.input',
        'attention.q_down': 'attention.input',
        'attention.q_up': 'attention.query_latent',
        'attention.kv_down': 'attention.input',
        'attention.kv_up': 'attention.latent',
        'attention.o': 'attention.head_outputs',
    },
    Mlp: {'mlp.gate': MLP_INPUT, 'mlp.up': MLP_INPUT, 'mlp.down': 'mlp.hidden_units'},
    MoE: {
        'mlp.router': MLP_INPUT,
        'mlp.gate': EXPERT_INPUT,
        'mlp.up': EXPERT_INPUT,
        'mlp.down': HIDDEN_UNITS,
        'mlp.shared.gate': MLP_INPUT,
        'mlp.shared.up': MLP_INPUT,
        'mlp.shared.down': 'shared_experts.hidden_units',
    },
}


@dataclasses.dataclass(frozen=True)
class MapInputs:
    """The second moments of what a linear map read, over the tokens of a text; of experts' maps over those that each read."""

    gram: np.ndarray  # float64 [I, I], or [E, I, I]: Σ x xᵀ, without a mean taken off
    count: np.ndarray  # float64 [] or [E]: tokens

    @property
    def norm(self) -> np.ndarray:
        """float64 [I] or [E, I]: the length of each input over all tokens, √ Σ x², as Wanda (arXiv:2306.11695) has it."""
        return np.sqrt(np.maximum(np.diagonal(self.gram, axis1=-2, axis2=-1), 0))

    @property
    def mean_square(self) -> np.ndarray:
        """float64 [I] or [E, I]: the mean of each input's square; 0 of an expert that read nothing."""
        return self.norm**2 / np.maximum(self.count, 1)[..., None]


class ExpertUse(NamedTuple):
    """What the tokens of a text made of the experts of one layer, float64 [E] each."""

    count_E: np.ndarray  # tokens that chose the expert
    contribution_E: np.ndarray  # Σ over those of the output's length times its weight; by `count_E` it is REAP's score


@dataclasses.dataclass(frozen=True)
class InputStatistics:
    """Of a text that a model read."""

    maps: dict[str, MapInputs]  # by name, as in `layers.3.attention.q`; maps that read the same have the same arrays
    experts: dict[int, ExpertUse]  # by the number of the layer
    cosine_L: np.ndarray  # float64: the mean cosine between the residual stream before each layer and after it
    tokens: int

    def map(self, name: str) -> MapInputs:
        """Those of a map. Raises UserError for a name that none has, or none that was asked for."""
        if name not in self.maps:
            raise UserError(f'{name!r}: there are no statistics of such a linear map{nearest(name, sorted(self.maps))}')
        return self.maps[name]


def input_statistics(
    run: TrainedRun,
    rows: Sequence[Sequence[int]] | np.ndarray,
    maps: Sequence[str] = ('*',),
    tokens_at_once: int = TOKENS_AT_ONCE,
    progress: Callable[[int, int], object] = lambda done, of: None,
) -> InputStatistics:
    """Reads rows of text with a trained run, on the run's mesh, and gives the statistics of its linear maps' inputs.

    Args:
        run: opened by `weft.open_run`; `stacked=True` compiles sooner.
        rows: the ids of the tokens of each text, [N, T] or of different lengths. Each row is a document of its own.
        maps: patterns of the names that are wanted (`'layers.*.mlp.*'`); the others' matrices are not kept.
        tokens_at_once: of a batch; what a device holds at once goes with it.
        progress: is told after each batch how many rows are done, and of how many.

    Raises UserError for a pattern that means no map, for rows that do not fit the model, on a mesh with stages, for an
    encoder–decoder, and for maps of a registered kind of layer, of whose inputs nothing is known.
    """
    with jax.set_mesh(run.mesh):
        return model_statistics(run.model, rows, run.context, maps, tokens_at_once, progress)


def model_statistics(
    model: Decoder,
    rows: Sequence[Sequence[int]] | np.ndarray,
    context: int,
    maps: Sequence[str] = ('*',),
    tokens_at_once: int = TOKENS_AT_ONCE,
    progress: Callable[[int, int], object] = lambda done, of: None,
) -> InputStatistics:
    """As `input_statistics`, of a model on the current mesh; `context`: the most tokens of a row."""
    c = model.config
    needs_no_stages('statistics of inputs')
    wanted = wanted_maps(c, maps)
    check_rows(c, rows, context)
    ways = BUCKET * math.prod(jax.sharding.get_mesh().shape[axis] for axis in SEQUENCE)
    width = -(-max(len(row) for row in rows) // ways) * ways
    at_once = max(tokens_at_once // width // row_ways(), 1) * row_ways()
    sources = {one.source for one in wanted}
    taps = frozenset({BEFORE, AFTER, *sources} | ({CHOICES, OUTPUTS} if c.moe else set()))
    if HIDDEN_UNITS in sources:
        taps |= {EXPERT_INPUT}
    totals: dict[str, np.ndarray] = {}
    for begin in range(0, len(rows), at_once):
        some = [list(map(int, row)) for row in rows[begin : begin + at_once]]
        found = _sums(model, taps, place(filled_up(some, at_once, width, context)))
        for name, array in found.items():
            add(totals, name, np.asarray(array))
        progress(min(begin + at_once, len(rows)), len(rows))
    return collected(c, wanted, totals, sum(len(row) for row in rows))


class Wanted(NamedTuple):
    """A linear map whose inputs are wanted."""

    layer: int
    name: str  # within the layer
    source: str  # of the sum
    row: int  # of the sum's first dim


def wanted_maps(c: ModelConfig, patterns: Iterable[str]) -> list[Wanted]:
    """The linear maps that patterns mean. Raises UserError as `input_statistics`."""
    assert not isinstance(patterns, str), 'several patterns'
    if c.encoder:
        raise UserError('model.encoder is given: statistics of inputs are of models without one')
    every, patterns = all_maps(c), list(patterns)
    for pattern in patterns:
        if not fnmatch.filter(every, pattern):
            raise UserError(f'{pattern!r}: no layer has such a linear map{nearest(pattern, sorted(every))}')
    chosen = {name: source for name, source in every.items() if any(fnmatch.fnmatch(name, p) for p in patterns)}
    unknown = sorted(name for name, source in chosen.items() if source is None)
    if unknown:
        raise UserError(
            f'{unknown[0]}: it is of a kind of layer of whose inputs nothing is known; leave it out of `maps`'
        )
    having: dict[str, set[int]] = {}
    for name, source in every.items():
        having.setdefault(str(source), set()).add(int(name.split('.')[1]))
    having[MLP_INPUT] = set(range(c.layers))
    found = []
    for name, source in chosen.items():
        _, layer, rest = name.split('.', 2)
        row = sorted(having[str(source)]).index(int(layer))
        found.append(Wanted(int(layer), rest, str(source), row))
    return found


@functools.lru_cache(maxsize=32)
def all_maps(c: ModelConfig) -> dict[str, str | None]:
    """Of each linear map of the layers, by name, the sum that is of its inputs; None: nothing is known of them."""
    by_layer: dict[int, dict[str, str | None]] = {}
    for block, (_, numbers) in zip(declared_decoder(c).groups, layers_by_group(c), strict=True):
        read = READ.get(type(block.attention), {}) | READ.get(type(block.mlp), {})
        of_layer = {name: read.get(name) for name, _ in linear_maps(block)}
        by_layer |= dict.fromkeys(numbers, of_layer)
    return {f'layers.{n}.{name}': source for n in range(c.layers) for name, source in by_layer[n].items()}


def check_rows(c: ModelConfig, rows: Sequence[Sequence[int]] | np.ndarray, context: int) -> None:
    """Raises UserError for rows that a model cannot read."""
    if not len(rows):
        raise UserError('rows: none is given; give at least one row of tokens')
    last = (c.vocabulary or 0) - 1
    for number, row in enumerate(rows):
        ids = np.asarray(row)
        if not 1 <= len(ids) <= context:
            raise UserError(f'row {number} has {len(ids)} tokens: it must have from 1 to {context}')
        if ids.min() < 0 or ids.max() > last:
            wrong = ids[(ids < 0) | (ids > last)][0]
            raise UserError(f'row {number}: {wrong} is no token; ids are from 0 to {last}')


def filled_up(rows: list[list[int]], count: int, width: int, context: int) -> tuple[np.ndarray, ...]:
    """Tokens, positions and segments, int32 [count, width]: rows with padding after them, and rows of padding alone."""
    tokens_BT, length_B = pad_rows(rows, count, width)
    length_B = np.where(np.arange(count) < len(rows), length_B, 0)
    column_T = np.arange(width, dtype=np.int32)
    # A table of positions may have fewer rows than the padding, which nothing attends to.
    position_BT = np.broadcast_to(np.minimum(column_T, context - 1), tokens_BT.shape)
    return tokens_BT, position_BT, (column_T[None] < length_B[:, None]).astype(np.int32)


@functools.partial(jax.jit, static_argnums=1)
def _sums(model: Decoder, taps: frozenset[str], rows: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
    """The sums over one batch by name, [L, …] of the layers that have them."""
    layouts = {name: LAYOUTS.get(name, P()) for name in sums_of(taps)}
    body = functools.partial(batch_sums, names=taps, mixtures=mixtures(model.config))
    return one_device(body, model, (TOKENS,), layouts)(model, rows)


def mixtures(c: ModelConfig) -> list[int]:
    """The numbers of the layers that have experts."""
    return [number for number, spec in enumerate(c.layer_specs) if spec.experts]


def add(totals: dict[str, np.ndarray], name: str, array: np.ndarray) -> None:
    """Adds a batch's sums to those of all before it, in float64."""
    if name in totals:
        totals[name] += array
    else:
        totals[name] = array.astype(np.float64)


def collected(c: ModelConfig, wanted: list[Wanted], totals: dict[str, np.ndarray], tokens: int) -> InputStatistics:
    """The statistics, of the sums over all rows."""
    experts = {layer: ExpertUse(totals[VISITS][row], totals[OUTPUTS][row]) for row, layer in enumerate(mixtures(c))}
    made: dict[tuple[str, int], MapInputs] = {}
    maps = {}
    for one in wanted:
        key = one.source, one.row
        if key not in made:
            count = experts[one.layer].count_E if one.source in (EXPERT_INPUT, HIDDEN_UNITS) else np.float64(tokens)
            made[key] = MapInputs(totals[one.source][one.row], np.asarray(count))
        maps[f'layers.{one.layer}.{one.name}'] = made[key]
    return InputStatistics(maps, experts, totals[COSINE] / tokens, tokens)
