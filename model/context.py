"""What a block knows of its tokens beside their activations, from one device's view.

Letters: B rows, T sequence, S tokens of a source, D model, M kv heads times their width, R buckets of distances, N query
heads.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import P

from weft.model.compute import ComputeConfig
from weft.model.edits import Chosen, Observer, Place
from weft.model.records import BETWEEN_BLOCKS, Metric, Records, Report, Tap
from weft.sharding.collectives import axis_index, gather_sequence, psum, reduce_scatter_sequence, tensor_slice
from weft.sharding.mesh import BATCH, as_axes
from weft.sharding.pipeline import microbatch, my_microbatches


class EncoderOutput(NamedTuple):
    """An encoder's output while a decoder reads whole rows."""

    x_BSD: jax.Array  # on each device of `tensor` all of it
    segment_BS: (
        jax.Array
    )  # sources of a row, numbered from 1: the decoder's tokens attend to those of their own segment


class CrossCache(NamedTuple):
    """What decoding keeps of an encoder's output: one layer's keys and values of all of it, in the form of a cache.

    A decoder's cache has the layers of each group as one, with a leading dim L of them.
    """

    k_BSM: jax.Array
    v_BSM: jax.Array
    length_B: jax.Array  # tokens of each row's source, int32


@dataclasses.dataclass(frozen=True)
class ForwardContext:
    """What a block needs to know of its tokens beside their activations: those of this device's part of `context`."""

    position_BT: jax.Array  # place in the document, int32
    segment_BT: jax.Array  # documents of a row, numbered from 1; 0 is padding
    compute: ComputeConfig  # resolved: no 'auto' in it
    sequence_split: bool = True  # between blocks each device of `tensor` holds a slice of the sequence, not all of it
    dropout_key: jax.Array | None = None  # one for all devices; None: no dropout
    row_B: jax.Array | None = None  # number of each row in the global batch, for dropout and edits
    column_T: jax.Array | None = (
        None  # number of each column in the row; where it is not given, in decoding, positions are
    )
    microbatches: int = 1  # of a pipeline, into which the rows are cut; 1 where `stage` is 1
    decoding: bool = False  # new tokens of rows that are begun, which see the cache
    kind_BT: jax.Array | None = None  # what text a token is of (`embedding.token_types`); None: all 0
    source: EncoderOutput | CrossCache | None = None  # what an encoder made of the rows' sources
    relative_RN: jax.Array | None = None  # relative positions' biases of this device's heads
    measures: bool = False  # whether somebody asks for metrics
    observer: Observer | None = None  # who captures activations, and changes them
    slots: int = 0  # columns that attention patterns are told of while decoding; 0: they are not
    layer: jax.Array | int | None = None  # number of the layer that is being traced
    records: Records | None = None  # of that layer

    def my_microbatches(self) -> 'ForwardContext':
        """The rows that this stage works on outside of the pipeline."""
        return self._rows(lambda tree: my_microbatches(tree, self.microbatches))

    def microbatch(self, number: jax.Array) -> 'ForwardContext':
        """The rows of one microbatch."""
        return self._rows(lambda tree: microbatch(tree, number, self.microbatches))

    def _rows(self, choose: Callable[[dict[str, Any]], dict[str, Any]]) -> 'ForwardContext':
        names = ('position_BT', 'segment_BT', 'row_B', 'kind_BT')
        return dataclasses.replace(self, **choose({name: getattr(self, name) for name in names}))

    def recording(self, layer: jax.Array | int | None = None) -> tuple['ForwardContext', Records]:
        """This context for one call of the layer of a number, and what that call will have recorded."""
        records = Records({}, {})
        return dataclasses.replace(self, records=records, layer=layer), records

    def metric(
        self,
        name: str,
        total: jax.Array,
        *,
        per: Literal['tokens', 'rows'] = 'tokens',
        weight: float = 0.0,
        report: Report | None = None,
    ) -> None:
        """Says a sum over this device's tokens, to be added up over all devices and logged under `name`.

        Args:
            name: once a layer. Router figures are named `router.entropy` and so forth.
            total: this device's share: what several devices have alike counts on one of them, or as a part on each.
            per: what the whole sum is divided by: the batch's real tokens, or its rows.
            weight: of the mean over all layers with that name in the training objective; 0: it is only watched.
            report: what is logged, a dict by name, from the quotients of all layers [L, …]; their mean where it is None.
                A function of a module, not a lambda: it tells metrics apart.
        """
        if self.measures and self.records is not None:
            assert name not in self.records.metrics, f'{name} is said twice in a layer'
            self.records.metrics[name] = Metric(total, per, weight, report)

    def tap(
        self,
        name: str,
        value: jax.Array,
        layout: P = BETWEEN_BLOCKS,
        copies: int = 1,
        real: int | None = None,
        chosen: Chosen | None = None,
    ) -> jax.Array:
        """Offers an activation to whoever asks for it by name: to capture it, or to change it (`weft.model.edits`).

        Args:
            name: once a layer.
            value: this device's part, [B, T, …].
            layout: of each dim which mesh axes split it, as between whole sequences: together all those that hold different
                numbers. Where T is not split, while decoding, those of dim 1 are left out.
            copies: so many neighbours along the axis of dim 2 have the same part of it.
            real: how many numbers of the last dim, all devices together, are no padding; None: all.
            chosen: which experts stand in dim 2, where those are a token's own choice: an edit has that dim of all experts.

        Returns the value, changed where an edit asks for it: go on with this one.
        """
        if self.observer is None or self.records is None:
            return value
        on = set() if self.decoding else {'context', 'tensor'} if self.sequence_split else {'context'}
        sequence = tuple(axis for axis in as_axes(layout[1]) if axis in on)
        layout = P(layout[0], sequence or None, *layout[2:])
        row_B = axis_index(BATCH) * value.shape[0] + jnp.arange(value.shape[0]) if self.row_B is None else self.row_B
        column_BT = (
            self.position_BT if self.column_T is None else jnp.broadcast_to(self.column_T, self.position_BT.shape)
        )
        if 'tensor' in sequence:
            column_BT = tensor_slice(column_BT)
        value = self.observer.edited(name, value, Place(self.layer, row_B, column_BT, layout, copies, real, chosen))
        if self.observer.captures(name):
            assert name not in self.records.taps, f'{name} is tapped twice in a layer'
            self.records.taps[name] = Tap(value, layout, copies, real)
        return value

    def asks(self, name: str) -> bool:
        """Whether somebody captures or changes the activation of that name: what is costly is made only then."""
        return self.observer is not None and self.observer.asks(name)

    def edits(self, name: str) -> bool:
        """Whether somebody changes the activation of that name."""
        return self.observer is not None and name in self.observer.edits

    @property
    def live_BT(self) -> jax.Array:
        """Which of the tokens that stand between blocks on this device are real."""
        return (tensor_slice(self.segment_BT) if self.sequence_split else self.segment_BT) > 0

    def gather_sequence(self, x_BTD: jax.Array) -> jax.Array:
        """From the layout between blocks to this context's whole sequence on each device of `tensor`."""
        return gather_sequence(x_BTD) if self.sequence_split else x_BTD

    def reduce_scatter_sequence(self, x_BTD: jax.Array) -> jax.Array:
        """Partial sums over `tensor` to the layout between blocks."""
        return reduce_scatter_sequence(x_BTD) if self.sequence_split else psum(x_BTD, 'tensor')

    def dropout(self, x_BTD: jax.Array, rate: float, *site: int | jax.Array) -> jax.Array:
        """Zeroes a share of x; which ones depends on the key, the site, the row and the column alone, not on the mesh."""
        if self.dropout_key is None or rate == 0:
            return x_BTD
        assert self.row_B is not None
        assert self.column_T is not None
        key = self.dropout_key
        for number in site:
            key = jax.random.fold_in(key, number)
        column_T = tensor_slice(self.column_T, 0) if self.sequence_split else self.column_T
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
        key_BT = fold(jax.vmap(jax.random.fold_in, (None, 0))(key, self.row_B), column_T)
        keep_BTD = jax.vmap(jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x_BTD.shape[-1:])))(key_BT)
        return jnp.where(keep_BTD, x_BTD / (1 - rate), 0).astype(x_BTD.dtype)
