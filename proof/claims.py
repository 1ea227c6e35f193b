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


# In billions (10^9), from the documents that this project grew from: "The Bill" of Llama 3 405B.
LLAMA_3_405B = {
    'embedding': 2.10,
    'attention, a layer': 5.7,
    'FFN, a layer': 26.17,
    'a layer': 31.87,
    'all layers': 401.6,
    'head': 2.10,
    'total': 405.8,
}


def llama_405b() -> tuple[ClaimedFigure, ...]:
    """The table of Llama 3 405B line by line, in parameters."""
    found = bill(load_config(CONFIGS / 'llama-3.1-405b.yaml').model)
    row = {one.part: one for one in found.rows}
    (layer,) = found.layers
    exact = {
        'embedding': (row['embedding'].shapes, row['embedding'].total),
        'attention, a layer': (row['attention'].shapes, row['attention'].each),
        'FFN, a layer': (row['mlp'].shapes, row['mlp'].each),
        'a layer': ('with two norms', layer.each),
        'all layers': (f'× {layer.times}', layer.total),
        'head': (row['head'].shapes, row['head'].total),
        'total': ('with the last norm', found.total),
    }
    return tuple(
        ClaimedFigure(part, exact[part][0], claimed * 1e9, exact[part][1]) for part, claimed in LLAMA_3_405B.items()
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
