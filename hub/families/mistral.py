"""Mistral (Jiang et al. 2023, arXiv:2310.06825): Llama with a sliding window in every layer."""

from typing import Any

from weft.hub.families import Fields
from weft.hub.families.llama import ATTENTION, MLP, NORMS, OUTER, causal_family, common, write_common
from weft.model.config import ModelConfig, model_of


def read(f: Fields) -> ModelConfig:
    return model_of(common(f, kv_heads=8) | {'attention.window': f.given('sliding_window', 4096)})


def write(c: ModelConfig) -> dict[str, Any]:
    return write_common(c) | {'model_type': 'mistral', 'sliding_window': c.attention.window}


FAMILY = causal_family('mistral', 'Mistral', read, write, OUTER | NORMS | ATTENTION | MLP)
