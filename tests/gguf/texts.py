"""Texts that tokenizers get wrong, the same ones each time: for comparison with another implementation."""

import random
from collections.abc import Iterator, Sequence

SAID = """
the of and to in is you that it he was for on are as with his they I’m don't we'LL "quoted" naïve façade Straße
Ελλάδα привет мир שלום مرحبا नमस्ते สวัสดี 你好世界 こんにちは 東京都 안녕하세요 한국어 😀 👩\u200d👩\u200d👧\u200d👦 🏳️\u200d🌈 é ﬁ
½ ² ① Ⅷ 12 345 6789 1234567890 3.14159 1,000,000 0x1F 10% $5.00 a_b camelCase SCREAMING_SNAKE foo(bar[0]) != == -> ::
// /* */ #include <stdio.h> https://example.org/a?b=c&d=e#f user@example.org
C++ C# F# e.g. U.S.A. --- ... !!! ??? \u2581 \u200b \ufeff
"""
WORDS = [*SAID.split(), '\u00a0']
SPACES = (' ', ' ', ' ', ' ', '  ', '   ', '    ', '\n', '\n\n', '\n\n\n', '\t', '\t\t', ' \n', '\r\n', '', '\u3000')
RANGES = (
    (0x20, 0x7F),
    (0xA0, 0x250),
    (0x370, 0x530),
    (0x600, 0x700),
    (0x3040, 0x3100),
    (0x4E00, 0x9FA6),
    (0xAC00, 0xD7A4),
)
RANGES += ((0x1F300, 0x1F700), (0x2000, 0x2100), (0x10000, 0x10100), (0, 0x20))


def texts(special: Sequence[str], count: int, seed: int = 0) -> Iterator[str]:
    """Words, signs, spaces of all kinds, random characters and names of special tokens, in all orders."""
    draw = random.Random(seed)
    for number in range(count):
        parts = []
        for _ in range(draw.randrange(1, 14)):
            kind = draw.random()
            if kind < 0.6:
                parts.append(draw.choice(WORDS))
            elif kind < 0.75 and special:
                parts.append(draw.choice(special))
            else:
                low, high = draw.choice(RANGES)
                parts.append(''.join(chr(draw.randrange(low, high)) for _ in range(draw.randrange(1, 6))))
            parts.append(draw.choice(SPACES))
        text = ''.join(parts)
        yield text if number % 3 else text.strip()
