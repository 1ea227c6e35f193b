"""Reading prompts and decoding one token a step, with a sharded cache of keys and values: pure functions of global arrays.

Letters: B rows, T prompt tokens, S slots of the cache, V vocabulary, D model.
"""

import jax
import jax.numpy as jnp
from jax import P, lax

from model.decoder import Decoder, backends, to_vocabulary
from model.forward import TOKENS, one_device, real_vocabulary
from model.layers import CACHE_SPEC, Cache, View, specs
from sharding.mesh import BATCH


def empty_cache(model: Decoder, rows: int, slots: int) -> Cache:
    """A cache for `rows` sequences of at most `slots` tokens, in the compute dtype, split over BATCH and `tensor`.

    Where `tensor` has more devices than there are KV heads, each keeps the head that it uses.
    """
    c = model.config
    heads = max(c.kv_heads, jax.sharding.get_abstract_mesh().shape['tensor'])
    make = lambda: jnp.zeros((c.layers, rows, slots, heads, c.head_dim), c.dtype, out_sharding=CACHE_SPEC)
    return Cache(make(), make())


def prefill(model: Decoder, cache: Cache, tokens_BT, length_B):
    """Reads the prompts: row b's are tokens_BT[b, :length_B[b]], what follows is padding.

    Returns the logits [B, vocabulary] after each row's last token, and the cache.
    """

    def body(model, cache, tokens_BT, length_B):
        T, n = tokens_BT.shape[1], lax.axis_size('tensor')
        position_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), tokens_BT.shape)
        segment_BT = (position_BT < length_B[:, None]).astype(jnp.int32)
        view = View(position_BT, segment_BT, **backends(model.config), sequence_split=T % n == 0)
        x_BTD, cache, _ = model.hidden(tokens_BT, view, cache)
        last_BD = jnp.take_along_axis(view.join(x_BTD), length_B[:, None, None] - 1, axis=1)[:, 0]
        return to_vocabulary(last_BD, model.head()), cache

    return _with_cache(body, model, cache, tokens_BT, length_B)


def decode(model: Decoder, cache: Cache, token_B, position_B):
    """One more token in each row, at its position. Returns the logits [B, vocabulary] after it, and the cache."""

    def body(model, cache, token_B, position_B):
        ones_B1 = jnp.ones_like(position_B)[:, None]
        view = View(position_B[:, None], ones_B1, **backends(model.config), sequence_split=False, decoding=True)
        x_BTD, cache, _ = model.hidden(token_B[:, None], view, cache)
        return to_vocabulary(x_BTD[:, 0], model.head()), cache

    return _with_cache(body, model, cache, token_B, position_B)


def _with_cache(body, model, cache, tokens, row_B):
    layout = jax.tree.map(lambda _: CACHE_SPEC, cache)
    run = one_device(body, model, (specs(model), layout, TOKENS, TOKENS), (P(BATCH, 'tensor'), layout))
    logit_BV, cache = run(model, cache, tokens, row_B)
    return real_vocabulary(logit_BV, model), cache
