"""A real step of training compiled for accelerators that need not be there sends what it asks for, and nothing else.

`make compiled` runs these; each compiler is asked in a process of its own.
"""

import pytest

from analysis import communication
from analysis.aot import compile_step
from analysis.traffic import difference
from model.config import ModelConfig
from sharding.mesh import MeshConfig
from training.config import RunConfig, TrainingConfig

# Sizes in whole tiles; enough layers for a loop; more tokens than one chunk of the loss.
RUN = RunConfig(
    name='step',
    mesh=MeshConfig(data=4, tensor=2),
    model=ModelConfig(
        vocabulary=8192,
        layers=4,
        model_dim=1024,
        heads=8,
        mlp_dim=4096,
        tied_embedding=False,  # a compiler gathers a tied one once for both its uses, where the code asks twice
        dtype='bfloat16',
        remat='block',
    ),
    training=TrainingConfig(steps=1, batch=8, sequence_length=2048),
)


@pytest.mark.parametrize('chip', ['h100', 'v5p'])
def test_a_step_for_eight_devices_sends_what_it_asks_for(chip):
    """Axis by axis the bytes of the request and of the count by hand; no kind in place of another."""
    found = compile_step(RUN, chip)
    assert found.status == 'compiled', found.message
    lines = difference(found.asked, found.sent, ignore=0.01)
    assert not lines, '\n'.join([*lines, 'asked:', str(found.asked), 'sent:', str(found.sent)])
    t = RUN.training
    for axes, size in communication.training(RUN.model, RUN.mesh, t.batch, t.sequence_length).bytes_by_axes().items():
        assert found.asked.bytes_by_axes()[axes] == pytest.approx(size, rel=0.01), axes
        assert found.sent.bytes_by_axes()[axes] == pytest.approx(size, rel=0.01), f'{axes}\n{found.sent}'
