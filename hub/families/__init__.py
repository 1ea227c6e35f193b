"""Published model families: each file maps a published config and its tensors' names onto the one stack.

A family is a `Family`: two functions between config.json and `ModelConfig`, and a table from its tensors' names to ours. To
add one, write such a file, list it in `FAMILIES`, and add goldens (tests/families/README.md). The table says where every
number of a published tensor goes, so that it is read in both directions and can be checked: each tensor is used once, and
each of our arrays is filled once (hub/tensor_table.py).
"""

import dataclasses
import difflib
import functools
import importlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from weft.hub.families.fields import Fields
from weft.model.config import HeadConfig, ModelConfig, RotaryConfig, changed
from weft.runtime.errors import NAMED, UserError, shown
from weft.storage.foreign import shown_value

# fmt: off
FAMILIES = (  # their files
    'llama', 'mistral', 'mixtral', 'qwen2', 'qwen3', 'qwen3_moe', 'olmoe', 'phi3', 'glm4_moe',
    'qwen2_moe', 'olmo2', 'smollm3',
    'gpt2', 'gemma2', 'gemma3', 'gpt_oss', 'deepseek_v2', 'deepseek_v3', 'grok1',
    'bert', 't5', 'marian',
)
# fmt: on
ENCODER = 'encoder.layers.'  # how a table's names of an encoder's layers begin


@dataclasses.dataclass(frozen=True)
class TensorPart:
    """Where a part of a published tensor goes."""

    leaf: str  # our array's name, such as groups.0.attention.q.w_IO
    at: tuple[int, ...] = ()  # index into its first dims: of the layer in the group, of the expert
    take: tuple[slice | int, ...] = ()  # of the published tensor, by dim; () takes all
    axes: tuple[int, ...] | None = None  # ours, by the tensor's; None: as they are

    def __call__(self, array: Any) -> Any:
        """The part of a published tensor, in our layout."""
        array = array[self.take] if self.take else array
        return array if self.axes is None else array.transpose(self.axes)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A published tensor: its name, its shape, and where its parts go, which together are all of it."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[TensorPart, ...]
    copy_of: str | None = None  # the tensor that it repeats; then its parts are those of that one


# What a table may say beside the name of one of our arrays -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Joined:
    """A tensor that holds several of our arrays one after another along a dim."""

    leaves: tuple[str, ...]
    dim: int = 0
    flip: bool = False  # see Flipped


@dataclasses.dataclass(frozen=True)
class Woven:
    """A tensor that holds several of our arrays in turns along its last dim, as gpt-oss has gate and up."""

    leaves: tuple[str, ...]
    flip: bool = False


@dataclasses.dataclass(frozen=True)
class Flipped:
    """A matrix that is transposed against torch's Linear, which has out × in (GPT-2's Conv1D has in × out)."""

    leaf: str


@dataclasses.dataclass(frozen=True)
class AsRow:
    """A tensor of one row that holds our vector."""

    leaf: str


@dataclasses.dataclass(frozen=True)
class Where:
    """A tensor that has this name where the model has another array, `beside`, or has it not."""

    leaf: str
    beside: str
    has: bool


def linear(published: str, ours: str, weight: str = 'w_IO') -> dict[str, str]:
    return {f'{published}.weight': f'{ours}.{weight}', f'{published}.bias': f'{ours}.b_O'}


def layer_norm(published: str, ours: str) -> dict[str, str]:
    return {f'{published}.weight': f'{ours}.scale_D', f'{published}.bias': f'{ours}.bias_D'}


Entry = str | Joined | Woven | Flipped | AsRow | Where


