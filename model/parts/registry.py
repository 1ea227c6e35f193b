"""Kinds of a part of a model, by name: what the field `kind` of the part's config chooses.

A kind is a frozen dataclass with a field `kind: Literal['NAME'] = 'NAME'`, and for layers the module that computes it. Another
file adds one with `MIXERS.register('NAME', Config, Module)`, before a config is read; nothing here is edited.
"""

from collections.abc import Callable
from typing import Any

from weft.runtime.errors import UserError, nearest

# The value of a field that is not given and is filled in when a `ModelConfig` is made, so that nothing that computes meets it.
UNSET: Any = None


class Registry:
    """The kinds of one part.

    Args:
        part: the field of `ModelConfig`, for messages.
        default: the kind of a config that names none.
    """

    def __init__(self, part: str, default: str):
        self.part, self.default = part, default
        self.configs: dict[str, type] = {}
        self.modules: dict[str, Callable[..., Any]] = {}

    def register(self, kind: str, config: type, module: Callable[..., Any] | None = None) -> None:
        """Adds a kind; `module` may come later, by `implement`."""
        assert self.configs.get(kind, config) is config, f'two kinds of {self.part} are called {kind}'
        self.configs[kind] = config
        if module is not None:
            self.implement(kind, module)

    def implement(self, kind: str, module: Callable[..., Any]) -> None:
        """What computes a kind."""
        self.modules[kind] = module

    def config(self, kind: str | None) -> type:
        """The dataclass of a kind; None: the default one. Raises UserError naming those that exist."""
        kind = self.default if kind is None else kind
        if kind not in self.configs:
            raise UserError(f'model.{self.part}.kind is {kind!r}: no such kind{nearest(kind, self.configs)}')
        return self.configs[kind]

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

        choices = {kind: handler.generate_schema(config) for kind, config in self.configs.items()}
        return core_schema.tagged_union_schema(choices, kind_of)


def filled(field: Any, value: Any) -> Any:
    """A field's value, or what fills it where it is `UNSET`."""
    return value if field is UNSET else field


def check_at_least(section: str, config: Any, least: float, *fields: str) -> None:
    """Raises UserError for a field that is given and below `least`, or no number."""
    for field in fields:
        value = getattr(config, field)
        if value is not None and not value >= least:
            told = 'it cannot be negative; nearest: 0' if least == 0 else f'it must be at least {least}'
            raise UserError(f'{section}.{field} is {value}: {told}')


def check_above_zero(section: str, config: Any, *fields: str) -> None:
    """Raises UserError for a field that is given and not above 0."""
    for field in fields:
        value = getattr(config, field)
        if value is not None and not value > 0:
            raise UserError(f'{section}.{field} is {value}: it must be above 0')


# What a module is called with to make a layer's part: see `model.block`.
MIXERS = Registry('attention', 'gqa')  # (model config, layer's spec); its `rules` are what a mesh must divide
FEED_FORWARDS = Registry('mlp', 'mlp')  # (model config), as those of the next
MIXTURES = Registry('moe', 'moe')
POSITIONS = Registry('positions', 'rotary')  # without modules
