"""A plan as one HTML page: its figures, and pictures of memory, time and roofline as SVG. Nothing is loaded from elsewhere."""

import collections
import html
import math
import re
from collections.abc import Iterable
from typing import Any

from rich.table import Table

from weft.planner.plan_text import amount, count, flops_line, in_gib, peak, tables, verdict
from weft.sharding.mesh import MeshConfig
from weft.training.tables import bound

# Okabe and Ito's palette, which colour-blind readers can tell apart; grey and a light blue beside it.
COLOURS = ('#0072b2', '#e69f00', '#009e73', '#cc79a7', '#56b4e9', '#d55e00', '#8c8c8c', '#f0e442', '#5d3a9b', '#a6761d')
WIDTH = 860  # of a picture, in its own units
LEFT = 150  # of them for names
LONG = 60  # characters of a cell that is broken into lines
INK, GRID, ALARM = 'var(--ink)', 'var(--grid)', 'var(--alarm)'
STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --quiet: #666; --grid: #ddd; --alarm: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181c; --quiet: #a0a0a0; --grid: #3a3d44; --alarm: #ff8a80; }
}
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: var(--ink);
       background: var(--paper); overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
table { border-collapse: collapse; font-size: 13px; overflow-wrap: normal; }
th, td { padding: .15rem .7rem .15rem 0; text-align: right; white-space: nowrap; vertical-align: top; }
th { border-bottom: 1px solid var(--quiet); } td.words, th.words, th.long { text-align: left; }
td.long { text-align: left; white-space: normal; min-width: 16rem; }
svg { width: 100%; min-width: 38rem; height: auto; display: block; }
svg text { font: 13px system-ui, sans-serif; fill: var(--ink); }
.quiet { color: var(--quiet); } .alarm { color: var(--alarm); }
p.alarm { border: 1px solid; padding: .5rem .8rem; font-weight: 600; }
.big { display: flex; flex-wrap: wrap; gap: 1rem 2.2rem; margin: 1rem 0; } .big b { display: block; font-size: 1.5rem; }
.wide { overflow-x: auto; } .whole { white-space: nowrap; }
"""


def plan_page(plan: dict[str, Any]) -> str:
    """The page; whatever a config says is escaped."""
    run, chip = plan['run'], plan['chip']
    title = f'{run["name"]} on {chip["count"]} {chip["name"]}'
    body = [f'<h1>{_text(title)}</h1>', *(pictures(plan) if plan['what'] != 'bill' else [])]
    body += [f'<h2>{_text(table.title)}</h2>{_table(table)}' for table in tables(plan)]
    body += [f'<p>{_prose(flops_line(plan))}</p>', f'<p class="quiet">Chip: {_text(chip["source"])}.</p>']
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<title>{_text(title)}</title><style>{STYLE}</style>{"".join(body)}</html>\n'
    )


def pictures(plan: dict[str, Any]) -> list[str]:
    """What a step needs, drawn; of one that does not fit its memory alone."""
    lines = ''.join(f'<p>{_prose(line)}</p>' for line in verdict(plan))
    mesh = f'{plan["what"]}, mesh {MeshConfig(**plan["mesh"])} ({plan["mesh_is"]}), {plan["run"]["dtype"]}'
    about = f'<p class="quiet">{_prose(mesh)}</p>'
    memory = [headline(plan), '<h2>Memory of a chip</h2>', memory_picture(plan)]
    if not plan['fits']:
        return [about, lines.replace('<p>', '<p class="alarm">'), *memory]
    time = ['<h2>Time of a step</h2>', time_picture(plan), lines]
    return [about, *memory, *time, '<h2>Roofline</h2>', roofline_picture(plan)]


def headline(plan: dict[str, Any]) -> str:
    memory, room = plan['memory_per_chip_bytes']['total'], plan['memory_available_bytes']
    figures = [
        ('parameters', count(plan['parameters']['total'])),
        ('active', count(plan['parameters']['active'])),
        ('of memory' if plan['fits'] else 'of memory: DOES NOT FIT', f'{memory / room:.0%}'),
    ]
    if plan['fits']:
        figures += [
            ('a step, predicted', f'{plan["step_seconds"]:.3g} s'),
            ('tokens/s in all', amount(plan['tokens_per_second'])),
            ('MFU', f'{plan["mfu"]:.1%}'),
        ]
    kind = lambda name: ' class="alarm"' if 'NOT' in name else ''
    shown = (f'<div{kind(name)}><b>{_prose(value)}</b>{_text(name)}</div>' for name, value in figures)
    return f'<div class="big">{"".join(shown)}</div>'


def memory_picture(plan: dict[str, Any]) -> str:
    """One bar of all parts, against what the chip has."""
    parts = [(name, size) for name, size in plan['memory_per_chip_bytes'].items() if size and name != 'total']
    room = plan['memory_available_bytes']
    most = max(room, sum(size for _, size in parts)) * 1.05
    scale = (WIDTH - 20) / most
    shapes, x = [], 10.0
    for (_, size), colour in zip(parts, COLOURS, strict=False):
        shapes.append(_rect(x, 22, size * scale, 44, colour))
        x += size * scale
    edge = 10 + room * scale
    shapes.append(_line(edge, 12, edge, 76, INK))
    if x > edge:
        over = f'<rect x="{edge:.1f}" y="18" width="{x - edge:.1f}" height="52" fill="none"'
        shapes.append(f'{over} stroke="{ALARM}" stroke-width="3"/>')
    shapes.append(_label(edge - 6, 12, f'the chip has {room / 2**30:.1f} GiB', 'end'))
    legend, height = _legend([f'{name} {in_gib(size)} GiB' for name, size in parts], 98)
    return _svg(height, [*shapes, legend])


def time_picture(plan: dict[str, Any]) -> str:
    """Bars for each part's multiplying and moving, for what is sent over each set of axes, and for the whole step."""
    t = plan['time']
    sent = collections.defaultdict[str, float](float)
    for send in t['collectives']:
        sent[send['axes']] += send['seconds']
    # Of each row the bars: seconds, and the place of their colour.
    rows: list[tuple[str, list[tuple[float, int]]]] = [
        (part['name'].replace('_', ' '), [(part['compute_seconds'], 0), (part['memory_seconds'], 1)])
        for part in t['parts']
    ]
    rows += [
        (f'links: {axes}', [(seconds, 2)]) for axes, seconds in sent.items() if seconds > 1e-3 * t['bound_seconds']
    ]
    whole = {'bound': 'bound_seconds', 'nothing overlaps': 'apart_seconds', 'predicted': 'predicted_seconds'}
    rows += [(name, [(t[figure], 6)]) for name, figure in whole.items()]
    scale = (WIDTH - LEFT - 90) / max(t[figure] for figure in whole.values())
    shapes, y = [], 6.0
    for name, bars in rows:
        shapes.append(_label(LEFT - 8, y + 7 * len(bars) + 3, name, 'end'))
        for seconds, colour in bars:
            shapes.append(_rect(LEFT, y, max(seconds * scale, 0.5), 12, COLOURS[colour]))
            shapes.append(_label(LEFT + seconds * scale + 6, y + 11, _seconds(seconds)))
            y += 15
        y += 6
    legend, height = _legend(['multiplying, at the peak', 'moving, at the bandwidth', 'sending'], y + 18, LEFT)
    return _svg(height, [*shapes, legend])


