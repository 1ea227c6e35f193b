"""Everything that a plan says, as one tree of plain numbers: what `scripts/plan.py` prints, writes as JSON and draws."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from weft.model import cost
from weft.model.block import has_costs
from weft.model.config import ModelConfig
from weft.planner.bill import bill, cache_bill, rules_of_thumb
from weft.planner.chips import Chip, torus_shape
from weft.planner.roofline import mfu
from weft.planner.search import Candidate, SearchResult, TrainingCandidate, why, with_settings
from weft.planner.serving import ServingCandidate
from weft.planner.traffic.tables import Traffic
from weft.sharding.mesh import BATCH
from weft.training.config import RunConfig

if TYPE_CHECKING:  # the compilers' side imports much that a plan does not need
    from weft.planner.aot import Compiled

PASSES: tuple[Literal['train', 'prefill', 'decode'], ...] = ('train', 'prefill', 'decode')
CHINCHILLA = 20  # tokens a parameter (Hoffmann et al. 2022, arXiv:2203.15556, table 3), of those that a token meets
SECONDS_A_DAY = 86_400


@dataclasses.dataclass(frozen=True, kw_only=True)
class Terms:
    """What a run is planned for beside its config."""

    tokens: float | None = None  # to train on; None: the config's steps
    price: float | None = None  # of a chip for an hour
    currency: str = 'USD'  # of the price
    watts: float | None = None  # of a chip; None: the data sheet's


def model_part(c: ModelConfig, length: int) -> dict[str, Any]:
    """The bill, FLOPs a token and cache of a model, at rows of `length` tokens."""
    whole, cache = bill(c), cache_bill(c)
    flops = {what: cost.flops_per_token(c, what, length) for what in PASSES}
    return {
        'parameters': {
            'total': whole.total,
            'active': whole.active,
            'by_part': whole.parts(),
            'bytes': whole.bytes,
            'bill': whole.to_json(),
        },
        'context': length,
        'traced': not has_costs(c),
        'flops_per_token': {what: sum(parts.values()) for what, parts in flops.items()} | {'by_part': flops},
        'rules_of_thumb': [rule.to_json() for rule in rules_of_thumb(c, length)],
        'cache_bytes_per_token': cache.bytes_per_token,
        'cache': dataclasses.asdict(cache) | {'bytes': cache.bytes(length), 'full_bytes': cache.full_bytes(length)},
    }


def candidate_part(candidate: Candidate) -> dict[str, Any]:
    """Memory, and the time of a step with what it is made of, to train or to serve as a candidate has it."""
    time, figures = candidate.time, ('compute', 'memory', 'links', 'waits', 'bound', 'apart', 'predicted')
    return {
        'settings': candidate.settings,
        'mesh': dataclasses.asdict(candidate.mesh),
        'memory_per_chip_bytes': candidate.memory.parts() | {'total': candidate.total},
        'memory_available_bytes': candidate.available,
        'fits': candidate.fits,
        'time': {
            'parts': [dataclasses.asdict(part) for part in time.parts],
            'collectives': [dataclasses.asdict(one) for one in time.collectives],
            **{f'{name}_seconds': getattr(time, name) for name in figures},
            'limit': time.limit,
            'efficiency': time.efficiency,
        },
        'step_seconds': candidate.seconds,
    }


def training_part(candidate: TrainingCandidate, chip: Chip, terms: Terms) -> dict[str, Any]:
    """Memory, time and money of training as a candidate has it."""
    run, seconds = candidate.run, candidate.seconds
    t, chips = run.training, run.mesh.size
    step_tokens = t.batch * t.sequence_length
    tokens = terms.tokens or t.steps * step_tokens
    days = tokens / step_tokens * seconds / SECONDS_A_DAY
    watts = terms.watts or chip.watts
    executed = sum(part.flops for part in candidate.time.parts) * chips / step_tokens
    return {
        'what': 'train',
        **candidate_part(candidate),
        'remat': run.compute.remat,
        'accumulation': t.accumulation,
        'microbatches': run.microbatches,
        'tokens_per_step': step_tokens,
        'executed_flops_per_token': executed,
        'mfu': mfu(run, chip, seconds),
        'mfu_at_most': mfu(run, chip, candidate.time.bound),
        'tokens_per_second': step_tokens / seconds,
        'tokens_per_day': step_tokens / seconds * SECONDS_A_DAY,
        'training': {
            'tokens': tokens,
            'chinchilla_tokens': CHINCHILLA * cost.active_parameters(run.model),
            'days': days,
            'chip_hours': days * 24 * chips,
            'cost': None if terms.price is None else days * 24 * chips * terms.price,
            'currency': terms.currency,
            'energy_kwh': None if watts is None else days * 24 * chips * watts / 1e3,
            'watts_per_chip': watts,
        },
    }


def serving_part(candidate: ServingCandidate, chip: Chip, terms: Terms) -> dict[str, Any]:
    """Memory, time and money of serving as a candidate has it."""
    seconds, chips = candidate.seconds, candidate.mesh.size
    watts = terms.watts or chip.watts
    per_second = candidate.tokens_per_second
    flops = sum(cost.flops_per_token(candidate.model, 'decode', candidate.length).values())
    return {
        'what': 'serve',
        **candidate_part(candidate),
        'mfu': flops * per_second / (chip.flops(candidate.compute.dtype) * chips),
        'tokens_per_second': per_second,
        'tokens_per_day': per_second * SECONDS_A_DAY,
        'serving': {
            'rows': candidate.rows,
            'length': candidate.length,
            'prompt': candidate.prompt,
            'tokens_per_second_per_row': 1 / seconds,
            'prefill_rows': candidate.mesh.span(BATCH),
            'prefill_seconds': candidate.prefill.predicted,
            'prefill_bound_seconds': candidate.prefill.bound,
            'cost_per_million_tokens': None if terms.price is None else terms.price * chips / 3600 / per_second * 1e6,
            'currency': terms.currency,
            'joules_per_token': None if watts is None else watts * chips / per_second,
        },
    }


# What the plan of what does not fit leaves out: no chip runs it, so it has no speed and costs nothing.
SPEED = [
    'time',
    'step_seconds',
    'mfu',
    'mfu_at_most',
    'tokens_per_second',
    'tokens_per_day',
    'days',
    'chip_hours',
    'cost',
    'energy_kwh',
    'tokens_per_second_per_row',
    'prefill_seconds',
    'prefill_bound_seconds',
    'cost_per_million_tokens',
    'joules_per_token',
]


def without_speed(part: Mapping[str, Any]) -> dict[str, Any]:
    """The part on training or serving, with None in place of what is in SPEED."""
    left: dict[str, Any] = {name: None if name in SPEED else value for name, value in part.items()}
    return left | {name: without_speed(left[name]) for name in ('training', 'serving') if name in left}


def as_planned(run: RunConfig, chosen: Mapping[str, Any]) -> RunConfig:
    """A run laid out as a plan chose."""
    return with_settings(run, {key: value for key, value in chosen['settings'].items() if key != 'rows'})


def compiled_part(compiled: 'Compiled', chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What a compiler made of a step, beside what the plan says of it."""
    planned = Traffic()
    for send in chosen['time']['collectives']:
        planned.add(send['kind'], send['axes'], send['bytes'], send['calls'])
    planned = planned.lowered()
    rows = sorted(planned.sent.keys() | compiled.sent.sent.keys())
    size = lambda table, key: table.sent[key].bytes if key in table.sent else 0.0
    return {
        'status': compiled.status,
        'message': compiled.message,
        'seconds': compiled.seconds,
        'fits': compiled.fits,
        'memory_per_chip_bytes': compiled.memory,
        'planned_memory_bytes': chosen['memory_per_chip_bytes']['total'],
        'collectives': [
            {'kind': key[0], 'axes': key[1], 'planned_bytes': size(planned, key), 'bytes': size(compiled.sent, key)}
            for key in rows
        ],
        'unplanned': compiled.unplanned() if compiled.status == 'compiled' else [],
    }


def search_part(found: SearchResult) -> dict[str, Any]:
    return {
        'meshes': found.meshes,
        'ranked': [
            {
                'settings': candidate.settings,
                'mesh': str(candidate.mesh),
                'fits': candidate.fits,
                'step_seconds': candidate.seconds if candidate.fits else None,
                'memory_bytes': candidate.total,
                'why': why(candidate, found.best),
            }
            for candidate in found.ranked
        ],
    }


def chip_part(name: str, chip: Chip, chips: int) -> dict[str, Any]:
    figures = {field: value for field, value in dataclasses.asdict(chip).items() if field != 'kinds'}
    return {'name': name, 'count': chips, 'torus_shape': list(torus_shape(chip, chips)), **figures}


def run_part(run: RunConfig) -> dict[str, Any]:
    t = run.training
    return {
        'name': run.name,
        'dtype': run.compute.dtype,
        'weight_dtype': str(run.compute.parameter_dtype),
        'layers': run.model.layers,
        'batch': t.batch,
        'sequence_length': t.sequence_length,
    }
