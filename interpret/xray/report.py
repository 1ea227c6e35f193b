"""The X-ray of a text, or of two side by side, as one object that JSON holds and weft.interpret.page shows.

Letters: L layers, T tokens, N heads, D model, V vocabulary.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from weft.inference.run import TrainedRun
from weft.interpret.xray import compare
from weft.interpret.xray import index as cell_index
from weft.interpret.xray.cells import check_cell, promoted
from weft.interpret.xray.encode import Strings, array, number
from weft.interpret.xray.observed import CELLS, check_model, observe, text_ids
from weft.interpret.xray.patching import ATTENTION, HEADS, MLP, RESIDUAL, Change, Patches, column, unit
from weft.interpret.xray.text import Cell, Examined, Stage, examine
from weft.model.cost import parameters
from weft.model.decoder import Decoder

VERSION = 1
MOST_CELLS = 1500  # of which a report tells what their values promote
MOST_PLACES = 8  # of two texts that are patched one by one
LEAST_DIFFERENCE = 1e-3  # of logits between two answers, of which shares can be told
BY_NAME = {'residual': RESIDUAL, 'attention': ATTENTION, 'feed_forward': MLP}


@dataclasses.dataclass(frozen=True)
class Made:
    """How a report came about."""

    command: str
    weft: str
    run: str
    title: str


def report(
    run: TrainedRun, text: str, against: str | None, made: Made, stage: Stage, named: Sequence[Cell] = ()
) -> dict[str, Any]:
    """Runs all instruments on a text, and on another beside it; use it under `jax.set_mesh(run.mesh)`.

    `stage(what, of how many)` is told what goes on, and gives who is told how many are done; `named` are cells that are ablated
    and told of beside those that fire most. Raises UserError for a text that is empty or too long, for a cell that is not
    there, and for a model that is no decoder.
    """
    begin = time.perf_counter()
    tokenizer, c = run.tokenizer, run.config.model
    assert tokenizer is not None
    assert c.vocabulary is not None
    check_model(run.kind)
    texts = [text] if against is None else [text, against]
    ids = [text_ids(run, option, one) for option, one in zip(('--text', '--against'), texts, strict=False)]
    for layer, cell in named:
        check_cell(c, f'--cell {layer}:{cell}', layer, cell)
    found_index = cell_index.load(run.folder) if isinstance(run.folder, Path) else None
    strings = Strings(tokenizer)
    done = stage('forward pass', 1)
    observed, random = observe(run, ids)
    done(1)
    examined = [
        examine(run, one, of_one, random, strings, stage, named) for one, of_one in zip(texts, observed, strict=True)
    ]
    found: dict[str, Any] = {'version': VERSION, 'title': made.title, 'model': model_facts(run)}
    found['texts'] = [one.report for one in examined]
    found |= {'compare': None, 'patch': None}
    if len(examined) == 2:
        pairs = compare.compare((ids[0], ids[1]), (examined[0].residual_LTD, examined[1].residual_LTD))
        found['compare'] = {
            'alignment': [list(pair) for pair in pairs.pairs],
            'cosine': array(pairs.cosine_LA),
            'parted': pairs.parted,
        }
        found |= patch(run.model, examined[0], examined[1], strings, stage)
    found['cells'] = told_cells(run, examined, found_index, strings, stage)
    found['index'] = None
    if found_index is not None:
        found['index'] = {'tokens': found_index.tokens, 'source': str(found_index.about['source'])}
    found['strings'] = strings.texts
    seconds = number(time.perf_counter() - begin)
    found['made'] = {'command': made.command, 'weft': made.weft, 'run': made.run, 'step': run.step, 'seconds': seconds}
    return found


def model_facts(run: TrainedRun) -> dict[str, Any]:
    """Sizes of the model."""
    c = run.config.model
    dense = [not spec.experts for spec in c.layer_specs]
    return {
        'name': run.config.name,
        'layers': c.layers,
        'heads': getattr(c.attention, 'heads', None),
        'kv_heads': getattr(c.attention, 'kv_heads', None),
        'model_dim': c.model_dim,
        'hidden': getattr(c.mlp, 'dim', None) if any(dense) else None,
        'experts': c.moe.experts if c.moe else None,
        'top_k': c.moe.top_k if c.moe else None,
        'vocabulary': c.vocabulary,
        'parameters': sum(parameters(c).values()),
        'kinds': ['dense' if one else 'experts' for one in dense],
    }


def told_cells(
    run: TrainedRun,
    examined: Sequence[Examined],
    found_index: cell_index.Index | None,
    strings: Strings,
    stage: Stage,
) -> dict[str, Any]:
    """Of the cells that the texts fire most what their values say and, with an index, the training texts that fire them."""
    cells = list(dict.fromkeys(cell for one in examined for cell in wanted_cells(one)))
    if not cells:
        return {}
    done = stage('what cells promote', len(cells))
    units = examined[0].observed.taps[CELLS].shape[-1]
    told = promoted(run.model, cells, units)
    done(len(cells))
    pairs = lambda some: [[strings.of_id(token), number(logit)] for token, logit in some]
    return {
        f'{layer}:{cell}': {
            'layer': layer,
            'cell': cell,
            'promotes': pairs(one.promotes),
            'suppresses': pairs(one.suppresses),
            'norm': number(one.norm),
            'texts': None if found_index is None else training_texts(run, found_index, layer, cell),
        }
        for (layer, cell), one in zip(cells, told, strict=True)
    }


def wanted_cells(one: Examined) -> list[tuple[int, int]]:
    """The cells of which a report tells more: of all layers and tokens first the strongest, then the second … by share."""
    if one.cells is None:
        return []
    found = dict[tuple[int, int], None]()
    ablated = one.report['ablation']['cells']
    found.update(dict.fromkeys((cell['layer'], cell['cell']) for cell in ablated))
    for k in range(one.cells.cell_LTk.shape[-1]):
        share_LT = one.cells.share_LTk[..., k]
        for at in np.argsort(-share_LT, axis=None, kind='stable'):
            layer, token = np.unravel_index(at, share_LT.shape)
            if share_LT[layer, token] > 0 and len(found) < MOST_CELLS:
                found[int(layer), int(one.cells.cell_LTk[layer, token, k])] = None
    return list(found)


def training_texts(run: TrainedRun, found_index: cell_index.Index, layer: int, cell: int) -> list[dict[str, Any]]:
    """The texts that fire a cell most, as text."""
    tokenizer = run.tokenizer
    assert tokenizer is not None
    return [
        {
            'before': tokenizer.decode(before),
            'token': tokenizer.decode([token]),
            'after': tokenizer.decode(after),
            'activation': number(activation),
        }
        for before, token, after, activation in found_index.texts(layer, cell)
    ]


def patch(model: Decoder, one: Examined, other: Examined, strings: Strings, stage: Stage) -> dict[str, Any]:
    """Where the difference between two texts' answers stands: values of the first are put into the run on the second.

    The share that comes back of the difference between two logits (Meng et al. 2022, arXiv:2202.05262; as in Wang et al. 2022,
    arXiv:2211.00593): (patched − corrupted) / (clean − corrupted), of answer 0's log-probability less answer 1's after the
    last token: clean is the first text, corrupted the second.
    """
    ids = one.observed.ids, other.observed.ids
    if len(ids[0]) != len(ids[1]):
        why = f'the texts have {len(ids[0])} and {len(ids[1])} tokens: patching needs texts of equally many'
        return {'patch': None, 'patch_reason': why}
    answers = compare.answers(one.log_last_V, other.log_last_V)
    gap = lambda log_V: float(log_V[answers[0]] - log_V[answers[1]])
    clean, corrupted = gap(one.log_last_V), gap(other.log_last_V)
    if abs(clean - corrupted) < LEAST_DIFFERENCE:
        return {
            'patch': None,
            'patch_reason': 'the model says the same after both texts: there is nothing to bring back',
        }
    taps, L, T = one.observed.taps, model.config.layers, len(ids[0])
    places = compare.differing(ids, MOST_PLACES)
    values = {name: taps[name] for name in (*BY_NAME.values(), HEADS) if name in taps}
    heads = taps[HEADS].shape[2] if HEADS in taps else 0
    changes = [Change(name, layer, column(at, T)) for name in BY_NAME.values() for layer in range(L) for at in places]
    changes += [Change(HEADS, layer, unit(head, heads)) for layer in range(L) for head in range(heads)]
    log_CV = Patches(model, ids[1], values).log_probabilities(changes, stage('patching', len(changes)))
    share = (log_CV[:, answers[0]] - log_CV[:, answers[1]] - corrupted) / (clean - corrupted)
    found: dict[str, Any] = {
        'answers': [strings.of_id(answer) for answer in answers],
        'clean': number(clean),
        'corrupted': number(corrupted),
        'positions': places,
    }
    for row, name in enumerate(BY_NAME):
        size = L * len(places)
        found[name] = array(share[row * size : (row + 1) * size].reshape(L, -1))
    found['heads'] = array(share[len(BY_NAME) * L * len(places) :].reshape(L, heads)) if heads else None
    return {'patch': found}
