"""A plan as text: tables for a terminal."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from weft.planner.bill import BYTES
from weft.planner.chips import CHIPS
from weft.runtime.device_memory import gib
from weft.runtime.errors import shown
from weft.sharding.mesh import MeshConfig
from weft.training.tables import Fitted, wrapped

STRATEGIES = 12  # that are told


def print_plan(plan: dict[str, Any], console: Console) -> None:
    run, chip = plan['run'], plan['chip']
    torus = ' × '.join(map(str, chip['torus_shape']))
    say(
        console,
        f'{shown(run["name"])} on {chip["count"]} {chip["name"]}{f" ({torus} torus)" if torus else ""}, {run["dtype"]}: '
        f'{amount(peak(plan))}FLOP/s, {gib(chip["memory_bytes"])} at {amount(chip["bandwidth"])}B/s, links '
        f'{amount(chip["links"])}B/s, beyond {chip["domain"]:,} chips {amount(chip["network"])}B/s a chip ({chip["source"]})',
    )
    console.print()
    for table in tables(plan):
        # A table's own title would be no wider than the table.
        title, table.title = table.title, None
        say(console, str(title), style='bold')
        console.print(Fitted(table))
        console.print()
    say(console, flops_line(plan))
    if plan['what'] != 'bill':
        console.print()
        for line in verdict(plan):
            say(console, line, style='' if plan['fits'] else 'bold red')


def say(console: Console, line: str, style: str = '') -> None:
    """Prints text in lines of whole words."""
    for part in wrapped(line, console.width):
        console.print(Text(part, style=style), soft_wrap=True)


def tables(plan: dict[str, Any]) -> Iterator[Table]:
    yield bill_table(plan)
    yield flops_table(plan)
    yield rules_table(plan)
    if plan['what'] == 'bill':
        return
    if plan['search']:
        yield search_table(plan['search'])
    yield memory_table(plan)
    if plan['fits']:
        yield time_table(plan)
        yield links_table(plan)
    if 'compiled' in plan:
        yield compiled_table(plan)


def bill_table(plan: dict[str, Any]) -> Table:
    """Parameters by part, one layer's and all layers', and what they take in each precision."""
    p = plan['parameters']
    table = _table('Parameters', 'part', 'of what', 'one', 'times', 'all', 'share', *BYTES)
    sizes = lambda count: [gb(count * size) for size in BYTES.values()]

    def row(name: str, line: dict[str, Any]) -> None:
        numbers = (f'{line[field]:,}' for field in ('each', 'times', 'total'))
        share = f'{line["total"] / p["total"]:.1%}'
        table.add_row(name, line['shapes'], *numbers, share, *sizes(line['total']))

    layers = {line['layer']: line for line in p['bill']['layers']}
    last = ''
    for line in [*p['bill']['rows'], {'layer': ''}]:
        if last and line['layer'] != last:
            row(f'= {last}', layers[last])
        last = line['layer']
        if 'part' in line:
            row(f'{"  " if last else ""}{line["part"].replace("_", " ")}', line)
    table.add_section()
    table.add_row('total', '', '', '', f'{p["total"]:,}', '', *sizes(p['total']))
    share = f'{p["active"] / p["total"]:.1%}'
    table.add_row('active for a token', '', '', '', f'{p["active"]:,}', share, *sizes(p['active']))
    return table


def flops_table(plan: dict[str, Any]) -> Table:
    f, c = plan['flops_per_token'], plan['context']
    kinds = ('train', 'prefill', 'decode')
    table = _table(f'FLOPs a token, {c:,} tokens of context: what the model needs, matmuls, causal', 'part', *kinds)
    for part in f['by_part']['train'] | f['by_part']['decode']:
        figures = (f['by_part'][what].get(part) for what in kinds)
        table.add_row(part.replace('_', ' '), *('' if figure is None else amount(figure) for figure in figures))
    table.add_section()
    table.add_row('all', *(amount(f[what]) for what in kinds))
    return table


def flops_line(plan: dict[str, Any]) -> str:
    """What training executes, and what the cache keeps."""
    c = plan['cache']
    shared = c['numbers'] != c['without_sharing']
    alone = f' (a key and a value for each query head would be {2 * c["without_sharing"]:,})' if shared else ''
    traced = ['counted by tracing, not by part: a kind of layer does not say what it costs'] if plan['traced'] else []
    lines = [*traced, f'{c["kind"]} cache: {plan["cache_bytes_per_token"]:,.0f} bytes a token in bfloat16{alone}']
    if c['state']:
        lines.append(f'{gb(c["state"])} a row, however long it is')
    if c['windowed']:
        lines.append(
            f'{gb(c["bytes"])} for {plan["context"]:,}, of which layers with a window keep {c["window"]:,} each: '
            f'all in every layer would be {gb(c["full_bytes"])}'
        )
    if 'executed_flops_per_token' in plan:
        executed = amount(plan['executed_flops_per_token'])
        lines.append(f'training executes {executed}, with what remat={plan["remat"]} computes again')
    return '; '.join(lines)


def rules_table(plan: dict[str, Any]) -> Table:
    table = _table('Rules of thumb', 'rule', 'is said to be', 'FLOPs', 'exact', 'times', 'why it differs')
    for rule in plan['rules_of_thumb']:
        figures = (amount(rule['rule']), amount(rule['exact']), f'{rule["times"]:.3g}')
        table.add_row(rule['name'], rule['about'], *figures, rule['why'])
    return table


def search_table(search: dict[str, Any]) -> Table:
    best, every = search['ranked'][:STRATEGIES], len(search['ranked'])
    serving = 'rows' in best[0]['settings']
    which = 'of each set of axes' if every <= STRATEGIES else f'{STRATEGIES} of {every} sets of axes'
    table = _table(
        f'Search: {search["meshes"]:,} meshes divide model and {"rows" if serving else "batch"}; the best {which}',
        *('mesh', *(['rows'] if serving else ['remat', 'parts']), 's/step', 'GiB', 'why'),
    )
    for choice in best:
        settings = choice['settings']
        if serving:
            how = [f'{settings["rows"]:,}']
        else:
            cut = f' × {settings["training.microbatches"]}' if 'training.microbatches' in settings else ''
            how = [settings['compute.remat'], f'{settings["training.accumulation"]:,}{cut}']
        seconds = f'{choice["step_seconds"]:.3g}' if choice['fits'] else '–'
        table.add_row(choice['mesh'], *how, seconds, in_gib(choice['memory_bytes']), choice['why'])
    return table


def memory_table(plan: dict[str, Any]) -> Table:
    m, room = plan['memory_per_chip_bytes'], plan['memory_available_bytes']
    table = _table(
        f'Memory of a chip, mesh {MeshConfig(**plan["mesh"])} ({plan["mesh_is"]})', 'part', 'GiB', 'share of the chip'
    )
    for part, size in m.items():
        if part == 'total':
            table.add_section()
        if size:
            table.add_row(part, in_gib(size), f'{size / room:.1%}')
    table.add_row('fits' if plan['fits'] else 'DOES NOT FIT', in_gib(room), 'of the chip')
    return table


def time_table(plan: dict[str, Any]) -> Table:
    t = plan['time']
    table = _table(
        'Time of a step on a chip, at its peaks', 'part', 'FLOPs', 's multiplying', 'bytes', 's moving', 'FLOPs a byte'
    )
    for part in t['parts']:
        computing = (amount(part['flops']), f'{part["compute_seconds"]:.4g}')
        moving = (amount(part['bytes']) + 'B', f'{part["memory_seconds"]:.4g}')
        intensity = part['flops'] / part['bytes'] if part['bytes'] else 0
        table.add_row(part['name'].replace('_', ' '), *computing, *moving, f'{intensity:,.0f}')
    table.add_section()
    table.add_row('all', '', f'{t["compute_seconds"]:.4g}', '', f'{t["memory_seconds"]:.4g}', '')
    return table


def links_table(plan: dict[str, Any]) -> Table:
    table = _table('Sent by a chip in a step', 'over', 'kind', 'calls', 'bytes', 'bytes/s', 'seconds', 'hides behind')
    behind = {'nowhere': 'nothing: waits', 'anywhere': 'all work', 'attention': 'attention'}
    for send in plan['time']['collectives']:
        if send['seconds'] > 1e-3 * plan['time']['predicted_seconds']:
            sent = f'{send["calls"]:,.0f}', amount(send['bytes']) + 'B', amount(send['rate'])
            table.add_row(send['axes'], send['kind'], *sent, f'{send["seconds"]:.4g}', behind[send['hides']])
    return table


def compiled_table(plan: dict[str, Any]) -> Table:
    c = plan['compiled']
    took = sum(c['seconds'].values())
    said = f': {_gist(c["message"])}' if c['message'] else ''
    title = f'Compiled: {c["status"]}{f" in {took:.0f} s" if took else ""}{said}'
    table = _table(title, 'what', 'planned', 'compiled', 'ratio')
    compare = lambda name, planned, found: table.add_row(
        name, amount(planned) + 'B', amount(found) + 'B', f'{found / planned:.3f}' if planned else 'not planned'
    )
    if 'total' in c['memory_per_chip_bytes']:
        compare('memory of a chip', c['planned_memory_bytes'], c['memory_per_chip_bytes']['total'])
    for name, size in c['memory_per_chip_bytes'].items():
        # Of TPUs they count memory twice (planner/aot_worker.py).
        if name != 'total' and not (name == 'temporaries' and CHIPS[plan['chip']['name']].platform == 'tpu'):
            table.add_row(f'  {name}', '', amount(size) + 'B', '')
    for row in c['collectives']:
        if c['status'] == 'compiled':
            compare(f'{row["kind"]} over {row["axes"]}', row['planned_bytes'], row['bytes'])
    for line in c['unplanned']:
        table.add_row(f'unplanned: {line}', '', '', '')
    return table


def _gist(message: str) -> str:
    """The line of a long message that says what went wrong."""
    lines = message.strip().splitlines()
    return next((line for line in reversed(lines) if 'Error' in line or 'EXHAUSTED' in line), lines[-1])


def verdict(plan: dict[str, Any]) -> list[str]:
    """The figures that one came for, a line each; of what does not fit, what would."""
    if not plan['fits']:
        return [does_not_fit(plan)]
    t = plan['time']
    lines = [
        f'Step: at least {t["bound_seconds"]:.4g} s (limit: {t["limit"]}), {t["apart_seconds"]:.4g} s if nothing overlaps; '
        f'predicted {plan["step_seconds"]:.4g} s with an efficiency of {t["efficiency"]:.2f}.',
    ]
    if plan['what'] == 'train':
        r = plan['training']
        lines.append(
            f'{plan["tokens_per_second"]:,.0f} tokens/s on all chips, {count(plan["tokens_per_day"])} tokens a day, MFU '
            f'{plan["mfu"]:.1%} (at most {plan["mfu_at_most"]:.1%}).'
        )
        costs = [f'{count(r["tokens"])} tokens take {r["days"]:.3g} days, {figure(r["chip_hours"])} chip-hours']
        if r['cost'] is not None:
            costs.append(f'cost {shown(r["currency"], 20)} {figure(r["cost"])}')
        if r['energy_kwh'] is not None:
            costs.append(f'{figure(r["energy_kwh"])} kWh at {r["watts_per_chip"]:.0f} W a chip')
        lines.append(f'{", ".join(costs)}. Chinchilla: {count(r["chinchilla_tokens"])} tokens.')
    else:
        s = plan['serving']
        many, length = s['prefill_rows'], f'{s["prompt"]:,}'
        reading = f'{many:,} prompts of {length} are read' if many > 1 else f'a prompt of {length} is read'
        lines.append(
            f'{s["rows"]:,} rows of {s["length"]:,} tokens: {plan["tokens_per_second"]:,.0f} tokens/s of all rows together, '
            f'{s["tokens_per_second_per_row"]:.3g} of each; {reading} in '
            f'{s["prefill_seconds"]:.3g} s (at least {s["prefill_bound_seconds"]:.3g} s).'
        )
        if s['cost_per_million_tokens'] is not None:
            cost = figure(s['cost_per_million_tokens'])
            lines.append(f'A million tokens cost {shown(s["currency"], 20)} {cost}.')
    return lines


def does_not_fit(plan: dict[str, Any]) -> str:
    """That a plan does not fit, why, and how many chips would do."""
    memory, room, chips = plan['memory_per_chip_bytes'], plan['memory_available_bytes'], plan['chip']['count']
    name, size = max(((part, size) for part, size in memory.items() if part != 'total'), key=lambda one: one[1])
    found = plan['fits_from']
    if found is None:
        works = 'No number of chips that divides it was found to hold it: it needs a smaller model, batch or length.'
    elif found['chips'] == chips:
        how = ', '.join(f'{key}={value}' for key, value in found['settings'].items() if value != 1)
        works = f'On as many chips this fits: {how}; --mesh auto finds the fastest that does.'
    else:
        works = f'It fits {"from" if found["chips"] > chips else "on"} {found["chips"]:,} chips'
        if without := found['without']:
            works += (
                f', but no number of them that was tried reaches --{without}: --chips {found["chips"]} '
                f'--rows {found["settings"]["rows"]} --mesh auto without it plans that.'
            )
        else:
            works += f': --chips {found["chips"]} --mesh auto plans that.'
    return f'DOES NOT FIT: a chip needs {gib(memory["total"])}, {gib(size)} of it {name}, and has {gib(room)}. {works}'


def peak(plan: dict[str, Any]) -> float:
    """FLOP/s of a chip in the run's dtype."""
    return plan['chip']['float32_flops' if plan['run']['dtype'] == 'float32' else 'bfloat16_flops']


