"""What a mixture of experts sends: the router's sums, and tokens to their experts and back in each of three ways.

The names are those of model/ops/expert_dispatch.py. The count is of even choices and of accelerators: on a CPU
`ragged` is made of all_gathers.
"""

from weft.model.ops.expert_dispatch import capacity, default_dispatch
from weft.planner.communication.view import INT32, View
from weft.sharding.mesh import SEQUENCE


def mixture(view: View, times: int, ends: int, written: int) -> None:
    """`times` layers of experts, of which `ends` end what is computed once more; `written` as in `View.unchanged`."""
    c, m = view.config, view.config.moe
    assert m is not None
    # Sums over a row's tokens: of choices, which the backward pass needs once more, of scores, and of real tokens.
    axes = SEQUENCE if view.split else ('context',)
    view.send('psum', axes, view.rows * m.experts * view.wide, times * (2 + view.again))
    view.send('psum', axes, view.rows * view.wide, view.unchanged(times, written))
    dispatch = view.compute.dispatch
    name = default_dispatch('tpu') if dispatch == 'auto' else dispatch
    WAYS[name](view, times, ends)
    if m.shared_experts:
        view.join(c.model_dim, times)
        view.sum(times, 0 if m.shared_gate else ends)  # the gate's gradient needs what it weighs


def all_gather(view: View, times: int, ends: int) -> None:
    """Every token to every device of `tensor` and `expert`; sums come back."""
    n, again = view.mesh.tensor, view.again
    tokens = view.mine
    for axis in ('tensor', 'expert') if view.split else ('expert',):
        tokens *= getattr(view.mesh, axis)
        _choices(view, axis, tokens, times)
    D = view.config.model_dim * view.number
    view.scatter(('expert',), tokens * D, times, again * (times - ends))
    if view.split:
        view.scatter(('tensor',), view.mine * n * D, times, again * (times - ends))
    else:
        view.send('psum', ('tensor',), view.mine * D, times)


def all_to_all(view: View, times: int, ends: int) -> None:
    """A buffer from each device to each expert."""
    m, n = view.config.moe, view.mesh.tensor
    assert m is not None
    N = int(view.mine)
    rows = m.experts * (capacity(N, m.top_k, m.experts, view.compute.capacity_factor) if view.split else N)
    size = rows * view.config.model_dim * view.number
    view.exchange(('expert',), size, 2 * times, view.again)
    if view.split:
        view.gather(('tensor',), n * size, times, view.again)
        view.scatter(('tensor',), n * size, times, view.again * times)
    else:
        view.send('psum', ('tensor',), N * view.config.model_dim * view.number, times)


def ragged(view: View, times: int, ends: int) -> None:
    """Each row to its expert's device alone."""
    m = view.config.moe
    assert m is not None
    tokens = view.mine
    if view.split:
        tokens *= view.mesh.tensor
        _choices(view, 'tensor', tokens, times)
    view.gather(('expert',), view.mesh.expert * m.experts * INT32, times, view.again, grad=False)
    D = view.config.model_dim * view.number
    view.exchange(('expert',), tokens * m.top_k * D, 2 * times, view.again, kind='ragged_all_to_all')
    if view.split:
        view.scatter(('tensor',), tokens * D, times, view.again * (times - ends))
    else:
        view.send('psum', ('tensor',), tokens * D, times)


def _choices(view: View, axis: str, tokens: float, times: int) -> None:
    """So many tokens, gathered over an axis with their experts and the weights of these."""
    m = view.config.moe
    assert m is not None
    view.gather((axis,), tokens * view.config.model_dim * view.number, times, view.again)
    view.gather((axis,), tokens * m.top_k * view.wide, times, view.again)
    view.gather((axis,), tokens * m.top_k * INT32, times, view.again, grad=False)


WAYS = {'all_gather': all_gather, 'all_to_all': all_to_all, 'ragged': ragged}
