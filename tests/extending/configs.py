"""What a user writes in a config to have each of the changes that are files of this folder."""

import json
from typing import Any

import tests.extending.attention_variant
import tests.extending.captured_activation
import tests.extending.feed_forward
import tests.extending.lora
import tests.extending.optimizer
import tests.extending.quantized_weight
import tests.extending.recurrent_state
import tests.extending.router  # noqa: F401
from tests.extending import harness
from weft.training.config import RunConfig, parse

BASE: dict[str, Any] = {
    'name': 'x',
    'model': {
        'vocabulary': harness.VOCABULARY,
        'layers': 2,
        'model_dim': 16,
        'attention': {'heads': 4, 'kv_heads': 2},
        'mlp': {'dim': 32},
    },
    'training': {'steps': 4, 'batch': harness.ROWS, 'sequence_length': harness.COLUMNS},
}
MOE = {'experts': 4, 'mlp_dim': 8}
# What a user writes to have a change.
CHANGES: dict[str, dict[str, Any]] = {
    'attention_variant': {'model': {'attention': {'kind': 'gated', 'heads': 4, 'kv_heads': 2}}},
    'router': {'model': {'moe': {'kind': 'cosine', **MOE}}},
    'feed_forward': {'model': {'mlp': {'kind': 'squared_relu', 'dim': 32}}},
    'recurrent_state': {
        'model': {'attention': {'kind': 'linear', 'heads': 4, 'head_dim': 4}, 'positions': {'kind': 'none'}}
    },
    'captured_activation': {'model': {'mlp': {'kind': 'watched', 'dim': 32, 'activation': 'relu'}}},
    'lora': {'model': {'adapter': {'kind': 'lora', 'rank': 2, 'targets': ['attention.q', 'attention.v', 'mlp.*']}}},
    'quantized_weight': {'model': {'weights': [{'kind': 'int8_aware', 'targets': ['mlp.*']}]}},
}


def config(change: dict[str, Any], *overrides: str) -> RunConfig:
    """The run of a config that has the change."""
    tree = {**BASE, **change, 'model': {**BASE['model'], **change.get('model', {})}}
    return parse(json.dumps(tree), 'change.yaml', overrides)
