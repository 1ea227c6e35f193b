"""The counts of what is sent, on programs small enough to count by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P, lax
from jax.sharding import NamedSharding

from tests.planner.steps import mesh_shape
from weft.planner.traffic.groups import replica_groups
from weft.planner.traffic.hlo import compiled_traffic
from weft.planner.traffic.tables import Sent, Traffic, difference
from weft.planner.traffic.traced import jaxpr_traffic
from weft.sharding.mesh import MeshConfig, make_mesh

N = 1024  # numbers of float32 on one device: 4,096 bytes
S = 4 * N
MESH = MeshConfig(data=4, tensor=2)


def program(body):
    """The body on [N / 4, 4] numbers of each device, as a function and its argument's shape. Under `jax.set_mesh`."""
    spec = P('data', 'tensor')
    run = jax.shard_map(body, in_specs=spec, out_specs=P(('data', 'tensor')), check_vma=False)
    return run, jax.ShapeDtypeStruct((N, 8), jnp.float32, sharding=NamedSharding(jax.sharding.get_mesh(), spec))


def asked(body) -> Traffic:
    with jax.set_mesh(make_mesh(MESH)):
        run, x = program(body)
        return jaxpr_traffic(jax.make_jaxpr(run)(x), mesh_shape())


@pytest.mark.parametrize(
    ('body', 'key', 'sent'),
    [
        (lambda x: lax.all_gather(x, 'data', tiled=True), ('all_gather', 'data'), 3 * S),
        (lambda x: lax.all_gather(x, ('data', 'context', 'expert')), ('all_gather', 'data'), 3 * S),
        (lambda x: lax.all_gather(x, ('data', 'tensor')), ('all_gather', 'data+tensor'), 7 * S),
        (lambda x: lax.psum_scatter(x, 'data', tiled=True), ('reduce_scatter', 'data'), S * 3 / 4),
        (lambda x: lax.psum(x, 'data'), ('psum', 'data'), 2 * S * 3 / 4),
        (lambda x: lax.pmax(x, 'tensor'), ('pmax', 'tensor'), S),
        (lambda x: -lax.pmin(x, 'tensor'), ('pmin', 'tensor'), S),
        (lambda x: lax.all_to_all(x, 'data', 0, 1, tiled=True), ('all_to_all', 'data'), S * 3 / 4),
        (lambda x: lax.ppermute(x, 'data', [(i, (i + 1) % 4) for i in range(4)]), ('ppermute', 'data'), S),
        (lambda x: lax.psum(x.astype(jnp.bfloat16), 'tensor'), ('psum', 'tensor'), S / 2),
    ],
)
def test_one_collective(body, key, sent):
    found = asked(body)
    assert (found.sent, found.unknown) == ({key: Sent(1, sent)}, [])


def test_axes_of_one_device_and_a_permutation_that_keeps_all_send_nothing():
    assert not asked(lambda x: lax.psum(lax.all_gather(x, 'expert', tiled=True), ('context', 'stage'))).sent
    assert not asked(lambda x: lax.ppermute(x, 'data', [(i, i) for i in range(4)])).sent


