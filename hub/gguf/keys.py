"""The keys of a GGUF file's architecture, read by name, so that what nothing reads is known."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from weft.hub.gguf.file import Contents
from weft.storage.foreign import shown_value

Config = Mapping[str, Any]
LARGEST = 2**31 - 1
# Keys that change no logit, or say again what others say; after the architecture's name.
IDLE = (
    'vocab_size',
    'attention.value_length',
    'rope.scaling.finetuned',
    'rope.scaling.original_context_length',
    'tensor_data_layout',
    'pooling_type',
    'mm.tokens_per_image',
)


class Keys:
    """The keys of one architecture in a header; each is read by name, and those that none has read can be told."""

    def __init__(self, contents: Contents, architecture: str):
        self.architecture, self.values, self.tensors = architecture, contents.values, contents.tensors
        self.error = contents.error
        self.seen = {f'{architecture}.{name}' for name in IDLE}

    def __call__(self, name: str, default: Any = ...) -> Any:
        """A key's value. Of a value for each layer, the one that all of them have."""
        key = f'{self.architecture}.{name}'
        self.seen.add(key)
        value = self.values.get(key)
        if value is None:
            if default is ...:
                raise self.error(f'key {key} is missing, which a model of this architecture needs')
            return default
        if isinstance(value, np.ndarray):
            if value.size == 0 or not (value == value[0]).all():
                raise self.error(
                    f'key {key} has {len(value)} values, which differ from layer to layer: only one for all layers is supported'
                )
            return value[0].item()
        return value

    def count(self, name: str, default: Any = ...) -> int:
        """A key that holds a whole number above 0."""
        return self.whole(name, default, least=1)

    def whole(self, name: str, default: Any = ..., least: int = 0) -> int:
        """A key that holds a whole number from `least` on."""
        value = self(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
            rule = f'it must be a whole number from {least} to {LARGEST}'
            raise self.error(f'key {self.architecture}.{name} is {shown_value(value)}: {rule}')
        return value

    def positive(self, name: str, default: Any = ...) -> float:
        """A key that holds a number above 0."""
        value = self.number(name, default)
        if not value > 0:
            raise self.error(f'key {self.architecture}.{name} is {value}: it must be above 0')
        return float(value)

    def number(self, name: str, default: Any = ...) -> float:
        value = self(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(f'key {self.architecture}.{name} is {shown_value(value)}: it must be a number')
        return value

    def layers(self) -> int:
        """Blocks, those that predict further ahead among them; the file has tensors of each."""
        blocks = self.count('block_count')
        there = {name.split('.')[1] for name in self.tensors if name.startswith('blk.')}
        if blocks != len(there):
            raise self.error(
                f'key {self.architecture}.block_count is {blocks}, and the file has tensors of {len(there)} blocks'
            )
        return blocks

    def vocabulary(self) -> int:
        """Tokens that the embedding has rows of."""
        embedding = self.tensors.get('token_embd.weight')
        if embedding is None:
            raise self.error('tensor token_embd.weight is missing, which every model has')
        return embedding.shape[0]

    def vector(self, name: str, length: int) -> np.ndarray | None:
        """The numbers of a short tensor, which say something of the model; None where there is none."""
        found = self.tensors.get(name)
        if found is None:
            return None
        if found.shape != (length,):
            raise self.error(f'tensor {name} is {list(found.shape)} and by the keys must be {[length]}')
        return np.array(found.read(), np.float32)

    def unread(self) -> dict[str, Any]:
        """The architecture's keys that nothing has read."""
        mine = [key for key in self.values if key.startswith(f'{self.architecture}.') and key not in self.seen]
        short = lambda value: value if isinstance(value, int | float) else shown_value(value)
        return {key: short(self.values[key]) for key in mine}
