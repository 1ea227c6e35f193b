"""All instruments on one text, as the part TEXT of a report.

Letters: L layers, T tokens, N heads, D model, K experts of a token, E experts, V vocabulary, M layers of experts.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from weft.inference.run import TrainedRun
from weft.interpret.xray import attention, contributions, experts, programs
from weft.interpret.xray.cells import TopCells, dense_layers, top_cells
from weft.interpret.xray.encode import Strings, array, number, numbers, token_text
from weft.interpret.xray.frozen import freeze
from weft.interpret.xray.lens import lens, residuals
from weft.interpret.xray.observed import Observed
from weft.interpret.xray.patching import (
    ATTENTION,
    CELLS,
    EXPERTS,
    HEADS,
    MLP,
    Change,
    Patches,
    everywhere,
    means,
    of_all_layers,
    unit,
)
from weft.model.decoder import Decoder

TOP_LENS, TOP_CELLS, TOP_KEYS, TOP_PROMOTED = 5, 5, 3, 3
NEW = 16  # tokens that a model of experts goes on with
ABLATED_CELLS = 20
GROUP = 8  # layers whose heads are read by the LM head at once

Cell = tuple[int, int]  # layer and number
Stage = Callable[[str, int], Callable[[int], object]]  # (what, of how many) gives who is told how many are done


@dataclasses.dataclass
class Examined:
    """The part of a report, and what others are made of."""

    report: dict[str, Any]
    observed: Observed
    cells: TopCells | None
    log_last_V: np.ndarray  # log-probabilities after the last token
    residual_LTD: np.ndarray


def examine(
    run: TrainedRun,
    text: str,
    observed: Observed,
    random: Sequence[Observed],
    strings: Strings,
    stage: Stage,
    named: Sequence[Cell] = (),
) -> Examined:
    """Runs all instruments on one text; use it under `jax.set_mesh(run.mesh)`. `named`: cells that are ablated in any case."""
    model, taps, ids = run.model, observed.taps, observed.ids
    residual_LTD = residuals(taps)
    following_T = np.array([*ids[1:], 0])
    last = programs.read(model, residual_LTD[-1], following_T)
    answer_T = last.top_Nk[:, 0]
    report: dict[str, Any] = {'text': text, 'ids': ids, 'tokens': strings.of(ids).tolist()}
    report['next'] = next_tokens(last, strings)
    stage('logit lens', 1)
    found = lens(model, residual_LTD, answer_T)
    report['lens'] = {
        'top': array(strings.of(found.top_LTk[..., :TOP_LENS]), 'u32'),
        'probability': array(found.probability_LTk[..., :TOP_LENS]),
        'entropy': array(found.entropy_LT),
        'answer': array(found.answer_LT),
        'decided': found.decided_T.tolist(),
    }
    report['attention'] = patterns(observed)
    report |= written(model, observed, random, answer_T, strings, stage)
    cells = None
    if CELLS in taps and dense_layers(model):
        done = stage('cells', 1)
        cells = top_cells(model, taps[CELLS], TOP_CELLS)
        done(1)
        kinds = {'cell': 'u32', 'activation': 'f32', 'share': 'f32'}
        report['cells_top'] = {name: array(a, kinds[name]) for name, a in zip(kinds, cells, strict=True)}
    else:
        report['cells_top'] = None
    report['experts'] = of_experts(run, observed, strings, stage)
    report['ablation'], log_last_V = ablation(model, observed, cells, strings, stage, named)
    return Examined(report, observed, cells, log_last_V, residual_LTD)


def next_tokens(last: programs.Read, strings: Strings) -> dict[str, Any]:
    """What the model says next after each token, and how likely it found the token that follows."""
    probability_Tk = np.exp(last.logit_Nk - last.log_sum_N[:, None])
    actual_T = np.exp(last.asked_N - last.log_sum_N)
    return {
        'top': strings.of(last.top_Nk).tolist(),
        'probability': numbers(probability_Tk),
        'entropy': numbers(last.entropy_N),
        'actual': {'probability': [*numbers(actual_T[:-1]), None], 'rank': [*last.rank_N[:-1].tolist(), None]},
    }


def patterns(observed: Observed) -> dict[str, Any] | None:
    """The patterns of all heads, in 8 bits, and the largest weights of each query."""
    if observed.pattern_LNTS is None:
        return None
    key, weight = attention.top_keys(observed.pattern_LNTS, TOP_KEYS)
    eighth = np.round(255 * np.clip(observed.pattern_LNTS, 0, 1)).astype(np.uint8)
    return {'pattern': array(eighth, 'u8'), 'top': {'key': array(key, 'u16'), 'weight': array(weight)}}


def written(
    model: Decoder,
    observed: Observed,
    random: Sequence[Observed],
    answer_T: np.ndarray,
    strings: Strings,
    stage: Stage,
) -> dict[str, Any]:
    """What heads and parts write: sections `heads` and `layers`."""
    taps = observed.taps
    frozen = freeze(model, taps)
    shares = contributions.contributions(model, taps, frozen, answer_T)
    before_LTD, between_LTD = taps['residual.before_attention'], taps['residual.after_attention']
    layers = {
        'attention_norm': np.linalg.norm(taps['attention.output'], axis=-1),
        'feed_forward_norm': np.linalg.norm(taps['mlp.output'], axis=-1),
        'residual_norm': np.linalg.norm(residuals(taps), axis=-1),
        'attention_cosine': contributions.cosine(taps['attention.output'], before_LTD),
        'feed_forward_cosine': contributions.cosine(taps['mlp.output'], between_LTD),
        'attention_answer': shares.attention_LT,
        'feed_forward_answer': shares.mlp_LT,
        'embedding_answer': shares.embedding_T,
        'constant_answer': shares.constant_T,
    }
    found: dict[str, Any] = {'layers': {name: array(a) for name, a in layers.items()}, 'heads': None}
    if HEADS not in taps:
        return found
    done, L = stage('what heads write', model.config.layers), model.config.layers
    norms, answers, promotes, reads = [], [], [], []
    for layer in range(L):
        of_layer = contributions.of_heads(model, frozen, shares.directions, layer, taps[HEADS][layer])
        norms.append(np.linalg.norm(of_layer.write_TND, axis=-1).T)
        answers.append(of_layer.answer_NT)
        reads.append(of_layer.read_TND.swapaxes(0, 1))
        if len(reads) == GROUP or layer + 1 == L:
            read_GNTD = np.stack(reads)
            flat = read_GNTD.reshape(-1, read_GNTD.shape[-1])
            top = programs.read(model, flat, np.zeros(len(flat), np.int32), direct=True).top_Nk[:, :TOP_PROMOTED]
            promotes.append(top.reshape(*read_GNTD.shape[:3], -1))
            reads = []
        done(layer + 1)
    heads: dict[str, Any] = {'write_norm': array(np.stack(norms)), 'answer': array(np.stack(answers))}
    heads['promotes'] = array(strings.of(np.concatenate(promotes)), 'u32')
    found['heads'] = scored(observed, random, np.stack(norms).shape[:2]) | heads
    return found


def scored(observed: Observed, random: Sequence[Observed], shape: tuple[int, ...]) -> dict[str, Any]:
    """Scores and roles of heads; where there are no patterns all scores are 0."""
    nothing = {role: np.zeros(shape, np.float32) for role in attention.ROLES}
    on_random = None
    if observed.pattern_LNTS is not None:
        nothing = attention.scores(observed.pattern_LNTS, observed.ids)
        some = [(one.pattern_LNTS, one.ids) for one in random if one.pattern_LNTS is not None]
        on_random = attention.mean_scores(*zip(*some, strict=True)) if some else None
    found: dict[str, Any] = {role: array(score_LN) for role, score_LN in nothing.items()}
    for role in attention.ROLES:
        found[f'{role}_random'] = None if on_random is None else array(on_random[role])
    found['repeats'] = int(attention.targets(observed.ids)['duplicate'].any(1).sum())
    found['role'] = attention.roles(nothing if on_random is None else on_random)
    return found


def of_experts(run: TrainedRun, observed: Observed, strings: Strings, stage: Stage) -> dict[str, Any] | None:
    """The paths of the text's tokens, and of those that the model goes on with."""
    c, taps, tokenizer = run.config.model, observed.taps, run.tokenizer
    if c.moe is None or not set(experts.TAPS) <= taps.keys():
        return None
    assert tokenizer is not None
    own = experts.paths(*(taps[name] for name in experts.TAPS))
    done = stage('experts while decoding', 1)
    new, decoding = experts.greedy(run.model, observed.ids, NEW, run.context)
    done(1)
    texts = [token_text(tokenizer, token) for token in observed.ids]
    of_kind = experts.load_by_kind(own.chosen_MTK, texts, c.moe.experts)
    whole = lambda paths: {
        'chosen': array(paths.chosen_MTK, 'u16'),
        'weight': array(paths.weight_MTK),
        'entropy': array(paths.entropy_MT),
    }
    written = {'ids': new, 'tokens': [strings.of_id(token) for token in new]}
    return {
        'layers': [layer for layer, spec in enumerate(c.layer_specs) if spec.experts],
        **whole(own),
        'decode': None if decoding is None else whole(decoding) | written,
        'load_by_kind': {kind: array(load_ME) for kind, load_ME in of_kind.items()},
    }


