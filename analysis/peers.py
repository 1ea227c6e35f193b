"""Other projects side by side with this one, in one run: blocks of steps in turns, so that both meet the same machine."""

import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

import jax

from analysis.measure import Trainer, measurable, seconds_each
from sharding.errors import UserError
from sharding.mesh import make_mesh
from training.config import RunConfig

WORKER = Path(__file__).with_name('nanogpt_worker.py')


def recipe(config: RunConfig) -> dict[str, Any]:
    """What nanoGPT is told of a config. UserError where it has no such model: its MLP is four times as wide."""
    m, t = config.model, config.training
    fixed = {'mlp_dim': 4 * m.model_dim, 'kv_heads': m.heads, 'activation': 'gelu', 'norm': 'layernorm', 'moe': None}
    for field, value in fixed.items():
        if getattr(m, field) != value:
            raise UserError(f'model.{field} is {getattr(m, field)}: nanoGPT has {value} alone; choose another config')
    if t.accumulation > 1:
        raise UserError(f'training.accumulation is {t.accumulation}: beside nanoGPT it must be 1')
    return {
        **{field: getattr(m, field) for field in ('layers', 'heads', 'model_dim', 'vocabulary', 'bias', 'dtype')},
        'sequence_length': t.sequence_length,
        'batch': t.batch,
    }


def beside_nanogpt(
    config: RunConfig, repository: Path, python: str, rounds: int = 20, steps: int = 10
) -> dict[str, Any]:
    """Our step and nanoGPT's on the same recipe: medians of `rounds` turns of `steps` steps each, and their ratio.

    Args:
        repository: a checkout of nanoGPT.
        python: an interpreter that has torch.
    """
    if not (repository / 'model.py').is_file():
        raise UserError(f'--repository {repository}: holds no model.py; give a checkout of nanoGPT')
    config = measurable(config)
    command = [python, str(WORKER), str(repository), json.dumps(recipe(config))]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer,
        jax.set_mesh(make_mesh(config.mesh)),
    ):
        assert peer.stdin
        assert peer.stdout
        trainer = Trainer(config)
        seconds_each(trainer.step, 3)
        ready = next((line for line in peer.stdout if line.startswith('ready')), '')  # nanoGPT says a few things first
        if not ready:
            raise UserError(f'--python {python}: nanoGPT did not start; its message stands above')
        ours, theirs, ratios = [], [], []
        for _ in range(rounds):
            ours.append(statistics.median(seconds_each(trainer.step, steps, warm=1)))
            peer.stdin.write(f'{steps}\n')
            peer.stdin.flush()
            theirs.append(statistics.median(json.loads(peer.stdout.readline())))
            ratios.append(ours[-1] / theirs[-1])
        peer.stdin.close()
    return {
        'step_seconds': statistics.median(ours),
        'nanogpt_step_seconds': statistics.median(theirs),
        'ratio': statistics.median(ratios),
        'ratio_range': [min(ratios), max(ratios)],
        'mesh': str(config.mesh),
        'nanogpt': ready.removeprefix('ready').strip(),
    }
