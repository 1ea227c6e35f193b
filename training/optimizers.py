"""Optimizers by kind: what a config's `optimizer:` section says, optax' transformation of it, and what its state takes.

A kind is a dataclass registered here or, by `register`, in any file that is imported before the config is read:
docs/extending.md shows one. Which weights decay, and which stand for a linear map, is told by their role (model/parameters.py).
"""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from weft.model.decoder import Decoder, weights_of
from weft.model.parameters import Role, name_of
from weft.model.parts.registry import check_above_zero
from weft.runtime.errors import UserError
from weft.runtime.registry import Registry

MATRICES = (Role.MATRIX, Role.EXPERT, Role.ROUTER)  # what Muon makes orthogonal: neither embedding nor head

# Fields of any kind, by what they must be.
NOT_NEGATIVE = {'learning_rate', 'warmup_steps', 'final_learning_rate_ratio', 'weight_decay'}
NOT_NEGATIVE |= {'epsilon', 'decay_exponent', 'least_scale'}
DECAY_RATES = {'momentum', 'beta1', 'beta2'}


class Shard(NamedTuple):
    """What one device keeps of a weight, or, of layers that are stacked, of one layer's."""

    shape: tuple[int, ...]
    dtype: str
    role: Role


def roles(model: Decoder) -> Any:
    """Of each weight its role, as its layer declares it: a tree like the model, with roles for arrays."""
    known = weights_of(model.config)
    return jax.tree_util.tree_map_with_path(lambda path, _: known[name_of(path)].role, model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """What all kinds have: a learning rate that rises linearly and falls along a cosine, weight decay, and clipping.

    A kind extends it by its own fields, by `kind` with its name as default, and by `rule`.
    """

    kind: str
    learning_rate: float = 3e-4  # at its highest
    warmup_steps: int = 100  # over which the learning rate rises from 0
    final_learning_rate_ratio: float = 0.1  # the learning rate at the last step, as a share of the highest
    weight_decay: float = 0.1  # of matrices and tables; scales and biases have none
    grad_clip: float | None = 1.0  # global norm above which a gradient is scaled down to it; null: never

    def __post_init__(self) -> None:
        for field, value in vars(self).items():
            if field in NOT_NEGATIVE and value is not None and not value >= 0:
                raise UserError(f'optimizer.{field} is {value}: it must be at least 0')
            if field in DECAY_RATES and value is not None and not 0 <= value < 1:
                raise UserError(f'optimizer.{field} is {value}: it must be at least 0 and less than 1')
        if self.grad_clip is not None and self.grad_clip <= 0:
            raise UserError(f'optimizer.grad_clip is {self.grad_clip}: it must be above 0; null turns clipping off')

    def schedule(self, steps: int) -> optax.Schedule:
        """Learning rate of a step of a run of `steps`: linear from 0 over `warmup_steps`, then a cosine to the last step."""
        warmup = min(self.warmup_steps, steps)
        cosine = optax.cosine_decay_schedule(self.learning_rate, max(steps - warmup, 1), self.final_learning_rate_ratio)
        if not warmup:
            return cosine
        return optax.join_schedules([lambda step: self.learning_rate * (step + 1) / warmup, cosine], [warmup])

    def build(self, steps: int, roles: Any) -> optax.GradientTransformation:
        """Gradients to updates in a run of `steps`: clipping by global norm, then `rule`; `roles`: a tree like the weights."""
        rule = self.rule(self.schedule(steps), roles)
        return optax.chain(optax.clip_by_global_norm(self.grad_clip), rule) if self.grad_clip else rule

    def rule(self, rate: optax.Schedule, roles: Any) -> optax.GradientTransformation:
        """Clipped gradients to what is added to the weights, the learning rate `rate` of a step applied."""
        raise NotImplementedError(f'optimizer.kind {self.kind} has no rule')

    def state_bytes(self, shard: Shard) -> int:
        """Bytes that a device keeps for its part of a weight, by tracing `build`; a kind may say them by arithmetic, sooner."""
        return _traced_bytes(self, (shard,)) - self.fixed_bytes

    @functools.cached_property
    def fixed_bytes(self) -> int:
        """Bytes that a device keeps whatever the weights: counters."""
        return _traced_bytes(self, ())


@functools.lru_cache(maxsize=4096)
def _traced_bytes(config: OptimizerConfig, shards: tuple[Shard, ...]) -> int:
    """Bytes of the state that `build` makes for weights of these shapes on one device."""
    weights = [jax.ShapeDtypeStruct(shard.shape, shard.dtype) for shard in shards]
    state = jax.eval_shape(config.build(1, [shard.role for shard in shards]).init, weights)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def state_bytes(config: OptimizerConfig, shards: Iterable[tuple[Shard, float]]) -> float:
    """Bytes of the optimizer's state on a device that keeps each of these shards so many times."""
    return config.fixed_bytes + sum(times * config.state_bytes(shard) for shard, times in shards)


def decays(roles: Any) -> Any:
    """Which weights decay, by their role: a tree of bool like `roles`."""
    return jax.tree.map(lambda role: role.decays, roles)


def _bytes(shard: Shard) -> int:
    return math.prod(shard.shape) * jnp.dtype(shard.dtype).itemsize


OPTIMIZERS = Registry('optimizer', default='adamw')


def register(config: type[OptimizerConfig]) -> type[OptimizerConfig]:
    """Adds a kind of optimizer, named by the default of its field `kind`; a decorator of its dataclass."""
    kind = config.__dataclass_fields__['kind'].default
    assert isinstance(kind, str)
    OPTIMIZERS.register(kind, config)
    return config


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(OptimizerConfig):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101): two moments of each number."""

    kind: Literal['adamw'] = 'adamw'
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8

    def rule(self, rate: optax.Schedule, roles: Any) -> optax.GradientTransformation:
        return optax.adamw(
            rate, self.beta1, self.beta2, self.epsilon, weight_decay=self.weight_decay, mask=decays(roles)
        )

    def state_bytes(self, shard: Shard) -> int:
        return 2 * _bytes(shard)


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion(OptimizerConfig):
    """Lion (Chen et al. 2023, arXiv:2302.06675): the sign of a moment, of which each number has one.

    Its authors advise a learning rate 3 to 10 times lower than AdamW's, and a weight decay as many times higher.
    """

    kind: Literal['lion'] = 'lion'
    beta1: float = 0.9
    beta2: float = 0.99

    def rule(self, rate: optax.Schedule, roles: Any) -> optax.GradientTransformation:
        return optax.lion(rate, self.beta1, self.beta2, weight_decay=self.weight_decay, mask=decays(roles))

    def state_bytes(self, shard: Shard) -> int:
        return _bytes(shard)


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Adafactor(OptimizerConfig):
    """Adafactor without momentum (Shazeer and Stern 2018, arXiv:1804.04235, algorithms 4 and 5).

    Second moments of a matrix are kept as the means of its rows and of its columns. Steps are relative: to the root mean square
    of the weight, so that `learning_rate` is a share of it. Each matrix of a stack of layers or experts stands for itself,
    where `optax.adafactor` would take the two largest dims of the stack for rows and columns.
    """

    kind: Literal['adafactor'] = 'adafactor'
    learning_rate: float = 1e-2  # at its highest, times the root mean square of a weight
    decay_exponent: float = 0.8  # moments of step t decay by 1 - t^-decay_exponent
    update_clip: float = 1.0  # root mean square above which a weight's update is scaled down to it
    epsilon: float = 1e-30  # added to squared gradients
    least_scale: float = 1e-3  # of a weight's root mean square, where it is smaller

    def __post_init__(self) -> None:
        super().__post_init__()
        check_above_zero('optimizer', self, 'update_clip')

    def rule(self, rate: optax.Schedule, roles: Any) -> optax.GradientTransformation:
        return optax.chain(
            self.scale_by_factored_moments(roles),
            optax.add_decayed_weights(self.weight_decay, decays(roles)),
            optax.scale_by_learning_rate(rate),
        )

    def scale_by_factored_moments(self, roles: Any) -> optax.GradientTransformation:
        """Gradients to updates of a size relative to their weights."""

        def init(weights: Any) -> FactoredState:
            moments = jax.tree.map(_moments, weights, roles)
            return FactoredState(jnp.int32(0), jax.tree.map(jnp.zeros_like, moments))

        def update(gradients: Any, state: FactoredState, weights: Any) -> tuple[Any, FactoredState]:
            decay = 1 - (state.taken + 1.0) ** -self.decay_exponent

            def mean(old: jax.Array, new: jax.Array) -> jax.Array:
                return (decay * old + (1 - decay) * new).astype(old.dtype)

            def new_moments(gradient: jax.Array, role: Role, moments: Any) -> Any:
                return jax.tree.map(mean, moments, _moments(jnp.square(gradient) + self.epsilon, role))

            def step(gradient: jax.Array, role: Role, moments: Any, weight: jax.Array) -> jax.Array:
                def size(x: jax.Array) -> jax.Array:
                    return jnp.sqrt(jnp.square(x).mean((-2, -1) if role.decays else -1, keepdims=True))

                scaled = gradient * moments.inverse_root()
                scaled = scaled / jnp.maximum(1, size(scaled) / self.update_clip)
                return (scaled * jnp.maximum(size(weight), self.least_scale)).astype(gradient.dtype)

            moments = jax.tree.map(new_moments, gradients, roles, state.moments)
            return jax.tree.map(step, gradients, roles, moments, weights), FactoredState(state.taken + 1, moments)

        return optax.GradientTransformation(init, update)

    def state_bytes(self, shard: Shard) -> int:
        if not shard.role.decays:
            return _bytes(shard)
        row, column = shard.shape[:-1], (*shard.shape[:-2], shard.shape[-1])
        return sum(_bytes(shard._replace(shape=shape)) for shape in (row, column))


class FactoredState(NamedTuple):
    """Adafactor's state."""

    taken: jax.Array  # steps, int32
    moments: Any  # a tree like the weights, with `Factored` or `Unfactored` for arrays


