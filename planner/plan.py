"""Everything that a plan says, as one tree of plain numbers: what `scripts/plan.py` prints, writes as JSON and draws."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from weft.model import cost
from weft.model.config import ModelConfig
from weft.planner.bill import bill, cache_bill, rules_of_thumb
from weft.planner.chips import Chip, shape
from weft.planner.memory import Memory
from weft.planner.roofline import Time, mfu
from weft.planner.search import Choice, Found, why
from weft.planner.serving import Serving
from weft.planner.traffic import Traffic
from weft.sharding.mesh import AXES, BATCH, MeshConfig
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
        'flops_per_token': {what: sum(parts.values()) for what, parts in flops.items()} | {'by_part': flops},
        'rules_of_thumb': [rule.to_json() for rule in rules_of_thumb(c, length)],
        'cache_bytes_per_token': cache.bytes_per_token(),
        'cache': dataclasses.asdict(cache) | {'bytes': cache.bytes(length), 'full_bytes': cache.full_bytes(length)},
    }


def training_part(choice: Choice, chip: Chip, terms: Terms) -> dict[str, Any]:
    """Memory, time and money of training as a choice has it."""
    run, seconds = choice.run, choice.seconds
    t, chips = run.training, run.mesh.size
    step_tokens = t.batch * t.sequence_length
    tokens = terms.tokens or t.steps * step_tokens
    days = tokens / step_tokens * seconds / SECONDS_A_DAY
    watts = terms.watts or chip.watts
    executed = sum(part.flops for part in choice.time.parts) * chips / step_tokens
    return {
        'what': 'train',
        'settings': choice.knobs,
        'mesh': mesh_part(run.mesh),
        'remat': run.compute.remat,
        'accumulation': t.accumulation,
        'microbatches': run.microbatches,
        'tokens_per_step': step_tokens,
        'executed_flops_per_token': executed,
        'memory_per_chip_bytes': memory_part(choice.memory),
        'memory_available_bytes': choice.room,
        'fits': choice.fits,
        'time': time_part(choice.time),
        'step_seconds': seconds,
        'mfu': mfu(run, chip, seconds),
        'mfu_at_most': mfu(run, chip, choice.time.bound),
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


def serving_part(serving: Serving, chip: Chip, terms: Terms) -> dict[str, Any]:
    """Memory, time and money of serving as a choice has it."""
    seconds, chips = serving.seconds, serving.mesh.size
    watts = terms.watts or chip.watts
    per_second = serving.tokens_per_second
    flops = sum(cost.flops_per_token(serving.model, 'decode', serving.length).values())
    return {
        'what': 'serve',
        'settings': serving.knobs,
        'mesh': mesh_part(serving.mesh),
        'memory_per_chip_bytes': memory_part(serving.memory),
        'memory_available_bytes': serving.room,
        'fits': serving.fits,
        'time': time_part(serving.time),
        'step_seconds': seconds,
        'mfu': flops * per_second / (chip.flops(serving.compute.dtype) * chips),
        'tokens_per_second': per_second,
        'tokens_per_day': per_second * SECONDS_A_DAY,
        'serving': {
            'rows': serving.rows,
            'length': serving.length,
            'prompt': serving.prompt,
            'tokens_per_second_per_row': 1 / seconds,
            'prefill_rows': serving.mesh.span(BATCH),
            'prefill_seconds': serving.prefill.predicted,
            'prefill_bound_seconds': serving.prefill.bound,
            'cost_per_million_tokens': None if terms.price is None else terms.price * chips / 3600 / per_second * 1e6,
            'currency': terms.currency,
            'joules_per_token': None if watts is None else watts * chips / per_second,
        },
    }


SPEED = ('time', 'step_seconds', 'mfu', 'mfu_at_most', 'tokens_per_second', 'tokens_per_day')
OF_TRAINING = ('days', 'chip_hours', 'cost', 'energy_kwh')
OF_SERVING = (
    'tokens_per_second_per_row',
    'prefill_seconds',
    'prefill_bound_seconds',
    'cost_per_million_tokens',
    'joules_per_token',
)


def without_speed(part: Mapping[str, Any]) -> dict[str, Any]:
    """The part on training or serving of what does not fit: no chip runs it, so it has no speed and costs nothing."""
    left = {name: None if name in SPEED else value for name, value in part.items()}
    for name, fields in (('training', OF_TRAINING), ('serving', OF_SERVING)):
        if name in left:
            left[name] = {field: None if field in fields else value for field, value in left[name].items()}
    return left


def mesh_part(mesh: MeshConfig) -> dict[str, int]:
    """Devices along each axis."""
    return {axis: getattr(mesh, axis) for axis in AXES}


def memory_part(memory: Memory) -> dict[str, float]:
    """Bytes by part, and their sum."""
    return {**memory.parts(), 'total': memory.total}


def time_part(time: Time) -> dict[str, Any]:
    """A roofline with what it is made of."""
    return {
        'parts': [
            {
                'name': part.name,
                'flops': part.flops,
                'bytes': part.bytes,
                'compute_seconds': part.compute,
                'memory_seconds': part.memory,
            }
            for part in time.parts
        ],
        'collectives': [dataclasses.asdict(send) for send in time.sends],
        'compute_seconds': time.compute,
        'memory_seconds': time.memory,
        'links_seconds': time.links,
        'waits_seconds': time.waits,
        'bound_seconds': time.bound,
        'apart_seconds': time.apart,
        'predicted_seconds': time.predicted,
        'limit': time.limit,
        'efficiency': time.efficiency,
    }


def settled(run: RunConfig, chosen: Mapping[str, Any]) -> RunConfig:
    """A run laid out as a plan chose."""
    mesh = MeshConfig(**chosen['mesh'])
    if chosen['what'] != 'train':
        return dataclasses.replace(run, mesh=mesh)
    training = dataclasses.replace(
        run.training,
        accumulation=chosen['accumulation'],
        microbatches=chosen['microbatches'] if mesh.stage > 1 else None,
    )
    compute = dataclasses.replace(run.compute, remat=chosen['remat'])
    return dataclasses.replace(run, mesh=mesh, compute=compute, training=training)


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


def search_part(found: Found) -> dict[str, Any]:
    """What a search looked at, and why its first choice is that."""
    return {
        'meshes': found.meshes,
        'ranked': [
            {
                'settings': choice.knobs,
                'mesh': str(choice.mesh),
                'fits': choice.fits,
                'step_seconds': choice.seconds if choice.fits else None,
                'memory_bytes': choice.total,
                'why': why(choice, found.best),
            }
            for choice in found.ranked
        ],
    }


def chip_part(name: str, chip: Chip, chips: int) -> dict[str, Any]:
    """The chip as it is described."""
    figures = dataclasses.asdict(chip)
    figures.pop('kinds')
    return {'name': name, 'count': chips, 'torus_shape': list(shape(chip, chips)), **figures}


def run_part(run: RunConfig) -> dict[str, Any]:
    """What is planned."""
    t = run.training
    return {
        'name': run.name,
        'dtype': run.compute.dtype,
        'weight_dtype': str(run.compute.parameter_dtype),
        'layers': run.model.layers,
        'batch': t.batch,
        'sequence_length': t.sequence_length,
    }