def test_ragged_all_to_all_counts_an_even_choice():
    def body(x):
        whole_4 = jnp.full(4, x.shape[0] // 4, jnp.int32)
        return lax.ragged_all_to_all(x, x, whole_4 * 0, whole_4, whole_4 * 0, whole_4, axis_name='data')

    assert asked(body).sent == {('ragged_all_to_all', 'data'): Sent(1, S * 3 / 4)}


def loops(x):
    """5 · (1 + 3) sums over tensor forward, in loops within loops, jit and remat."""

    @jax.checkpoint
    def inner(x, _):
        return jnp.sin(lax.psum(x, 'tensor')), None

    def outer(x, _):
        x = jax.jit(lambda x: jnp.sin(lax.psum(x, 'tensor')))(x)
        return lax.scan(inner, x, length=3)[0], None

    return lax.scan(outer, x, length=5)[0]


def test_loops_are_multiplied_out():
    assert asked(loops).sent == {('psum', 'tensor'): Sent(20, 20 * S)}
    # Backward: each once more, and those that are rematerialised twice, the last sum of which nobody needs.
    found = asked(lambda x: jax.grad(lambda x: loops(x).sum())(x))
    assert found.sent == {('psum', 'tensor'): Sent(20 + 20 + 15, 55 * S)}


def test_custom_gradients_are_seen():
    @jax.custom_vjp
    def f(x):
        return lax.psum(x, 'tensor')

    f.defvjp(lambda x: (f(x), None), lambda _, g: (lax.all_gather(g, 'data', tiled=True)[: g.shape[0]],))
    assert asked(f).sent == {('psum', 'tensor'): Sent(1, S)}
    both = asked(lambda x: jax.grad(lambda x: f(x).sum())(x)).sent
    assert both == {('all_gather', 'data'): Sent(1, 3 * S), ('psum', 'tensor'): Sent(1, S)}


def test_of_branches_the_largest_counts_of_each_kind():
    def body(x):
        twice = lambda x: lax.psum(lax.psum(x, 'tensor'), 'tensor')
        other = lambda x: lax.psum(lax.ppermute(x, 'data', [(0, 1)]), 'tensor')
        return lax.cond(lax.axis_index('data') > 1, twice, other, x)

    assert asked(body).sent == {('psum', 'tensor'): Sent(2, 2 * S), ('ppermute', 'data'): Sent(1, S)}


def test_a_loop_whose_trips_nobody_knows_is_told():
    def body(x):
        return lax.while_loop(lambda x: x.sum() < 9, lambda x: lax.psum(x, 'tensor'), x)

    found = asked(body)
    assert found.sent == {('psum', 'tensor'): Sent(1, S)}
    assert found.unknown == ['trips of a while loop that holds psum over tensor']
    assert difference(found, found) == ['not counted: trips of a while loop that holds psum over tensor']
    quiet = asked(lambda x: lax.while_loop(lambda x: x.sum() < 9, lambda x: x + 1, x))
    assert not quiet.unknown, 'it sends nothing, however often'


def test_outside_of_shard_map_types_tell_what_is_sent():
    def step(x_ND, w_DF):
        y_NF = jnp.einsum('ND,DF->NF', x_ND, w_DF, out_sharding=P('data', None))  # a sum over tensor of [N / 4, 16]
        whole_NF = jax.reshard(y_NF, P(None, None))
        moved_NF = jax.reshard(y_NF, P(None, 'data'))
        return jnp.sum(x_ND), whole_NF, moved_NF, jax.reshard(whole_NF, P('tensor', None))

    with jax.set_mesh(make_mesh(MESH)):
        at = lambda *spec: NamedSharding(jax.sharding.get_mesh(), P(*spec))
        x = jax.ShapeDtypeStruct((N, 8), jnp.float32, sharding=at('data', 'tensor'))
        w = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=at('tensor', None))
        found = jaxpr_traffic(jax.make_jaxpr(jax.jit(step))(x, w), mesh_shape())
    part = N // 4 * 16 * 4  # bytes of y on one device
    assert found.sent == {
        ('reduce', 'tensor'): Sent(1, part),
        ('reduce', 'data+tensor'): Sent(1, 2 * 4 * 7 / 8),
        ('reshard', 'data'): Sent(2, part * 4 * 3 / 4 + part * 3 / 4),
    }


@pytest.mark.usefixtures('optimized')
def test_a_compiled_program_sends_what_it_was_asked():
    def body(x):
        x = lax.scan(lambda x, w: (jnp.tanh(lax.psum(x, 'tensor') * w), None), x, jnp.arange(1.0, 7.0))[0]
        x = lax.all_gather(jnp.sin(x), 'data', tiled=True)
        return lax.ppermute(lax.psum_scatter(x, ('data', 'tensor'), tiled=True), 'tensor', [(0, 1), (1, 0)])

    with jax.set_mesh(make_mesh(MESH)):
        run, x = program(body)
        want = jaxpr_traffic(jax.make_jaxpr(run)(x), mesh_shape()).lowered()
        found = compiled_traffic(jax.jit(run).lower(x).compile().as_text(), mesh_shape())
    assert found.sent == want.sent
    assert len(found.sent) == 4


# Modules as compilers for TPUs and GPUs write them --------------------------------------------------------------------

