"""A table of what is sent, by kind and axes; how it is kept in files, and how two of them differ."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

Mesh = Mapping[str, int]  # devices along each axis, in the mesh's order
Key = tuple[str, str]  # kind, axes joined with '+'


class Sent(NamedTuple):
    """Arrays, and bytes that one device sends of them."""

    calls: float
    bytes: float


@dataclasses.dataclass
class Traffic:
    """A table of what is sent, and what could not be counted."""

    sent: dict[Key, Sent] = dataclasses.field(default_factory=dict)
    unknown: list[str] = dataclasses.field(default_factory=list)

    def add(self, kind: str, axes: str, size: float, calls: float = 1) -> None:
        """Counts one more operation; none where no axis is left or nothing is sent."""
        if axes and size:
            old = self.sent.get((kind, axes))
            self.sent[kind, axes] = Sent(old.calls + calls, old.bytes + size) if old else Sent(calls, size)

    def include(self, other: 'Traffic', times: float = 1) -> None:
        """Adds all of another table, `times` over."""
        for (kind, axes), sent in other.sent.items():
            self.add(kind, axes, sent.bytes * times, sent.calls * times)
        self.unknown += [line for line in other.unknown if line not in self.unknown]

    def bytes_by_axes(self) -> dict[str, float]:
        """Bytes over each set of axes, of all kinds together."""
        total = collections.defaultdict[str, float](float)
        for (_, axes), sent in self.sent.items():
            total[axes] += sent.bytes
        return dict(total)

    def lowered(self) -> 'Traffic':
        """A table of what a program asks for, in the words of a compiled one: every sum and maximum is an all_reduce."""
        words = {**dict.fromkeys(('psum', 'pmax', 'pmin', 'reduce'), 'all_reduce'), 'reshard': 'all_gather'}
        found = Traffic(unknown=list(self.unknown))
        for (kind, axes), sent in self.sent.items():
            found.add(words.get(kind, kind), axes, sent.bytes, sent.calls)
        return found

    def budget(self) -> dict[str, list[float]]:
        """{'all_gather over data+expert': [calls, bytes]}, sorted."""
        assert not self.unknown, f'a table with unknown trip counts is no budget: {self.unknown}'
        return {name(key): [_whole(x) for x in self.sent[key]] for key in sorted(self.sent)}

    @classmethod
    def of_budget(cls, rows: Mapping[str, list[float]]) -> 'Traffic':
        key = lambda text: tuple(text.split(' over ', 1))
        return cls({key(text): Sent(*amounts) for text, amounts in rows.items()})

    def to_json(self) -> dict[str, Any]:
        """A budget with what could not be counted: {'bytes': `budget`'s, 'unknown': lines}."""
        return {'bytes': dataclasses.replace(self, unknown=[]).budget(), 'unknown': self.unknown}

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> 'Traffic':
        return dataclasses.replace(cls.of_budget(table['bytes']), unknown=table['unknown'])

    def __str__(self) -> str:
        rows = sorted(self.sent.items(), key=lambda row: -row[1].bytes)
        lines = [f'{name(key)}: {_amount(sent)}' for key, sent in rows]
        return '\n'.join([*lines, *(f'not counted: {line}' for line in self.unknown)])


def largest(tables: Iterable[Traffic]) -> Traffic:
    """Of each kind and axes the largest figures among alternatives: a device takes one branch, nobody knows which."""
    found = Traffic()
    for table in tables:
        for key, sent in table.sent.items():
            old = found.sent.get(key, Sent(0, 0))
            found.sent[key] = Sent(max(old.calls, sent.calls), max(old.bytes, sent.bytes))
        found.unknown += [line for line in table.unknown if line not in found.unknown]
    return found


def name(key: Key) -> str:
    """A row's name, as in `all_gather over data+expert`."""
    return ' over '.join(key)


def cost(kind: str, size: float, p: int) -> float:
    """Bytes that one of p devices sends, where `size` is the S of the module's table."""
    if kind in ('ppermute', 'broadcast'):
        return size
    once = ('all_gather', 'reduce_scatter', 'all_to_all', 'ragged_all_to_all', 'reshard')
    return size * (p - 1) / p * (1 if kind in once else 2)


def label(axes: Iterable[str], mesh: Mesh) -> str:
    """The axes of more than one device, in the mesh's order, joined with '+'."""
    axes = set(axes)
    return '+'.join(axis for axis in mesh if axis in axes and mesh[axis] > 1)


def span(axes: Iterable[str], mesh: Mesh) -> int:
    """Devices along the axes together."""
    return math.prod(mesh[axis] for axis in axes)


# Budgets --------------------------------------------------------------------------------------------------------------


SUSPECTS = {
    'all_gather': 'unplanned gather?',
    'reduce_scatter': 'a gradient or an activation summed once more?',
    'psum': 'a sum where a reduce_scatter would do?',
    'all_reduce': 'a reduce_scatter turned into an all_reduce?',
    'reshard': 'an unplanned change of layout?',
    'reduce': 'a sum over a split dim outside shard_map?',
}


def difference(
    golden: Traffic, found: Traffic, *, exact: bool = False, slack: float = 0.0, ignore: float = 0.0
) -> list[str]:
    """Readable lines for what `found` sends beyond the budget `golden`; with `exact`, for what it sends less too.

    `slack` is the share by which a row's bytes may exceed its budget; an excess below the share `ignore` of all that the
    budget sends over the same axes is not told. Calls count only where `exact` is asked for: a compiler joins and splits
    them. Loops of unknown trips are always told. Empty when all is within budget.
    """
    total = golden.bytes_by_axes()
    lines = [f'not counted: {line}' for line in found.unknown]
    for key in sorted(golden.sent.keys() | found.sent.keys()):
        had, have = golden.sent.get(key), found.sent.get(key)
        hint = f': {SUSPECTS[key[0]]}' if key[0] in SUSPECTS else ''
        excess = (have.bytes if have else 0) - (had.bytes if had else 0)
        if 0 < excess <= ignore * total.get(key[1], 0):
            continue
        if had is None:
            assert have is not None, 'the key is one of either table'
            lines.append(f'{name(key)}: {_amount(have)} (not in the budget){hint}')
        elif have is None:
            lines += [f'{name(key)}: gone (budget {_amount(had)})'] if exact else []
        elif have.bytes > had.bytes * (1 + slack) or (exact and have.calls > had.calls):
            lines.append(f'{name(key)}: {_amount(have)} (budget {_amount(had)}){hint}')
        elif exact and have != had:
            lines.append(f'{name(key)}: {_amount(have)} (less than the budget, {_amount(had)})')
    return lines


def _amount(sent: Sent) -> str:
    return f'{sent.calls:,.12g} call{"s" * (sent.calls != 1)}, {_size(sent.bytes)}'


def _size(count: float) -> str:
    for unit, size in (('TB', 1e12), ('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
        if count >= size:
            return f'{count / size:.6g} {unit}'
    return f'{count:.6g} B'


def _whole(x: float) -> float:
    return int(x) if x == int(x) else round(x, 3)
