"""Numbers that come near to what was asked for."""

import math

MOST_TRIED = 2**20  # divisors


def nearest_divisor(n: int, wanted: int) -> int:
    """The divisor of n that is nearest to `wanted`, the smaller of two; of the largest n among those that are soon found."""
    small = [d for d in range(1, min(math.isqrt(n), MOST_TRIED) + 1) if n % d == 0]
    return min([*small, *(n // d for d in small)], key=lambda d: (abs(d - wanted), d))
