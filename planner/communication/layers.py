"""What layers send: the weights that are gathered, activations around attention and MLP, the ring of keys and values."""

from weft.planner.communication.experts import mixture
from weft.planner.communication.view import INT32, View
from weft.planner.weights import Group
from weft.sharding.mesh import AXES


def layers(view: View, group: Group, ticks: int = 1) -> None:
    """All layers of a group that this device holds, each on `ticks` passes of the view's rows."""
    c, times = group.config, group.held(view.mesh) * ticks
    # Where a norm follows a part's sum the sum is needed once more, also the last one.
    ends = group.ends // group.stages(view.mesh) * ticks if c.norm.order == 'pre' else 0
    weights(view, group, ticks)
    attention(view, times, group.written * ticks)
    if c.encoder:  # attention to its output
        view.join(c.model_dim, times)
        view.sum(times)
    if group.experts:
        mixture(view, times, ends, group.written * ticks)
    else:
        view.join(c.model_dim, times)
        view.sum(times, ends)


def weights(view: View, group: Group, ticks: int) -> None:
    """Each matrix is gathered in each forward pass of its layer; its gradient is scattered back in each backward pass.

    What a pipeline's backward pass needs of them is the same on every tick: JAX computes it once, before the ticks.
    """
    n, held = view.mesh.tensor, group.held(view.mesh)
    gathers = held * (ticks + 1 if view.again else 1)

    def gather(axes: tuple[str, ...], size: float, arrays: int = 1) -> None:
        view.send('all_gather', axes, size, gathers, arrays)
        view.send('reduce_scatter', axes, size, held * ticks * view.training, arrays)

    kept = lambda weight: not view.training and weight.declared.of_source  # not the weight, but what it makes
    for weight, arrays in group.gathered_alike:
        if not kept(weight):
            number = view.number if weight.narrow_in_use else view.stored
            gather(weight.gathered, weight.used(view.mesh) * number, arrays)
    # More devices than heads: each uses one head of keys and one of values, which it takes from all of them.
    for weight in group.weights:
        if weight.declared.repeats and n > weight.declared.repeats and not kept(weight):
            gather(('tensor',), weight.size * (view.number if weight.narrow_in_use else view.stored))


def attention(view: View, times: int, written: int) -> None:
    """Activations joined before and summed after; what stands between devices of `context`: see `ring`."""
    c, a = view.config, view.config.attention
    if a.kind == 'mla':
        view.join(a.kv_lora_rank + a.qk_rope_head_dim, times)
        view.join(a.q_lora_rank or c.model_dim, times)
    else:
        view.join(c.model_dim, times)
    view.sum(times)
    if c.attention.qk_norm == 'full':  # of queries and of keys, and of the gradients of both
        view.send('psum', ('tensor',), view.tokens * view.wide, times * 2 * (1 + view.again + view.training))
    if view.decoding:
        heads = c.attention.heads / view.mesh.tensor
        width = a.kv_lora_rank if a.kind == 'mla' else a.head_dim
        view.send('pmax', ('context',), view.rows * heads * view.wide, times)
        view.send('psum', ('context',), view.rows * heads * width * view.wide, times)
        view.send('psum', ('context',), view.rows * heads * view.wide, times)
    else:
        ring(view, times, written)


def ring(view: View, times: int, written: int) -> None:
    """Keys, values and their places go round n devices of `context`: in n − 1 sends a pass, and n − 1 backward.

    Backward their gradients go along, in at least float32, and one send further: home. The attention backend `reference`
    gathers them instead. Places are the same for all layers: see `View.unchanged`.
    """
    c, n = view.config, view.mesh.context
    heads = max(c.attention.kv_heads, view.mesh.tensor) / view.mesh.tensor
    for width in (c.attention.query_dim, c.attention.value_dim):
        numbers = view.tokens * heads * width
        if view.compute.attention == 'reference':
            view.gather(('context',), n * numbers * view.number, times, view.again)
        elif n > 1:
            sends = times * (1 + view.again + view.training) * (n - 1)
            view.send('ppermute', ('context',), numbers * view.number, sends)
            if view.training:
                view.send('ppermute', ('context',), numbers * view.wide, times * n)
    places = 2 * view.unchanged(times, written)
    if view.compute.attention == 'reference':
        view.send('all_gather', ('context',), n * view.tokens * INT32, places)
    elif n > 1:
        view.send('ppermute', ('context',), view.tokens * INT32, (places + 2 * times * view.training) * (n - 1))


def copies(view: View, group: Group) -> None:
    """A step sums the gradients of weights over the axes along which they are copies."""
    for weight, arrays in group.kept_alike:
        split = {*weight.split, *(['stage'] if group.where == 'pipeline' else [])}
        number = max(view.stored, 4) if weight.wide else view.stored
        axes = tuple(axis for axis in AXES if axis not in split)
        view.send('psum', axes, group.held(view.mesh) * weight.shard(view.mesh) * number, arrays=arrays)
