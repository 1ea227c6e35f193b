"""How far a run is, in a terminal: a bar, and a line for each row of metrics."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn


def progress_bar(console: Console, steps: int) -> Progress:
    """Where the run is; a log file gets lines instead (see Run.log). What has no room on the line is left out, none is cut."""
    columns: dict[str, tuple[ProgressColumn, int]] = {  # with the most cells that each takes
        'what': (TextColumn('{task.description}'), len('compiling')),
        'bar': (BarColumn(bar_width=30), 30),
        'count': (MofNCompleteColumn(), 2 * len(str(steps)) + 1),
        'loss': (TextColumn('{task.fields[loss]}'), len('loss 12.3456')),
        'speed': (TextColumn('{task.fields[speed]}'), len('1,234,567 tokens/s')),
        'remaining': (TimeRemainingColumn(), len('12:34:56')),
    }
    room, kept = console.width, set[str]()
    for name in ('count', 'loss', 'speed', 'remaining', 'what', 'bar'):  # the first is needed most
        room -= columns[name][1] + 1
        if room < -1:  # nothing follows the last
            break
        kept.add(name)
    return Progress(
        *(column for name, (column, _) in columns.items() if name in kept),
        console=console,
        disable=not console.is_terminal or console.quiet,
    )


def metrics_line(row: dict[str, Any], steps: int, steady: bool = True) -> str:
    """A row of metrics as a line for a person; `steady`: its speed is without the time that compiling took."""
    text = f'step {row["step"]}/{steps}  loss {row["loss"]:.4f}  {row["tokens_per_second"]:,.0f} tokens/s'
    text += '' if steady else ' with compiling'
    if 'router.max_share' in row:
        text += f'  largest expert share {row["router.max_share"]:.2f}'
    if 'validation_loss' in row:
        text += f'  validation {row["validation_loss"]:.4f} nats, {row["validation_bits_per_byte"]:.4f} bits/byte'
    return text
