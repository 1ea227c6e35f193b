"""benchmarks/plan.md: what is planned by shapes alone beside what the compilers made of the same steps.

`python -m weft.proof.compiled_page` writes it from the records that `python -m weft.proof.compiled_pairs` and
`weft.proof.compiled_searched` keep.
"""

import collections
import re
import statistics
from collections.abc import Iterator
from typing import NamedTuple

from weft.planner import communication
from weft.planner.aot import ROOT, Compiled
from weft.planner.chips import CHIPS
from weft.planner.memory import Memory, serving_memory, training_memory
from weft.planner.roofline import StepTime, decode_time, mfu, prefill_time, run_traffic, train_time
from weft.planner.traffic.tables import Traffic
from weft.proof.compiled_pairs import PAIRS, ProgramPair, compiled_before
from weft.proof.compiled_searched import Searched, searched
from weft.storage.files import write
from weft.training.config import TrainingConfig

PAGE = ROOT / 'benchmarks' / 'plan.md'

HEAD = """# Plans beside compiled programs

Written by `python -m weft.proof.compiled_page` from the records in [compiled/](compiled), which `make compilers` and
`python -m weft.proof.compiled_pairs` make (jax 0.10.2, libtpu 0.0.42.1, jax-cuda13-plugin 0.10.2 with autotuning off).
**Nothing here ran on a TPU or a GPU**: our own steps were compiled for machines of those chips, on two CPU cores without any.

Each cell has the plan, made by shapes alone, and behind the stroke what the compiled program has. GB are 10^9 bytes of one
chip. The compilers' times are of a machine that was busy with other work for some of them.

*Arguments*: weights, optimizer state, batch, cache. *Memory*: of GPUs arguments and temporaries, of TPUs what is held at the
fullest moment (`peak_memory_in_bytes`): what TPUs' compiler calls temporaries counts memory again that arrays use one after the
other, and it compiles steps whose arguments and temporaries are more than a chip has. *Sent*: bytes that a chip sends in a
step, all kinds and axes together, loops multiplied out. Nothing is fitted.
"""


class PairPlan(NamedTuple):
    """What a plan says of a pair."""

    memory: Memory
    sent: Traffic
    time: StepTime


def plan_pair(pair: ProgramPair) -> PairPlan:
    run, chip = pair.config, CHIPS[pair.chip]
    c, compute, mesh = run.model, run.compute, run.mesh
    rows, length = run.training.batch, run.training.sequence_length
    if pair.what == 'train':
        return PairPlan(training_memory(run, chip.platform), run_traffic(run), train_time(run, chip))
    if pair.what == 'decode':
        memory = serving_memory(c, compute, mesh, rows, length, platform=chip.platform)
        sent = communication.decoding(c, compute, mesh, rows)
        return PairPlan(memory, sent, decode_time(c, compute, mesh, chip, rows, length))
    memory = serving_memory(c, compute, mesh, rows, length, length, chip.platform)
    sent = communication.prefill(c, compute, mesh, rows, length)
    return PairPlan(memory, sent, prefill_time(c, compute, mesh, chip, rows, length))


def by_axes(sent: Traffic) -> dict[str, dict[str, float]]:
    """Bytes over each set of axes, whatever groups an axis is cut into, by kind, the most first."""
    found: dict[str, collections.Counter[str]] = {}
    for (kind, axes), (_, size) in sent.sent.items():
        whole = re.sub(r' \(groups of \d+\)', '', axes)
        found.setdefault(whole, collections.Counter())[kind] += size  # type: ignore[assignment]  # takes any number
    return {axes: dict(kinds.most_common()) for axes, kinds in found.items()}


def total_bytes(sent: Traffic) -> float:
    return sum(sent.bytes_by_axes().values())


class CompiledRow(NamedTuple):
    """A pair with its plan and its record."""

    pair: ProgramPair
    planned: PairPlan
    compiled: Compiled

    @property
    def ratios(self) -> dict[str, float]:
        """The plan's figures by the compiled program's."""
        return {
            'arguments': self.planned.memory.arguments / self.compiled.memory['arguments'],
            'memory': self.planned.memory.total / self.compiled.memory['total'],
            'sent': total_bytes(self.planned.sent) / total_bytes(self.compiled.sent),
        }


def compiled_rows() -> list[CompiledRow]:
    """Of all pairs with a record of a program."""
    found = ((pair, compiled_before(pair)) for pair in PAIRS)
    return [
        CompiledRow(pair, plan_pair(pair), compiled)
        for pair, compiled in found
        if compiled and compiled.status == 'compiled'
    ]


def in_parts(t: TrainingConfig) -> str:
    """A step's parts, where it has more than one."""
    return f' in {t.accumulation} parts' if t.accumulation > 1 else ''


def beside(plan: float, compiled: float) -> str:
    """A cell of GB: the plan's, and the compiled program's."""
    return f'{plan / 1e9:.4g} / {compiled / 1e9:.4g}'


