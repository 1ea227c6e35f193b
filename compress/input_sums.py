"""Sums over the tokens of a batch of what linear maps read, from one device's view: no activation leaves the program.

A layer offers what its maps read by `ForwardContext.tap`. Here the context is one whose `tap` adds up products where the layer
runs, so that a batch's activations are never together: what stays of a layer is a matrix [I, I].

Letters: B rows, T sequence, N tokens of this device, D model, I inputs of a map, E experts (of an array of one device: those
that it holds), K experts a token, F hidden units of an expert, R pairs (token, choice), L layers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import P, lax

from weft.model.block import Block
from weft.model.config import LayerSpec, ModelConfig
from weft.model.context import ForwardContext
from weft.model.decoder import Decoder
from weft.model.edits import Chosen, Observer
from weft.model.forward import scoring_view
from weft.model.ops.expert_dispatch import LocalExperts, by_expert
from weft.model.ops.grouped_matmul import grouped_apply, grouped_matmul, permute
from weft.model.ops.grouped_weights import Bias, Matmul
from weft.model.records import BETWEEN_BLOCKS, Tap
from weft.sharding.collectives import (
    all_gather,
    all_to_all,
    axis_index,
    match_varying,
    psum,
    reduce_scatter,
    tensor_slice,
    upcast,
    vary_like,
)
from weft.sharding.mesh import BATCH, SEQUENCE, as_axes

BEFORE, AFTER = 'residual.before_attention', 'residual.after_mlp'
MLP_INPUT, CHOICES, OUTPUTS = 'mlp.input', 'router.choices', 'experts.outputs'
# Sums that are no tap's own product with itself.
EXPERT_INPUT, HIDDEN_UNITS, VISITS, COSINE = 'experts.input', 'experts.hidden_units', 'experts.visits', 'cosine'
KEPT_INPUT, KEPT_CHOICES = 'kept mlp.input', 'kept router.choices'  # activations that experts' hidden units are made of
# How the arrays [L, …] of all devices are split; others are whole on each.
LAYOUTS = {EXPERT_INPUT: P(None, 'expert'), HIDDEN_UNITS: P(None, 'expert', 'tensor')}


@dataclasses.dataclass(frozen=True)
class SummingContext(ForwardContext):
    """A context in whose records stand sums instead of activations, of the names that its observer captures.

    Of a name the matrix Σ x xᵀ [I, I] over real tokens, in at least float32, where I are all numbers of a token; and of
        residual.after_mlp  `COSINE`: Σ cos(the stream before the layer, after it)
        router.choices      `VISITS` [E], the tokens that each expert read; if asked for `EXPERT_INPUT` [E, D, D] of those
        experts.outputs     [E]: Σ of the length of an expert's output times its weight in the token's sum
    Each is this device's share, of `EXPERT_INPUT` of the experts that it holds.
    """

    def tap(
        self,
        name: str,
        value: jax.Array,
        layout: P = BETWEEN_BLOCKS,
        copies: int = 1,
        real: int | None = None,
        chosen: Chosen | None = None,
    ) -> jax.Array:
        """As `ForwardContext.tap` takes it; the value is never changed."""
        if self.observer is None or self.records is None:
            return value
        if name == MLP_INPUT and self.about_experts:
            self.keep(KEPT_INPUT, value)
        if not self.observer.captures(name):
            return value
        assert copies == 1, f'{name}: devices of tensor hold it more than once'
        if name == BEFORE:
            self.keep(name, value)
        elif name == AFTER:
            self.keep(COSINE, self.cosine(self.records.taps.pop(BEFORE).value, value))
        elif name == CHOICES:
            self.visit(value)
        elif name == OUTPUTS:
            assert chosen is not None, 'the experts of a token’s own choice'
            length_BTK = jnp.sqrt((upcast(value) ** 2).sum(-1))
            self.keep(OUTPUTS, per_expert(length_BTK, chosen.number_BTK, chosen.among))
        else:
            x_BTI = own_tokens(value, layout)
            x_BTI = jnp.where(self.live_BT[..., None], upcast(x_BTI), 0)  # whatever stands at padding
            self.keep(name, gram(x_BTI.reshape(-1, x_BTI.shape[-1])))
        return value

    def keep(self, name: str, value: jax.Array) -> None:
        """Records a value of one layer."""
        assert self.records is not None
        assert name not in self.records.taps, f'{name} is said twice in a layer'
        self.records.taps[name] = Tap(value, P())

    def cosine(self, before_BTD: jax.Array, after_BTD: jax.Array) -> jax.Array:
        """Σ over real tokens of the cosine between two vectors each; 0 of a vector without length."""
        a, b = upcast(before_BTD), upcast(after_BTD)
        lengths_BT = jnp.sqrt((a * a).sum(-1) * (b * b).sum(-1))
        cosine_BT = (a * b).sum(-1) / jnp.where(lengths_BT > 0, lengths_BT, 1)
        return jnp.where(self.live_BT, cosine_BT, 0).sum()

    def visit(self, expert_BTK: jax.Array) -> None:
        """Records which experts read the tokens, and the products of what they read."""
        assert self.records is not None
        assert isinstance(self.observer, SumObserver)
        experts = self.observer.experts
        expert_BTK = jnp.where(self.live_BT[..., None], expert_BTK, experts)
        self.keep(VISITS, per_expert(jnp.ones(expert_BTK.shape, jnp.float32), expert_BTK, experts))
        if not self.about_experts:
            return
        self.keep(KEPT_CHOICES, expert_BTK)
        x_BTD = self.records.taps[KEPT_INPUT].value
        expert_NK, x_ND = expert_BTK.reshape(-1, expert_BTK.shape[-1]), x_BTD.reshape(-1, x_BTD.shape[-1])
        order_R, place_R, sizes_E = by_expert(expert_NK, experts)
        x_RD = upcast(permute(x_ND, order_R, place_R))
        products_EDD = grouped_products(x_RD, x_RD, sizes_E, self.compute.grouped_matmul)
        self.keep(EXPERT_INPUT, reduce_scatter(products_EDD, 'expert'))

    @property
    def about_experts(self) -> bool:
        """Whether sums of what each expert reads are asked for."""
        assert self.observer is not None
        return self.observer.captures(EXPERT_INPUT)


class SumObserver(Observer):
    """Who asks for sums at some names of a model that has so many experts in a layer, on all devices together, or 0."""

    def __init__(self, names: frozenset[str], experts: int) -> None:
        super().__init__(names)
        self.experts = experts


def own_tokens(value: jax.Array, layout: P) -> jax.Array:
    """A tapped array [B, T, …] as [B, T / (context × tensor), I]: all numbers of the tokens that stand here between blocks."""
    x_BTI = value.reshape(*value.shape[:2], -1)
    axes = [as_axes(part) for part in layout]
    if any('tensor' in part for part in axes[2:]):
        return all_to_all(x_BTI, 'tensor', 1, 2)
    return x_BTI if 'tensor' in axes[1] else tensor_slice(x_BTI)


def gram(x_NI: jax.Array) -> jax.Array:
    """XᵀX [I, I]."""
    return jnp.einsum('NI,NJ->IJ', x_NI, x_NI, precision='highest')


def per_expert(value_BTK: jax.Array, expert_BTK: jax.Array, experts: int) -> jax.Array:
    """[E]: the sum of the values whose choice is each expert; a choice that is none of them counts nowhere."""
    one_BTKE = expert_BTK[..., None] == jnp.arange(experts)[None, None, None]
    return jnp.where(one_BTKE, value_BTK[..., None], 0).sum((0, 1, 2))


def grouped_products(a_RI: jax.Array, b_RJ: jax.Array, sizes_E: jax.Array, backend: str) -> jax.Array:
    """[E, I, J]: of each group AᵀB of its rows, of which the first sizes[0] are the first group's.

    That is the gradient of a grouped matmul with regard to its weights, which each backend makes at the cost of R I J.
    """
    a_RI, b_RJ, sizes_E = match_varying((a_RI, b_RJ, sizes_E))
    zero_EIJ = vary_like(jnp.zeros((len(sizes_E), a_RI.shape[1], b_RJ.shape[1]), a_RI.dtype), a_RI)
    _, products = jax.vjp(lambda w_EIJ: grouped_matmul(a_RI, w_EIJ, sizes_E, backend=backend), zero_EIJ)
    return products(b_RJ)[0]


def hidden_products(block: Block, x_BTD: jax.Array, expert_BTK: jax.Array, backend: str) -> jax.Array:
    """[E, F, F]: Σ h hᵀ of the hidden units of this device's experts over the tokens that chose them.

    Of `data` and `context` this device's share; where `tensor` splits hidden units, its part of the first of both dims. Tokens
    and their choices go to all devices of `tensor` and `expert`, as in the dispatch `all_gather`: none is dropped.
    """
    experts: LocalExperts = block.mlp.experts(x_BTD.dtype, backend)
    x_ND, expert_NK = x_BTD.reshape(-1, x_BTD.shape[-1]), expert_BTK.reshape(-1, expert_BTK.shape[-1])
    for axis in ('tensor', 'expert'):
        x_ND, expert_NK = all_gather(x_ND, axis), all_gather(expert_NK, axis)
    mine_NK = expert_NK - experts.held * axis_index('expert')
    mine_NK = jnp.where((mine_NK >= 0) & (mine_NK < experts.held), mine_NK, experts.held)
    order_R, place_R, sizes_E = by_expert(mine_NK, experts.held)

    def units(matmul: Matmul, x_RD: jax.Array, weights: Any) -> jax.Array:
        inner, *added = weights
        h = matmul(x_RD, inner)
        if added:
            h = tuple(a + matmul(a, bias) for a, bias in zip(h, added[0], strict=True))
        return experts.activation(*h)

    inner = tuple(w for w in (experts.gate_EDF, experts.up_EDF) if w is not None)
    weights = (inner, *(() if experts.biases is None else (tuple(map(Bias, experts.biases[0])),)))
    h_RF = upcast(grouped_apply(units, permute(x_ND, order_R, place_R), weights, sizes_E, backend=backend))
    return grouped_products(h_RF, all_gather(h_RF, 'tensor', 1), sizes_E, backend)


def sums_of(names: frozenset[str]) -> set[str]:
    """The names of the sums that taps are asked for by."""
    others = {AFTER: COSINE, CHOICES: VISITS}
    found = {others.get(name, name) for name in names if name != BEFORE}
    return found | {HIDDEN_UNITS} if EXPERT_INPUT in names else found


def batch_sums(
    model: Decoder, rows: tuple[jax.Array, ...], names: frozenset[str], mixtures: Sequence[int]
) -> dict[str, jax.Array]:
    """One device's view: of each name the sums [L, …] of the layers that have it, laid out as `LAYOUTS` says.

    Args:
        rows: tokens, positions and segments [B, T].
        names: taps, as `SummingContext` has them, and `EXPERT_INPUT`, which asks for `HIDDEN_UNITS` too.
        mixtures: the numbers of the layers that have experts.
    """
    c = model.config
    tokens_BT, plain = scoring_view(model, (*rows, None))
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    ctx = SummingContext(**fields | {'observer': SumObserver(names, c.moe.experts if c.moe else 0)})
    _, _, records = model.hidden(tokens_BT, ctx, for_head=False)
    found = {name: tap.value for name, tap in records.taps.items()}
    if EXPERT_INPUT in names:
        x_LBTD, expert_LBTK = found.pop(KEPT_INPUT), found.pop(KEPT_CHOICES)
        found[HIDDEN_UNITS] = hidden_sums(model, x_LBTD, expert_LBTK, mixtures, ctx.compute.grouped_matmul)
    assert found.keys() == sums_of(names), found.keys()
    for name, value in found.items():
        # Devices of these axes have other experts, or hidden units.
        apart = {axis for axes in LAYOUTS.get(name, P()) for axis in as_axes(axes)}
        found[name] = psum(value, [axis for axis in (*BATCH, *SEQUENCE) if axis not in apart])
    return found


def hidden_sums(
    model: Decoder, x_LBTD: jax.Array, expert_LBTK: jax.Array, mixtures: Sequence[int], backend: str
) -> jax.Array:
    """[L, E, F, F]: `hidden_products` of the layers that have experts, in their order; x may be of all layers or of those."""
    of_mixtures = {layer: number for number, layer in enumerate(mixtures)}
    of_x = of_mixtures if len(x_LBTD) == len(mixtures) else {layer: layer for layer in mixtures}
    found: dict[int, jax.Array] = {}

    def products(given: tuple[Block, jax.Array, jax.Array]) -> jax.Array:
        return hidden_products(*given, backend)

    for group, (spec, numbers) in enumerate(layers_by_group(model.config)):
        if not spec.experts:
            continue
        blocks, x = model.groups[group], x_LBTD[np.array([of_x[n] for n in numbers])]
        choices = expert_LBTK[np.array([of_mixtures[n] for n in numbers])]
        if isinstance(blocks, nnx.List):
            found |= {
                n: products((block, x[i], choices[i])) for i, (n, block) in enumerate(zip(numbers, blocks, strict=True))
            }
        else:
            found |= dict(zip(numbers, lax.map(products, (blocks, x, choices)), strict=True))
    return jnp.stack([found[layer] for layer in mixtures])


def layers_by_group(c: ModelConfig) -> list[tuple[LayerSpec, range]]:
    """Of each of `Decoder.groups` its kind and the numbers of its layers."""
    found, first = [], 0
    for run in c.layer_groups:
        found += [(spec, range(first + at, first + run.layers, len(run.specs))) for at, spec in enumerate(run.specs)]
        first += run.layers
    return found
