"""The rooms of the project: its top-level packages, the highest first, as imports may go down them."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
# A module may import those of its own room and of the rooms after it: docs/architecture.md says why.
ROOMS = (
    'scripts',
    'compress',
    'interpret',
    'proof',
    'planner',
    'inference',
    'training',
    'hub',
    'data',
    'model',
    'storage',
    'sharding',
    'runtime',
)
