"""What a report is made of: arrays as base64, numbers of six digits, texts of tokens in one table.

The report's form stands in docs/interpret.md.
"""

import base64
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from weft.data.tokenizer import Tokenizer

DTYPES = {'u8': '<u1', 'u16': '<u2', 'u32': '<u4', 'f16': '<f2', 'f32': '<f4'}


def array(values: Any, dtype: str = 'f32') -> dict[str, Any]:
    """An array as an object: its bytes in base64 (little-endian, C order), dtype and shape. All numbers must be finite."""
    found = np.ascontiguousarray(values, DTYPES[dtype])
    assert np.isfinite(np.asarray(values, np.float64)).all(), 'a report has no NaN'
    return {'b64': base64.b64encode(found.tobytes()).decode(), 'dtype': dtype, 'shape': list(found.shape)}


def decoded(found: dict[str, Any]) -> np.ndarray:
    """The array that `array` has made an object of."""
    return np.frombuffer(base64.b64decode(found['b64']), DTYPES[found['dtype']]).reshape(found['shape'])


def number(value: float) -> float:
    """Six significant digits."""
    assert math.isfinite(value), 'a report has no NaN'
    return float(f'{value:.6g}')


def numbers(values: Iterable[Any]) -> Any:
    """Numbers of six digits, of lists of any depth."""
    return [number(float(one)) if np.ndim(one) == 0 else numbers(one) for one in values]


class Strings:
    """The table of tokens' texts, each once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.texts = tokenizer, list[str]()
        self.places, self.of_ids = dict[str, int](), dict[int, int]()

    def of_id(self, token: int) -> int:
        """The place of a token's text in the table."""
        if token not in self.of_ids:
            text = token_text(self.tokenizer, token)
            if text not in self.places:
                self.places[text] = len(self.texts)
                self.texts.append(text)
            self.of_ids[token] = self.places[text]
        return self.of_ids[token]

    def of(self, ids: Any) -> Any:
        """The places of tokens, an array of the same shape."""
        ids = np.asarray(ids)
        some, inverse = np.unique(ids, return_inverse=True)
        return np.array([self.of_id(int(one)) for one in some], np.uint32)[inverse].reshape(ids.shape)


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """What a token alone stands for; the name of one that no text has; bytes that are no character as U+FFFD."""
    piece = tokenizer.pieces[token] if token < len(tokenizer.pieces) else b''
    return piece.decode('utf-8', 'replace') or tokenizer.name_of(token) or f'<{token}>'
