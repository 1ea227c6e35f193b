"""Sections of a config that come in kinds: `kind` names one of the dataclasses that are registered for the section."""

import json
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import pydantic
from pydantic_core import core_schema

from weft.runtime.errors import UserError, nearest, shown

Config = TypeVar('Config')


class Registry(Generic[Config]):
    """The kinds of one section: frozen dataclasses, each with a field `kind` whose default is its name.

    As metadata of a field's type, `optimizer: Annotated[OptimizerConfig, OPTIMIZERS]`, it reads the section: the mapping's
    `kind` chooses the dataclass, which then checks its own fields. A file outside of the project adds a kind by
    registering one.
    """

    def __init__(self, section: str, default: str):
        self.section, self.default = section, default  # the default is the kind of a mapping that names none
        self._kinds: dict[str, type[Config]] = {}

    def register(self, config: type[Config]) -> type[Config]:
        """Adds a kind; a decorator of its dataclass. Raises ValueError where another dataclass has its name already."""
        name = config.__dataclass_fields__['kind'].default  # type: ignore[attr-defined]
        other = self._kinds.get(name, config)
        if (other.__module__, other.__qualname__) != (config.__module__, config.__qualname__):
            raise ValueError(f'{self.section}.kind {name!r} is {other.__module__}.{other.__qualname__} already')
        self._kinds[name] = config
        return config

    def __getitem__(self, name: str) -> type[Config]:
        """The dataclass of a kind. Raises UserError where there is none of the name."""
        if not isinstance(name, str) or name not in self._kinds:
            raise UserError(
                f'{self.section}.kind is {shown(name, quoted=True)}: no such kind{nearest(str(name), self._kinds)}'
            )
        return self._kinds[name]

    def names(self) -> list[str]:
        """All kinds that are registered."""
        return list(self._kinds)

    def of(self, section: Any) -> type[Config]:
        """The dataclass that a section of a config, perhaps a mistaken one, is to be read as."""
        name = section.get('kind', self.default) if isinstance(section, dict) else self.default
        return self._kinds.get(name if isinstance(name, str) else '', self._kinds[self.default])

    def read(self, section: Any) -> Config:
        """A section of a config as the dataclass of its kind. Raises UserError, or pydantic's error of the first bad field."""
        if type(section) in self._kinds.values():
            return section
        if not isinstance(section, dict):
            raise UserError(
                f'{self.section} is {shown(json.dumps(section), 60)}: it must be a mapping, such as {{kind: {self.default}}}'
            )
        kind = self[section.get('kind', self.default)]
        return pydantic.TypeAdapter(kind).validate_json(json.dumps(section), strict=True, extra='forbid')

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(self.read)
