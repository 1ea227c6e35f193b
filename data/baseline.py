"""What a general-purpose compressor needs for the same text: the figure that a language model has to beat."""

import lzma


def xz_bits_per_byte(data: bytes, given: bytes | None = None) -> float:
    """Bits that `xz -9` needs for each byte of `data`: alone, or after `given` (both together, minus `given` alone)."""
    assert data, 'no bytes, no bits per byte'
    if given is None:
        return 8 * len(lzma.compress(data, preset=9)) / len(data)
    return 8 * (len(lzma.compress(given + data, preset=9)) - len(lzma.compress(given, preset=9))) / len(data)