def pairs_table(found: list[CompiledRow]) -> Iterator[str]:
    names = 'model, step, chips, mesh, rows × tokens, arguments GB, memory GB, ratio, sent GB, ratio, fits, compiled in'
    yield f'| {" | ".join(names.split(", "))} |'
    yield f'|{"---|" * 4}{"---:|" * 6}---|---:|'
    for row in found:
        run, made, told, t = row.pair.config, row.compiled, row.planned, row.pair.config.training
        cells = [
            row.pair.model,
            row.pair.what,
            f'{run.mesh.size:,} {row.pair.chip}',
            str(run.mesh),
            f'{t.batch:,} × {t.sequence_length:,}{in_parts(t) if row.pair.what == "train" else ""}',
            beside(told.memory.arguments, made.memory['arguments']),
            beside(told.memory.total, made.memory['total']),
            f'{row.ratios["memory"]:.3f}',
            beside(total_bytes(told.sent), total_bytes(made.sent)),
            f'{row.ratios["sent"]:.3f}',
            'yes' if made.fits else '**no**',
            f'{sum(made.seconds.values()):.0f} s',
        ]
        yield f'| {" | ".join(cells)} |'


def summary(found: list[CompiledRow]) -> Iterator[str]:
    """How far plans and programs are apart."""
    for platform, name in (('tpu', 'TPU'), ('gpu', 'NVIDIA')):
        mine = [row.ratios for row in found if CHIPS[row.pair.chip].platform == platform]
        off = {what: [abs(ratios[what] - 1) for ratios in mine] for what in ('arguments', 'memory', 'sent')}
        parts = [
            f'{what} {statistics.median(each):.1%} (at most {max(each):.1%})' for what, each in off.items() if each
        ]
        if parts:
            yield f'{name}, {len(mine)} pairs, apart in the median by: {", ".join(parts)}.'
    for row in found:
        made = row.compiled
        together = made.memory['arguments'] + made.memory['temporaries']
        if made.fits and together > made.available:
            yield (
                f'{row.pair.model}, {row.pair.what}, {row.pair.config.mesh.size} {row.pair.chip}: compiled for chips of '
                f'{made.available / 1e9:.1f} GB, with arguments and temporaries of {together / 1e9:.1f} GB.'
            )


def pair_section(row: CompiledRow) -> Iterator[str]:
    """A page of one pair: memory, collectives, roofline."""
    run, made, told, t = row.pair.config, row.compiled, row.planned, row.pair.config.training
    gb = lambda size: f'{size / 1e9:.3g} GB'
    parts = ', '.join(f'{part} {gb(size)}' for part, size in told.memory.parts().items() if size)
    time = told.time
    speed = f'{t.batch / time.predicted:,.0f} tokens/s'
    if row.pair.what == 'train':
        tokens = t.batch * t.sequence_length / time.predicted
        speed = f'{tokens:,.0f} tokens/s, MFU {mfu(run, CHIPS[row.pair.chip], time.predicted):.1%}'
    yield f'### {row.pair.model}, {row.pair.what}, {run.mesh.size:,} {row.pair.chip}: {run.mesh}'
    yield f'\n`{row.pair.overrides}`\n'
    yield f'- Planned: {gb(told.memory.total)} of {gb(made.available)}: {parts}.'
    yield f'- Compiled: {gb(made.memory["total"])}, of which arguments {gb(made.memory["arguments"])}.'
    yield f'- Roofline: at least {time.bound:.3g} s ({time.limit}), predicted {time.predicted:.3g} s: {speed}.'
    yield from (f'- Not asked for: {text}.' for text in made.unplanned())
    yield '\n| axes | planned GB | compiled GB | of which |'
    yield '|---|---:|---:|---|'
    planned, compiled = by_axes(told.sent), by_axes(made.sent)
    size = lambda table, axes: sum(table.get(axes, {}).values())
    for axes in sorted(planned.keys() | compiled.keys(), key=lambda axes: -size(compiled, axes)):
        of = ', '.join(f'{kind} {part / 1e9:.4g}' for kind, part in compiled.get(axes, {}).items() if part > 1e6)
        yield f'| {axes} | {size(planned, axes) / 1e9:.4g} | {size(compiled, axes) / 1e9:.4g} | {of} |'
    yield ''


SEARCHED = """## What the search chooses

The first choices of `plan.py` without a mesh for the cases of proof/search_cases.py, whose chips there is a compiler for:
`python -m weft.proof.compiled_searched`.

| case | chips | rows × tokens | choice | memory GB | ratio | sent GB | ratio | fits |
|---|---|---:|---|---:|---:|---:|---:|---|"""


def search_section(found: list[Searched]) -> Iterator[str]:
    yield SEARCHED
    for one in found:
        made, choice, t = one.compiled, one.choice, one.choice.run.training
        if not made:
            continue
        about = f'{one.name} | {one.case.chips} {one.case.chip} | {t.batch} × {t.sequence_length:,}'
        what = f'{choice.mesh}, {choice.run.compute.remat}{in_parts(t)}'
        if made.status != 'compiled':
            yield f'| {about} | {what} | {choice.total / 1e9:.4g} / – | | | | **{made.status}** |'
            continue
        memory = choice.total, made.memory['total']
        sent = total_bytes(run_traffic(choice.run)), total_bytes(made.sent)
        cells = [f'{beside(*pair)} | {pair[0] / pair[1]:.3f}' for pair in (memory, sent)]
        yield f'| {about} | {what} | {" | ".join(cells)} | {"yes" if made.fits else "**no**"} |'
    yield ''


def compiled_page(found: list[CompiledRow], of_search: list[Searched]) -> str:
    lines = [HEAD, *summary(found), '', *pairs_table(found), '', *search_section(of_search)]
    lines += ['## Memory, collectives and roofline of the largest', '']
    for row in found:
        if row.pair.shown:
            lines += pair_section(row)
    return '\n'.join(lines).rstrip() + '\n'


if __name__ == '__main__':
    write(PAGE, compiled_page(compiled_rows(), searched()).encode())
    print('\n'.join(summary(compiled_rows())))
