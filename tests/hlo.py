"""Compiled programs, read as text."""

import math
import re

SENT = (
    'all-reduce',
    'all-gather',
    'reduce-scatter',
    'collective-permute',
    'all-to-all',
    'ragged-all-to-all',
    'partition-id',
)
MOVED = ('copy', 'transpose', 'gather', 'dynamic-slice', 'slice', 'concatenate', 'pad', 'reverse')


def instructions(text: str) -> list[tuple[str, tuple[int, ...], int]]:
    """Opcode, dims and bytes of each instruction of a compiled program with one result, in fused computations too."""
    found = []
    for kind, dims, opcode in re.findall(r'= \(?((?:bf|[a-z])\d+)\[([\d,]*)\]\S* ([a-z-]+)\(', text):
        shape = tuple(int(size) for size in dims.split(',') if size)
        found.append((opcode, shape, math.prod(shape) * int(re.sub(r'\D', '', kind)) // 8))
    return found
