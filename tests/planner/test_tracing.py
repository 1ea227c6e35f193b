"""Counts by tracing: on a mesh without devices they are those by formula, and a kind of layer that says nothing has a plan."""

import dataclasses

import pytest

from tests.extending import configs
from weft.model import cost
from weft.model.block import has_costs
from weft.model.compute import ComputeConfig
from weft.model.config import AttentionConfig, MLAConfig, MLPConfig, ModelConfig, MoEConfig
from weft.planner import chips, communication
from weft.planner.activations import ActivationCounter, kept_by
from weft.planner.bill import cache_bill
from weft.planner.flops import executed
from weft.planner.memory import serving_memory, training_memory
from weft.planner.plan import model_part
from weft.planner.plan_text import flops_line, gb
from weft.planner.roofline import decode_time, prefill_time, train_time
from weft.planner.tracing import traced_activations, traced_flops, traced_traffic
from weft.planner.traffic.tables import difference
from weft.planner.weights import inventory
from weft.sharding.mesh import BATCH, MeshConfig

ROWS, LENGTH = 64, 1024
DENSE = ModelConfig(
    vocabulary=2048, layers=12, model_dim=512, attention=AttentionConfig(heads=8, kv_heads=4), mlp=MLPConfig(dim=1536)
)
EXPERTS = dataclasses.replace(DENSE, moe=MoEConfig(experts=8, mlp_dim=256, shared_experts=1))
LATENT = MLAConfig(heads=8, q_lora_rank=96, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
MODELS = {'dense': DENSE, 'experts': EXPERTS, 'latent': dataclasses.replace(EXPERTS, attention=LATENT)}
# More chips than any machine that runs the tests has.
MESHES = MeshConfig(replica=2, data=4, context=4, tensor=4), MeshConfig(data=2, expert=8, tensor=2)
CHIP = chips.chip_named('v5e')


@pytest.mark.parametrize('mesh', MESHES, ids=str)
@pytest.mark.parametrize('name', MODELS)
def test_flops_and_bytes_sent_are_those_by_formula(name, mesh):
    c, compute = MODELS[name], ComputeConfig(remat='block', dispatch='all_gather')
    for what in 'train', 'prefill', 'decode':
        flops = sum(executed(c, compute, what, rows=ROWS, length=LENGTH, mesh=mesh).values())
        assert traced_flops(c, compute, mesh, what, ROWS, LENGTH) == flops, what
    for what, formula in ('prefill', communication.prefill), ('decode', communication.decoding):
        length = () if what == 'decode' else (LENGTH,)
        sent = traced_traffic(c, compute, mesh, what, ROWS, LENGTH)
        assert not difference(sent, formula(c, compute, mesh, ROWS, *length)), what


@pytest.mark.parametrize('remat', ['none', 'block', 'dots'])
@pytest.mark.parametrize('name', MODELS)
def test_what_layers_keep_is_near_what_the_formula_says(name, remat):
    """The formula counts what compilers leave, a trace all that JAX's rules keep: never less, and no third more."""
    c, compute, mesh = MODELS[name], ComputeConfig(dtype='bfloat16', remat=remat), MeshConfig(data=4, tensor=2)
    shallow = dataclasses.replace(c, layers=c.layers // 2)
    count = ActivationCounter(compute=compute, mesh=mesh, rows=ROWS / mesh.span(BATCH), columns=LENGTH)
    layers = sum(kept_by(group, count) for group in inventory(c).groups)
    deep, half = (traced_activations(model, compute, mesh, ROWS, LENGTH, 1, 'tpu') for model in (c, shallow))
    assert 1 <= (deep - half) / (layers / 2) <= 4 / 3


@pytest.mark.parametrize('name', configs.CHANGES)
def test_every_change_has_a_bill(name):
    c = configs.config(configs.CHANGES[name]).model
    part = model_part(c, 8)
    padding = (c.padded_vocabulary - c.vocabulary) * c.model_dim
    assert part['parameters']['total'] == sum(cost.parameters(c).values()) - padding
    assert part['traced'] == (name not in ('attention_variant', 'feed_forward'))
    assert all(row['shapes'] and not row['shapes'].startswith(' ') for row in part['parameters']['bill']['rows'])
    assert all('0.0%' not in rule['why'] for rule in part['rules_of_thumb'])
    state = 2 * 4 * 4 * 4 * 4 if name == 'recurrent_state' else 0  # layers, heads, and a head's state in float32
    assert part['cache']['state'] == state
    assert part['cache']['bytes'] == 8 * part['cache_bytes_per_token'] + state


@pytest.mark.parametrize('name', ['recurrent_state', 'router'])
def test_a_kind_that_does_not_say_what_it_costs_has_a_plan(name):
    run = configs.config(configs.CHANGES[name])
    assert not has_costs(run.model)
    sizes = run.model, run.compute
    by_token = {what: sum(cost.flops_per_token(run.model, what, 8).values()) for what in ('train', 'prefill', 'decode')}
    matrices = 2 * sum(
        w.size for group in inventory(run.model).groups for w in group.weights if len(w.declared.shape) > 1
    )
    assert by_token['decode'] >= matrices * (1 if run.model.moe is None else 0.5)
    assert by_token['train'] > 2 * by_token['prefill'] > by_token['decode']
    mesh = MeshConfig(data=2, context=2, tensor=2)
    at = dataclasses.replace(run, mesh=mesh)
    kept = [training_memory(dataclasses.replace(at, compute=ComputeConfig(remat=remat))) for remat in ('none', 'block')]
    assert kept[0].activations > kept[1].activations > 0
    assert serving_memory(*sizes, mesh, 8, 16).cache > 0
    state = f'{gb(cache_bill(run.model).state)} a row, however long it is'
    told = flops_line(model_part(run.model, 16) | {'what': 'bill'})
    assert (state in told) == (name == 'recurrent_state'), told
    for time in train_time(at, CHIP), decode_time(*sizes, mesh, CHIP, 8, 16), prefill_time(*sizes, mesh, CHIP, 8, 16):
        assert 0 < time.bound <= time.predicted
        assert min(time.compute, time.links) > 0