SHAPE = {'data': 4, 'tensor': 2}
TPU = """
HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (input: bf16[64,16]) -> bf16[16,16] {
  %input = bf16[64,16]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.9 = bf16[64,16]{1,0:T(8,128)(2,1)} all-reduce(%input), replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%sum
  ROOT %slice = bf16[16,16]{1,0} dynamic-slice(%all-reduce.9, %input), dynamic_slice_sizes={16,16}
}

%condition (state.1: (s32[], bf16[64,16], /*index=2*/s32[])) -> pred[] {
  %state.1 = (s32[]{:T(128)}, bf16[64,16]{1,0}, /*index=2*/s32[]{:T(128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(9)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

%body (state.2: (s32[], bf16[64,16], /*index=2*/s32[])) -> (s32[], bf16[64,16], s32[]) {
  %state.2 = (s32[]{:T(128)}, bf16[64,16]{1,0}, /*index=2*/s32[]{:T(128)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%state.2), index=0
  %x.2 = bf16[64,16]{1,0} get-tuple-element(%state.2), index=1
  %step = s32[]{:T(128)} get-tuple-element(%state.2), index=2
  %fusion.1 = bf16[16,16]{1,0} fusion(%x.2), kind=kCustom, calls=%all-reduce-scatter.1
  %gather = bf16[64,16]{1,0} all-gather(%fusion.1), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %next = s32[]{:T(128)} add(%i.2, %step)
  ROOT %tuple.2 = (s32[]{:T(128)}, bf16[64,16]{1,0}, s32[]{:T(128)}) tuple(%next, %gather, %step)
}

ENTRY %main (x: bf16[64,16]) -> bf16[64,16] {
  %x = bf16[64,16]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = s32[]{:T(128)} copy(%zero)
  %two = s32[] constant(2)
  %tuple = (s32[]{:T(128)}, bf16[64,16]{1,0}, s32[]) tuple(%start, %x, %two)
  %while = (s32[]{:T(128)}, bf16[64,16]{1,0}, s32[]) while(%tuple), condition=%condition, body=%body
  %y = bf16[64,16]{1,0} get-tuple-element(%while), index=1
  %send = (bf16[64,16]{1,0}, bf16[64,16]{1,0}) collective-permute-start(%y), source_target_pairs={{0,2},{2,4},{1,1}}
  ROOT %sent = bf16[64,16]{1,0} collective-permute-done(%send)
}
"""


def test_a_tpu_loop_has_the_trips_of_its_counter():
    """From 0 in steps of 2 below 9: 5 times. The step comes in with the loop's state; the scatter is a fusion."""
    size = 64 * 16 * 2
    found = compiled_traffic(TPU, SHAPE)
    assert not found.unknown
    assert found.sent == {
        ('reduce_scatter', 'data'): Sent(5, 5 * size * 3 / 4),
        ('all_gather', 'data'): Sent(5, 5 * size * 3 / 4),
        ('ppermute', 'data'): Sent(1, size),
    }


@pytest.mark.parametrize(
    ('old', 'new'),
    [
        ('direction=LT', 'direction=NE'),
        ('tuple(%start, %x, %two)', 'tuple(%start, %x, %n)'),
        ('%limit = s32[]{:T(128)} constant(9)', '%limit = s32[]{:T(128)} get-tuple-element(%state.1), index=0'),
    ],
)
def test_a_loop_that_cannot_be_counted_is_told_and_not_guessed(old, new):
    text = TPU.replace(old, new).replace(
        '%two = s32[] constant(2)', '%two = s32[] constant(2)\n  %n = s32[] parameter(1)'
    )
    found = compiled_traffic(text, SHAPE)
    assert found.unknown == ['trips of %while, whose condition is %condition']
    assert found.sent['all_gather', 'data'].calls == 1


def test_gpu_loops_say_their_trips_and_starts_count_once():
    text = """
%region (p: f32[256]) -> f32[256] {
  %p = f32[256]{0} parameter(0)
  %start = ((f32[256]{0}), f32[128]{0}) reduce-scatter-start(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %done = f32[128]{0} reduce-scatter-done(%start)
  %gs = (f32[128]{0}, f32[256]{0}) all-gather-start(%done), replica_groups=mesh['a'=4,'b'=2] {'b'}, dimensions={0}
  ROOT %gd = f32[256]{0} all-gather-done(%gs)
}

%never (q: f32[256]) -> pred[] {
  %q = f32[256]{0} parameter(0)
  ROOT %c = pred[] constant(true)
}

ENTRY %main (x: f32[256]) -> f32[256] {
  %x = f32[256]{0} parameter(0)
  ROOT %w = f32[256]{0} while(%x), condition=%never, body=%region, backend_config={"known_trip_count":{"n":"6"}}
}
"""
    found = compiled_traffic(text, SHAPE)
    assert found.sent == {('reduce_scatter', 'tensor'): Sent(6, 6 * 512), ('all_gather', 'tensor'): Sent(6, 6 * 512)}