def ablation(
    model: Decoder,
    observed: Observed,
    cells: TopCells | None,
    strings: Strings,
    stage: Stage,
    named: Sequence[Cell],
) -> tuple[dict[str, Any], np.ndarray]:
    """What the answer after the last token loses with each part at its mean, and the log-probabilities with all of them."""
    c, taps, L = model.config, observed.taps, model.config.layers
    values = {ATTENTION: means(taps[ATTENTION]), MLP: means(taps[MLP])}
    changes: list[Change | None] = [None]
    changes += [Change(name, layer, everywhere()) for name in (ATTENTION, MLP) for layer in range(L)]
    heads = taps[HEADS].shape[2] if HEADS in taps else 0
    if heads:
        values[HEADS] = means(taps[HEADS])
        changes += [Change(HEADS, layer, unit(head, heads)) for layer in range(L) for head in range(heads)]
    fired = list(dict.fromkeys([*named, *strongest(cells, ABLATED_CELLS)]))
    if fired:
        values[CELLS] = of_all_layers(means(taps[CELLS]), dense_layers(model), L)
        changes += [Change(CELLS, layer, unit(cell, taps[CELLS].shape[2])) for layer, cell in fired]
    chosen = passed_over(model, observed)
    if chosen:
        assert c.moe is not None
        values[EXPERTS] = np.zeros((L, 1, c.moe.experts, 1), np.float32)
        changes += [change for _, _, change in chosen]
    log_CV = Patches(model, observed.ids, values, begin=1).log_probabilities(changes, stage('ablation', len(changes)))
    answer = int(log_CV[0].argmax())
    rest = iter((log_CV[1:, answer] - log_CV[0, answer]).tolist())
    take = lambda count: [next(rest) for _ in range(count)]
    found: dict[str, Any] = {'answer': strings.of_id(answer), 'logprob': number(float(log_CV[0, answer]))}
    found['attention'], found['feed_forward'] = array(take(L)), array(take(L))
    found['heads'] = array(np.reshape(take(L * heads), (L, heads))) if heads else None
    found['cells'] = [
        {'layer': layer, 'cell': cell, 'change': number(change)}
        for (layer, cell), change in zip(fired, take(len(fired)), strict=True)
    ]
    found['experts'] = None
    if chosen:
        assert c.moe is not None
        change_ME = np.zeros((len({row for row, _, _ in chosen}), c.moe.experts), np.float32)
        for (row, expert, _), change in zip(chosen, take(len(chosen)), strict=True):
            change_ME[row, expert] = change
        found['experts'] = array(change_ME)
    return found, log_CV[0]


def strongest(cells: TopCells | None, most: int) -> list[Cell]:
    """Layer and number of the cells that have the largest share of their layer at the last token."""
    if cells is None:
        return []
    share_Lk = cells.share_LTk[:, -1]
    order = np.argsort(-share_Lk, axis=None, kind='stable')[:most]
    places = [np.unravel_index(at, share_Lk.shape) for at in order]
    return [(int(layer), int(cells.cell_LTk[layer, -1, k])) for layer, k in places if share_Lk[layer, k] > 0]


def passed_over(model: Decoder, observed: Observed) -> list[tuple[int, int, Change]]:
    """Of each layer of experts (by its place among them) and each expert that a token chose, the change that passes it over."""
    c, found = model.config, []
    if c.moe is None or experts.TAPS[0] not in observed.taps:
        return []
    layers = [layer for layer, spec in enumerate(c.layer_specs) if spec.experts]
    for row, (layer, chosen_TK) in enumerate(zip(layers, observed.taps[experts.TAPS[0]], strict=True)):
        found += [(row, int(e), Change(EXPERTS, layer, unit(int(e), c.moe.experts))) for e in np.unique(chosen_TK)]
    return found