WORDS = ('part', 'rule', 'mesh', 'over', 'what', 'why', 'why it differs', 'of what', 'is said to be', 'hides behind')
LEFT = (*WORDS, 'kind', 'remat')


def _table(title: str, *columns: str) -> Table:
    """An empty table: words may be folded, numbers and names not."""
    table = Table(title=title, pad_edge=False, box=None)
    for column in columns:
        table.add_column(column, justify='left' if column in LEFT else 'right', no_wrap=column not in WORDS)
    return table


def amount(x: float) -> str:
    """A number with its prefix, as in `4.2 T`."""
    for unit, size in (('P', 1e15), ('T', 1e12), ('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if abs(x) >= size:
            return f'{x / size:.3g} {unit}'
    return f'{x:.3g} '


def count(x: float) -> str:
    """A number of parameters or tokens as people tell it, as in `405.9 B`."""
    for unit, size in (('T', 1e12), ('B', 1e9), ('M', 1e6), ('k', 1e3)):
        if x >= size:
            return f'{x / size:.4g} {unit}'
    return f'{x:.0f}'


def figure(x: float) -> str:
    """A number of hours or of money: whole where it is large, with three digits where it is small."""
    return f'{x:,.0f}' if x >= 100 else f'{x:.3g}'


def gb(x: float) -> str:
    """Bytes as decimal gigabytes, as model sizes are told; what is small in a smaller unit, with three digits."""
    return f'{x / 1e9:,.2f} GB' if x >= 1e9 else f'{amount(x)}B'


def in_gib(x: float) -> str:
    """Bytes in GiB without the unit, three digits of what is small."""
    return f'{x / 2**30:.2f}' if x >= 2**30 else f'{x / 2**30:.3g}'
