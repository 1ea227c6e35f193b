"""Which part of the text is held out: about the share that is asked for, in whole groups or documents, or by their ends.

What is held out is at least half of the share and at most one and a half times it; else the source is refused.
"""

import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from weft.data.config import DataConfig
from weft.data.sources import Document
from weft.runtime.errors import UserError, shown

LEAST, MOST = 0.5, 1.5  # of the share that is asked for
TELL = {
    'package': 'whole packages',
    'file': 'whole files',
    'document': 'whole documents',
    'end': 'the end of each document',
}


@dataclass(frozen=True)
class Split:
    """Whole groups are held out, or whole documents, or the end of every document."""

    by: str  # 'package', 'file', 'document' or 'end'
    share: float
    held_out: frozenset[str] = frozenset()  # names of groups

    def parts(self, document: Document, group: str) -> dict[str, str]:
        """The document's text, by split."""
        if self.by != 'end':
            return {'validation' if group in self.held_out else 'train': document.text}
        place = cut(document.text, self.share)
        return {'train': document.text[:place], 'validation': document.text[place:]}


def split_of(
    config: DataConfig,
    size_of_group: Mapping[str, int],
    size_of_text: Mapping[str, int],
    ends: int,
    ends_of: Callable[[float], int],
) -> tuple[Split, float]:
    """By groups if whole ones come near the share that is wanted, else by documents, else the end of each document.

    Returns the split and the share of bytes that is held out. `ends` are the bytes of all documents' ends, `ends_of` counts
    them for another share. Raises UserError where the share is far from what was asked for.
    """
    kinds = ('package' if config.paths == ('stdlib',) else 'file', size_of_group), ('document', size_of_text)
    whole = sum(size_of_group.values())

    def of_whole(share: float) -> tuple[Split, int] | None:
        for by, sizes in kinds:
            names = held_out(sizes, share)
            if (held := sum(sizes[name] for name in names)) >= LEAST * share * whole:
                return Split(by, share, names), held
        return None

    held_by = lambda share: found[1] if (found := of_whole(share)) else ends_of(share)
    share = config.validation_share
    if found := of_whole(share):
        return found[0], found[1] / whole
    return Split('end', share), checked(ends, whole, config, held_by)


def held_out(sizes: Mapping[str, int], share: float) -> frozenset[str]:
    """Names in an order that depends on nothing but themselves, taken while they fit into `share` of all."""
    room = share * sum(sizes.values())
    names = []
    # As bytes: a file's name need not be UTF-8.
    for name in sorted(sizes, key=lambda name: hashlib.blake2b(os.fsencode(name), key=b'weft validation').digest()):
        if sizes[name] <= room:
            names.append(name)
            room -= sizes[name]
    return frozenset(names)


def cut(text: str, share: float) -> int:
    """Where the end of a text that is held out begins.

    At the last line end before the share begins (a text of a single line is cut inside it), if the rest is at most MOST times
    the share of the text's bytes; else at the first line end after it, if the rest is at least LEAST times that; else at a
    space, before or after; else between two characters. Of a text of a few characters the number that comes nearest to the
    share is held out, which may be none.
    """
    place = int(len(text) * (1 - share))
    whole = len(text.encode())
    fits = lambda at: LEAST * share * whole <= bytes_after(text, at) <= MOST * share * whole
    if fits(line := text.rfind('\n', 0, place) + 1 or place):
        return line
    if not text.isascii():  # characters have different lengths: the share is one of bytes
        place = len(text.encode()[: int(whole * (1 - share))].decode(errors='ignore'))
    for end in '\n', ' ':
        for at in text.rfind(end, 0, place) + 1, text.find(end, place) + 1:
            if at and fits(at):
                return at
    options = [at for at in (place - 1, place, place + 1) if 0 <= at <= len(text)]
    options = [at for at in options if text[at - 1 : at + 1] != '\r\n'] or options
    return min(options, key=lambda at: abs(bytes_after(text, at) - share * whole))


def bytes_after(text: str, at: int) -> int:
    return len(text[at:].encode())


def checked(held: int, whole: int, config: DataConfig, held_by: Callable[[float], int]) -> float:
    """The share that came out, where `held_by` another share so many bytes would be held out.

    Raises UserError where it is far from what was asked for.
    """
    share, found = config.validation_share, held / whole
    if not near(held, share, whole):
        digits = 1 - math.floor(math.log10(found)) if found else 0
        other = math.ceil(round(found * 10**digits, 6)) / 10**digits  # with two digits
        works = 0 < other <= 0.5 and near(held_by(other), other, whole)
        raise UserError(
            f'data.source={shown(", ".join(config.paths))}: {held:,} of {whole:,} bytes can be held out where '
            f'data.validation_share={share:g} asks for {share * whole:,.0f}, and {LEAST:g} to {MOST:g} times as many '
            f'are taken: give more or longer texts{f", or data.validation_share={other:g}, which they allow" if works else ""}'
        )
    return found


def near(held: int, share: float, whole: int) -> bool:
    """Whether so many bytes are about the share of the whole."""
    return LEAST * share <= held / whole <= MOST * share
