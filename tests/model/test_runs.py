"""Layers of several kinds in a row, as few written down as can be."""

import random
import time

from weft.model.layer_groups import LayerGroup, LayerSpec, group_layers

A, B, C = LayerSpec(), LayerSpec(experts=True), LayerSpec(windowed=True)


def every_way(kinds: tuple[LayerSpec, ...]) -> tuple[LayerGroup, ...]:
    """What `group_layers` is to find, by trying all."""
    if not kinds:
        return ()
    found = []
    for unit in range(1, len(kinds) + 1):
        for repeats in range(1, len(kinds) // unit + 1):
            if kinds[: unit * repeats] == kinds[:unit] * repeats:
                found.append((LayerGroup(kinds[:unit], repeats), *every_way(kinds[unit * repeats :])))
    return min(found, key=lambda runs: (sum(len(run.specs) for run in runs), len(runs), -runs[0].layers))


def test_runs_are_the_best_of_all_ways():
    chance = random.Random(0)
    for _ in range(120):
        pattern = [chance.choice((A, B, C)) for _ in range(chance.randint(1, 4))]
        kinds = [A] * chance.randint(0, 3) + (pattern * 9)[: chance.randint(0, 9)]
        if chance.random() < 0.3:
            kinds = [chance.choice((A, B)) for _ in kinds]
        assert group_layers(tuple(kinds)) == every_way(tuple(kinds)), kinds


def test_thousands_of_layers_take_seconds_whatever_their_kinds():
    chance = random.Random(0)
    began = time.process_time()
    assert group_layers((A,) * 3 + (B,) * 4997) == (LayerGroup((A,), 3), LayerGroup((B,), 4997))
    assert group_layers((A, B, B, C) * 500) == (LayerGroup((A, B, B, C), 500),)
    kinds = tuple(chance.choice((A, B)) for _ in range(2000))
    assert sum((run.specs * run.repeats for run in group_layers(kinds)), ()) == kinds
    assert time.process_time() - began < 20
