"""What each step sends, exactly: a gather that nobody planned, or a sum in place of a scatter, is named here.

A change that is meant to send something else renews the budgets, which are files beside this one:
REGOLD=1 pytest tests/planner/test_budgets.py
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import pytest
from jax import lax

from tests.planner.steps import decode_step, mesh_shape, run_config, training_step
from weft.model import context, linear
from weft.model.compute import DEFAULT, ComputeConfig
from weft.model.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig, changed
from weft.planner.traffic.hlo import compiled_traffic
from weft.planner.traffic.tables import Traffic, difference
from weft.planner.traffic.traced import jaxpr_traffic
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.training.config import RunConfig

BUDGETS = Path(__file__).with_name('budgets')
DENSE = ModelConfig(
    vocabulary=300,
    layers=2,
    model_dim=32,
    attention=AttentionConfig(heads=8, kv_heads=4),
    mlp=MLPConfig(dim=48),
)
EXPERTS = dataclasses.replace(
    DENSE, layers=2, moe=MoEConfig(experts=8, mlp_dim=16, shared_experts=1, first_dense_layers=1)
)


def dumps(budgets: Mapping[str, Mapping[str, list[float]]]) -> str:
    """JSON with one row a line, so that a change of a budget is a readable diff."""
    parts = []
    for part, rows in budgets.items():
        lines = ',\n'.join(f'  {json.dumps(text)}: {json.dumps(amounts)}' for text, amounts in rows.items())
        parts.append(f' {json.dumps(part)}: {{\n{lines}\n }}' if lines else f' {json.dumps(part)}: {{}}')
    return '{\n' + ',\n'.join(parts) + '\n}\n'


class Case(NamedTuple):
    """A model on a mesh; its step of training is traced, and a step of decoding where the mesh has no pipeline."""

    model: ModelConfig
    mesh: MeshConfig
    training: dict = {}  # noqa: RUF012  # fields of TrainingConfig
    compiled: bool = False  # for CPUs too, which takes seconds
    compute: ComputeConfig = DEFAULT

    def config(self) -> RunConfig:
        return run_config(self.model, self.mesh, 8, 32, self.compute, **self.training)


# One line for each kind of model and mesh whose traffic is to stay what it is.
CASES = {
    'dense_data2_tensor4': Case(DENSE, MeshConfig(data=2, tensor=4), compiled=True),
    'dense_remat_data4_tensor2': Case(
        changed(DENSE, {'attention.qk_norm': True}), MeshConfig(data=4, tensor=2), compute=ComputeConfig(remat='block')
    ),
    'dense_untied_data8': Case(
        changed(
            DENSE,
            {
                'embedding.tied': False,
                'norm.kind': 'layernorm',
                'attention.o_bias': True,
                'mlp.bias': True,
                'norm.bias': True,
                'attention.qkv_bias': True,
                'mlp.activation': 'gelu',
            },
        ),
        MeshConfig(data=8),
    ),
    'dense_repeated_heads_tensor8': Case(DENSE, MeshConfig(tensor=8)),
    'dense_replica2_data2_tensor2': Case(DENSE, MeshConfig(replica=2, data=2, tensor=2)),
    'dense_accumulation_data2_tensor2': Case(DENSE, MeshConfig(data=2, tensor=2), {'accumulation': 2}),
    'dense_stage2_data2_tensor2': Case(DENSE, MeshConfig(stage=2, data=2, tensor=2), compiled=True),
    'dense_context4_tensor2': Case(DENSE, MeshConfig(context=4, tensor=2)),
    'dense_stage2_context2_tensor2': Case(DENSE, MeshConfig(stage=2, context=2, tensor=2)),
    'experts_data2_expert2_tensor2': Case(EXPERTS, MeshConfig(data=2, expert=2, tensor=2), compiled=True),
    'experts_all_to_all_expert4_tensor2': Case(
        EXPERTS, MeshConfig(expert=4, tensor=2), compute=ComputeConfig(dispatch='all_to_all')
    ),
    'experts_ragged_expert4_tensor2': Case(
        EXPERTS, MeshConfig(expert=4, tensor=2), compute=ComputeConfig(dispatch='ragged')
    ),
    'experts_remat_expert8': Case(EXPERTS, MeshConfig(expert=8), compute=ComputeConfig(remat='block')),
}
# Of a compiled program only the bytes are held to the budget, with this slack for another version of the compiler.
SLACK = 0.02


def asked(name: str) -> dict[str, Traffic]:
    """What the steps of a case ask for."""
    config = CASES[name].config()
    with jax.set_mesh(make_mesh(config.mesh)):
        steps = {'training': training_step(config)}
        if config.mesh.stage == 1:
            steps['decoding'] = decode_step(config)
        return {part: jaxpr_traffic(jax.make_jaxpr(step)(*args), mesh_shape()) for part, (step, args) in steps.items()}


def compiled(name: str) -> Traffic:
    """What a case's step of training sends as it was compiled for CPUs."""
    config = CASES[name].config()
    with jax.set_mesh(make_mesh(config.mesh)):
        step, args = training_step(config)
        return compiled_traffic(jax.jit(step, donate_argnums=0).lower(*args).compile().as_text(), mesh_shape())