def roofline_picture(plan: dict[str, Any]) -> str:
    """FLOP/s that each part can reach by its FLOPs a byte, under the chip's roof; both axes logarithmic."""
    chip = plan['chip']
    top_speed = peak(plan)
    ridge = top_speed / chip['bandwidth']
    parts = [part for part in plan['time']['parts'] if part['flops'] and part['bytes']]
    points = {part['name'].replace('_', ' '): part['flops'] / part['bytes'] for part in parts}
    low, high = min(ridge / 20, *points.values()) / 2, max(ridge * 20, *points.values()) * 2
    bottom, top, height = low * chip['bandwidth'], top_speed * 3, 340
    across = lambda x: LEFT + (WIDTH - LEFT - 30) * math.log(x / low) / math.log(high / low)
    up = lambda y: 20 + (height - 60) * (1 - math.log(y / bottom) / math.log(top / bottom))
    shapes = []
    for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1):
        shapes += [_line(across(10**power), 20, across(10**power), height - 40, GRID)]
        shapes += [_label(across(10**power), height - 24, f'{10.0**power:g}', 'middle')]
    for power in range(math.ceil(math.log10(bottom)), math.floor(math.log10(top)) + 1):
        shapes += [_line(LEFT, up(10**power), WIDTH - 30, up(10**power), GRID)]
        shapes += [_label(LEFT - 8, up(10**power) + 4, f'{amount(10.0**power)}FLOP/s', 'end')]
    roof = f'{across(low):.1f},{up(bottom):.1f} {across(ridge):.1f},{up(top_speed):.1f} {across(high):.1f},{up(top_speed):.1f}'
    shapes.append(f'<polyline points="{roof}" fill="none" stroke="{INK}" stroke-width="2"/>')
    for x, colour in zip(points.values(), COLOURS, strict=False):
        y = up(min(top_speed, x * chip['bandwidth']))
        shapes.append(f'<circle cx="{across(x):.1f}" cy="{y:.1f}" r="7" fill="{colour}" stroke="var(--paper)"/>')
    shapes.append(_label((LEFT + WIDTH) / 2, height - 6, 'FLOPs a byte moved', 'middle'))
    legend, end = _legend([f'{name}, {x:,.0f} FLOPs a byte' for name, x in points.items()], height + 16, LEFT)
    return _svg(end, [*shapes, legend])