def test_conditionals_count_their_largest_branch():
    text = """
%one (p.1: f32[64]) -> f32[64] {
  %p.1 = f32[64]{0} parameter(0)
  ROOT %r.1 = f32[64]{0} all-reduce(%p.1), replica_groups={}, to_apply=%add
}

%two (p.2: f32[64]) -> f32[64] {
  %p.2 = f32[64]{0} parameter(0)
  %a.2 = f32[64]{0} all-reduce(%p.2), replica_groups={}, to_apply=%add
  ROOT %r.2 = f32[64]{0} all-reduce(%a.2), replica_groups={}, to_apply=%add
}

ENTRY %main (i: s32[], x: f32[64]) -> f32[64] {
  %i = s32[] parameter(0)
  %x = f32[64]{0} parameter(1)
  %c = f32[64]{0} conditional(%i, %x, %x), branch_computations={%one, %two}
  ROOT %d = f32[64]{0} conditional(%i, %c, %c), true_computation=%one, false_computation=%one
}
"""
    assert compiled_traffic(text, SHAPE).sent == {('all_reduce', 'data+tensor'): Sent(3, 3 * 2 * 256 * 7 / 8)}


@pytest.mark.parametrize(
    ('text', 'rows', 'axes'),
    [
        ('{{0,1},{2,3},{4,5},{6,7}}', [[0, 1], [2, 3], [4, 5], [6, 7]], 'tensor'),
        ('[4,2]<=[8]', [[0, 1], [2, 3], [4, 5], [6, 7]], 'tensor'),
        ('[2,4]<=[4,2]T(1,0)', [[0, 2, 4, 6], [1, 3, 5, 7]], 'data'),
        ("mesh['data'=4,'tensor'=2] {'data'}", [[0, 2, 4, 6], [1, 3, 5, 7]], 'data'),
        ("mesh['a'=2,'b'=4], device_ids=([2,4]<=[4,2]T(1,0)) {'b'}", [[0, 2, 4, 6], [1, 3, 5, 7]], 'data'),
        ('{}', [list(range(8))], 'data+tensor'),
        ('{{0,2},{4,6},{1,3},{5,7}}', [[0, 2], [4, 6], [1, 3], [5, 7]], 'data (groups of 2)'),
    ],
)
def test_groups_of_devices(text, rows, axes):
    attributes = f', channel_id=1, replica_groups={text}, use_global_device_ids=true'
    np.testing.assert_array_equal(replica_groups(attributes, 8), rows)
    lines = ['ENTRY %main (x: u8[16]) -> u8[16] {', '  %x = u8[16]{0} parameter(0)']
    module = '\n'.join([*lines, f'  ROOT %r = u8[16]{{0}} all-reduce(%x){attributes}', '}'])
    assert list(compiled_traffic(module, SHAPE).sent) == [('all_reduce', axes)]


# Budgets --------------------------------------------------------------------------------------------------------------

BUDGET = Traffic({('all_gather', 'data+expert'): Sent(12, 1.05e6), ('psum', 'tensor'): Sent(3, 600)})


def test_a_difference_says_what_is_new_gone_or_larger():
    found = Traffic({('all_gather', 'data+expert'): Sent(14, 1.31e6), ('ppermute', 'context'): Sent(1, 8)})
    assert difference(BUDGET, found) == [
        'all_gather over data+expert: 14 calls, 1.31 MB (budget 12 calls, 1.05 MB): unplanned gather?',
        'ppermute over context: 1 call, 8 B (not in the budget)',
    ]
    assert 'psum over tensor: gone (budget 3 calls, 600 B)' in difference(BUDGET, found, exact=True)


def test_what_is_within_the_budget_is_not_told():
    differ = functools.partial(difference, BUDGET)
    more = Traffic({('all_gather', 'data+expert'): Sent(99, 1.06e6)})
    assert differ(BUDGET, exact=True) == []
    assert differ(more, slack=0.02) == differ(more, ignore=0.02) == []
    assert len(differ(more, slack=0.001)) == 1
    assert differ(Traffic({('all_gather', 'data+expert'): Sent(9, 1)})) == []
    unplanned = Traffic({('all_reduce', 'data+expert'): Sent(1, 1e4), ('all_reduce', 'data'): Sent(1, 1)})
    assert differ(unplanned, ignore=0.02) == [
        'all_reduce over data: 1 call, 1 B (not in the budget): a reduce_scatter turned into an all_reduce?'
    ], 'nothing is ignored over axes that have no budget'


def test_budgets_survive_their_file():
    assert Traffic.of_budget(BUDGET.budget()).sent == BUDGET.sent
    with pytest.raises(AssertionError, match='unknown trip counts'):
        Traffic(unknown=['trips']).budget()
