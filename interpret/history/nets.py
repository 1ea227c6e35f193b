"""Models of language that are no kinds of the project's decoder, small and on one device: Elman's network, the LSTM, a decoder
whose norm can be batch norm or none.

Each is the same three steps: a row of a table for each token, what mixes the tokens, logits by a second table. A document
begins with nothing behind it: recurrent states are zeros there, and attention stays inside of it.

Letters: B rows, T sequence, D model, H hidden units of a recurrent net, h heads, d width of a head, F units of an MLP, V
vocabulary, L layers.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

Weights = dict[str, jax.Array]
Statistics = dict[str, jax.Array]  # running means and variances of batch norms; empty for all others
NormKind = Literal['layer', 'batch', 'none']
KEPT = 0.95  # share of a running statistic that a step leaves


@dataclasses.dataclass(frozen=True, kw_only=True)
class Net(abc.ABC):
    """What a net is, without its weights."""

    vocabulary: int
    dim: int  # of a token's vector, and of what the logits are made of

    @abc.abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each weight between the tables its shape; a matrix multiplies what stands before it from the right."""

    @abc.abstractmethod
    def mix(
        self, w: Weights, x_BTD: jax.Array, segment_BT: jax.Array, seen: Statistics, learns: bool
    ) -> tuple[jax.Array, Statistics]:
        """What the logits are made of, [B, T, D], of tokens' vectors; and batch norms' statistics after this batch.

        `segment_BT` numbers the documents of a row from 1; 0 is padding. `learns`: batch norms use the batch's own statistics.
        """

    def statistics(self) -> Statistics:
        """Batch norms' statistics before any batch."""
        return {}

    def initial(self, key: jax.Array) -> Weights:
        """Random weights: matrices of the scale 1 / √rows, biases 0, scales 1."""
        tables = {'embed_VD': (self.vocabulary, self.dim), 'head_DV': (self.dim, self.vocabulary)}
        found = {}
        for number, (name, shape) in enumerate({**tables, **self.shapes()}.items()):
            fan_in = 1 if name == 'embed_VD' else shape[-2] if len(shape) > 1 else None
            noise = jax.random.normal(jax.random.fold_in(key, number), shape)
            constant = jnp.full(shape, float('scale' in name))
            found[name] = constant if fan_in is None else noise * fan_in**-0.5
        return self.prepared(found)

    def prepared(self, w: Weights) -> Weights:
        """The weights to begin with, of random ones."""
        return w

    def logits(self, w: Weights, mixed_BTD: jax.Array) -> jax.Array:
        """Logits of the next token, [B, T, V]."""
        return mixed_BTD @ w['head_DV']

    @property
    def parameters(self) -> int:
        """Numbers that are learnt."""
        return 2 * self.vocabulary * self.dim + sum(map(math.prod, self.shapes().values()))

    def training_flops(self, sequence_length: int) -> float:
        """Matmul FLOPs of one token's forward and backward pass, a multiplication and an addition being 2."""
        matrices = sum(math.prod(shape) for shape in self.shapes().values() if len(shape) > 1)
        return 6.0 * (matrices + self.vocabulary * self.dim)


