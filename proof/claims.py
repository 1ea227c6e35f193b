"""What is often said of a model's numbers, beside what they are: `python -m weft.proof.claims`. See docs/claims.md."""

import dataclasses
from pathlib import Path

from weft.planner.bill import bill
from weft.training.config import load_config

CONFIGS = Path(__file__).parents[1] / 'configs/models'
CLOSE = 0.01  # apart, by the exact figure: a claim is rounded


@dataclasses.dataclass(frozen=True)
class ClaimedFigure:
    """A line of a table of parameters, as claimed and as it is."""

    part: str
    shapes: str
    claimed: float
    exact: float

    @property
    def holds(self) -> bool:
        return abs(self.claimed - self.exact) <= CLOSE * self.exact

    @property
    def verdict(self) -> str:
        return 'so' if self.holds else f'{self.claimed / self.exact:.1f} times too large'


def llama_405b() -> tuple[ClaimedFigure, ...]:
    """The table of Llama 3 405B line by line, in parameters, as "The Bill" among this project's first documents has it."""
    found = bill(load_config(CONFIGS / 'llama-3.1-405b.yaml').model)
    row = {one.part: one for one in found.rows}
    (layer,) = found.layers
    return (
        ClaimedFigure('embedding', row['embedding'].shapes, 2.10e9, row['embedding'].total),
        ClaimedFigure('attention, a layer', row['attention'].shapes, 5.7e9, row['attention'].each),
        ClaimedFigure('FFN, a layer', row['mlp'].shapes, 26.17e9, row['mlp'].each),
        ClaimedFigure('a layer', 'with two norms', 31.87e9, layer.each),
        ClaimedFigure('all layers', f'× {layer.times}', 401.6e9, layer.total),
        ClaimedFigure('head', row['head'].shapes, 2.10e9, row['head'].total),
        ClaimedFigure('total', 'with the last norm', 405.8e9, found.total),
    )


def markdown(lines: tuple[ClaimedFigure, ...]) -> str:
    """The lines as a table, in billions."""
    rows = ['| part | of | says | is | parameters | |', '|---|---|---:|---:|---:|---|']
    for one in lines:
        says, is_ = f'{one.claimed / 1e9:,.2f} B', f'{one.exact / 1e9:,.2f} B'
        rows.append(f'| {one.part} | {one.shapes} | {says} | {is_} | {one.exact:,} | {one.verdict} |')
    return '\n'.join(rows)


if __name__ == '__main__':
    print(markdown(llama_405b()))