def _legend(names: Iterable[str], y: float, left: float = 10) -> tuple[str, float]:
    """Colours and what they stand for, in rows, and where the picture ends."""
    shapes, x = [], left
    for name, colour in zip(names, COLOURS, strict=False):
        width = 26 + 7.6 * len(name)
        if x + width > WIDTH:
            x, y = left, y + 20
        shapes += [_rect(x, y - 10, 12, 12, colour), _label(x + 17, y, name)]
        x += width
    return ''.join(shapes), y + 12


def _seconds(seconds: float) -> str:
    return f'{seconds:.3g} s' if seconds >= 0.1 else f'{seconds * 1e3:.3g} ms'


def _svg(height: float, shapes: Iterable[str]) -> str:
    return f'<div class="wide"><svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{"".join(shapes)}</svg></div>'


def _rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def _line(x: float, y: float, to_x: float, to_y: float, colour: str = INK) -> str:
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="{colour}"/>'


def _label(x: float, y: float, text: str, anchor: str = 'start') -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_text(text)}</text>'


def _text(text: object) -> str:
    return html.escape(str(text))


def _prose(text: str) -> str:
    """Escaped, no line ending between a number and its unit or within an option such as --mesh."""
    return re.sub(r'--[\w-]+', r'<span class="whole">\g<0></span>', _text(bound(text)))


def _table(table: Table) -> str:
    kinds = []
    for column in table.columns:
        long = any(len(bound(str(cell))) > LONG for cell in column.cells)
        kinds.append(' class="long"' if long else ' class="words"' if column.justify == 'left' else '')

    def row(tag: str, cells: Iterable[object]) -> str:
        shown = (f'<{tag}{kind}>{_text(cell)}</{tag}>' for cell, kind in zip(cells, kinds, strict=True))
        return f'<tr>{"".join(shown)}</tr>'

    rows = zip(*([bound(str(cell)) for cell in column.cells] for column in table.columns), strict=True)
    heads = row('th', (column.header for column in table.columns))
    return f'<div class="wide"><table>{heads}{"".join(row("td", cells) for cells in rows)}</table></div>'
