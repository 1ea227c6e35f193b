"""GGUF files as published folders: the fields of config.json that a header stands for, and tensors by their names there.

`read` gives both, to be taken further like a folder's; file.py reads the format, fields.py says what each
architecture's keys mean, architectures.py what its tensors are. Tokenizers are made of the same header by
tokenizer.py.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from weft.hub.families import Tensor
from weft.hub.gguf import file as gguf_file
from weft.hub.gguf.architectures import ARCHITECTURES, Architecture, Changed, Entry, Experts, Pair
from weft.hub.gguf.blocks import Blocks, Numbers
from weft.hub.gguf.file import Contents
from weft.hub.gguf.keys import Keys
from weft.hub.gguf.sources import Expert, Narrowed, Undone
from weft.runtime.errors import nearest
from weft.storage.foreign import shown_value

SUFFIX = '.gguf'
Found = Numbers | Undone | Narrowed
LAYER = re.compile(r'(blk|layers|h)\.(\d+)\.')
EXPERT = re.compile(r'(experts|ffn_gate|ffn_up|ffn_down)\.(\d+)\.')
MOST_EXPERTS = 2**17  # of all layers together; the largest models have some 25,000
IDS = {
    'bos_token_id': 'tokenizer.ggml.bos_token_id',
    'eos_token_id': 'tokenizer.ggml.eos_token_id',
    'pad_token_id': 'tokenizer.ggml.padding_token_id',
}


class Parsed(NamedTuple):
    """A tensor's name with {i} and {e} for the layer and the expert, and these, '' where it has none."""

    pattern: str
    layer: str
    expert: str

    def filled(self, pattern: str) -> str:
        """Another name with this one's layer and expert."""
        return pattern.replace('{i}', self.layer).replace('{e}', self.expert)


def parsed(name: str) -> Parsed:
    layer, expert = LAYER.search(name), EXPERT.search(name)
    pattern = EXPERT.sub(r'\1.{e}.', LAYER.sub(r'\1.{i}.', name, count=1), count=1)
    return Parsed(pattern, layer[2] if layer else '', expert[2] if expert else '')


class Model:
    """A file that was read. Raises UserError for a tensor that is not known, or does not fit the keys."""

    def __init__(self, contents: Contents, architecture: Architecture, config: Mapping[str, Any]):
        self.contents, self.architecture = contents, architecture
        self.config = config  # as in config.json
        self.called: dict[str, str] = {}  # what each tensor of `stored` is made of in the file
        self._found: dict[str, Numbers | Undone] = {}
        self._experts, self._seconds = architecture.experts(config), architecture.seconds
        self._experts_there: set[str] = set()
        layers = {parsed(name).layer for name in contents.tensors}
        if self._experts * len(layers) > MOST_EXPERTS:
            raise contents.error(
                f'its keys say that it has {self._experts} experts: at most {MOST_EXPERTS} in all layers together work'
            )
        left_out = architecture.consumed + (architecture.copies if self.packed else ())
        for name, numbers in contents.tensors.items():
            if not any(re.fullmatch(pattern, name) for pattern in left_out):
                self._place(name, numbers)
        if len(self._experts_there) != self._experts:
            raise contents.error(
                f'its keys say that it has {self._experts} experts, and its tensors are of {len(self._experts_there)}'
            )
        self.stored = _as_most(contents, self._found)  # by the names of a published folder

    @property
    def packed(self) -> list[str]:
        """The types of its tensors in blocks of few bits."""
        return sorted({one.layout.name for one in self.contents.tensors.values() if isinstance(one, Blocks)})

    def check(self, table: Sequence[Tensor]) -> None:
        """Raises UserError where a tensor of `table` is missing or of another shape, or one is there that is none of it.

        Tensors are told by their names in the file.
        """
        if left := self.stored.keys() - {one.name for one in table}:
            name = min(left)
            raise self.stored[name].file.error(
                f'tensor {self.called[name]} is none that a model of architecture '
                f'{self.architecture.name} with these keys has; its numbers would be lost'
            )
        for one in table:
            found = self.stored.get(one.name)
            if one.copy_of or (found is not None and found.shape == one.shape):
                continue
            if found is None:
                raise self.contents.error(
                    f'tensor {self.name_of(one.name)} is missing: by its keys a model of architecture '
                    f'{self.architecture.name} has it'
                )
            raise found.file.error(
                f'tensor {self.called[one.name]} stands for {list(found.shape)} numbers and by the keys of the '
                f'file must for {list(one.shape)}'
            )

    def name_of(self, published: str) -> str:
        """What a tensor that a published folder has is called in a file."""
        if published in self.called:
            return self.called[published]
        where = parsed(published)
        base, _, suffix = where.pattern.rpartition('.')
        for name, entry in self.architecture.names.items():
            theirs = entry if isinstance(entry, str) else entry.name
            if theirs in (base, where.pattern):
                return where.filled(name if theirs == where.pattern else f'{name}.{suffix}')
        return published

    def _place(self, name: str, numbers: Numbers) -> None:
        """A tensor of the file as what it is in a published folder."""
        where = parsed(name)
        if first := self._seconds.get(where.pattern):
            self._count(name, where, numbers)
            self._beside(where.filled(first), name, numbers)
            return
        entry, tail = self._entry(where)
        if entry is None:
            raise numbers.file.error(
                f'tensor {name} {list(numbers.shape)} is none that a model of architecture '
                f'{self.architecture.name} is known to have; its numbers would be lost'
            )
        self._count(name, where, numbers)
        if isinstance(entry, Pair):
            second = where.filled(entry.second)
            other = self._beside(second, name, numbers)
            undone = entry.undo(numbers, other, name, second)
            self._add(where.filled(entry.name), f'{name} and {second}', undone)
        elif isinstance(entry, Experts):
            if len(numbers.shape) != 3:
                raise numbers.file.error(
                    f'tensor {name} {list(numbers.shape)} must have 3 dims, a matrix for each expert'
                )
            for e in range(self._experts):
                published = where._replace(expert=str(e)).filled(entry.name)
                self._add(published + tail, name, Expert(numbers, e))
        elif isinstance(entry, Changed):
            self._add(where.filled(entry.name) + tail, name, entry.undo(numbers, self.config, name))
        else:
            self._add(where.filled(entry) + tail, name, numbers)

    def _entry(self, where: Parsed) -> tuple[Entry | None, str]:
        """What the table says of a name, and what of it goes on in the published one: where the table has it without that."""
        base, _, suffix = where.pattern.rpartition('.')
        if where.pattern in self.architecture.names or suffix not in ('weight', 'bias'):
            return self.architecture.names.get(where.pattern), ''
        return self.architecture.names.get(base), f'.{suffix}'

    def _count(self, name: str, where: Parsed, numbers: Numbers) -> None:
        """Takes note of the experts that a tensor is of."""
        if where.expert:
            self._experts_there.add(where.expert)
        elif '_exps.' in name:
            if numbers.shape[0] != self._experts:
                raise numbers.file.error(
                    f'tensor {name} is of {numbers.shape[0]} experts and by the keys must be of {self._experts}'
                )
            self._experts_there |= {str(e) for e in range(self._experts)}

    def _beside(self, other: str, name: str, numbers: Numbers) -> Numbers:
        if other not in self.contents.tensors:
            raise numbers.file.error(f'tensor {name} is there without {other}, which belongs to it')
        return self.contents.tensors[other]

    def _add(self, published: str, name: str, source: Numbers | Undone) -> None:
        if published in self._found:
            raise source.file.error(
                f'tensors {self.called[published]} and {name} are the same one of a model of architecture '
                f'{self.architecture.name}'
            )
        self._found[published], self.called[published] = source, name


