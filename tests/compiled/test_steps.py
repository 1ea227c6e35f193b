"""A real step of training compiled for accelerators that need not be there sends what it asks for, and nothing else.

`make compiled` runs these; each compiler is asked in a process of its own.
"""

import dataclasses

import pytest

from tests.hlo import MOVED, SENT, instructions
from weft.model.compute import ComputeConfig
from weft.model.config import AttentionConfig, EmbeddingConfig, MLPConfig, ModelConfig, MoEConfig, changed
from weft.planner import communication
from weft.planner.aot import compile_step
from weft.planner.traffic.tables import difference
from weft.sharding.mesh import MeshConfig
from weft.training.config import RunConfig, TrainingConfig

# Sizes in whole tiles; enough layers for a loop; more tokens than one chunk of the loss.
RUN = RunConfig(
    name='step',
    mesh=MeshConfig(data=4, tensor=2),
    model=ModelConfig(
        vocabulary=8192,
        layers=4,
        model_dim=1024,
        attention=AttentionConfig(heads=8),
        mlp=MLPConfig(dim=4096),
        embedding=EmbeddingConfig(tied=False),
    ),
    compute=ComputeConfig(dtype='bfloat16', remat='block'),
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
    for axes, size in (
        communication.training(RUN.model, RUN.compute, RUN.mesh, t.batch, t.sequence_length).bytes_by_axes().items()
    ):
        assert found.asked.bytes_by_axes()[axes] == pytest.approx(size, rel=0.01), axes
        assert found.sent.bytes_by_axes()[axes] == pytest.approx(size, rel=0.01), f'{axes}\n{found.sent}'


ONE = dataclasses.replace(
    RUN, mesh=MeshConfig(), model=changed(RUN.model, {'layers': 2, 'mlp.dim': 2048, 'vocabulary': 8064})
)
EXPERTS = dataclasses.replace(ONE, model=dataclasses.replace(ONE.model, moe=MoEConfig(experts=8, mlp_dim=1024)))
LARGE = 2**20  # bytes: every matrix but the router has more, the cache and the activations of one row have less
# What TPUs move after all: the experts' last matrix, which their kernel wants turned.
TPU_TURNS = {('copy', (8, 1024, 1024))}


@pytest.mark.parametrize('config', [ONE, EXPERTS], ids=['dense', 'experts'])
@pytest.mark.parametrize('chip', ['h100', 'v6e'])
def test_one_device_sends_nothing_and_moves_no_parameter(chip, config, tmp_path):
    for what in ('train', 'prefill', 'decode'):
        one_row = {} if what == 'train' else {'rows': 1, 'length': 128}
        found = compile_step(config, chip, what, **one_row, hlo=tmp_path / what)
        assert found.status == 'compiled', found.message
        text = instructions((tmp_path / what).read_text())
        assert len(text) > 100
        assert not [opcode for opcode, *_ in text if opcode in SENT]
    moved = {(opcode, shape) for opcode, shape, size in text if opcode in MOVED and size >= LARGE}
    if chip == 'v6e' and config is ONE:  # a slice of a stack is read where it is used
        moved = {(opcode, shape) for opcode, shape in moved if opcode != 'dynamic-slice'}
    assert moved <= (TPU_TURNS if chip == 'v6e' and config is EXPERTS else set())
