"""How much a prediction listens to a token so many places before it: the norm of the gradient, by distance.

ℓ_T being the loss of the last token of a row and x_t the vector of token t, the norm of ∂ℓ_T/∂x_{T−d}. In a recurrent net it is
a product of d Jacobians, and so vanishes or explodes like the d-th power of a number (Bengio et al. 1994; Pascanu et al. 2013,
arXiv:1211.5063, section 2); attention has a way of one step to every token.

Letters: B rows, T sequence, D model.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from weft.interpret.history.net_training import on_device
from weft.interpret.history.nets import Net, Statistics, Weights
from weft.model.batch import Batch
from weft.model.context import ForwardContext
from weft.model.decoder import Decoder
from weft.model.forward import TOKENS, one_device
from weft.model.head import to_vocabulary


def norm_by_distance(loss_of: Callable[[jax.Array], jax.Array], x_BTD: jax.Array) -> jax.Array:
    """Norm of the gradient of each row's loss [B] with respect to each token's vector, [B, T]: the last token comes first."""
    gradient_BTD = jax.grad(lambda x_BTD: loss_of(x_BTD).sum())(x_BTD)
    # Of numbers whose squares float32 cannot hold.
    largest_BT1 = jnp.maximum(jnp.abs(gradient_BTD).max(-1, keepdims=True), jnp.finfo(gradient_BTD.dtype).tiny)
    return (largest_BT1[..., 0] * jnp.sqrt(((gradient_BTD / largest_BT1) ** 2).sum(-1)))[:, ::-1]


def last_loss(logit_BV: jax.Array, target_B: jax.Array) -> jax.Array:
    """Cross-entropy of each row's last token, [B]."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logit_BV), target_B[:, None], 1)[:, 0]


def of_net(net: Net, w: Weights, seen: Statistics, batch: Batch) -> np.ndarray:
    """[B, T] of a small net, for rows that are one document each."""

    @jax.jit
    def norms(w: Weights, batch: Batch) -> jax.Array:
        def loss_of(x_BTD: jax.Array) -> jax.Array:
            mixed_BTD, _ = net.mix(w, x_BTD, batch.segment_BT, seen, False)
            return last_loss(net.logits(w, mixed_BTD[:, -1:])[:, 0], batch.target_BT[:, -1])

        return norm_by_distance(loss_of, w['embed_VD'][batch.tokens_BT])

    return np.asarray(norms(w, on_device(batch)), np.float64)


def of_decoder(model: Decoder, batch: Batch) -> np.ndarray:
    """[B, T] of the project's decoder, for rows that are one document each; under `jax.set_mesh`, on one device."""
    c = model.config

    def body(model: Decoder, batch: Batch) -> jax.Array:
        ctx = ForwardContext(batch.position_BT, batch.segment_BT, compute=model.resolved_compute)

        def loss_of(x_BTD: jax.Array) -> jax.Array:
            mixed_BTD, _, _ = model.stack(x_BTD, ctx)
            logit_BV = to_vocabulary(mixed_BTD[:, -1], model.head(), c)[:, : c.vocabulary]
            return last_loss(logit_BV, batch.target_BT[:, -1])

        return norm_by_distance(loss_of, model.embed(batch.tokens_BT, ctx))

    assert jax.sharding.get_mesh().size == 1, 'a gradient with respect to all of a row'
    return np.asarray(jax.jit(one_device(body, model, (TOKENS,), TOKENS))(model, on_device(batch)), np.float64)


def single_documents(batch: Batch) -> np.ndarray:
    """Which rows of a batch are one document each, without padding."""
    return np.flatnonzero((batch.segment_BT == 1).all(1))


def beside_the_last(norm_BT: np.ndarray) -> np.ndarray:
    """By distance the median over rows of the norm as a share of that of the last token, [T]."""
    share_BT = norm_BT / norm_BT[:, :1]
    return np.median(share_BT, axis=0)
