"""Attention for TPUs: the Pallas kernel that comes with JAX, "splash" (sparse flash) attention, forward and backward.

It masks by slot, not by position: T = S, and within a row a document's tokens lie side by side in the order of their
positions, which is how rows are packed. A step of decoding, where T < S, is `reference_attention`'s on every
platform: its scores are B * heads * S. The kernel's outputs do not say over which mesh axes they vary, so a shard_map
around it needs check_vma=False.

Letters: B batch rows, T tokens, K key/value heads, G query heads per key/value head, H width of a query and
a key, U of a value.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from weft.model.ops.attention.blockwise import fill
from weft.model.ops.attention.mask import QKV, MaskRule
from weft.runtime.errors import UserError

LANES = 128  # the kernel's tiles are whole multiples of them
TILES = (512, 256, 128)


def splash_attention(inputs: QKV, rule: MaskRule) -> jax.Array:
    """What `reference_attention` gives, [B, T, K, G, U], for rows as above. On a CPU the kernel is interpreted.

    Raises:
        UserError: keys that are not the queries' own tokens, or float64.
    """
    q_BTKGH, k_BTKH, v_BTKU, (_, q_segment_BT), (_, k_segment_BT) = inputs
    T, G = q_BTKGH.shape[1], q_BTKGH.shape[3]
    if k_BTKH.shape[1] != T:
        raise UserError(
            f'attention backend splash takes as many keys as queries ({T}), not {k_BTKH.shape[1]}; reference takes any'
        )
    if q_BTKGH.dtype == jnp.float64:
        raise UserError('attention backend splash has no float64; it computes in float32 or less, reference in any')
    pad = partial(fill, tile=LANES)  # tokens of segment 0 at the end see themselves: no sum of a softmax is empty
    q_BKGTH = pad(q_BTKGH * jnp.asarray(rule.scale, q_BTKGH.dtype)).transpose(0, 2, 3, 1, 4)
    k_BKTH, v_BKTU = pad(k_BTKH).swapaxes(1, 2), pad(v_BTKU).swapaxes(1, 2)
    segments = kernels.SegmentIds(pad(q_segment_BT), pad(k_segment_BT))

    def run(interpret: bool, *arrays: Any) -> Any:  # an array; by its type the kernel may give residuals too
        one_kv_head = make_kernel(k_BKTH.shape[2], G, rule, interpret)
        return jax.vmap(jax.vmap(one_kv_head, in_axes=(0, 0, 0, None)))(*arrays)

    arrays = q_BKGTH, k_BKTH, v_BKTU, segments
    out_BKGTH = lax.platform_dependent(*arrays, tpu=partial(run, False), cpu=partial(run, True))
    return out_BKGTH.transpose(0, 3, 1, 2, 4)[:, :T]


def make_kernel(T: int, G: int, rule: MaskRule, interpret: bool) -> kernels.SplashAttentionKernel:
    """(q [G, T, H], k [T, H], v [T, U], segments [T] twice) to [G, T, U]; T in whole LANES."""
    see_TT: masks.Mask
    if rule.window is not None:
        see_TT = masks.LocalMask((T, T), (rule.window - 1, 0 if rule.causal else rule.window - 1), offset=0)
    else:
        see_TT = masks.CausalMask((T, T)) if rule.causal else masks.FullMask((T, T))
    tile = next(tile for tile in TILES if T % tile == 0)
    # dq and dk, dv by kernels of their own: the fused one keeps T / tile copies of dq
    ends = ('_q', '_kv', '_kv_compute', '_q_dkv', '_kv_dkv', '_kv_dkv_compute', '_q_dq', '_kv_dq')
    sizes: dict[str, Any] = {f'block{end}': tile for end in ends}
    see_GTT = masks.MultiHeadMask([see_TT] * G)
    return kernels.make_splash_mqa_single_device(
        see_GTT, block_sizes=kernels.BlockSizes(**sizes), attn_logits_soft_cap=rule.softcap, interpret=interpret
    )
