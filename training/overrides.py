"""Dotted overrides of a config, each read as its field's type; and what a key that does not exist may have been meant to be."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

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
            if kind is not None and section_of(kind) is None:
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
    if section_of(kind) or tuple in (get_origin(kind), *map(get_origin, options)):
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


def registry_of(kind: Any) -> Registry[Any] | None:
    """The registry of a field that is a section of several kinds, or None."""
    for option in get_args(kind):
        if isinstance(option, Registry):
            return option
        if (found := registry_of(option)) is not None:
            return found
    return None


def section_of(kind: Any, node: Any = None) -> Any:
    """The dataclass of a field that is a section, or None; of several kinds that which `node`, the section, asks for."""
    if (registry := registry_of(kind)) is not None:
        return registry.of(node)
    return next((option for option in (kind, *get_args(kind)) if dataclasses.is_dataclass(option)), None)


def kind_of(root: Any, path: Sequence[str]) -> Any:
    """The type of the field at `path`, in a section of several kinds of any that has it; None if there is no such field."""
    kind = root
    for name in path:
        registry = registry_of(kind)
        sections = [section_of(kind), *(map(registry.__getitem__, registry.names()) if registry else ())]
        fields = [field for section in sections if section for field in dataclasses.fields(section)]
        kind = next((field.type for field in fields if field.name == name), None)
        if kind is None:
            return None
    return kind


def keys(kind: Any, prefix: str = '') -> Iterator[str]:
    """All dotted keys of a section, of one with several kinds those of its usual kind."""
    for field in dataclasses.fields(section_of(kind)):
        yield prefix + field.name
        if section_of(field.type):
            yield from keys(field.type, f'{prefix}{field.name}.')


def unknown(root: Any, path: Sequence[str], tree: Any = None) -> str:
    """What a key that is not in the config `tree` may have been meant to be.

    One of its section that is alike, else of any; else what the section has.
    """
    section = kind_of(root, path[:-1]) if len(path) > 1 else root
    for part in path[:-1]:
        tree = tree.get(part) if isinstance(tree, dict) else None
    parents = ''.join(f'{part}.' for part in path[:-1])
    own = [parents + field.name for field in dataclasses.fields(section_of(section, tree))]
    for known in own, list(keys(root)):
        by_leaf = {one.rpartition('.')[2]: one for one in reversed(known) if one != parents + path[-1]}
        if (leaf := closest(path[-1], by_leaf)) is not None:
            return f'; did you mean {by_leaf[leaf]!r}?'
    return nearest('', own)