def budget(name: str, found: dict[str, Traffic]) -> dict[str, Traffic]:
    """The case's budgets; with REGOLD what was found becomes them."""
    file = BUDGETS / f'{name}.json'
    saved = json.loads(file.read_text()) if file.exists() else {}
    if os.environ.get('REGOLD'):
        saved |= {part: table.budget() for part, table in found.items()}
        file.parent.mkdir(exist_ok=True)
        file.write_text(dumps(dict(sorted(saved.items()))))
    return {part: Traffic.of_budget(saved.get(part, {})) for part in found}


@pytest.mark.parametrize('name', CASES)
def test_steps_ask_for_what_is_budgeted(name):
    found = asked(name)
    for part, golden in budget(name, found).items():
        assert not (lines := difference(golden, found[part], exact=True)), '\n'.join([part, *lines])


@pytest.mark.usefixtures('optimized')
@pytest.mark.parametrize('name', [name for name, case in CASES.items() if case.compiled])
def test_compiled_training_stays_within_its_budget(name):
    found = {'compiled for CPUs': compiled(name)}
    for part, golden in budget(name, found).items():
        assert not (lines := difference(golden, found[part], slack=SLACK)), '\n'.join([part, *lines])


def test_every_budget_has_a_case():
    assert {file.stem for file in BUDGETS.glob('*.json')} == CASES.keys()


# Mistakes that change no loss, only what is sent: each is told by kind and axes.


def test_an_activation_gathered_once_more_is_told(monkeypatch):
    def wasteful(x_BTD):
        whole_BTD = lax.all_gather(x_BTD, 'data', tiled=True)
        return gather_sequence(
            lax.dynamic_slice_in_dim(whole_BTD, lax.axis_index('data') * x_BTD.shape[0], x_BTD.shape[0])
        )

    gather_sequence = context.gather_sequence
    monkeypatch.setattr(context, 'gather_sequence', wasteful)
    lines = told('dense_data2_tensor4')
    assert any(line.startswith('all_gather over data: ') and line.endswith('unplanned gather?') for line in lines), (
        lines
    )


def test_a_weight_gathered_over_too_many_axes_is_told(monkeypatch):
    def wasteful(w, dtype, axes, dim=0):
        if dim or w.ndim > 2:
            return unshard(w, dtype, axes, dim)
        columns = w.shape[1]
        w = unshard(lax.all_gather(w, 'tensor', axis=1, tiled=True), dtype, axes)
        return lax.dynamic_slice_in_dim(w, lax.axis_index('tensor') * columns, columns, axis=1)

    unshard = linear.unshard
    monkeypatch.setattr(linear, 'unshard', wasteful)
    lines = told('experts_data2_expert2_tensor2')
    for kind in (f'{kind} over {axis}' for kind in ('all_gather', 'reduce_scatter') for axis in ('data', 'expert')):
        assert any(line.startswith(f'{kind}: ') and '(budget ' in line for line in lines), lines


def test_a_sum_in_place_of_a_scatter_is_told(monkeypatch):
    def wasteful(x_BTD):
        return context.tensor_slice(lax.psum(x_BTD, 'tensor'))

    monkeypatch.setattr(context, 'reduce_scatter_sequence', wasteful)
    lines = told('dense_data2_tensor4')
    assert any(line.startswith('psum over tensor: ') and 'reduce_scatter would do' in line for line in lines), lines
    assert any(line.startswith('reduce_scatter over tensor: ') and 'less than the budget' in line for line in lines), (
        lines
    )


def told(name: str) -> list[str]:
    found = asked(name)['training']
    golden = json.loads((BUDGETS / f'{name}.json').read_text())['training']
    return difference(Traffic.of_budget(golden), found, exact=True)
