"""What the rows of a grouped matmul are multiplied by: a weight of each group, its transpose, several at once, or a bias.

Letters: E groups (experts), D and F widths, R rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Transposed(NamedTuple):
    """Weights [E, D, F] that stand for their transposes [E, F, D]: transposing them would copy them."""

    w: jax.Array


class Bias(NamedTuple):
    """Vectors [E, F], one for each group: `matmul(rows, Bias(b))` gives each row its group's vector, whatever the rows hold."""

    b: jax.Array


# matmul(rows, weight) -> rows; matmul(rows, (weight, …)) -> (rows, …); matmul(rows, Bias) -> what to add to rows.
Matmul = Callable[[jax.Array, Any], Any]
# f(matmul, rows [R, D], weights) -> rows [R, F], each row by itself, multiplied by weights with `matmul` alone.
RowFunction = Callable[[Matmul, jax.Array, Any], jax.Array]