def goes_on(segment_BT: jax.Array) -> jax.Array:
    """Whether each token stands in the document of the token before it, float32 [B, T]."""
    before_BT = jnp.pad(segment_BT[:, :-1], ((0, 0), (1, 0)))
    return (segment_BT == before_BT).astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Elman(Net):
    """Elman's simple recurrent network (Elman 1990, Cognitive Science 14): h_t = tanh(x_t W + h_{t−1} U + b).

    As a model of language: Mikolov et al. 2010 (Interspeech). H is D.
    """

    activation: Callable[[jax.Array], jax.Array] = jnp.tanh

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """W, U and b."""
        D = self.dim
        return {'input_DH': (D, D), 'recurrent_HH': (D, D), 'bias_H': (D,)}

    def mix(
        self, w: Weights, x_BTD: jax.Array, segment_BT: jax.Array, seen: Statistics, learns: bool
    ) -> tuple[jax.Array, Statistics]:
        """The hidden states, one token after another."""
        given_BTH = x_BTD @ w['input_DH'] + w['bias_H'][None, None]

        def step(h_BH: jax.Array, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            given_BH, keep_B = now
            h_BH = self.activation(given_BH + (h_BH * keep_B[:, None]) @ w['recurrent_HH'])
            return h_BH, h_BH

        start_BH = jnp.zeros_like(x_BTD[:, 0])
        _, h_TBH = lax.scan(step, start_BH, (given_BTH.swapaxes(0, 1), goes_on(segment_BT).T))
        return h_TBH.swapaxes(0, 1), seen


@dataclasses.dataclass(frozen=True, kw_only=True)
class LSTM(Net):
    """Long short-term memory (Hochreiter and Schmidhuber 1997), with the forget gate of Gers et al. 2000 (eq. 4–9).

    c_t = f ⊙ c_{t−1} + i ⊙ tanh(g),  h_t = o ⊙ tanh(c_t);  i, f, g, o from x_t W + h_{t−1} U + b, all but g by a sigmoid.
    Forget gates begin with a bias of 1 (Jozefowicz et al. 2015). H is D.
    """

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """W, U and b of the four gates, in the order i, f, g, o."""
        D = self.dim
        return {'input_DG': (D, 4 * D), 'recurrent_HG': (D, 4 * D), 'bias_G': (4 * D,)}

    def prepared(self, w: Weights) -> Weights:
        """Forget gates begin open."""
        return w | {'bias_G': w['bias_G'].at[self.dim : 2 * self.dim].set(1.0)}

    def mix(
        self, w: Weights, x_BTD: jax.Array, segment_BT: jax.Array, seen: Statistics, learns: bool
    ) -> tuple[jax.Array, Statistics]:
        """The hidden states, one token after another."""
        given_BTG = x_BTD @ w['input_DG'] + w['bias_G'][None, None]

        def step(
            state: tuple[jax.Array, jax.Array], now: tuple[jax.Array, jax.Array]
        ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            given_BG, keep_B = now
            h_BH, c_BH = (a_BH * keep_B[:, None] for a_BH in state)
            i, f, g, o = jnp.split(given_BG + h_BH @ w['recurrent_HG'], 4, axis=-1)
            c_BH = jax.nn.sigmoid(f) * c_BH + jax.nn.sigmoid(i) * jnp.tanh(g)
            h_BH = jax.nn.sigmoid(o) * jnp.tanh(c_BH)
            return (h_BH, c_BH), h_BH

        start_BH = jnp.zeros_like(x_BTD[:, 0])
        _, h_TBH = lax.scan(step, (start_BH, start_BH), (given_BTG.swapaxes(0, 1), goes_on(segment_BT).T))
        return h_TBH.swapaxes(0, 1), seen


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlainDecoder(Net):
    """A decoder as that of 2017, but x + f(norm(x)) with a norm of one's choice: what the norms are compared in.

    layer: LayerNorm (Ba et al. 2016, arXiv:1607.06450), over each token's D numbers. batch: batch norm (Ioffe and Szegedy 2015,
    arXiv:1502.03167), over each number of all real tokens of the batch while it learns, by running means and variances else.
    none: nothing.
    """

    layers: int
    heads: int
    norm: NormKind
    epsilon: float = 1e-5

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Queries, keys and values side by side, their output, and an MLP of 4 D units, in each layer; norms."""
        D, F, found = self.dim, 4 * self.dim, dict[str, tuple[int, ...]]()
        for layer in range(self.layers):
            matrices = {'qkv_DA': (D, 3 * D), 'out_DD': (D, D), 'up_DF': (D, F), 'down_FD': (F, D)}
            found |= {f'{layer}.{name}': shape for name, shape in matrices.items()}
        for name in self.norms:
            found |= {f'{name}.scale_D': (D,), f'{name}.bias_D': (D,)}
        return found

    @property
    def norms(self) -> list[str]:
        """Names of the norms."""
        inner = [f'{layer}.{part}' for layer in range(self.layers) for part in ('attention', 'mlp')]
        return [] if self.norm == 'none' else [*inner, 'last']

    def statistics(self) -> Statistics:
        """Means 0 and variances 1 of each batch norm."""
        if self.norm != 'batch':
            return {}
        ones = {f'{name}.variance_D': jnp.ones(self.dim) for name in self.norms}
        return {f'{name}.mean_D': jnp.zeros(self.dim) for name in self.norms} | ones

    def prepared(self, w: Weights) -> Weights:
        """What is added to the residual stream begins smaller, as the project's decoder has it."""
        gain = (2 * self.layers) ** -0.5
        return {name: x * gain if name.endswith(('out_DD', 'down_FD')) else x for name, x in w.items()}

    def training_flops(self, sequence_length: int) -> float:
        """As of any net, and of attention the scores and the sums, of half of all pairs of tokens."""
        pairs = 12.0 * self.layers * self.dim * (sequence_length + 1) / 2
        return super().training_flops(sequence_length) + pairs

    def mix(
        self, w: Weights, x_BTD: jax.Array, segment_BT: jax.Array, seen: Statistics, learns: bool
    ) -> tuple[jax.Array, Statistics]:
        """The layers, and the last norm."""
        after = dict(seen)

        def norm(name: str, x_BTD: jax.Array) -> jax.Array:
            if self.norm == 'none':
                return x_BTD
            if self.norm == 'layer':
                mean, variance = x_BTD.mean(-1, keepdims=True), x_BTD.var(-1, keepdims=True)
            elif learns:
                live_BT1 = (segment_BT > 0)[..., None]
                count = jnp.maximum(live_BT1.sum(), 1)
                mean_D = jnp.where(live_BT1, x_BTD, 0).sum((0, 1)) / count
                variance_D = jnp.where(live_BT1, (x_BTD - mean_D[None, None]) ** 2, 0).sum((0, 1)) / count
                for what, now_D in (('mean_D', mean_D), ('variance_D', variance_D)):
                    after[f'{name}.{what}'] = KEPT * seen[f'{name}.{what}'] + (1 - KEPT) * now_D
                mean, variance = mean_D[None, None], variance_D[None, None]
            else:
                mean, variance = (seen[f'{name}.{what}'][None, None] for what in ('mean_D', 'variance_D'))
            scaled = (x_BTD - mean) * lax.rsqrt(variance + self.epsilon) * w[f'{name}.scale_D'][None, None]
            return scaled + w[f'{name}.bias_D'][None, None]

        (B, T), h = x_BTD.shape[:2], self.heads
        x_BTD = x_BTD + sinusoids(T, self.dim)[None]
        causal_TT = jnp.tril(jnp.ones((T, T), bool))
        seen_B1TT = (causal_TT[None] & (segment_BT[:, :, None] == segment_BT[:, None]))[:, None]
        for layer in range(self.layers):
            qkv_BTA = norm(f'{layer}.attention', x_BTD) @ w[f'{layer}.qkv_DA']
            q, k, v = (a.reshape(B, T, h, -1) for a in jnp.split(qkv_BTA, 3, axis=-1))
            score_BhTT = jnp.einsum('BThd,BShd->BhTS', q, k) * (self.dim // h) ** -0.5
            weight_BhTT = jax.nn.softmax(jnp.where(seen_B1TT, score_BhTT, -1e30))
            read_BTD = jnp.einsum('BhTS,BShd->BThd', weight_BhTT, v).reshape(x_BTD.shape)
            x_BTD = x_BTD + read_BTD @ w[f'{layer}.out_DD']
            hidden_BTF = jax.nn.relu(norm(f'{layer}.mlp', x_BTD) @ w[f'{layer}.up_DF'])
            x_BTD = x_BTD + hidden_BTF @ w[f'{layer}.down_FD']
        return norm('last', x_BTD), after


def sinusoids(length: int, dim: int) -> Any:
    """Positions as sines and cosines [T, D] (Vaswani et al. 2017, arXiv:1706.03762, section 3.5)."""
    angle = jnp.arange(length)[:, None] * 1e4 ** (-jnp.arange(0, dim, 2) / dim)[None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)
