"""Dotted overrides of a config, each read as its field's type; and what a key that does not exist may have been meant to be."""

import dataclasses
import itertools
import re
from collections.abc import Iterator, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from weft.runtime.errors import UserError, closest, nearest, shown
from weft.runtime.registry import Registry
from weft.training import yaml_text

KEY = re.compile(r'[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*')


def apply(tree: dict[str, Any], overrides: Sequence[str], root: type) -> None:
    """Sets the keys of `tree`, a config of the dataclass `root`; of two overrides of one key the later one counts.

    Text stays as it stands where a field holds text: `name=010`, `data.source=*.txt`, `data.source=a #b`; `[a, b]` is a list of
    texts where there may be several, and `null` is none where there may be none. Raises UserError for what is no override.
    """
    for override in overrides:
        key, equals, value = override.partition('=')
        if not equals or not KEY.fullmatch(key):
            raise UserError(
                f'{shown(override, quoted=True)}: an override is dotted.key=value, as in training.steps=100'
            )
        if not value:
            raise UserError(f'{shown(override)}: has no value; null is for none')
        node = tree
        *parents, last = key.split('.')
        for depth, parent in enumerate(parents, 1):
            kind = kind_of(root, parents[:depth])
            if kind is not None and not sections_of(kind):
                section = shown('.'.join(parents[:depth]))
                raise UserError(f'{shown(override)}: {section} is a value and has no keys of its own')
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        node[last] = _read(value, kind_of(root, key.split('.')), shown(override))


def _read(value: str, kind: Any, source: str) -> Any:
    """The value of an override as its field has it; None: no such field, which is told later."""
    if kind is None:
        return value
    options = (kind,) if get_origin(kind) is tuple else get_args(kind) or (kind,)
    if value == 'null' and type(None) in options:
        return None
    inner = [one for option in options for one in (get_args(option) if get_origin(option) is Literal else [option])]
    if str in options or all(isinstance(one, str) for one in inner if one is not type(None)):
        several = any(get_origin(option) is tuple for option in options)
        listed = several and value.startswith('[') and value.endswith(']')
        return yaml_text.read(value, source, resolve=str) if listed else value
    if sections_of(kind) or tuple in (get_origin(kind), *map(get_origin, options)):
        return yaml_text.read(value, source)
    try:
        return yaml_text.scalar(value.strip())
    except ValueError as error:
        raise UserError(f'{source}: {error}') from None


def options_of(kind: Any) -> Iterator[Any]:
    """The types that a field may have, and the registries (`runtime.registry`) of kinds of sections that it may be."""
    if get_origin(kind) in (Union, UnionType, Annotated):
        for option in get_args(kind):
            yield from options_of(option)
    else:
        yield kind


def sections_of(kind: Any) -> list[Any]:
    """The dataclasses that a field that is a section may have, of several kinds; empty for a value."""
    kinds = [option.configs.values() if isinstance(option, Registry) else [option] for option in options_of(kind)]
    return list(dict.fromkeys(filter(dataclasses.is_dataclass, itertools.chain(*kinds))))


def fields_of(kind: Any) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a section by name; of several kinds that have one, the first kind's."""
    found: dict[str, dataclasses.Field[Any]] = {}
    for section in sections_of(kind):
        for field in dataclasses.fields(section):
            found.setdefault(field.name, field)
    return found


def kind_of(root: Any, path: Sequence[str]) -> Any:
    """The type of the field at `path`, of the first kind that has it where a section has several; None: no such field."""
    kind = root
    for name in path:
        field = fields_of(kind).get(name)
        kind = field and field.type
    return kind


def keys(kind: Any, prefix: str = '') -> Iterator[str]:
    """All dotted keys of a section, whatever kinds of it have them."""
    for name, field in fields_of(kind).items():
        yield prefix + name
        yield from keys(field.type, f'{prefix}{name}.')


def resolve(root: Any, path: Sequence[Any]) -> tuple[tuple[Any, ...], Any]:
    """The keys of a pydantic path, which names the kind after a section that may be of several, and the type it leads to."""
    kind, found, left = root, list[Any](), list(path)
    while left:
        found.append(left.pop(0))
        kind = kind_of(kind, found[-1:])
        registries = [option for option in options_of(kind) if isinstance(option, Registry)]
        of_name = {name: config for registry in registries for name, config in registry.configs.items()}
        if left and left[0] in of_name:
            kind = of_name[left.pop(0)]
    return tuple(found), kind


def unknown(root: Any, path: Sequence[str]) -> str:
    """What a key may have been meant to be: one of its section that is alike, else of any; else what the section has."""
    parents, section = resolve(root, path[:-1])
    own = ['.'.join((*parents, name)) for name in fields_of(section)]
    for known in own, list(keys(root)):
        by_leaf = {one.rpartition('.')[2]: one for one in reversed(known) if one != '.'.join((*parents, path[-1]))}
        if (leaf := closest(path[-1], by_leaf)) is not None:
            return f'; did you mean {by_leaf[leaf]!r}?'
    return nearest('', own)
