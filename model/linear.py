"""Products of activations and weights, from one device's view.

Letters: B rows, T sequence, N tokens or outputs, D inputs, M outputs.
"""

import jax.numpy as jnp
from jax import lax

from weft.sharding.mesh import platform


def linear(x_BTD, w_DN):
    """x @ w on tokens flattened to one dim: on a CPU the gradient is twice as fast as with two."""
    flat_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    # Of one token XLA for GPUs may write all products out before it adds them up; of two it does not.
    alone = len(flat_ND) == 1 and platform() == 'gpu'
    y_NM = (jnp.pad(flat_ND, ((0, 1), (0, 0))) @ w_DN)[:1] if alone else flat_ND @ w_DN
    return y_NM.reshape(*x_BTD.shape[:-1], -1)


def linear_back(x_BTN, w_DN):
    """x @ w.T, for weights kept with D first."""
    flat = lax.dot_general(x_BTN.reshape(-1, x_BTN.shape[-1]), w_DN, (((1,), (1,)), ((), ())))
    return flat.reshape(*x_BTN.shape[:-1], -1)
