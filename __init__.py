# ruff: noqa: F401 (names for type checkers and editors)
"""Weft: sharded transformers in JAX.

What a notebook or a program of one's own begins with; each name is imported when it is first used:

    run = weft.open_run('runs/demo')
    with jax.set_mesh(run.mesh):
        (answer,) = weft.generate(run.model, run.tokenizer, ['def main('], weft.Sampling(), max_new_tokens=40, context=256)
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weft.inference.generate import generate
    from weft.inference.run import open_run
    from weft.inference.sampling import Sampling
    from weft.interpret.trace import trace
    from weft.model.config import ModelConfig
    from weft.model.decoder import Decoder
    from weft.model.forward import hidden_states, logits
    from weft.runtime.errors import MachineError, UserError
    from weft.sharding.mesh import MeshConfig, make_mesh
    from weft.training.config import RunConfig, load_config
    from weft.training.loss import loss_and_gradient
    from weft.training.step import init, train_step

_MODULES = {
    'inference.generate': ['generate'],
    'inference.run': ['open_run'],
    'inference.sampling': ['Sampling'],
    'interpret.trace': ['trace'],
    'model.config': ['ModelConfig'],
    'model.decoder': ['Decoder'],
    'model.forward': ['hidden_states', 'logits'],
    'runtime.errors': ['MachineError', 'UserError'],
    'sharding.mesh': ['MeshConfig', 'make_mesh'],
    'training.config': ['RunConfig', 'load_config'],
    'training.loss': ['loss_and_gradient'],
    'training.step': ['init', 'train_step'],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    found = getattr(importlib.import_module(f'{__name__}.{_MODULE_OF[name]}'), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
