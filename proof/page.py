"""The page of `scripts/prove.py`: tables that a reader can check."""

from collections.abc import Collection

import jax

from weft.proof.cases import Results
from weft.proof.equivalence import DEVICES, LONG, LOSSES_TOLERANCE, MESHES, MODELS, RUNS, TOLERANCE, B, T, losses_dtype
from weft.proof.faults import caught
from weft.sharding.mesh import AXES


def proof_page(results: Results, cases: Collection[str]) -> str:
    """Markdown: what was compared, on which meshes, how far apart it was, and which planted faults were caught."""
    missing = [case for case in cases if case not in results.found]
    lines = [
        '# Every mesh gives the same numbers',
        '',
        f'`python scripts/prove.py`, jax {jax.__version__}, {DEVICES} devices simulated by a CPU; code {results.code}. '
        'The cases are in `proof/cases.py`.',
        '',
    ]
    if missing:
        lines += [f'**Not run yet: {len(missing)} of {len(cases)} cases**, such as `{missing[0]}`.', '']
    lines += [*summary(results, cases), *gradients(results), *initials(results), *long_runs(results)]
    return '\n'.join([*lines, *faults(results, cases)])


def summary(results: Results, cases: Collection[str]) -> list[str]:

    def worst(prefix: str, field: str = 'error') -> str:
        values = [found[field] for case, found in results.found.items() if case.startswith(prefix) and field in found]
        return f'{max(values):.1e}' if values else '–'

    whole_runs = [
        f'| {steps} losses, {kind}, {losses_dtype(kind)}, {len(LONG)} meshes | {tolerance:.0e} | '
        f'{worst(f"losses/{kind}/", field)} |'
        for kind in RUNS
        for field, steps, tolerance in zip(
            ('error', 'error of 50'), (20, 50), LOSSES_TOLERANCE[losses_dtype(kind)], strict=True
        )
    ]
    planted = [case for case in cases if case.startswith('fault/')]
    found = sum(caught(results.found[case]) for case in planted if case in results.found)
    tolerance = f'{TOLERANCE["gradient"]:.0e}'
    return [
        '| claim | tolerance | worst found |',
        '|---|---:|---:|',
        f'| loss of a step equals one device’s, float64, {len(MESHES)} meshes × {len(MODELS)} models | {tolerance} | '
        f'{worst("gradient/", "loss")} |',
        f'| every leaf of its gradient (max \\|Δ\\| over max \\|g\\|) | {tolerance} | {worst("gradient/")} |',
        f'| initial parameters that differ in any bit, float32, {len(MESHES)} meshes | 0 | {worst("initial/")} |',
        *whole_runs,
        f'| planted faults that are caught | {len(planted)} | {found} |',
        '',
    ]


def gradients(results: Results) -> list[str]:
    """One row a mesh, one column a model."""
    lines = [
        '## Loss and gradient of one step, float64',
        '',
        f'A decoder of 8 layers, 8 heads, 8 experts, {B} rows of {T} tokens, several documents and padding in each. dense: a '
        'sliding window, accumulation in 2 parts; all_gather: a dense layer before the 8, shared experts, rematerialisation; '
        'all_to_all: accumulation in 2 parts, a capacity that is never reached. Each figure: the '
        'worst leaf’s max |Δ| over max |g| of one device.',
        '',
        '| ' + ' | '.join([*AXES, *MODELS]) + ' |',
        '|' + '---:|' * (len(AXES) + len(MODELS)),
    ]
    for mesh in MESHES:
        sizes = [str(getattr(mesh, axis)) if getattr(mesh, axis) > 1 else '·' for axis in AXES]
        found = [results.found.get(f'gradient/{kind}/{mesh}') for kind in MODELS]
        lines.append('| ' + ' | '.join([*sizes, *(f'{one["error"]:.1e}' if one else '' for one in found)]) + ' |')
    return [*lines, '']


def initials(results: Results) -> list[str]:
    """How many meshes begin with the same bits."""
    cases = (f'initial/all_gather/{mesh}' for mesh in MESHES)
    done = [results.found[case] for case in cases if case in results.found]
    if not done:
        return []
    return [
        '## Initial parameters, float32',
        '',
        f'The {done[0]["parameters"]:,} parameters of the model with experts, which has every kind of weight, are bit for bit '
        f'one device’s on {sum(one["error"] == 0 for one in done)} of {len(done)} meshes.',
        '',
    ]


def long_runs(results: Results) -> list[str]:
    lines = [
        '## Losses of whole runs',
        '',
        'Relative difference from one device, the largest of 20 and of 50 steps of AdamW: dense in float32; all_gather, whose '
        'routers’ biases move too, in float64. (In float32 a token whose second and third expert score the same to the last '
        'digits visits one or the other by the order of a sum, and two right runs part: by 4e-3 in 50 steps on stage=8.)',
        '',
        '| mesh | dense, 20 | dense, 50 | all_gather, 20 | all_gather, 50 | loss, first → last |',
        '|---|---:|---:|---:|---:|---:|',
    ]
    for mesh in LONG:
        found = [results.found.get(f'losses/{kind}/{mesh}') for kind in RUNS]
        figures = [f'{one[field]:.1e}' if one else '' for one in found for field in ('error', 'error of 50')]
        ends = f'{found[0]["first"]:.3f} → {found[0]["last"]:.3f}' if found[0] else ''
        lines.append('| ' + ' | '.join([str(mesh), *figures, ends]) + ' |')
    return [*lines, '']


def faults(results: Results, cases: Collection[str]) -> list[str]:
    """What happens to the same comparison when the code is wrong."""
    lines = [
        '## Planted faults',
        '',
        'The same comparison while one thing is wrong. A fault is caught where the type check of `shard_map` refuses the '
        f'program, or where the error is above {TOLERANCE["gradient"]:.0e}.',
        '',
        '| fault | model | mesh | caught by | error |',
        '|---|---|---|---|---:|',
    ]
    for case in cases:
        if case.startswith('fault/'):
            found = results.found.get(case, {})
            by = 'types' if 'refused' in found else 'numbers' if found and caught(found) else '**not caught**'
            error = f'{found["error"]:.1e}' if 'error' in found else ''
            lines.append(f'| {" | ".join(case.split("/")[1:])} | {by if found else ""} | {error} |')
    return [*lines, '']
