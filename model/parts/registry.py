"""Kinds of a part of a model, by name: what the field `kind` of the part's config chooses.

A kind is a frozen dataclass with a field `kind: Literal['NAME'] = 'NAME'`, and for layers the module that computes it. Another
file adds one with `MIXERS.register('NAME', Config, Module)`, before a config is read; nothing here is edited.
"""

from typing import Any

from weft.runtime.errors import UserError
from weft.runtime.registry import Registry

# The value of a field that is not given and is filled in when a `ModelConfig` is made, so that nothing that computes meets it.
UNSET: Any = None


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
MIXERS = Registry('model.attention', 'gqa')  # (model config, layer's spec); its `rules` are what a mesh must divide
FEED_FORWARDS = Registry('model.mlp', 'mlp')  # (model config), as those of the next
MIXTURES = Registry('model.moe', 'moe')
POSITIONS = Registry('model.positions', 'rotary')  # without modules
# Forms of layers' linear maps, whose configs extend `LinearForm`; other files add them all.
ADAPTERS = Registry('model.adapter', None)  # (the weight's Parameter, the config): see `linear_forms.Adapter`
WEIGHTS = Registry('model.weights', None)  # likewise: see `forms.kept.KeptWeight`
