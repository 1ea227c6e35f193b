"""Choosing the next token. Letters: B rows, V vocabulary."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from weft.runtime.errors import MachineError, UserError
from weft.sharding.mesh import BATCH

NO_TOKEN = -1  # where logits choose none
HOTTEST = 10_000.0  # beyond it all tokens are as likely as each other


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one prompt's tokens are chosen. The filters apply in this order, after the temperature."""

    temperature: float = 0.0  # 0: always the most likely token
    top_k: int = 0  # only the k most likely; 0: all
    top_p: float = 1.0  # the most likely that together reach this probability (Holtzman et al. 2020, arXiv:1904.09751)
    min_p: float = 0.0  # only those at least this share of the most likely one's probability (arXiv:2407.01082)
    repetition_penalty: float = 1.0  # first: divides logits of tokens that were there, multiplies negative ones
    seed: int = 0

    def __post_init__(self) -> None:
        t, penalty, most = self.temperature, self.repetition_penalty, f'and at most {HOTTEST:g}'
        for name, allowed, rule in (
            ('temperature', 0 <= t <= HOTTEST, f'at least 0 {most}; 0 always takes the most likely token'),
            ('top_k', 0 <= self.top_k < 2**31, 'at least 0 and less than 2^31; 0 keeps all tokens'),
            ('top_p', 0 < self.top_p <= 1, 'above 0 and at most 1; 1 keeps all tokens'),
            ('min_p', 0 <= self.min_p <= 1, 'between 0 and 1; 0 keeps all tokens'),
            ('repetition_penalty', 0 < penalty <= HOTTEST, f'above 0 {most}; 1 leaves all logits as they are'),
            ('seed', 0 <= self.seed < 2**32, 'at least 0 and less than 2^32'),
        ):
            if not allowed:
                raise UserError(f'{name.replace("_", "-")} is {getattr(self, name)}: it must be {rule}')


class RowSampling(NamedTuple):
    """The Sampling of each row of a batch, as arrays."""

    temperature_B: jax.Array | np.ndarray
    top_k_B: jax.Array | np.ndarray
    top_p_B: jax.Array | np.ndarray
    min_p_B: jax.Array | np.ndarray
    seed_B: jax.Array | np.ndarray  # uint32; rows with equal seed, position and logits choose alike
    penalty_B: jax.Array | np.ndarray | None = None  # None: 1 in every row


class Likely(NamedTuple):
    """How likely tokens were, natural logarithms of probabilities as the model gives them: before penalty and temperature."""

    logprob_B: jax.Array | np.ndarray  # of the chosen token, float32
    logprob_BK: jax.Array | np.ndarray  # of the K most likely, best first
    token_BK: jax.Array | np.ndarray


class Beside(NamedTuple):
    """What some rows need beside their next token."""

    seen_BV: jax.Array | None = None  # bool: which tokens a row has had, for penalties
    likely: Likely | None = None


def describe(
    logit_BV: jax.Array, position_B: jax.Array, choice: RowSampling | None, seen_BV: jax.Array | None, count: int
) -> tuple[jax.Array, Beside]:
    """`choose` after the penalty on tokens that were there (Keskar et al. 2019, arXiv:1909.05858), and what to tell of it.

    `count`: how many of the most likely tokens are told, with the chosen one's probability; 0: neither.
    """
    if seen_BV is None:
        token_B = choose(logit_BV, position_B, choice)
    else:
        assert choice is not None
        assert choice.penalty_B is not None
        penalty_B1 = choice.penalty_B[:, None]
        lower_BV = jnp.where(logit_BV > 0, logit_BV / penalty_B1, logit_BV * penalty_B1)
        token_B = choose(jnp.where(seen_BV, lower_BV, logit_BV), position_B, choice)
        seen_BV = seen_BV | (jnp.arange(logit_BV.shape[1], dtype=jnp.int32)[None] == token_B[:, None])
    if not count:
        return token_B, Beside(seen_BV)

    def tell(logit_BV: jax.Array, token_B: jax.Array) -> Likely:
        all_BV = jax.nn.log_softmax(logit_BV)
        return Likely(jnp.take_along_axis(all_BV, token_B[:, None], 1)[:, 0], *jax.lax.top_k(all_BV, count))

    likely = jax.shard_map(tell, in_specs=P(BATCH), out_specs=P(BATCH))(logit_BV, token_B)
    return token_B, Beside(seen_BV, likely)


def choose(logit_BV: jax.Array, position_B: jax.Array, choice: RowSampling | None) -> jax.Array:
    """The token that follows each row's position, int32 [B]. Rows are split over BATCH, V is whole; logits are float32.

    `NO_TOKEN` where a row's largest logit is not finite. Without a choice the most likely one: a draw takes long to compile.
    """
    if choice is None:
        return likeliest(logit_BV)
    return jax.shard_map(one_device, in_specs=P(BATCH), out_specs=P(BATCH))(logit_BV, position_B, choice)


def likeliest(logit_BV: jax.Array) -> jax.Array:
    """The most likely token, or `NO_TOKEN`: the largest of numbers with a NaN among them is a NaN."""
    return jnp.where(jnp.isfinite(logit_BV.max(-1)), jnp.argmax(logit_BV, axis=-1), NO_TOKEN).astype(jnp.int32)


def check_token(token: int) -> None:
    """Raises MachineError for `NO_TOKEN`."""
    if token == NO_TOKEN:
        raise MachineError(
            'the logits of the next token are not finite: the weights are, so a number between them is too large for the '
            'dtype that the model computes in (compute.dtype)'
        )


def one_device(logit_BV: jax.Array, position_B: jax.Array, choice: RowSampling) -> jax.Array:
    """`choose` for the rows of one device."""
    greedy_B = likeliest(logit_BV)

    def sampled() -> jax.Array:
        warm_B = jnp.where(choice.temperature_B > 0, choice.temperature_B, 1)
        order_BV = jnp.argsort(-logit_BV, axis=-1, stable=True)
        sorted_BV = jnp.take_along_axis(logit_BV, order_BV, axis=-1) / warm_B[:, None]
        rank_1V = jnp.arange(sorted_BV.shape[-1])[None]
        sorted_BV = jnp.where((choice.top_k_B[:, None] == 0) | (rank_1V < choice.top_k_B[:, None]), sorted_BV, -jnp.inf)
        chance_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(chance_BV, axis=-1) - chance_BV
        keep_BV = (before_BV < choice.top_p_B[:, None]) & (chance_BV >= choice.min_p_B[:, None] * chance_BV[:, :1])

        def draw(seed: jax.Array | np.ndarray, position: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(seed), position)
            return jax.random.gumbel(key, sorted_BV.shape[-1:], sorted_BV.dtype)

        noise_BV = jax.vmap(draw)(choice.seed_B, position_B)
        best_B1 = jnp.argmax(jnp.where(keep_BV, sorted_BV + noise_BV, -jnp.inf), axis=-1)[:, None]
        picked_B = jnp.take_along_axis(order_BV, best_B1, axis=-1)[:, 0].astype(jnp.int32)
        return jnp.where((choice.temperature_B > 0) & (greedy_B != NO_TOKEN), picked_B, greedy_B)

    return jax.lax.cond((choice.temperature_B > 0).any(), sampled, lambda: greedy_B)