@dataclasses.dataclass(frozen=True)
class Family:
    """How a family is read and written."""

    name: str  # of its file
    # As in config.json; the first is the one that is written, unless `write` gives another.
    architectures: tuple[str, ...]
    # The model of a config.json's fields; raises UserError for what it cannot represent.
    read: Callable[[Fields], ModelConfig]
    # The fields of config.json for a model; what `read` gives of them is that model, or it is not of this family.
    write: Callable[[ModelConfig], dict[str, Any]]
    # Published tensor names to ours. {i} stands for the layer, {e} for the expert; a layer's arrays are named without their
    # group (attention.q.w_IO), those of an encoder's layers encoder.layers.attention.q.w_IO. Entries whose arrays the model
    # does not have are left out.
    names: Mapping[str, Entry]
    buffers: tuple[str, ...] = ()  # patterns of published tensors that hold no parameters
    # Tensors of the layers of `mtp` that repeat another, by name.
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prefix: str = ''  # of the published names, where a publisher's files may leave it out; part of `names`
    old_names: tuple[tuple[str, str], ...] = ()  # patterns of names in older files, and what stands for each in `names`
    # Published tables of positions, [max_positions, model_dim], that follow from the model: files need not have them, but if so
    # with these numbers.
    fixed: Mapping[str, Callable[[ModelConfig], np.ndarray]] = dataclasses.field(default_factory=dict)
    # Published names that files may hold beside those in `names`: equal copies of the tensor named.
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # What a file's having a tensor makes of the model, where config.json does not say so; by the tensor's name.
    told: Mapping[str, Callable[[ModelConfig], ModelConfig]] = dataclasses.field(default_factory=dict)
    headless: str | None = None  # the architecture without an LM head, whose files begin no name with `prefix`
    tied_unless_stored: bool = False  # a head that files do not hold is the embedding, whatever config.json says

    def model(self, fields: Fields) -> ModelConfig:
        """The model of a config.json, without an LM head where its architecture has none."""
        c = self.read(fields)
        named = fields('architectures', None)
        return without_head(c) if named and named[0] == self.headless else c

    def config(self, c: ModelConfig) -> dict[str, Any]:
        """The fields of config.json for a model, as `write` gives them, with the architecture."""
        fields = {'architectures': [self.architectures[0]]} | self.write(c)
        if c.head:
            return fields
        if self.headless is None:
            raise UserError('model.head is null: this family has an LM head')
        return fields | {'architectures': [self.headless]}

    def without(self, c: ModelConfig, part: str) -> ModelConfig:
        """The model without one of `OPTIONAL`, or as it is where it has none."""
        if part == 'mtp':
            return changed(c, {'mtp.layers': 0})
        if part == 'next_sentence':
            return changed(c, {'pooler.next_sentence': False}) if c.pooler else c
        if part == 'pooler':
            return changed(c, {'pooler': None})
        if self.tied_unless_stored:
            return changed(c, {'embedding.tied': True})
        return c if self.headless is None or c.causal else without_head(c)  # a decoder's is not left out by chance

    def known_as(self, name: str) -> str:
        """A tensor's name in a file, as `names` has it."""
        for pattern, now in self.old_names:
            name = re.sub(pattern, now, name)
        return name

    def model_of(self, c: ModelConfig, names: Iterable[str]) -> ModelConfig:
        """The model of a config.json whose files hold tensors of those names (as `known_as` gives them)."""
        there = set(names)
        for name, told in self.told.items():
            c = told(c) if name in there else c
        return c


# Parts that a model can do without, and how a user is told that the files have none of one.
OPTIONAL = {
    'mtp': 'layers that predict further ahead (num_nextn_predict_layers)',
    'next_sentence': 'head for the next sentence',
    'pooler': 'pooler',
    'head': 'LM head',
}


def without_head(c: ModelConfig) -> ModelConfig:
    """A model that ends with its last hidden states."""
    left: dict[str, Any] = {'head': None, 'mtp.layers': 0}
    return changed(c, left | ({'pooler.next_sentence': False} if c.pooler else {}))


def rotary_of(c: ModelConfig) -> RotaryConfig:
    """A model's rotary positions; where it has others the default ones, as which a family then does not read it back."""
    return c.positions if c.positions.kind == 'rotary' else RotaryConfig()


def head_of(c: ModelConfig) -> HeadConfig:
    """A model's LM head; where it has none a plain one, of which only the architecture says that it is not there."""
    return c.head or HeadConfig()


@functools.cache
def _own_families() -> tuple[Family, ...]:
    return tuple(importlib.import_module(f'{__name__}.{name}').FAMILY for name in FAMILIES)


ADDED: list[Family] = []  # by files outside of the project


def register(family: Family) -> None:
    """Adds a family of another file. Raises ValueError where another family has one of its architectures."""
    for other in families():
        taken = {*family.architectures, family.headless} & {*other.architectures, other.headless} - {None}
        if taken and other.name != family.name:
            raise ValueError(f'family {other.name!r} has the architecture {min(map(str, taken))} already')
    ADDED[:] = [other for other in ADDED if other.name != family.name] + [family]


def families() -> tuple[Family, ...]:
    """All of them: the project's, and those that `register` added."""
    return (*_own_families(), *ADDED)


def family_of(fields: Fields) -> Family:
    """The family of a config.json. Raises UserError naming those that exist."""
    known = {name: family for family in families() for name in (*family.architectures, family.headless) if name}
    names = fields('architectures', None)
    if not names:
        there = 'architectures' in fields.values
        said = shown(json.dumps(fields.values['architectures']), 60) if there else 'missing'
        raise fields.error(
            f'architectures is {said}: it must name the class of the model, such as ["LlamaForCausalLM"]'
        )
    if names[0] not in known:
        raise fields.error(f'architectures is {shown_value(names)}: not supported{near(names[0], known)}')
    return known[names[0]]


def near(name: str, known: Iterable[str]) -> str:
    """What an architecture may have been meant to be, where it is nearly that, as the tail of a message; else what there is.

    Not that of another model: of a name's letters before its task, nearly all are the same, and all digits.
    """
    name = name[:NAMED]
    stem = lambda name: re.sub(r'(For[A-Z]|LMHead|MTModel).*', '', name).lower()
    digits = lambda name: re.sub(r'\D', '', name)
    by_stem = {stem(other): other for other in known if digits(other) == digits(name)}
    close = difflib.get_close_matches(stem(name), by_stem, n=1, cutoff=0.9)
    return (
        f'; did you mean {by_stem[close[0]]!r}?'
        if close
        else f'; the families are {", ".join(one.name for one in families())}'
    )


def pattern(layers: Iterable[bool]) -> tuple[bool, ...]:
    """The shortest row of flags that, over and over, gives those of all layers."""
    flags = tuple(layers)
    return next(flags[:n] for n in range(1, len(flags) + 1) if flags[n:] == flags[: len(flags) - n])
