"""What is sent before and after the layers: embedding, LM head, loss, logits; and by a pipeline between its stages."""

from weft.model.config import ModelConfig
from weft.model.costs import BOOL, INT32
from weft.model.ops.cross_entropy import CHUNK
from weft.planner.communication.counter import TrafficCounter
from weft.planner.weights import Inventory
from weft.sharding.mesh import AXES, FSDP


def embedding(c: ModelConfig, count: TrafficCounter) -> None:
    """The tables whole over FSDP; of the tokens' vectors D goes from split to whole, T from whole to split."""
    n, number = count.mesh.tensor, count.number
    rows = [c.padded_vocabulary, *([c.embedding.token_types] if c.embedding.token_types else [])]
    rows += [c.max_positions or 0] if c.positions.kind == 'learned' else []
    for vectors in rows:
        count.all_gather(FSDP, vectors * c.model_dim / n * number)
    size = count.tokens * c.model_dim * number
    if count.split:
        count.send('all_to_all', ('tensor',), size / n, 1 + count.training)
    else:
        count.all_gather(('tensor',), size)


def head(c: ModelConfig, count: TrafficCounter) -> None:
    """The LM head; a tied one is gathered like the embedding and turned from D split over `tensor` to V split."""
    weight = c.padded_vocabulary * c.model_dim / count.mesh.tensor * count.number
    count.all_gather(FSDP, weight)
    if c.embedding.tied:
        count.send('all_to_all', ('tensor',), weight, 1 + count.training)


def cross_entropy(c: ModelConfig, count: TrafficCounter) -> None:
    """Chunks of tokens, joined with their targets; maxima and sums over the vocabulary; their gradient at once."""
    n, local = count.mesh.tensor, int(count.own_tokens)
    chunks = -(-local * n // CHUNK)
    tokens = -(-local // chunks) * n
    x = tokens * c.model_dim * count.number
    for size in (x, tokens * INT32, tokens * BOOL):
        count.send('all_gather', ('tensor',), size, chunks)
    count.send('reduce_scatter', ('tensor',), x, chunks)
    count.send('pmax', ('tensor',), tokens * count.wide, chunks)
    # The sum and the target's logit; and a token's gradient from every device of `tensor`.
    count.send('psum', ('tensor',), tokens * count.wide, 3 * chunks)


def pipeline(c: ModelConfig, count: TrafficCounter, ticks: int) -> None:
    """A tick moves three microbatches by one stage, and backward the gradients of three."""
    count.send('ppermute', ('stage',), count.own_tokens * c.model_dim * count.number, 3 * ticks * 2)


def copies(c: ModelConfig, count: TrafficCounter, held: Inventory) -> None:
    """The gradients of what is in no layer, summed over the axes along which a weight is whole; the router's figures."""
    for weight in held.outside:
        axes = tuple(axis for axis in AXES if axis not in weight.split)
        count.send('psum', axes, weight.shard(count.mesh) * count.stored)
    if c.moe:
        layers = sum(group.layers for group in held.groups if group.experts)
        count.send('psum', AXES, layers * c.moe.experts * count.wide)


def logits(c: ModelConfig, count: TrafficCounter) -> None:
    """Of each row's last token: the same on all devices of `context`, then the whole vocabulary on those of `tensor`."""
    size = count.rows * c.padded_vocabulary * count.wide
    count.send('psum', ('context',), size / count.mesh.tensor)
    count.send('reshard', ('tensor',), size)
