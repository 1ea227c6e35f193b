"""Cross-entropy of a vocabulary that is split over `tensor`, with the product that makes the logits in it.

    loss = Σ over real tokens n of  logsumexp(logits_n) − logits_n[target_n],    logits = x W (+ bias, scale, cap)

**In chunks, forward and backward at once.** Logits of all tokens would be the largest array of a step ([N, V], float32). They
exist for CHUNK tokens at a time, and once: each chunk's gradient is made right after its value, while its logits are there
(Liger kernels, Hsu et al. 2024, arXiv:2410.10989, section 3.2, do so too). What the forward pass keeps for the backward pass
are then not activations but the gradients of x, W and bias themselves. That is exact because the loss is one number: its
cotangent is a scalar, and all that is left to do backward is to multiply by it.

**The sink.** W comes in the compute dtype, often bfloat16, and a vjp must give W's gradient in W's dtype: so each chunk's part
would be rounded to bfloat16 before the parts are added up. Therefore `head_product(x, W, sink)` takes a third argument, zeros
of W's shape in at least float32. Nothing is added to the value, but the gradient *of the sink* is defined to be that of W, in
the sink's dtype: who differentiates with respect to the sink gets each part unrounded, adds the parts, and rounds once.

Letters: N tokens, D model, V this device's columns of the padded vocabulary, c chunks of n tokens each, B rows, T sequence;
1 is a dim of one row, for what is gathered along the sequence.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from weft.sharding.collectives import axis_index, gather_sequence, mark_varying, pmax, psum, upcast

CHUNK = 2048  # tokens whose logits exist at once


class Head(NamedTuple):
    """What makes logits of activations."""

    w: jax.Array  # [D, V]; of a tied embedding [V, D], as the embedding lies: to transpose it is to copy it
    bias_V: jax.Array | None = None
    sink: jax.Array | None = None  # zeros like w in at least float32, which take w's gradient; None: w has its own


ToLogits = Callable[[jax.Array, Head], jax.Array]  # (x [N, D], head) -> logits [N, V], in at least float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def head_product(x_ND: jax.Array, w: jax.Array, sink: jax.Array | None, dims: str = 'DV') -> jax.Array:
    """x W in at least float32, [..., V], of w [D, V] or, where `dims` is 'VD', of its transpose w [V, D].

    The backward pass casts the float32 cotangent to x's dtype first, so that both of its products run at the compute dtype's
    rate, on a GPU twice float32's or more. With a sink the gradient of w is the sink's; w's own is then 0.
    """
    return jnp.einsum(f'...D,{dims}->...V', x_ND, w, preferred_element_type=upcast(x_ND).dtype)


def _head_product_forward(
    x_ND: jax.Array, w: jax.Array, sink: jax.Array | None, dims: str
) -> tuple[jax.Array, tuple[Any, ...]]:
    return head_product(x_ND, w, sink, dims), (x_ND, w, sink is None)


def _head_product_backward(dims: str, saved: tuple[Any, ...], dlogit_NV: jax.Array) -> tuple[Any, ...]:
    x_ND, w, own = saved
    dlogit_NV = dlogit_NV.astype(x_ND.dtype)
    rows = (a.reshape(-1, a.shape[-1]) for a in (x_ND, dlogit_NV))
    dw = jnp.einsum(f'ND,NV->{dims}', *rows, preferred_element_type=upcast(x_ND).dtype)
    dx_ND = jnp.einsum(f'...V,{dims}->...D', dlogit_NV, w)
    return (dx_ND, dw.astype(w.dtype), None) if own else (dx_ND, jnp.zeros_like(w), dw)


head_product.defvjp(_head_product_forward, _head_product_backward)


def cross_entropy(
    to_logits: ToLogits, head: Head, x_BTD: jax.Array, target_BT: jax.Array, live_BT: jax.Array, vocabulary: int
) -> jax.Array:
    """This device's share of Σ −log p(target) over the real tokens of all devices of `tensor`; float32 or wider.

    Args:
        to_logits: makes logits with `head_product`, and closes over no traced value.
        head: this device's columns; without a sink.
        x_BTD: this device's slice of the sequence over `tensor`, as are the targets.
        live_BT: which targets count.
        vocabulary: columns that are real, all devices of `tensor` together; those after are padding.
    """
    n, N = lax.axis_size('tensor'), x_BTD.shape[0] * x_BTD.shape[1]
    chunks = -(-N * n // CHUNK)
    size = -(-N // chunks)

    def in_chunks(a_BT: jax.Array) -> jax.Array:
        """[c, 1, n, …], filled up with 0: no real tokens."""
        a_1N = a_BT.reshape(1, -1, *a_BT.shape[2:])
        a_1N = jnp.pad(a_1N, ((0, 0), (0, chunks * size - N), *[(0, 0)] * (a_1N.ndim - 2)))
        return a_1N.reshape(chunks, 1, size, *a_BT.shape[2:])

    compute = functools.partial(_chunk_loss, to_logits, vocabulary)
    return _loss(compute, head.w.dtype, head, *map(in_chunks, (x_BTD, target_BT, live_BT)))


def _chunk_loss(
    to_logits: ToLogits, vocabulary: int, head: Head, x_1nD: jax.Array, target_1n: jax.Array, live_1n: jax.Array
) -> jax.Array:
    """This device's share of one chunk's sum; the chunk is gathered from the slices of all devices of `tensor`."""
    x_ND, target_N, live_N = (gather_sequence(a)[0] for a in (x_1nD, target_1n, live_1n))
    logit_NV = to_logits(x_ND, head)
    n, V = lax.axis_size('tensor'), logit_NV.shape[1]
    column_V = axis_index('tensor') * V + jnp.arange(V)
    if n * V > vocabulary:
        logit_NV = jnp.where((column_V < vocabulary)[None], logit_NV, -jnp.inf)
    top_N = pmax(lax.stop_gradient(logit_NV.max(-1)), 'tensor')
    sum_N = psum(jnp.exp(logit_NV - top_N[:, None]).sum(-1), 'tensor')
    hit_N = psum(jnp.where(column_V[None] == target_N[:, None], logit_NV, 0).sum(-1), 'tensor')
    return jnp.where(live_N, top_N + jnp.log(sum_N) - hit_N, 0).sum() / n


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(
    compute: Callable[..., jax.Array],
    dtype: Any,  # of head.w, which the gradient is rounded to
    head: Head,
    x_c1nD: jax.Array,
    target_c1n: jax.Array,
    live_c1n: jax.Array,
) -> jax.Array:
    return lax.map(lambda chunk: compute(head, *chunk), (x_c1nD, target_c1n, live_c1n)).sum()


def _loss_forward(compute: Callable[..., jax.Array], dtype: Any, head: Head, *chunks: jax.Array) -> tuple[Any, ...]:
    """The loss; and, as what is saved for the backward pass, its gradients of (w, in the sink's dtype; bias; x)."""
    sink = mark_varying(jnp.zeros_like(head.w, dtype=upcast(head.w).dtype))

    def step(sums: tuple[Any, ...], chunk: tuple[Any, ...]) -> tuple[tuple[Any, ...], jax.Array]:
        x_1nD, target_1n, live_1n = chunk

        def loss(sink: jax.Array, bias_V: jax.Array | None, x_1nD: jax.Array) -> jax.Array:
            return compute(Head(head.w, bias_V, sink), x_1nD, target_1n, live_1n)

        value, pull = jax.vjp(loss, sink, head.bias_V, x_1nD)
        dw, dbias_V, dx_1nD = pull(mark_varying(jnp.ones_like(value)))
        return jax.tree.map(jnp.add, sums, (value, dw, dbias_V)), dx_1nD

    nothing = mark_varying(jax.tree.map(jnp.zeros_like, (sink[0, 0], sink, head.bias_V)))
    (value, dw, dbias_V), dx_c1nD = lax.scan(step, nothing, chunks)
    return value, (dw, dbias_V, dx_c1nD)


def _loss_backward(
    compute: Callable[..., jax.Array], dtype: Any, gradients: tuple[Any, ...], cotangent: jax.Array
) -> tuple[Any, ...]:
    """The saved gradients times what the loss counts in the whole, a number that is the same on all devices."""
    dw, dbias_V, dx_c1nD = gradients
    dbias_V, dx_c1nD = jax.tree.map(lambda d: (cotangent * upcast(d)).astype(d.dtype), (dbias_V, dx_c1nD))
    return Head((cotangent * dw).astype(dtype), dbias_V), dx_c1nD, None, None


_loss.defvjp(_loss_forward, _loss_backward)
