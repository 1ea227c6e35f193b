"""A forward pass with the scales of its norms frozen: then a logit is a sum of what each part has written.

A norm divides by a number that it makes of its whole input (RMSNorm: the root of the mean square; LayerNorm: the standard
deviation, after the mean is taken off). With that number kept as it was for each token the norm is linear, and so is all
that stands between what a part adds to the residual stream and the logits (Elhage et al. 2021, A mathematical framework for
transformer circuits; "direct logit attribution" with the final norm's scale frozen). Nothing is approximated of the sum
itself; what the picture leaves out is that another part's output would have changed the scale.

Letters: T tokens, D model, L layers.
"""

import dataclasses

import numpy as np

from weft.interpret.xray.programs import layer_weight
from weft.model.config import ModelConfig
from weft.model.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class FrozenNorm:
    """y = gain ⊙ (x − mean x, of a LayerNorm) + bias, with the gain of each token as it was."""

    gain_TD: np.ndarray
    bias_D: np.ndarray | None
    centers: bool

    @classmethod
    def at(cls, c: ModelConfig, x_TD: np.ndarray, scale_D: np.ndarray, bias_D: np.ndarray | None) -> 'FrozenNorm':
        """The norm with a scale and a bias as they are kept, frozen at what it read."""
        x_TD = x_TD.astype(np.float64)
        centers = c.norm.kind != 'rmsnorm'
        if centers:
            x_TD = x_TD - x_TD.mean(-1, keepdims=True)
        root_T1 = 1 / np.sqrt((x_TD * x_TD).mean(-1, keepdims=True) + c.norm.epsilon)
        return cls((root_T1 * (scale_D + c.norm.offset)).astype(np.float32), bias_D, centers)

    def forward(self, part_TD: np.ndarray) -> np.ndarray:
        """What becomes of a part of the input, [T, …, D]: all parts' add up to the output without the bias."""
        if self.centers:
            part_TD = part_TD - part_TD.mean(-1, keepdims=True)
        gain = self.gain_TD.reshape(len(self.gain_TD), *[1] * (part_TD.ndim - 2), -1)
        return part_TD * gain

    def back(self, direction_TD: np.ndarray) -> np.ndarray:
        """The direction in the input whose product with it is that of `direction` with the output, but for the bias."""
        before_TD = direction_TD * self.gain_TD
        return before_TD - before_TD.mean(-1, keepdims=True) if self.centers else before_TD

    def constant(self, direction_TD: np.ndarray) -> np.ndarray:
        """[T]: the bias's share of a product with the output."""
        return np.zeros(len(direction_TD), np.float32) if self.bias_D is None else direction_TD @ self.bias_D


@dataclasses.dataclass(frozen=True)
class FrozenPass:
    """The norms that stand after what parts write, frozen at one text.

    `after`, by (layer, part), norms the sum once a part was added ('post' order); `final` stands before the head.
    """

    layers: int
    after: dict[tuple[int, str], FrozenNorm]
    final: FrozenNorm | None

    def to_head(self, part_TD: np.ndarray, layer: int) -> np.ndarray:
        """What the head gets of a vector [T, …, D] that the attention of a layer adds."""
        if self.after:
            later = [(number, name) for number in range(layer + 1, self.layers) for name in ('attention', 'mlp')]
            for key in [(layer, 'attention'), (layer, 'mlp'), *later]:
                part_TD = self.after[key].forward(part_TD)
        return part_TD if self.final is None else self.final.forward(part_TD)


@dataclasses.dataclass(frozen=True)
class Directions:
    """Vectors whose products with what stands at a place of the residual stream are shares of one logit of each token."""

    attention_LTD: np.ndarray  # with a layer's attention output, as it is added
    mlp_LTD: np.ndarray
    embedding_TD: np.ndarray
    constant_T: np.ndarray  # the share of norms' biases that stand between; the head's own bias is not in it


def layer_norm(model: Decoder, layer: int, name: str, x_TD: np.ndarray) -> FrozenNorm:
    """A norm of a layer, frozen at what it read."""
    scale_D = layer_weight(model, layer, name, 'scale_D')
    assert scale_D is not None
    return FrozenNorm.at(model.config, x_TD, scale_D, layer_weight(model, layer, name, 'bias_D'))


def freeze(model: Decoder, taps: dict[str, np.ndarray]) -> FrozenPass:
    """The frozen pass of one text, of which `taps` are the activations [L, T, D] by name."""
    c, after = model.config, dict[tuple[int, str], FrozenNorm]()
    if c.norm.order == 'post':
        for part, before in (('attention', 'residual.before_attention'), ('mlp', 'residual.after_attention')):
            sum_LTD = taps[before] + taps[f'{part}.output']
            after |= {(at, part): layer_norm(model, at, f'{part}_norm', x_TD) for at, x_TD in enumerate(sum_LTD)}
        return FrozenPass(c.layers, after, None)
    bias_D = np.asarray(model.norm.bias_D[...], np.float32) if c.norm.bias else None
    scale_D = np.asarray(model.norm.scale_D[...], np.float32)
    final = FrozenNorm.at(c, taps['residual.after_mlp'][-1], scale_D, bias_D)
    return FrozenPass(c.layers, after, final)


def directions(frozen: FrozenPass, head_TD: np.ndarray) -> Directions:
    """For the logits of one token at each place, whose vectors in the head are `head_TD`: see `Directions`."""
    T = len(head_TD)
    constant_T, d_TD = np.zeros(T, np.float32), head_TD
    if frozen.final is not None:
        constant_T = constant_T + frozen.final.constant(d_TD)
        d_TD = frozen.final.back(d_TD)
    attention, mlp = list[np.ndarray](), list[np.ndarray]()
    for layer in reversed(range(frozen.layers)):
        for part, found in (('mlp', mlp), ('attention', attention)):
            if (after := frozen.after.get((layer, part))) is not None:
                constant_T = constant_T + after.constant(d_TD)
                d_TD = after.back(d_TD)
            found.append(d_TD)
    return Directions(np.stack(attention[::-1]), np.stack(mlp[::-1]), d_TD, constant_T)
