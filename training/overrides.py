"""Dotted overrides of a config, each read as its field's type; and what a key that does not exist may have been meant to be."""

import dataclasses
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
        for depth, parent in enumerate(parents):
            kind = kind_of(root, parents[: depth + 1])
            if kind is not None and not sections_of(kind):
                raise UserError(
                    f'{shown(override)}: {shown(".".join(parents[: depth + 1]))} is a value and has no keys of its own'
                )
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        node[last] = _read(value, kind_of(root, key.split('.')), shown(override))


def _read(value: str, kind: Any, source: str) -> Any:
    """The value of an override as its field has it; None: no such field, which is told later."""
    options = get_args(kind) or (kind,)
    texts = str in options or all(_is_text(option) for option in _inner(options))
    if kind is None or (value == 'null' and type(None) in options):
        return None if kind is not None else value
    if texts:
        several = any(get_origin(option) is tuple for option in options)
        listed = several and value.startswith('[') and value.endswith(']')
        return yaml_text.read(value, source, resolve=str) if listed else value
    if sections_of(kind) or tuple in (get_origin(kind), *map(get_origin, options)):
        return yaml_text.read(value, source)
    try:
        return yaml_text.scalar(value.strip())
    except ValueError as error:
        raise UserError(f'{source}: {error}') from None


def _inner(options: Sequence[Any]) -> Iterator[Any]:
    """Of a union the kinds in it but None, with those of a Literal one by one."""
    for option in options:
        if get_origin(option) is Literal:
            yield from get_args(option)
        elif option is not type(None):
            yield option


def _is_text(option: Any) -> bool:
    return isinstance(option, str) or option is str


def options_of(kind: Any) -> Iterator[Any]:
    """The types that a field may have, those of an annotation's registry (`runtime.registry`) among them."""
    if get_origin(kind) in (Union, UnionType, Annotated):
        for option in get_args(kind):
            yield from options_of(option)
    elif isinstance(kind, Registry):
        yield from kind.configs.values()
    else:
        yield kind


def sections_of(kind: Any) -> list[Any]:
    """The dataclasses that a field that is a section may have, of several kinds; empty for a value."""
    return list(dict.fromkeys(option for option in options_of(kind) if dataclasses.is_dataclass(option)))


def kind_of(root: Any, path: Sequence[str]) -> Any:
    """The type of the field at `path`, of the first kind that has it where a section has several; None: no such field."""
    kind = root
    for name in path:
        found = [
            field.type for section in sections_of(kind) for field in dataclasses.fields(section) if field.name == name
        ]
        if not found:
            return None
        kind = found[0]
    return kind


def keys(kind: Any, prefix: str = '') -> Iterator[str]:
    """All dotted keys of a section, whatever kinds of it have them."""
    told = set[str]()
    for section in sections_of(kind):
        for field in dataclasses.fields(section):
            if field.name not in told:
                told.add(field.name)
                yield prefix + field.name
                yield from keys(field.type, f'{prefix}{field.name}.')


def without_kinds(root: Any, path: Sequence[Any]) -> tuple[Any, ...]:
    """A path into a config without the names of kinds that pydantic has after sections that may be of several."""
    return _walk(root, path)[0]


def _walk(root: Any, path: Sequence[Any]) -> tuple[tuple[Any, ...], Any]:
    """The keys of a path that may name the kinds of sections, and the type of what it leads to."""
    kind, found, left = root, list[Any](), list(path)
    while left:
        found.append(left.pop(0))
        kind = kind_of(kind, found[-1:])
        of_name = {name: config for registry in _registries(kind) for name, config in registry.configs.items()}
        if left and left[0] in of_name:
            kind = of_name[left.pop(0)]
    return tuple(found), kind


def _registries(kind: Any) -> list[Registry]:
    """Those with which a field is annotated."""
    if get_origin(kind) in (Union, UnionType, Annotated):
        return [one for option in get_args(kind) for one in _registries(option)]
    return [kind] if isinstance(kind, Registry) else []


def unknown(root: Any, path: Sequence[str]) -> str:
    """What a key may have been meant to be: one of its section that is alike, else of any; else what the section has."""
    parents, section = _walk(root, path[:-1])
    fields = dict.fromkeys(field.name for one in sections_of(section) for field in dataclasses.fields(one))
    own = ['.'.join((*parents, field)) for field in fields]
    for known in own, list(keys(root)):
        by_leaf = {one.rpartition('.')[2]: one for one in reversed(known) if one != '.'.join((*parents, path[-1]))}
        if (leaf := closest(path[-1], by_leaf)) is not None:
            return f'; did you mean {by_leaf[leaf]!r}?'
    return nearest('', own)
