"""Other projects side by side with this one, in one run: blocks of steps in turns, so that both meet the same machine."""

import contextlib
import json
import operator
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from weft.inference.generate import first_token, next_token
from weft.inference.prompts import BUCKET, Prompts
from weft.inference.run import open_run
from weft.proof.speed import Trainer, seconds_each
from weft.runtime.errors import UserError
from weft.sharding.mesh import make_mesh
from weft.training.config import RunConfig
from weft.training.exporting import export_run

NANOGPT, TRANSFORMERS = (Path(__file__).with_name(f'{name}_worker.py') for name in ('nanogpt', 'transformers'))


def recipe(config: RunConfig) -> dict[str, Any]:
    """What nanoGPT is told of a config. UserError where it has no such model: its MLP is four times as wide."""
    m, t = config.model, config.training
    fixed = {
        'mlp.dim': 4 * m.model_dim,
        'attention.kind': 'gqa',
        'attention.kv_heads': m.attention.heads,
        'mlp.activation': 'gelu',
        'norm.kind': 'layernorm',
        'moe': None,
    }
    for field, value in fixed.items():
        if (found := operator.attrgetter(field)(m)) != value:
            raise UserError(f'model.{field} is {found}: nanoGPT has {value} alone; choose another config')
    biased = ('attention.o_bias', 'attention.qkv_bias', 'mlp.bias', 'norm.bias')
    without = [field for field in biased if not operator.attrgetter(field)(m)]
    if 0 < len(without) < len(biased):
        raise UserError(
            f'model.{without[0]} is false: nanoGPT has all biases or none; set it to true, or leave out all others'
        )
    if t.accumulation > 1:
        raise UserError(f'training.accumulation is {t.accumulation}: beside nanoGPT it must be 1')
    return {
        **{field: getattr(m, field) for field in ('layers', 'model_dim', 'vocabulary')},
        'heads': m.attention.heads,
        'bias': not without,
        'dtype': config.compute.dtype,
        'sequence_length': t.sequence_length,
        'batch': t.batch,
    }


@contextlib.contextmanager
def running_peer(
    python: str, worker: Path, *arguments: str, first: str = ''
) -> Iterator[tuple[str, Callable[[str], Any]]]:
    """Another project's worker, a process that is sent `first`: what it says of itself when it is ready, and its answers.

    It answers each line with one of JSON.
    """
    # Isolated: the folder of the worker has modules by names that a peer may look for.
    command = [python, '-I', str(worker), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        told, said = process.stdin, process.stdout
        assert told is not None
        assert said is not None

        def ask(line: str) -> Any:
            told.write(f'{line}\n')
            told.flush()
            answer = said.readline()
            if not answer:
                raise UserError(f'--python {python}: {worker.stem} ended; its message stands above')
            return json.loads(answer)

        told.write(first)
        told.flush()
        about = next((line for line in said if line.startswith('ready')), '')  # it may say a few things first
        if not about:
            raise UserError(f'--python {python}: {worker.stem} did not start; its message stands above')
        yield about.removeprefix('ready').strip(), ask


def compared(ours: list[float], theirs: list[float], peer: str) -> dict[str, Any]:
    """Figures of both, a turn's median each: what one of our steps takes in terms of one of theirs."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        'step_seconds': statistics.median(ours),
        f'{peer}_step_seconds': statistics.median(theirs),
        'ratio': statistics.median(ratios),
        'ratio_range': [min(ratios), max(ratios)],
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
    config = config.with_planned_vocabulary()
    with jax.set_mesh(make_mesh(config.mesh)):
        trainer = Trainer(config)
        seconds_each(trainer.step, 3)
        arguments = (str(repository.absolute()), json.dumps(recipe(config)))
        with running_peer(python, NANOGPT, *arguments) as (about, ask):
            ours, theirs = [], []
            for _ in range(rounds):
                ours.append(statistics.median(seconds_each(trainer.step, steps, warm=1)))
                theirs.append(statistics.median(ask(str(steps))))
            return {**compared(ours, theirs, 'nanogpt'), 'mesh': str(config.mesh), 'nanogpt': about}


def beside_transformers(
    folder: str, python: str, rows: int, prompt: int, new: int, rounds: int = 7, mesh: str | None = None
) -> dict[str, Any]:
    """Our decoding of a run and transformers' `generate` of the same weights, float32 and greedy: medians of `rounds` turns.

    The run is exported for it. `same_tokens`: how many of the first row's tokens are the same before they part.

    Args:
        folder: a run.
        python: an interpreter that has torch and transformers.
        rows, prompt, new: rows of a batch, tokens of each prompt, and tokens after it, of which the first is the prompt's.
    """
    run = open_run(folder, mesh, needs_text=False)
    if run.config.compute.dtype != 'float32':
        raise UserError(f'{folder}: computes in {run.config.compute.dtype}; beside transformers it must be float32')
    ids = np.random.default_rng(0).integers(0, run.config.model.vocabulary, (rows, prompt), dtype=np.int32)
    with tempfile.TemporaryDirectory() as place, jax.set_mesh(run.mesh):
        export_run(run.folder, Path(place) / 'exported', 'float32', say=lambda line: None)
        slots = -(-(prompt + new) // BUCKET) * BUCKET
        prompts = Prompts(ids, np.full(rows, prompt, np.int32)).placed()

        def decode() -> tuple[list[float], list[int]]:
            token_B, cache, _ = first_token(run.model, slots, prompts, None)
            position_B, found, times = prompts.length_B, [np.asarray(token_B)[0]], [time.perf_counter()]
            for _ in range(new - 1):
                token_B, position_B, cache, _ = next_token(run.model, cache, token_B, position_B, None)
                found.append(np.asarray(token_B)[0])
                times.append(time.perf_counter())
            return np.diff(times).tolist(), [int(token) for token in found]

        decode()  # compiles
        sizes = map(str, (rows, prompt, new))
        first = json.dumps(ids.tolist()) + '\n'
        with running_peer(python, TRANSFORMERS, f'{place}/exported', *sizes, first=first) as (about, ask):
            ours, theirs = [], []
            for _ in range(rounds):
                seconds, tokens = decode()
                answer = ask('go')
                ours.append(statistics.median(seconds[1:]))
                theirs.append(statistics.median(answer['seconds'][1:]))
    same = next((i for i, (a, b) in enumerate(zip(tokens, answer['tokens'], strict=True)) if a != b), new)
    return {
        **compared(ours, theirs, 'transformers'),
        'tokens_per_second': rows / statistics.median(ours),
        'transformers_tokens_per_second': rows / statistics.median(theirs),
        'tokens_per_second_per_row': 1 / statistics.median(ours),
        'same_tokens': same,
        'rows': rows,
        'prompt': prompt,
        'new': new,
        'mesh': str(run.config.mesh if mesh is None else mesh),
        'transformers': about,
    }
