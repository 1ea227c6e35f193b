"""Rotary positions (Su et al. 2021, arXiv:2104.09864) and the ways to stretch them to longer contexts.

Letters: B rows, T sequence, n any dims of heads, H head dim, h pairs of dims that turn together.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from weft.model.config import ModelConfig, RopeScaling
from weft.sharding.collectives import pmax, upcast

# Radians a position of each pair of dims without scaling, [h], by theta.
Plain = Callable[[float], jax.Array]


def rope(
    x_BTnH: jax.Array, position_BT: jax.Array, segment_BT: jax.Array, c: ModelConfig, windowed: bool = False
) -> jax.Array:
    """x with its first `c.rotary_dim` dims turned by each token's position, in x's dtype.

    Dims h and h + H/2 of those are a pair, as in Llama's published weights, or 2h and 2h + 1 (`positions.layout`).
    """
    p = c.positions
    assert p.kind == 'rotary'
    x, rest = upcast(x_BTnH[..., : c.rotary_dim]), x_BTnH[..., c.rotary_dim :]
    local_theta = p.local_theta if windowed else None
    theta, scaling = (p.theta, p.scaling) if local_theta is None else (local_theta, None)
    # Padding makes no row longer.
    turn, gain = frequencies(theta, x.shape[-1], jnp.where(segment_BT > 0, position_BT, 0), scaling, x.dtype)
    ones = (1,) * (x.ndim - 3)
    angle = position_BT.astype(x.dtype).reshape(*position_BT.shape, *ones, 1) * turn.reshape(
        -1, 1, *ones, turn.shape[-1]
    )
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if gain != 1:
        cos, sin = cos * gain, sin * gain
    if p.layout == 'interleaved':
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)
    else:
        a, b = jnp.split(x, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    turned = turned.astype(x_BTnH.dtype)
    return turned if not rest.shape[-1] else jnp.concatenate([turned, rest], -1)


def frequencies(
    theta: float, dims: int, position_BT: jax.Array, scaling: RopeScaling | None, dtype: DTypeLike
) -> tuple[jax.Array, float]:
    """Radians a position of each pair of dims, [1 or B, h], and a factor on queries and keys."""
    half = dims // 2
    # In float64: where half is no power of two, an exponent's rounding would be an angle's at far positions.
    plain = lambda theta: jnp.asarray(theta ** (-np.arange(half) / half), dtype)
    if scaling is None:
        return plain(theta)[None], 1.0
    return {'linear': _linear, 'dynamic': _dynamic, 'yarn': _yarn, 'llama3': _llama3, 'longrope': _longrope}[
        scaling.kind
    ](plain, theta, half, position_BT, scaling)


def row_lengths(position_BT: jax.Array) -> jax.Array:
    """int32 [B, 1]: tokens of each row's longest document so far, over all devices of `context`."""
    return pmax(position_BT.max(-1, keepdims=True), 'context') + 1


def _linear(plain: Plain, theta: float, half: int, position_BT: jax.Array, s: RopeScaling) -> tuple[jax.Array, float]:
    """Chen et al. 2023, arXiv:2306.15595: positions as if they were `factor` times closer."""
    return plain(theta)[None] / s.factor, 1.0


def _dynamic(plain: Plain, theta: float, half: int, position_BT: jax.Array, s: RopeScaling) -> tuple[jax.Array, float]:
    """Of transformers' `dynamic`: rows longer than the old context get a larger theta, by their length."""
    dtype = plain(theta).dtype
    length_B1 = jnp.maximum(row_lengths(position_BT), s.old_context).astype(dtype)
    stretch_B1 = s.factor * length_B1 / s.old_context - (s.factor - 1)
    theta_B1 = theta * stretch_B1 ** (half / (half - 1))
    return theta_B1 ** (-jnp.arange(half, dtype=dtype) / half)[None], 1.0


def _yarn(plain: Plain, theta: float, half: int, position_BT: jax.Array, s: RopeScaling) -> tuple[jax.Array, float]:
    """Peng et al. 2023, arXiv:2309.00071, section 3.2: slow pairs are interpolated, fast ones are not, a ramp between."""

    def pair_of(turns: float) -> float:
        """The pair that makes so many turns in the old context."""
        return half * math.log(s.old_context / (turns * 2 * math.pi)) / math.log(theta)

    low, high = pair_of(s.beta_fast), pair_of(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    turn = plain(theta)
    ramp = jnp.clip((jnp.arange(half, dtype=turn.dtype) - low) / max(high - low, 0.001), 0, 1)
    turn = turn / s.factor * ramp + turn * (1 - ramp)
    return turn[None], yarn_gain(s.factor) if s.attention_factor is None else s.attention_factor


def yarn_gain(factor: float, times: float = 1.0) -> float:
    """0.1 · times · ln(factor) + 1 (Peng et al. 2023, arXiv:2309.00071, eq. 22), as DeepSeek-V2's code has it."""
    return 0.1 * times * math.log(factor) + 1 if factor > 1 else 1.0


def _llama3(plain: Plain, theta: float, half: int, position_BT: jax.Array, s: RopeScaling) -> tuple[jax.Array, float]:
    """Of Llama 3.1's published code: pairs with long waves are slowed by `factor`, short ones are not, a ramp between."""
    turn = plain(theta)
    waves = s.old_context / (2 * math.pi) * turn  # in the old context
    share = (waves - s.low_frequency_factor) / (s.high_frequency_factor - s.low_frequency_factor)
    share = jnp.clip(share, 0, 1)
    return ((1 - share) * turn / s.factor + share * turn)[None], 1.0


def _longrope(plain: Plain, theta: float, half: int, position_BT: jax.Array, s: RopeScaling) -> tuple[jax.Array, float]:
    """LongRoPE, arXiv:2402.13753, as in Phi-3: each pair has its own factor, one for short and one for long rows."""
    turn = plain(theta)
    short, long = (turn / jnp.asarray(factors, turn.dtype) for factors in (s.short_factors, s.long_factors))
    gain = s.attention_factor
    if gain is None:
        gain = math.sqrt(1 + math.log(s.factor) / math.log(s.old_context)) if s.factor > 1 else 1.0
    return jnp.where(row_lengths(position_BT) > s.old_context, long[None], short[None]), gain
