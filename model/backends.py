"""How attention and the experts are computed: what a config names, or the fast backend of the platform."""

from typing import TypedDict

import jax

from weft.model.config import ModelConfig
from weft.model.ops.attention import AttentionFeatures
from weft.model.ops.attention import default_backend as attention_backend
from weft.model.ops.grouped_matmul import default_backend as experts_backend
from weft.sharding.mesh import platform


def asked(c: ModelConfig) -> AttentionFeatures:
    """What the model asks of attention that not every backend has."""
    return AttentionFeatures(
        softcap=c.attention_softcap is not None,
        sinks=c.attention_sinks,
        two_ways=not c.causal or c.encoder is not None,
        relative=c.positions == 'relative',
        value_width=c.value_dim != c.query_dim,
        float64=c.dtype == 'float64',
    )


class Backends(TypedDict):
    """View's arguments: how attention and the experts compute."""

    backend: str
    experts: str


def backends(c: ModelConfig) -> Backends:
    """The backends that the config names, or the fast ones of the current mesh's platform."""
    name, context = platform(), jax.sharding.get_abstract_mesh().shape['context']
    return {
        'backend': attention_backend(name, context, asked(c)) if c.attention == 'auto' else c.attention,
        'experts': experts_backend(name, c.dtype) if c.experts == 'auto' else c.experts,
    }
