"""Training runs that others published, beside what the plan says of them: benchmarks/plan_runs.md.

python -m weft.proof.published_runs                writes the page, and prints the efficiencies that the runs to fit on give

A chip's one efficiency is the geometric mean, over every other run of it, of the ideal time by the measured one. The runs
between are predicted with it. The bound is that of a program that computes nothing twice and gathers no weight again.
"""

import collections
import dataclasses
import functools
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from weft.model.cost import forward_flops
from weft.planner.chips import CHIPS, Chip
from weft.planner.roofline import StepTime, mfu, train_time
from weft.sharding.mesh import parse_mesh
from weft.storage.files import write
from weft.training.config import RunConfig, load_config

FOLDER = Path(__file__).parents[1]
RUNS, PAGE = FOLDER / 'benchmarks' / 'published_runs.yaml', FOLDER / 'benchmarks' / 'plan_runs.md'
WITHIN = 1.5  # times that a prediction may be off


@dataclasses.dataclass(frozen=True)
class PublishedRun:
    """One run: what was published, and the same run as a config of ours."""

    row: Mapping[str, Any]
    run: RunConfig
    fit: bool  # whether the efficiency is fitted on it

    @property
    def chip(self) -> Chip:
        return CHIPS[self.row['chip']]

    @property
    def name(self) -> str:
        return self.row['model']

    @property
    def machine(self) -> str:
        return f'{self.name} on {self.row["chips"]:,} {self.row["chip"]}'

    @functools.cached_property
    def measured(self) -> float:
        """Seconds a step."""
        row, t = self.row, self.run.training
        tokens = t.batch * t.sequence_length
        if 'seconds' in row:
            return float(row['seconds'])
        if 'tokens' in row:
            return tokens / (row['tokens'] * row['chips'])
        keys = {'square': t.sequence_length, 'causal': (t.sequence_length + 1) / 2}[row['counted']]
        return 3 * sum(forward_flops(self.run.model, keys).values()) * tokens / (row['tflops'] * 1e12 * row['chips'])

    def time(self, run: RunConfig) -> StepTime:
        """Of a step. An interleaved pipeline, which ours is not, has the bubble of as many microbatches as parts pass."""
        time, parts = train_time(run, self.chip), self.row.get('interleaved', 1)
        if parts == 1:
            return time
        training = dataclasses.replace(run.training, microbatches=run.microbatches * parts)
        cut = train_time(dataclasses.replace(run, training=training), self.chip)
        least = {(send.axes, send.kind): send for send in cut.collectives}
        sends = (min(send, least[send.axes, send.kind], key=lambda send: send.seconds) for send in time.collectives)
        return dataclasses.replace(cut, collectives=tuple(sends))

    @functools.cached_property
    def ideal(self) -> float:
        """Seconds a step with an efficiency of 1."""
        return self.time(self.run).ideal

    @functools.cached_property
    def bound(self) -> float:
        """Seconds a step at least, whatever is kept."""
        compute = dataclasses.replace(self.run.compute, remat='none')
        return self.time(dataclasses.replace(self.run, compute=compute)).bound

    @property
    def predicted(self) -> float:
        """Seconds a step."""
        return self.ideal / self.chip.efficiency

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


def read_published_runs() -> list[PublishedRun]:
    """All runs of the data file."""
    data = yaml.safe_load(RUNS.read_text(encoding='utf-8'))
    seen = collections.Counter[str]()
    runs = []
    for row in data['runs']:
        seen[row['chip']] += 1
        name, changes = row['model'], dict(row.get('set', {}))
        while name in data['models']:
            changes = {key: value for key, value in data['models'][name].items() if key != 'of'} | changes
            name = data['models'][name]['of']
        changes |= {
            'compute.dtype': 'bfloat16',
            'compute.remat': row['remat'],
            'training.batch': row['batch'],
            'training.sequence_length': row['length'],
            'training.accumulation': row.get('accumulation', 1),
            'training.microbatches': row.get('microbatches', 'null'),
        }
        overrides = [f'{key}={value}' for key, value in changes.items()]
        run = load_config(FOLDER / 'configs' / 'models' / f'{name}.yaml', overrides)
        mesh = parse_mesh(row['mesh'])
        assert mesh.size == row['chips'], f'{row}: its mesh has {mesh.size} devices'
        runs.append(PublishedRun(row, dataclasses.replace(run, mesh=mesh), fit=seen[row['chip']] % 2 == 1))
    return runs


def fitted(runs: list[PublishedRun]) -> dict[str, float]:
    """The efficiency of each chip that a run to fit on tells of."""
    ratios = collections.defaultdict[str, list[float]](list)
    for one in runs:
        if one.fit:
            ratios[one.row['chip']].append(one.ideal / one.measured)
    return {chip: statistics.geometric_mean(values) for chip, values in ratios.items()}


def published_runs_page(runs: list[PublishedRun]) -> str:
    """Markdown: every run, measured, bounded and predicted."""
    sources = yaml.safe_load(RUNS.read_text(encoding='utf-8'))['sources']
    held = [one for one in runs if not one.fit]
    good = sum(1 / WITHIN <= one.ratio <= WITHIN for one in held)
    respected = sum(one.bound <= one.measured for one in runs)
    worst = max(held, key=lambda one: max(one.ratio, 1 / one.ratio))
    lines = [
        '# The plan and published runs',
        '',
        f'`python -m weft.proof.published_runs`, from `benchmarks/published_runs.yaml`. The bound is respected by {respected} '
        f'of {len(runs)} runs; of the {len(held)} that no efficiency was fitted on, {good} predicted within {WITHIN} times, '
        f'the worst ({worst.name} on {worst.row["chips"]} {worst.row["chip"]}) {worst.ratio:.2f} times. MFU is ours: causal '
        'attention, matmuls once, by the dense bfloat16 peak of planner/chips.py.',
        '',
        '| run | chips | mesh | remat | measured s | bound s | predicted s | predicted / measured | MFU | published MFU | '
        'fit | source |',
        '|---|---:|---|---|---:|---:|---:|---:|---:|---:|---|---|',
    ]
    for one in runs:
        row = one.row
        said = f'{row["mfu"]:.1%}' if 'mfu' in row else ''
        lines.append(
            f'| {one.name}, {row["length"]:,} | {row["chips"]:,} {row["chip"]} | {one.run.mesh} | {row["remat"]} | '
            f'{one.measured:.2f} | {one.bound:.2f} | {one.predicted:.2f} | {one.ratio:.2f} | '
            f'{mfu(one.run, one.chip, one.measured):.1%} | {said} | {"yes" if one.fit else ""} | {row["source"]} |'
        )
    lines += ['', 'Efficiencies: ' + ', '.join(f'{chip} {value:.2f}' for chip, value in fitted(runs).items()) + '.', '']
    lines += [f'Miss: {one.machine}: {one.row["miss"]}.' for one in held if 'miss' in one.row]
    notes = [f'- {one.machine}: {one.row["note"]}.' for one in runs if 'note' in one.row]
    return '\n'.join([*lines, '', *notes, '', *(f'- {name}: {where}' for name, where in sources.items()), ''])


def main() -> None:
    runs = read_published_runs()
    for chip, value in fitted(runs).items():
        print(f'{chip}: {value:.3f} (planner/chips.py: {CHIPS[chip].efficiency})')
    write(PAGE, published_runs_page(runs).encode())
    print(PAGE.relative_to(FOLDER))


if __name__ == '__main__':
    main()
