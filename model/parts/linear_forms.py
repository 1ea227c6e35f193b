"""What a config says of the form of layers' linear maps.

The kinds that come with the project are `model.weights`: model/forms/ computes them, scripts/compress.py makes them of a run.
"""

import dataclasses
from typing import Literal

from weft.model.parts.registry import WEIGHTS, check_at_least
from weft.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearForm:
    """What all kinds of `model.adapter` and of `model.weights` have; a kind extends it by its own fields, and by `kind`.

    Attributes:
        targets: linear maps of the layers, by their weight's role (`matrix`, `expert`) or by name, in which a star stands for
            anything: `attention.q`, `mlp.*`. Rounded weights may also be `embedding` and `head`.
        layers: numbers of the layers that are meant, from 0; null: all. An adapter's are all.
    """

    kind: str
    targets: tuple[str, ...] = ('matrix', 'expert')
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.targets:
            raise UserError(
                f'targets of kind {self.kind} is []: it must name a linear map; for example ["matrix", "expert"]'
            )

    def names(self, layer: int) -> bool:
        """Whether a layer is meant."""
        return self.layers is None or layer in self.layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundedConfig(LinearForm):
    """`{kind: int8}`, `{kind: int4, group: 32}`, `{kind: fp8}`: codes and scales."""

    kind: Literal['int8', 'int4', 'fp8'] = 'int8'
    group: int = 32  # of int4: inputs of an output that have one scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactoredForm(LinearForm):
    """What all kinds have that keep a weight as factors.

    Attributes:
        compute: `factors` multiplies by one after the other, `rebuild` makes the weight of them first; `auto`: whichever takes
            fewer FLOPs for the tokens at hand. Experts' weights are always rebuilt.
    """

    compute: Literal['auto', 'factors', 'rebuild'] = 'auto'


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankConfig(FactoredForm):
    """`{kind: low_rank, rank: 64}`: W ≈ A B.

    Attributes:
        rank: columns of A.
        slices: `heads`: each head's part of the weight is a pair of its own; of experts each is one anyway.
        shared: of slices that share one factor, which: the `model` one, on the side of the model's width, or the `hidden` one.
        bits: 8 or 4, factors are rounded as weights of kind int8 or int4 are; null: they are numbers, and learn.
    """

    kind: Literal['low_rank'] = 'low_rank'
    rank: int
    slices: Literal['none', 'heads'] = 'none'
    shared: Literal['none', 'model', 'hidden'] = 'none'
    bits: Literal[8, 4] | None = None
    group: int = 32  # of 4 bits: inputs of a factor's output that have one scale

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least('model.weights', self, 1, 'rank')
        if self.bits and (self.slices != 'none' or self.shared != 'none'):
            raise UserError(f'model.weights.bits is {self.bits} with slices or shared: only plain pairs are rounded')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuckerConfig(FactoredForm):
    """`{kind: tucker, ranks: [4, 64, 16]}`: of heads or experts, the model's width, and the units of one; null: left whole."""

    kind: Literal['tucker'] = 'tucker'
    ranks: tuple[int | None, int | None, int | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CPConfig(FactoredForm):
    """`{kind: cp, rank: 64}`: a sum of outer products of a vector of heads or experts, of the model's width, and of units."""

    kind: Literal['cp'] = 'cp'
    rank: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least('model.weights', self, 1, 'rank')


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorTrainConfig(FactoredForm):
    """`{kind: tensor_train, rows: [8, 40], columns: [8, 40], ranks: [64]}`: a matrix as a chain of cores (Oseledets 2011).

    Attributes:
        rows: the model's width as a product of numbers, one for each core.
        columns: the hidden units likewise.
        ranks: between the cores, one fewer.
    """

    kind: Literal['tensor_train'] = 'tensor_train'
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not len(self.rows) == len(self.columns) == len(self.ranks) + 1:
            raise UserError(
                f'model.weights: a tensor train of {len(self.rows)} rows, {len(self.columns)} columns and {len(self.ranks)} '
                'ranks: it has as many rows as columns, and one rank fewer'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrunedConfig(LinearForm):
    """`{kind: pruned}`: weights of which some are 0 and stay so in training, by a mask of bits."""

    kind: Literal['pruned'] = 'pruned'


for kind in ('int8', 'int4', 'fp8'):
    WEIGHTS.register(kind, RoundedConfig)
WEIGHTS.register('low_rank', LowRankConfig)
WEIGHTS.register('tucker', TuckerConfig)
WEIGHTS.register('cp', CPConfig)
WEIGHTS.register('tensor_train', TensorTrainConfig)
WEIGHTS.register('pruned', PrunedConfig)
