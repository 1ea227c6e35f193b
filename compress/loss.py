"""The loss of a model with some of its weights replaced, without another program: what a change of each map costs."""

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from weft.compress.weights import Arrays, places
from weft.data.packing import Samples
from weft.inference.run import TrainedRun
from weft.model.decoder import Decoder, weights_of
from weft.model.parameters import name_of
from weft.training.evaluation import evaluate


def with_weights(model: Decoder, changed: Mapping[str, np.ndarray]) -> Decoder:
    """A stacked model with other values of the weights that are named by layers' numbers, `layers.3.mlp.up.w_IO`.

    The others' arrays are shared with the model.
    """
    declared = weights_of(model.config)

    def take(path: object, w: jax.Array) -> jax.Array:
        name = name_of(path)
        mine = [(place, changed[key]) for key, place in places(name, declared[name]) if key in changed]
        if not mine:
            return w
        array = np.array(w)
        for place, new in mine:
            array[... if place is None else place] = new
        return jax.device_put(array, w.sharding)

    return jax.tree_util.tree_map_with_path(take, model)


def loss_of(run: TrainedRun, rows: Samples, numbers: Sequence[int] | np.ndarray) -> Callable[[Arrays], float]:
    """A function of changed weights that gives the nats a token on these rows."""

    def loss(changed: Arrays) -> float:
        assert run.tokenizer is not None, 'rows are its tokens'
        with jax.set_mesh(run.mesh):
            model = with_weights(run.model, changed)
            return evaluate(model, run.tokenizer, rows, numbers, run.config.training.batch).nats_per_token

    return loss
