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
    from weft.model.config import ModelConfig
    from weft.model.decoder import Decoder
    from weft.model.forward import hidden_states, logits
    from weft.runtime.errors import MachineError, UserError
    from weft.sharding.mesh import MeshConfig, make_mesh
    from weft.training.config import RunConfig
    from weft.training.config import load as load_config
    from weft.training.loss import loss_and_gradient
    from weft.training.step import init, train_step

__all__ = [
    'Decoder',
    'MachineError',
    'MeshConfig',
    'ModelConfig',
    'RunConfig',
    'Sampling',
    'UserError',
    'generate',
    'hidden_states',
    'init',
    'load_config',
    'logits',
    'loss_and_gradient',
    'make_mesh',
    'open_run',
    'train_step',
]

_WHERE = {
    'generate': 'inference.generate',
    'open_run': 'inference.run',
    'Sampling': 'inference.sampling',
    'ModelConfig': 'model.config',
    'Decoder': 'model.decoder',
    'hidden_states': 'model.forward',
    'logits': 'model.forward',
    'MachineError': 'runtime.errors',
    'UserError': 'runtime.errors',
    'MeshConfig': 'sharding.mesh',
    'make_mesh': 'sharding.mesh',
    'RunConfig': 'training.config',
    'load_config': 'training.config',
    'loss_and_gradient': 'training.loss',
    'init': 'training.step',
    'train_step': 'training.step',
}
_OWN_NAME = {'load_config': 'load'}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    found = getattr(importlib.import_module(f'{__name__}.{_WHERE[name]}'), _OWN_NAME.get(name, name))
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