def is_file(path: Path) -> bool:
    """Whether a path names a GGUF file, which need not exist; a folder is none, whatever its name."""
    return path.suffix.lower() == SUFFIX and not path.is_dir()


def read(path: Path) -> Model:
    """A file, or the first of those that a model is split into. Raises UserError for what is not supported."""
    contents = gguf_file.read(path)
    values = contents.values
    kind = values.get('general.type', 'model')
    if not isinstance(kind, str) or kind != 'model':
        raise contents.error(
            f'general.type is {shown_value(kind)}: only files of whole models are read, which have "model"'
        )
    name = values.get('general.architecture')
    if not isinstance(name, str) or name not in ARCHITECTURES:
        near = nearest(name[:64], ARCHITECTURES) if isinstance(name, str) else ''
        raise contents.error(
            f'general.architecture is {shown_value(name)}, which is not supported{near}; '
            f'supported: {", ".join(ARCHITECTURES)}'
        )
    if not contents.tensors:
        raise contents.error('has no tensors: it is a vocabulary alone, not a model')
    architecture = ARCHITECTURES[name]
    keys = Keys(contents, name)
    config = dict(architecture.config(keys))
    config |= {field: gguf_file.whole(contents, key, 0) for field, key in IDS.items() if key in values}
    config |= keys.unread()
    return Model(contents, architecture, config)


def _as_most(contents: Contents, stored: Mapping[str, Numbers | Undone]) -> Mapping[str, Found]:
    """The tensors, of a file in float16 or bfloat16 all in that dtype whose numbers it holds exactly.

    Converters write norms and routers as float32, whatever they were, and to keep a model in float32 for these takes twice the
    memory.
    """
    count: Counter[np.dtype] = Counter()
    for one in contents.tensors.values():
        count[one.dtype] += math.prod(one.shape)
    most = count.most_common(1)[0][0]
    if most.itemsize > 2:
        return stored
    return {
        name: Narrowed(one, most) if one.dtype == np.float32 and _fits(one, most) else one
        for name, one in stored.items()
    }


def _fits(one: Numbers | Undone, dtype: np.dtype) -> bool:
    """Whether a tensor's numbers are exactly those of a narrower dtype; a block of few bits is not looked at."""
    if isinstance(one, Blocks) or any(isinstance(held, Blocks) for held in getattr(one, 'held', ())):
        return False
    step = max(2**24 // max(math.prod(one.shape[1:]), 1), 1)
    for begin in range(0, one.shape[0], step):
        numbers = one.read((slice(begin, begin + step),))
        with np.errstate(over='ignore'):
            if not np.array_equal(numbers, numbers.astype(dtype).astype(np.float32)):
                return False
    return True
