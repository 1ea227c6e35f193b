"""What a model learns from: rows of packed documents, as arrays that are NumPy's on the host and JAX's on devices.

Letters: B rows, T tokens of a row, S tokens of a source's row.
"""

from typing import Any, NamedTuple


class Source(NamedTuple):
    """Rows that an encoder reads, int32 [B, S] each. A token of the decoder attends to the source of its own segment."""

    tokens_BS: Any
    position_BS: Any  # place in the source, from 0
    segment_BS: Any  # sources of a row, numbered from 1; 0 is padding


class Batch(NamedTuple):
    """Rows to learn from, int32 [B, T] each: token t of a row is read, target t is what the model must predict there.

    A target counts exactly where its segment is above 0.
    """

    tokens_BT: Any
    target_BT: Any
    position_BT: Any  # place in the document, from 0
    segment_BT: Any  # documents of a row, numbered from 1; 0 is padding, where all arrays are 0
    source: Source | None = None  # of an encoder–decoder
