"""Which devices work together in a collective of a compiled program, and along which mesh axes they lie."""

import math
import re

import numpy as np

from weft.planner.traffic.tables import Mesh, label, span


def replica_groups(attributes: str, n: int) -> np.ndarray:
    """Devices that work together, one row a group, from an instruction's attributes; all n where it names none.

    Three spellings: `{{0,1},{2,3}}`; iota, as `[2,4]<=[4,2]T(1,0)`: 0 … 7 in that shape, transposed, cut into that many rows;
    and axes of a mesh, as `mesh['a'=4,'b'=2] {'b'}`.
    """
    mesh = re.search(r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(?(\[[^)]*\)?)\))? *\{([^}]*)\}', attributes)
    if mesh:
        sizes = {axis: int(size) for axis, size in re.findall(r"'?(\w+)'?=(\d+)", mesh[1])}
        wanted = re.findall(r"'(\w+)'", mesh[3])
        ids = _iota(mesh[2]) if mesh[2] else np.arange(math.prod(sizes.values()))
        axes = list(sizes)
        order = [axes.index(axis) for axis in axes if axis not in wanted] + [axes.index(axis) for axis in wanted]
        return (
            ids.reshape(tuple(sizes.values())).transpose(order).reshape(-1, math.prod(sizes[axis] for axis in wanted))
        )
    iota = re.search(r'replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)', attributes)
    if iota:
        return _iota(iota[1])
    lists = re.search(r'replica_groups=\{(\{[\d,{} ]*\})\}', attributes)
    if lists:
        return np.array([_numbers(group) for group in re.findall(r'\{([\d, ]+)\}', lists[1])])
    return np.arange(n)[None]


def source_target_pairs(attributes: str) -> np.ndarray:
    """[pairs, 2]: the devices of a permutation, who sends to whom."""
    found = re.search(r'source_target_pairs=\{(.*?\})\}', attributes)
    assert found, attributes
    return np.array([_numbers(pair) for pair in re.findall(r'\{([\d, ]+)\}', found[1])])


def _iota(text: str) -> np.ndarray:
    found = re.match(r'\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?', text)
    assert found, text
    shape, base, order = found.groups()
    ids = np.arange(math.prod(_numbers(base or shape))).reshape(_numbers(base or shape))
    return (ids.transpose(_numbers(order)) if order else ids).reshape(_numbers(shape))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(',')]


def axes_of(ids: np.ndarray, mesh: Mesh, whole: bool = True) -> str:
    """The mesh axes along which the devices of a row differ."""
    at = np.array(np.unravel_index(ids, tuple(mesh.values())))  # [axis, group, member]
    axes = [axis for axis, row in zip(mesh, at, strict=True) if (row != row[:, :1]).any()]
    partial = whole and span(axes, mesh) != ids.shape[1]
    return label(axes, mesh) + (f' (groups of {ids.shape[1]})' if partial else '')
