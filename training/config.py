"""A run's whole configuration: read from YAML and dotted overrides, checked before anything is touched."""

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pydantic

from weft.data.config import DataConfig
from weft.data.reading import decoded, opened
from weft.model.compute import ComputeConfig
from weft.model.config import OF_TRAINING, ModelConfig, needs_head
from weft.model.parts.numbers import nearest_divisor
from weft.model.parts.registry import check_at_least
from weft.model.sizes import batch_sizes, sizes
from weft.runtime.errors import UserError, nearest, nearest_path, shown
from weft.runtime.registry import import_extensions
from weft.sharding.mesh import BATCH, Divides, MeshConfig, check_divides
from weft.storage.foreign import lone_surrogate
from weft.training import yaml_text
from weft.training.optimizers import OPTIMIZERS, AdamW, OptimizerConfig
from weft.training.overrides import apply, resolve, unknown
from weft.training.renamed import renamed

LARGEST_NUMBER = 1 << 48  # no size is larger, and all arithmetic with one stays exact
FLOAT32 = float(np.finfo(np.float32).max)
LONGEST_NAME = 100  # characters of a run's name: the names of its files are longer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How much is learnt from at a time, and for how long."""

    steps: int
    batch: int  # sequences a step, all devices together
    sequence_length: int  # tokens
    accumulation: int = 1  # parts of a batch worked on one after another; the result is that of the whole batch
    microbatches: int | None = None  # parts that go through a pipeline (mesh.stage) in turn; None: 4 a stage, or fewer

    def __post_init__(self) -> None:
        check_at_least('training', self, 1, *vars(self))
        if self.batch % self.accumulation:
            works = nearest_divisor(self.batch, self.accumulation)
            raise UserError(
                f'training.accumulation is {self.accumulation} and training.batch {self.batch}: the first must divide the '
                f'second; nearest that works: {works}'
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run is saved, beside at its end and when it is interrupted."""

    every: int = 1000  # steps
    keep: int = 2  # the newest ones

    def __post_init__(self) -> None:
        check_at_least('checkpoint', self, 1, *vars(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """When a run says how it does."""

    every: int = 10  # steps between rows of metrics.jsonl
    validate_every: int = 500  # steps between validations, beside the one at the end
    validation_rows: int = 256  # of the validation split each time, rounded up to whole batches; the end reads all

    def __post_init__(self) -> None:
        check_at_least('metrics', self, 1, *vars(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: configs/*.yaml with overrides; `runs/NAME/config.yaml` holds all of it."""

    name: str
    seed: int = 0
    mesh: MeshConfig = MeshConfig()
    model: ModelConfig
    compute: ComputeConfig = ComputeConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig
    optimizer: Annotated[OptimizerConfig, OPTIMIZERS] = AdamW()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()

    def __post_init__(self) -> None:
        if not re.fullmatch(r'[A-Za-z0-9][A-Za-z0-9._-]*', self.name) or len(self.name) > LONGEST_NAME:
            clean = re.sub(r'[^A-Za-z0-9._-]+', '-', self.name).strip('.-')[:LONGEST_NAME] or 'run'
            raise UserError(
                f'name is {shown(self.name, quoted=True)}: a run is a folder directly in runs/, so letters, digits, dots, '
                f'dashes and underscores, a letter or digit first, {LONGEST_NAME} of them at most; for example {clean!r}'
            )
        if not 0 <= self.seed < 2**32:
            raise UserError(f'seed is {self.seed}: it must be at least 0 and less than 2^32')

    def check_sizes(self) -> None:
        """Raises UserError where the mesh cannot hold the model or the batch."""
        t, c = self.training, self.model
        needs_head(c, 'training')
        if not c.causal:
            raise UserError(
                'model.causal is false: training learns to predict the next token, which such a model would see; train with '
                'model.causal=true, and give what is to be read both ways to model.encoder'
            )
        if c.max_positions is not None and c.max_positions < t.sequence_length:
            raise UserError(
                f'model.positions.max is {c.max_positions} and training.sequence_length {t.sequence_length}: each token needs '
                f'a row of the table of positions; nearest that works: model.positions.max={t.sequence_length}'
            )
        check_divides(self.mesh, self.rules())

    def rules(self) -> list[Divides]:
        """What the mesh must divide."""
        t = self.training
        microbatches = t.microbatches if self.mesh.stage > 1 else None
        return [*sizes(self.model), *batch_sizes(t.batch, t.sequence_length, t.accumulation, microbatches)]

    @property
    def microbatches(self) -> int:
        """Into how many parts the pipeline cuts the rows of a device; 1 without one."""
        t, stages = self.training, self.mesh.stage
        if stages == 1:
            return 1
        rows = t.batch // (t.accumulation * self.mesh.span(BATCH))
        return t.microbatches or max(n for n in range(stages, 4 * stages + 1, stages) if rows % n == 0)

    def with_vocabulary(self, tokens: int) -> 'RunConfig':
        """This config with the tokenizer's vocabulary, where the config leaves it open."""
        have = self.model.vocabulary or tokens
        if have < tokens:
            raise UserError(
                f'model.vocabulary is {have} and the tokenizer has {tokens} pieces: at least {tokens} are needed'
            )
        return dataclasses.replace(self, model=dataclasses.replace(self.model, vocabulary=have))

    def with_planned_vocabulary(self) -> 'RunConfig':
        """This config before its tokenizer is there: with the vocabulary that is asked for."""
        if self.model.vocabulary:
            return self
        if self.data.vocabulary is None:
            raise UserError(
                'data.vocabulary is null and model.vocabulary too: say how many pieces the tokenizer that is learnt may have, '
                'such as data.vocabulary=4096'
            )
        return self.with_vocabulary(self.data.vocabulary)


RECORD = 'source.json'  # in the folder of a run that was imported: see training/importing.py
# Between a run and its continuation, beside the name of its folder.
MAY_CHANGE = ('mesh', 'checkpoint', 'metrics', 'training.steps', 'training.accumulation', 'training.microbatches')
# Besides, where the run is an imported model that has not been trained on.
MAY_BEGIN_WITH = ('seed', 'data', 'training', 'optimizer', 'compute', *(f'model.{field}' for field in OF_TRAINING))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a YAML file with overrides such as `training.steps=100`. Raises UserError naming the file and the key."""
    path = Path(path)
    if not os.path.lexists(path):
        near = [str(file) for file in (*path.parent.glob('*.yaml'), *Path('configs').glob('**/*.yaml'))]
        raise UserError(f'{shown(path)}: no such config{nearest_path(str(path), near) if near else ""}')
    with opened(path, shown(path)) as file:
        content = file.read(yaml_text.LARGEST * 4 + 1)
    return parse(content, str(path), overrides)


def parse(content: str | bytes, path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The config that a YAML text from `path` holds."""
    source = shown(path)
    import_extensions()
    tree = yaml_text.read(decoded(content, source) if isinstance(content, bytes) else content, source)
    if not isinstance(tree, dict):
        what = 'is empty' if tree is None else f'holds {"a list" if isinstance(tree, list) else shown(repr(tree), 60)}'
        raise UserError(f'{source}: {what}; a config is a mapping of keys to values, such as name: demo')
    apply(tree, overrides, RunConfig)
    return validate(tree, f'{source} with {shown(" ".join(overrides))}' if overrides else source)


def validate(tree: dict[str, Any], source: str) -> RunConfig:
    """A mapping as a RunConfig; `source` names where it came from in the message of a UserError."""
    for key, value in _leaves(tree):
        if (now := renamed(key, value)) is not None:
            raise UserError(f'{source}: {now}')
        key = shown(key, 80)
        if isinstance(value, float) and not abs(value) <= FLOAT32:
            rule = f'it must be a finite number, also in float32: at most {FLOAT32:.6g}'
            raise UserError(f'{source}: {key} is {value}: {rule}')
        if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
            raise UserError(f'{source}: {key} is {value}: whole numbers are at most 2^48')
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and lone_surrogate(text) is not None:
                raise UserError(
                    f'{source}: {key} is {shown(text, 60, quoted=True)}, which is not UTF-8: rename the file, or name it by a '
                    'glob with a star for such a letter'
                )
    try:
        return pydantic.TypeAdapter(RunConfig).validate_json(json.dumps(tree), strict=True, extra='forbid')
    except pydantic.ValidationError as error:
        raise UserError(f'{source}: {_explain(error.errors()[0])}') from None


def dump(config: RunConfig) -> str:
    """The complete config as YAML; `load_config` gives it back."""
    return yaml_text.dump(json.loads(json.dumps(dataclasses.asdict(config))))


def check_continues(saved: RunConfig, wanted: RunConfig, begun: bool = True) -> None:
    """Raises UserError naming the first key that a continuation may not change; `begun`: the run has taken steps."""
    may_change = MAY_CHANGE + (() if begun else MAY_BEGIN_WITH)
    if wanted.model.vocabulary is None and saved.model.vocabulary is not None:
        wanted = wanted.with_vocabulary(saved.model.vocabulary)
    old, new = (dict(_leaves(dataclasses.asdict(config))) for config in (saved, wanted))
    for key in sorted(old.keys() | new.keys()):
        free = any(key == name or key.startswith(f'{name}.') for name in ('name', *may_change))
        if not free and old.get(key) != new.get(key):
            raise UserError(
                f'{key} is {new.get(key)!r} and was {old.get(key)!r} when run {saved.name!r} began; a continuation may change '
                f'only {", ".join(may_change)}; set {key}={old.get(key)} again, choose another name, or begin anew with --fresh'
            )


def _explain(error: Any) -> str:
    """The line of a UserError about what pydantic found wrong."""
    key = '.'.join(shown(part, 60) for part in resolve(RunConfig, error['loc'])[0])
    if error['type'] == 'unexpected_keyword_argument':
        return f'no key {key!r}{unknown(RunConfig, error["loc"])}'
    if error['type'] == 'union_tag_invalid':
        kinds = error['ctx']['expected_tags'].replace("'", '').split(', ')
        return f'{key}.kind is {shown(error["ctx"]["tag"], 60, quoted=True)}: no such kind{nearest(error["ctx"]["tag"], kinds)}'
    if error['type'] == 'union_tag_not_found':
        return f'{key}.kind is missing: it has no default'
    if error['type'] in ('missing', 'missing_argument', 'missing_keyword_only_argument'):
        return f'{key} is missing: it has no default'
    cause = error.get('ctx', {}).get('error')
    if isinstance(cause, UserError):
        return str(cause)
    given = error['input']
    rule = error['msg'].replace('Input should be', 'it must be').replace('an object', 'a mapping of keys to values')
    if isinstance(given, float) and given.is_integer() and 'integer' in rule:
        rule += f', written as one: {int(given)}'
    return f'{key} is {shown(json.dumps(given), 80)}: {rule}'


def _leaves(tree: Any, prefix: str = '') -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f'{prefix}.{key}' if prefix else key)
    else:
        yield prefix, tree