class Factored(NamedTuple):
    """Means of a matrix' squared gradients."""

    row: jax.Array  # […, rows]
    column: jax.Array  # […, columns]

    def inverse_root(self) -> jax.Array:
        """1 / √ of the second moments that rows and columns stand for."""
        row = (self.row / self.row.mean(-1, keepdims=True)) ** -0.5
        return row[..., None] * self.column[..., None, :] ** -0.5


class Unfactored(NamedTuple):
    """A vector's squared gradients."""

    whole: jax.Array

    def inverse_root(self) -> jax.Array:
        """1 / √ of the second moments."""
        return self.whole**-0.5


def _moments(square: jax.Array, role: Role) -> Factored | Unfactored:
    """Of a weight's squared gradient what Adafactor keeps."""
    return Factored(square.mean(-1), square.mean(-2)) if role.decays else Unfactored(square)


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon(OptimizerConfig):
    """Muon (Jordan 2024, github.com/KellerJordan/Muon) for the layers' matrices, AdamW for all other weights.

    The momentum of each matrix is made orthogonal by five Newton–Schulz steps, and scaled so that its numbers are as large as
    those of AdamW's updates (Liu et al. 2025, arXiv:2502.16982, eq. 4): one learning rate serves both.
    """

    kind: Literal['muon'] = 'muon'
    momentum: float = 0.95
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW
    epsilon: float = 1e-8

    def rule(self, rate: optax.Schedule, roles: Any) -> optax.GradientTransformation:
        muon = optax.contrib.scale_by_muon(
            beta=self.momentum, eps=self.epsilon, weight_dimension_numbers=_last_two_dims
        )
        matrices = optax.chain(
            _in_auto_axes(muon),
            optax.stateless(_as_large_as_adamw),
            optax.add_decayed_weights(self.weight_decay),
            optax.scale_by_learning_rate(rate),
        )
        others = optax.adamw(
            rate, self.beta1, self.beta2, self.epsilon, weight_decay=self.weight_decay, mask=decays(roles)
        )
        kinds = jax.tree.map(lambda role: 'matrix' if role in MATRICES else 'other', roles)
        return optax.partition({'matrix': matrices, 'other': others}, kinds)

    def state_bytes(self, shard: Shard) -> int:
        return _bytes(shard) * (1 if shard.role in MATRICES else 2)


def _last_two_dims(weights: Any) -> Any:
    """Which dims Muon multiplies over: those of each matrix of a stack."""
    return jax.tree.map(lambda w: optax.contrib.MuonDimensionNumbers(w.ndim - 2, w.ndim - 1), weights)


def _as_large_as_adamw(updates: Any, weights: Any = None) -> Any:
    return jax.tree.map(lambda x: 0.2 * max(x.shape[-2:]) ** 0.5 * x, updates)


def _in_auto_axes(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transformation, with layouts within its update left to the compiler: Muon multiplies a matrix by itself."""

    def update(gradients: Any, state: Any, weights: Any = None) -> Any:
        layouts = jax.tree.map(lambda x: jax.typeof(x).sharding, (gradients, state))
        return jax.sharding.auto_axes(transformation.update, out_sharding=layouts)(gradients, state, weights)

    return optax.GradientTransformation(transformation.init, update)
