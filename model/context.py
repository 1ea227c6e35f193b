"""What a block knows of its tokens beside their activations, from one device's view.

Letters: B rows, T sequence, S tokens of a source, D model, M kv heads times their width, R buckets of distances, N query
heads.
"""

import dataclasses
from collections.abc import Set
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import P

from weft.model.compute import ComputeConfig
from weft.model.records import BETWEEN_BLOCKS, Metric, Records, Report, Tap
from weft.sharding.collectives import gather_sequence, psum, reduce_scatter_sequence, tensor_slice
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
    row_B: jax.Array | None = None  # number of each row in the global batch, for dropout
    column_T: jax.Array | None = None  # number of each column in the row, for dropout
    microbatches: int = 1  # of a pipeline, into which the rows are cut; 1 where `stage` is 1
    decoding: bool = False  # new tokens of rows that are begun, which see the cache
    kind_BT: jax.Array | None = None  # what text a token is of (`embedding.token_types`); None: all 0
    source: EncoderOutput | CrossCache | None = None  # what an encoder made of the rows' sources
    relative_RN: jax.Array | None = None  # relative positions' biases of this device's heads
    measures: bool = False  # whether somebody asks for metrics
    taps: Set[str] | Literal['all'] = frozenset()  # which activations somebody asks for
    records: Records | None = None  # of the layer that is being traced

    def my_microbatches(self) -> 'ForwardContext':
        """The rows that this stage works on outside of the pipeline."""
        return self._rows(lambda tree: my_microbatches(tree, self.microbatches))

    def microbatch(self, number: jax.Array) -> 'ForwardContext':
        """The rows of one microbatch."""
        return self._rows(lambda tree: microbatch(tree, number, self.microbatches))

    def _rows(self, choose) -> 'ForwardContext':
        names = ('position_BT', 'segment_BT', 'row_B', 'kind_BT')
        return dataclasses.replace(self, **choose({name: getattr(self, name) for name in names}))

    def recording(self) -> tuple['ForwardContext', Records]:
        """This context for one call of a layer, and what that call will have recorded."""
        records = Records({}, {})
        return dataclasses.replace(self, records=records), records

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

    def tap(self, name: str, value: jax.Array, layout: P = BETWEEN_BLOCKS) -> None:
        """Offers an activation to whoever asks for it by name (`weft.model.capture.capture`).

        `value` is this device's part, and `layout` says of each dim which mesh axes split it: together all those that hold
        different numbers.
        """
        if self.records is not None and (self.taps == 'all' or name in self.taps):
            assert name not in self.records.taps, f'{name} is tapped twice in a layer'
            self.records.taps[name] = Tap(value, layout)

    @property
    def live_BT(self) -> jax.Array:
        """Which of the tokens that stand between blocks on this device are real."""
        return (tensor_slice(self.segment_BT) if self.sequence_split else self.segment_BT) > 0

    def gather_sequence(self, x_BTD):
        """From the layout between blocks to this context's whole sequence on each device of `tensor`."""
        return gather_sequence(x_BTD) if self.sequence_split else x_BTD

    def reduce_scatter_sequence(self, x_BTD):
        """Partial sums over `tensor` to the layout between blocks."""
        return reduce_scatter_sequence(x_BTD) if self.sequence_split else psum(x_BTD, 'tensor')

    def dropout(self, x_BTD, rate: float, *site: int | jax.Array):
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
