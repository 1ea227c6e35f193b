"""Cases of the search over meshes, from 8 to 64 chips: held to brute force by tests, compiled by proof/compiled_searched.py."""

import dataclasses
from typing import NamedTuple

from weft.model.compute import ComputeConfig
from weft.model.config import AttentionConfig, EmbeddingConfig, MLPConfig, ModelConfig, MoEConfig, changed
from weft.training.config import RunConfig, TrainingConfig

SMALL = ModelConfig(
    vocabulary=32768,
    layers=16,
    model_dim=2048,
    attention=AttentionConfig(heads=16, kv_heads=4),
    mlp=MLPConfig(dim=8192),
    embedding=EmbeddingConfig(tied=False),
)
LARGE = changed(
    SMALL,
    {
        'layers': 64,
        'model_dim': 8192,
        'attention.heads': 64,
        'attention.head_dim': 128,
        'attention.kv_heads': 8,
        'mlp.dim': 28672,
    },
)
MIXTURE = dataclasses.replace(SMALL, moe=MoEConfig(experts=8, mlp_dim=4096))
WIDE = dataclasses.replace(LARGE, layers=32, moe=MoEConfig(experts=16, top_k=2, mlp_dim=8192))
DEEP = changed(SMALL, {'layers': 48, 'mlp.dim': 6144})


NARROW = ComputeConfig(dtype='bfloat16')


def run_of(model: ModelConfig, batch: int, length: int) -> RunConfig:
    """Without a mesh."""
    training = TrainingConfig(steps=1, batch=batch, sequence_length=length)
    return RunConfig(name='x', model=model, compute=NARROW, training=training)


class SearchCase(NamedTuple):
    """A model to be trained on so many chips."""

    model: ModelConfig
    chip: str
    chips: int
    batch: int  # rows
    length: int  # tokens

    @property
    def run(self) -> RunConfig:
        """Without a mesh."""
        return run_of(self.model, self.batch, self.length)


CASES = {
    'one host of GPUs': SearchCase(SMALL, 'h100', 8, 32, 4096),
    'a host of smaller ones': SearchCase(DEEP, 'a100-40gb', 8, 32, 2048),
    'a large model on two hosts': SearchCase(LARGE, 'h200', 16, 32, 2048),
    'a large model on eight hosts': SearchCase(LARGE, 'h100', 64, 64, 1024),
    'fewer rows than chips': SearchCase(SMALL, 'h100', 16, 4, 16384),
    'long rows': SearchCase(LARGE, 'b200', 32, 4, 32768),
    'a mixture on one host': SearchCase(MIXTURE, 'h100', 8, 32, 4096),
    'a large mixture': SearchCase(WIDE, 'h200', 32, 32, 2048),
    'a mixture on a torus': SearchCase(MIXTURE, 'v5e', 16, 32, 2048),
    'a small torus': SearchCase(SMALL, 'v6e', 8, 32, 4096),
    'half a cube': SearchCase(LARGE, 'v5p', 32, 32, 2048),
    'chips that are not a power of two': SearchCase(SMALL, 'h100', 24, 48, 2048),
}
