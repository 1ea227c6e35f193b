"""Models whose weights are written by hand, so that what an instrument is to find is known exactly.

The residual stream has four parts: which token stands here, at which place, which token stood before (written by a head), and
which token is to come next (written by a head, a cell or an expert, and read by the LM head).

    layer 0   head 0 looks at the token before and writes it; head 1 looks at the first token
    layer 1   head 0 looks at earlier copies of its token; head 1 is an induction head: it looks at what followed them, and
              writes that token as the next one
              cell CELL fires at token KEY and says VALUE; or experts: token a goes to expert a mod 4, which says SAYS + that

Letters: V tokens, T places, D = 3V + T, H width of a head, E experts, F hidden units.
"""

import numpy as np

from tests.families.loading import from_leaves
from weft.hub.tensor_table import array_shapes
from weft.model.config import ModelConfig, model_of
from weft.model.decoder import Decoder

V, T = 20, 40
TOKEN, PLACE, BEFORE, NEXT = 0, V, V + T, 2 * V + T  # where the parts begin
D, H, F, E = 3 * V + T, V + T, 4, 4
SHARP = 6.0  # of queries
CELL, KEY, VALUE = 2, 7, 11
SAYS = 12  # what expert 0 says; the next one says the token after it

PREVIOUS, FIRST, DUPLICATE, INDUCTION = (0, 0), (0, 1), (1, 0), (1, 1)  # layer and head


def config(experts: bool = False) -> ModelConfig:
    """Two layers of two heads; with experts the second layer is a mixture."""
    moe = {'moe.experts': E, 'moe.top_k': 1, 'moe.mlp_dim': F, 'moe.first_dense_layers': 1} if experts else {}
    return model_of(
        {
            'vocabulary': V,
            'layers': 2,
            'model_dim': D,
            'attention.heads': 2,
            'attention.head_dim': H,
            'positions.kind': 'learned',
            'positions.max': T,
            'mlp.dim': F,
            'mlp.activation': 'relu',
            'embedding.tied': False,
            **moe,
        }
    )


def model(experts: bool = False) -> Decoder:
    """The model on the current mesh."""
    c = config(experts)
    found = {name: np.zeros(leaf.shape, np.float32) for name, leaf in array_shapes(c).items()}
    for name, array in found.items():
        if name.endswith('scale_D'):
            array[...] = 1
    one = np.eye(V, dtype=np.float32)
    place = np.eye(T, dtype=np.float32)
    found['embed_VD'][:V, TOKEN : TOKEN + V] = one
    found['position_PD'][:, PLACE : PLACE + T] = place
    found['head_DV'][NEXT : NEXT + V, :V] = one

    def of(layer: int, name: str) -> np.ndarray:
        group, at = (layer, 0) if experts else (0, layer)
        return found[f'groups.{group}.{name}'][at]

    def put(layer: int, number: int, part: str, row: int, column: int, value: np.ndarray) -> None:
        """Sets a block of a head's matrix [D, H]."""
        w = of(layer, f'attention.{part}.{"w_OI" if part == "o" else "w_IO"}')
        begin = number * H + column
        w[row : row + value.shape[0], begin : begin + value.shape[1]] = value

    back = np.zeros((T, T), np.float32)
    back[np.arange(1, T), np.arange(T - 1)] = SHARP
    put(0, 0, 'q', PLACE, 0, back)
    put(0, 0, 'k', PLACE, 0, place)
    put(0, 0, 'v', TOKEN, 0, one)
    put(0, 0, 'o', BEFORE, 0, one / 7)
    put(0, 1, 'q', PLACE, 0, np.full((T, 1), SHARP, np.float32))
    put(0, 1, 'k', PLACE, 0, place[:, :1])
    put(1, 0, 'q', TOKEN, 0, SHARP * one)
    put(1, 0, 'q', PLACE, V, -2 * SHARP * place)  # not itself
    put(1, 0, 'k', TOKEN, 0, one)
    put(1, 0, 'k', PLACE, V, place)
    put(1, 1, 'q', TOKEN, 0, SHARP * one)
    put(1, 1, 'k', BEFORE, 0, one)
    put(1, 1, 'v', TOKEN, 0, one)
    put(1, 1, 'o', NEXT, 0, one)
    if experts:
        router_DE, up_EDF, down_EDF = of(1, 'mlp.router.w_IO'), of(1, 'mlp.up.w_EIO'), of(1, 'mlp.down.w_EOI')
        for token in range(V):
            router_DE[TOKEN + token, token % E] = 10
        up_EDF[:, TOKEN : TOKEN + V, 0] = 1
        for expert in range(E):
            down_EDF[expert, NEXT + SAYS + expert, 0] = 10
    else:
        of(1, 'mlp.up.w_IO')[TOKEN + KEY, CELL] = 1
        of(1, 'mlp.down.w_OI')[NEXT + VALUE, CELL] = 10
    return from_leaves(c, found)


class Letters:
    """A tokenizer of the letters a, b, c …; nothing begins a text."""

    prefix: tuple[int, ...] = ()
    vocabulary = embedded = V
    bos = eos = 0

    def __init__(self) -> None:
        self.pieces = [chr(97 + number).encode() for number in range(V)]

    def name_of(self, token: int) -> str:
        """A letter."""
        return self.pieces[token].decode()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """A letter is a token."""
        return [[ord(letter) - 97 for letter in text] for text in texts]

    def decode(self, ids: list[int]) -> str:
        """Letters."""
        return ''.join(map(self.name_of, ids))

    def starts_twice(self, text: str) -> bool:
        """Nothing does."""
        return False

    def check(self, ids: object) -> None:
        """All ids have a row in the embedding."""
