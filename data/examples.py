"""Pairs that a small encoder–decoder learns in a minute: strings of digits, and the same backwards.

python -m weft.data.examples 4000 > reverse.tsv
"""

import random
import sys
from collections.abc import Iterator


def reversed_digits(count: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """Different sources of 2 to 6 digits with spaces between them, and their digits from the last to the first."""
    draw, seen = random.Random(seed), set[str]()
    while len(seen) < count:
        digits = [str(draw.randrange(10)) for _ in range(draw.randint(2, 6))]
        source = ' '.join(digits)
        if source not in seen:
            seen.add(source)
            yield source, ' '.join(reversed(digits))


if __name__ == '__main__':
    for pair in reversed_digits(int(sys.argv[1])):
        print(*pair, sep='\t')
