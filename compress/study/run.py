"""Goes through cells, measures those that are missing or stale, and tells how long it will take."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from weft.compress.study.cells import Cell, of_settings
from weft.compress.study.measure import measure_cell
from weft.compress.study.rows import Row, append, key_in, key_of, make_row, measuring_code, mend, read_rows
from weft.compress.study.subjects import Say, Subject, Subjects
from weft.runtime.errors import Diverged, UserError


def run_cells(
    cells: Sequence[Cell],
    subjects: Subjects,
    results: Path,
    work: Path,
    say: Say,
    measure: Callable[[Cell, Subjects, Path, Say], Row] = measure_cell,
) -> int:
    """Measures the cells whose rows are missing or stale, in order; returns how many it measured.

    What a method refuses, and a model whose numbers are not finite any more, is a row too: it says why there is no figure.
    """
    reading = {name: int(value) for name, value in vars(subjects.reading).items()}
    known = {row['cell']: row for row in read_rows(results, say)}
    mend(results)
    begun, done, spent = time.monotonic(), 0, list[float]()
    for number, cell in enumerate(cells, start=1):
        subject: Subject = subjects.open(cell.model)
        key = key_of(cell, subject.sha256, reading)
        row = known.get(cell.name)
        if row is not None and key_in(row) == key:
            continue
        if row is not None:
            say(f'{cell.name}: stale, for {key.why(key_in(row))} changed: measured again')
        began = time.monotonic()
        try:
            figures = measure(cell, subjects, work, say)
        except (UserError, Diverged) as error:
            figures = {'refused': str(error)}
        append(results, make_row(cell, key, reading, figures, time.monotonic() - began))
        done += 1
        spent.append(time.monotonic() - began)
        left = sum(is_due(other, known) for other in cells[number:])
        say(f'{number}/{len(cells)}  {cell.name}: {told(figures)}; {in_words(left * statistics.median(spent))} left')
    if done:
        say(f'{done} cells in {in_words(time.monotonic() - begun)}')
    return done


def is_due(cell: Cell, known: dict[str, Row]) -> bool:
    """Whether it is to be measured, as far as that is known without the model."""
    return cell.name not in known or key_in(known[cell.name]).code != measuring_code(cell)


def told(figures: Row) -> str:
    """A row in a few words."""
    if 'refused' in figures:
        return f'no figure: {figures["refused"]}'
    if 'ratio' in figures:
        return f'{figures["tokens_per_second"]["value"]:.0f} tokens/s, {figures["ratio"]["value"]:.2f} × the original'
    if 'quality' not in figures:
        return 'done'
    held = figures['quality']['held-out']
    cost = held['perplexity_cost']
    more = '' if cost is None else f' ({cost["value"]:+.1%})'
    return f'{figures["share"]:.3f} of the bits, perplexity {held["perplexity"]["value"]:.2f}{more}'


def in_words(seconds: float) -> str:
    """A duration."""
    return f'{seconds:.0f} s' if seconds < 100 else f'{seconds / 60:.0f} min'


def stale_rows(rows: Sequence[Row], cells: Sequence[Cell], model_of: Callable[[str], str | None]) -> dict[str, str]:
    """Why rows no longer hold, by cell; `model_of` gives a model's hash, or None where it is not known."""
    names = {cell.name for cell in cells}
    found = {}
    for row in rows:
        if row['cell'] not in names:
            found[row['cell']] = 'the design has no such cell any more'
            continue
        have = key_in(row)
        model = model_of(of_settings(row['settings']).model)
        want = key_of(of_settings(row['settings']), have.model if model is None else model, row['reading'])
        if have != want:
            found[row['cell']] = f'{want.why(have)} changed'
    return found
