"""Sections of a config that come in kinds: its key `kind` chooses a dataclass and, for layers, what computes it.

A kind is a frozen dataclass with a field `kind: Literal['NAME'] = 'NAME'`. Another file adds one with
`REGISTRY.register('NAME', Config, …)` before a config is read; nothing of the project is edited: docs/extending.md.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any

from weft.runtime.errors import UserError, nearest, shown

IMPORTS = 'WEFT_IMPORT'  # modules, separated by commas, that register kinds of their own


def import_extensions() -> None:
    """Imports the modules that the environment names: before a config is read, for its kinds may be theirs.

    Not a config but whoever starts a command names them: a run folder from elsewhere says nothing of what code is run. Raises
    UserError where there is no such module.
    """
    for name in filter(None, os.environ.get(IMPORTS, '').split(',')):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f'{name}.'.startswith(f'{error.name}.'):
                raise
            raise UserError(
                f'{IMPORTS}: no module {shown(name, quoted=True)} on the path of Python; PYTHONPATH may name its folder'
            ) from None


class Registry:
    """The kinds of one part.

    Args:
        section: the key of the config, such as `model.attention`, for messages.
        default: the kind of a config that names none; None: it must name one.
    """

    def __init__(self, section: str, default: str | None):
        self.section, self.default = section, default
        self.configs: dict[str, type] = {}
        self.modules: dict[str, Callable[..., Any]] = {}

    def register(self, kind: str, config: type, module: Callable[..., Any] | None = None) -> None:
        """Adds a kind; `module` may come later, by `implement`. Raises ValueError where another dataclass has that name."""
        other = self.configs.get(kind, config)
        if (other.__module__, other.__qualname__) != (config.__module__, config.__qualname__):
            raise ValueError(f'{self.section}.kind {kind!r} is {other.__module__}.{other.__qualname__} already')
        self.configs[kind] = config
        if module is not None:
            self.implement(kind, module)

    def implement(self, kind: str, module: Callable[..., Any]) -> None:
        """What computes a kind."""
        self.modules[kind] = module

    def config(self, kind: str | None) -> type:
        """The dataclass of a kind; None: the default one. Raises UserError naming those that exist."""
        kind = self.default if kind is None else kind
        if kind is None:
            raise UserError(f'{self.section}.kind is missing: it has no default{self._known("")}')
        if kind not in self.configs:
            raise UserError(f'{self.section}.kind is {shown(kind, quoted=True)}: no such kind{self._known(kind)}')
        return self.configs[kind]

    def _known(self, kind: str) -> str:
        return (
            nearest(kind, self.configs) if self.configs else f'; none is known: {IMPORTS} names modules that add kinds'
        )

    def module(self, config: Any) -> Any:
        """What computes a part that has this config."""
        return self.modules[config.kind]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """For a field annotated with a registry: the dataclass of the kind that its mapping names, of those known by then."""
        from pydantic_core import core_schema

        def kind_of(value: Any) -> Any:
            if isinstance(value, dict):
                return value.get('kind', self.default)
            return getattr(value, 'kind', self.default)

        def unknown(value: Any) -> Any:
            self.config(kind_of(value))

        if not self.configs:
            return core_schema.no_info_plain_validator_function(unknown)
        choices = {kind: handler.generate_schema(config) for kind, config in self.configs.items()}
        return core_schema.tagged_union_schema(choices, kind_of)
