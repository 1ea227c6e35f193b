"""What a general-purpose compressor needs for the same text: the figure that a language model has to beat."""

import lzma
from concurrent.futures import ThreadPoolExecutor


def xz_bits_per_byte(data: bytes, given: bytes | None = None) -> float:
    """Bits that `xz -9` needs for each byte of `data`: alone, or after `given` (both together, minus `given` alone)."""
    assert data, 'no bytes, no bits per byte'
    if given is None:
        return 8 * _size(data) / len(data)
    with ThreadPoolExecutor() as pool:  # lzma lets other threads run
        both, before = pool.map(_size, (given + data, given))
    return 8 * (both - before) / len(data)


def _size(data: bytes) -> int:
    return len(lzma.compress(data, preset=9))
