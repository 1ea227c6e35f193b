"""What is sent before and after the layers: embedding, LM head, loss, logits; and by a pipeline between its stages."""

from weft.model.ops.cross_entropy import CHUNK
from weft.planner.communication.view import BOOL, INT32, View
from weft.planner.weights import Inventory
from weft.sharding.mesh import AXES, FSDP


def embedding(view: View, times: int = 1) -> None:
    """The tables whole over FSDP; of the tokens' vectors D goes from split to whole, T from whole to split."""
    c, n = view.config, view.mesh.tensor
    rows = [c.padded_vocabulary, *([c.embedding.token_types] if c.embedding.token_types else [])]
    rows += [c.max_positions or 0] if c.positions.kind == 'learned' else []
    for count in rows:
        view.gather(FSDP, count * c.model_dim / n * view.number, times)
    size = view.tokens * c.model_dim * view.number
    if view.split:
        view.exchange(('tensor',), size / n, times)
    else:
        view.gather(('tensor',), size, times)


def head(view: View) -> None:
    """The LM head; a tied one is gathered like the embedding and turned from D split over `tensor` to V split."""
    c = view.config
    weight = c.padded_vocabulary * c.model_dim / view.mesh.tensor * view.number
    view.gather(FSDP, weight)
    if c.embedding.tied:
        view.exchange(('tensor',), weight, 1)


def cross_entropy(view: View, times: int = 1) -> None:
    """Chunks of tokens, joined with their targets; maxima and sums over the vocabulary; their gradient at once."""
    c, n = view.config, view.mesh.tensor
    local = int(view.mine)
    chunks = -(-local * n // CHUNK)
    tokens = -(-local // chunks) * n
    chunks *= times
    x = tokens * c.model_dim * view.number
    for size in (x, tokens * INT32, tokens * BOOL):
        view.send('all_gather', ('tensor',), size, chunks)
    view.send('reduce_scatter', ('tensor',), x, chunks)
    view.send('pmax', ('tensor',), tokens * view.wide, chunks)
    # The sum and the target's logit; and a token's gradient from every device of `tensor`.
    view.send('psum', ('tensor',), tokens * view.wide, 3 * chunks)


def pipeline(view: View, ticks: int) -> None:
    """A tick moves three microbatches by one stage, and backward the gradients of three."""
    size = view.mine * view.config.model_dim * view.number
    view.send('ppermute', ('stage',), size, 3 * ticks * 2)


def copies(view: View, held: Inventory) -> None:
    """The gradients of what is in no layer, summed over the axes along which a weight is whole; the router's figures."""
    for weight in held.outside:
        axes = tuple(axis for axis in AXES if axis not in weight.split)
        view.send('psum', axes, weight.shard(view.mesh) * view.stored)
    if view.config.moe:
        layers = sum(group.layers for group in held.groups if group.experts)
        view.send('psum', AXES, layers * view.config.moe.experts * view.wide)


def logits(view: View) -> None:
    """Of each row's last token: the same on all devices of `context`, then the whole vocabulary on those of `tensor`."""
    c = view.config
    size = view.rows * c.padded_vocabulary * view.wide
    view.send('psum', ('context',), size / view.mesh.tensor)
    view.send('reshard', ('tensor',), size)
