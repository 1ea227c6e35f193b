"""docs/compression.md: what the study's rows come to, in words, tables and pictures. Every number on it is from the rows."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from weft.compress.study import plots
from weft.compress.study.cells import ORIGINAL, SMALLER, TRAINED_HERE, Cell
from weft.compress.study.evidence_sections import measure_section, sharing_section
from weft.compress.study.rows import ROOT, Row
from weft.compress.study.sections import (
    calibration_section,
    claim_section,
    published_section,
    refusal_section,
    rescue_section,
    speed_section,
    tensor_section,
)
from weft.compress.study.verdict import BREAKS, FAMILIES, SAVED, Duel, advised, best, breaks, curve, points, score
from weft.compress.study.words import NO, Found, at, figures_of, interval, percent, said, share, told
from weft.interpret.history.markdown import listed, prose, table
from weft.storage.files import make_folder, output_file

FILLED = 0.02  # of perplexity: a model of fewer layers that is worse by less shows that the others had nothing to learn


def write_page(rows: Sequence[Row], stale: dict[str, str], design: Sequence[str], path: Path) -> str:
    """Writes the page and its pictures, into a folder of its name beside it; gives what is missing, in words."""
    folder = path.with_suffix('')
    make_folder(folder)
    found = Found(rows, points(rows), folder, os.path.relpath(ROOT.resolve(), path.parent.resolve()))
    missing = [name for name in design if name not in {row['cell'] for row in rows}]
    sections: Iterable[Callable[[Found], list[str]]] = (
        verdict_section,
        curve_section,
        mixture_section,
        rescue_section,
        tensor_section,
        sharing_section,
        measure_section,
        calibration_section,
        claim_section,
        speed_section,
        published_section,
        refusal_section,
    )
    blocks = opening(found, stale, missing)
    for section in sections:
        blocks += section(found)
    with output_file('--out', path) as file:
        file.write(('\n\n'.join(blocks) + '\n').encode())
    return f'; {len(missing)} cells are missing' if missing else ''


def opening(found: Found, stale: dict[str, str], missing: Sequence[str]) -> list[str]:
    """What was asked, with what it was measured, and what it cannot tell."""
    originals = []
    for name in TRAINED_HERE:
        figures = figures_of(found, Cell(name, ORIGINAL))
        if figures is not None:
            parts = [f'{figures["bits"] / 32e6:.1f} M weights']
            for text, of in figures['quality'].items():
                cloze = '' if of['cloze'] is None else f', cloze {100 * of["cloze"]["value"]:.0f} %'
                parts.append(f'{of["perplexity"]["value"]:.1f} on {text}{cloze}')
            originals.append((name, *parts))
    reading = found.rows[0]['reading'] if found.rows else {'tokens': 0, 'calibration': 0}
    dates = sorted({row['date'] for row in found.rows})
    when = '' if not dates else dates[0] if len(dates) == 1 else f'{dates[0]} to {dates[-1]}'
    machines = listed(sorted({row['machine'] for row in found.rows})) if found.rows else 'no machine'
    blocks = [
        '# What do tensor decompositions cost a language model, and what is there instead?',
        prose(
            """The question comes from a paper (Zagitov et al. 2026, *Rethinking the Role of Tensor Decompositions in
            Post-Training LLM Compression*, arXiv:2606.03465) and from a short account of it, which says that tensor
            decompositions (CP, Tucker, tensor trains) fall short on language models because heads, layers and experts do not
            share subspaces. Here the decompositions stand beside what else could be done with the same bits: pairs of
            factors, quantisation, pruning, fewer layers, a smaller model. All bits are counted, of scales, indices and of
            what no method touches, as a share of the same model in float32.""",
            f"""**Limits.** These are small models: 10 to 15 million weights, trained here from random float32 numbers on 2.5
            million tokens of Python source, one seed each ([configs/compression/]({found.root}/configs/compression)). They
            are undertrained by any standard, and what is redundant in them need not be in a model that has read a thousand
            times as much.{null_words(found)} Intervals (95 %, in brackets) say how sure a figure is for these models and these
            texts, not for another seed. The rule of sensitivity was tuned on this page's held-out text, on one
            cell, and the rate of recovery chosen after one result at another rate. Of the rows of 2026-12-01, 125
            had their code hash rewritten, not measured again, when one function moved to another file; all other
            code was equal by its syntax trees. Tokens a second of that day are those of busy cores: on quiet ones
            and one device int8 decoded the dense model at 0.35 times float32's rate (scripts/decode.py, 200 tokens,
            --mesh data=1), perhaps because so small a model stays in the CPU's cache, which was not measured.""",
        ),
        '    python scripts/compress.py study',
        prose(
            f"""measures every cell again ({len(found.rows)} rows in
            [benchmarks/compression.jsonl]({found.root}/benchmarks/compression.jsonl)) and writes this page. Cost is
            perplexity above that of the model as it was, on the same {reading['tokens']:,} tokens of held-out packages; a
            second text, documentation of another project, is in the rows. Differences are taken token by token, and blocks of
            tokens drawn anew. Calibration text is {reading['calibration']:,} tokens of what the model learnt from. Measured
            {when} on {machines}, jax {found.rows[0]['jax'] if found.rows else ''}, cores shared with other work."""
        ),
    ]
    if originals:
        blocks.append(
            table(
                ('model', 'size', 'perplexity on held-out text', 'and on documentation'),
                [
                    (
                        name,
                        size,
                        *(
                            text.split(' on ')[0] + (', cloze' + text.split(', cloze')[1] if ', cloze' in text else '')
                            for text in rest
                        ),
                    )
                    for name, size, *rest in originals
                ],
            )
        )
    if stale or missing:
        blocks.append(
            prose(
                f"""**Not whole.** {len(missing)} of {len(missing) + len(found.rows)} cells are missing and {len(stale)} rows
                are of older code or settings; the command measures them."""
            )
        )
    return blocks


def null_words(found: Found) -> str:
    """How much of the dense model its text can fill."""
    small = [one for one in found.points if one.cell.method == SMALLER]
    told_ = [
        f'{one.cell.layers} layers in the place of 8 ({share(one.share)} of the bits) cost {interval(one.cost)}'
        for one in small
    ]
    if not told_:
        return ''
    idle = (
        ' So most of its weights are more than so little text can fill, and costs on this page are likely lower than those of '
        'a model that has read more.'
        if min(one.cost.value for one in small) < FILLED
        else ''
    )
    return f' How much: trained as long, {listed(told_)} of perplexity.{idle}'


def verdict_section(found: Found) -> list[str]:
    """What a user should do."""
    dense = found.model('dense')
    rows, others = [], []
    for saved in SAVED:
        pick = advised(dense, saved)
        if pick is None:
            continue
        same = [at(found.points, dataclasses.replace(pick.cell, model=name)) for name in TRAINED_HERE]
        tensor = best(dense, saved, 'tensors')
        rows.append(
            (
                f'{100 * saved:.0f} %',
                f'{said(pick.cell)} ({share(pick.share)} left)',
                *map(told, same),
                NO if tensor is None else f'{said(tensor.cell)}: {interval(tensor.cost)}',
            )
        )
        family = [best(dense, saved, name) for name in FAMILIES]
        others.append(
            (
                f'{100 * saved:.0f} %',
                *(NO if one is None else f'{said(one.cell)}: {percent(one.cost.value)}' for one in family),
            )
        )
    heading = ('bits saved', 'what to do', *TRAINED_HERE, 'the best tensor form, dense')
    return [
        '## The verdict',
        verdict_words(found),
        table(heading, rows),
        prose(
            """What to do is the simplest method that is not surely worse for the dense model than the best of all cells that
            save as much (in whole percent; rounding to nearest counts as simpler than GPTQ, and that as simpler than factors),
            before any training; its cost is told for all three models. “Surely” means on this page that 95 % intervals do not
            overlap, which is more than a test at 5 % asks for. Of matrices that have neither heads nor experts Tucker's form
            and CP are pairs, so Tucker's form of the whole dense model differs from SVD in attention alone; by sensitivity it
            was spread at half of the bits only. Factors leave the embedding in float32, which rounding does not. The best of
            each family for the dense model:"""
        ),
        table(('bits saved', *FAMILIES), others),
    ]


def verdict_words(found: Found) -> str:
    """One paragraph that a user can follow."""
    dense = found.model('dense')
    picks = {saved: one for saved in SAVED if (one := advised(dense, saved)) is not None}
    if not picks:
        return 'No cell of the dense model has been measured yet.'
    wins = sum(one.cell.method in FAMILIES['tensors'] for one in picks.values())
    verdict = (
        'No tensor form is what to use at any of these budgets.'
        if not wins
        else f'A tensor form is what to use at {wins} of {len(picks)} budgets.'
    )
    by_method: dict[Cell, list[float]] = {}
    for saved, one in picks.items():
        by_method.setdefault(one.cell, []).append(saved)
    parts = []
    for cell, of in by_method.items():
        one = picks[of[-1]]
        tensor = [best(dense, saved, 'tensors') for saved in of]
        costs = [NO if form is None else percent(form.cost.value) for form in tensor]
        budgets = listed([f'{100 * saved:.0f} %' for saved in of])
        parts.append(
            f'{said(cell)} where {budgets} of the bits are to be saved, which costs {interval(one.cost)} of perplexity (the '
            f'best tensor form: {listed(costs)})'
        )
    return prose(f'**For the dense model**: {"; ".join(parts)}. {verdict}')


def curve_section(found: Found) -> list[str]:
    """Where each method's curve breaks."""
    plots.curves(found.folder / 'curves.png', found.points)
    methods = [
        *(Cell('dense', method, 0.5) for method in ('svd', 'svd-shared', 'svd-slices', 'tucker', 'cp', 'tensor-train')),
        *(Cell('dense', method, 0.5, objective='frobenius') for method in ('svd', 'tucker')),
        *(
            Cell('dense', method, 0.5)
            for method in ('svd-int8', 'svd-int4', 'wanda', 'magnitude', 'layers', 'hidden-units')
        ),
    ]
    rows = []
    for like in methods:
        of = curve(found.model('dense'), like)
        if (where := breaks(of)) is not None:
            text = {'': 'at ', '<': 'below ', '>': 'above '}[where.within] + share(where.share)
            worst = of[-1]
            rows.append(
                (
                    said(like),
                    text,
                    len(of),
                    f'{share(worst.share)}: {interval(worst.cost)}',
                    f'{worst.kl.value:.3f}',
                    f'{percent(worst.cloze.value)}',
                )
            )
    rounded = [
        (said(one.cell), share(one.share), interval(one.cost), interval(one.docs_cost), f'{one.kl.value:.4f}')
        for one in found.model('dense')
        if one.cell.method in FAMILIES['rounding'] or one.cell.method == 'wanda-2:4'
        if one.cell.maps == 'all'
    ]
    return [
        '## Where does each method’s curve break?',
        f'![Perplexity against bits]({found.folder.name}/curves.png)',
        prose(
            f"""A curve counts as broken where perplexity is {100 * BREAKS:.0f} % above the original's (the dashed line);
            between two points the share is interpolated. All maps alike, the dense model:"""
        ),
        table(
            ('method', f'breaks ({100 * BREAKS:.0f} %)', 'points', 'at its last point', 'KL there, nats', 'cloze'), rows
        ),
        'What takes the bits that it takes:',
        table(('method', 'bits left', 'cost, held-out', 'cost, documentation', 'KL, nats'), rounded),
    ]


def mixture_section(found: Found) -> list[str]:
    """Is a mixture harder?"""
    plots.models(found.folder / 'models.png', found.points)
    cells: list[tuple[str, dict[str, Any]]] = [
        *((f'SVD, {100 * budget:.0f} %', {'method': 'svd', 'budget': budget}) for budget in (0.9, 0.75, 0.5, 0.25)),
        ('int8', {'method': 'int8'}),
        ('int4', {'method': 'int4'}),
        ('int4, GPTQ', {'method': 'gptq-int4'}),
        ('layers dropped, 75 %', {'method': 'layers', 'budget': 0.75}),
        ('hidden units dropped, 50 %', {'method': 'hidden-units', 'budget': 0.5}),
        ('Wanda, 50 %', {'method': 'wanda', 'budget': 0.5}),
    ]
    rows = [
        (label, *(told(at(found.points, Cell(name, **fields))) for name in TRAINED_HERE)) for label, fields in cells
    ]
    forms = [
        (
            f'{100 * budget:.0f} %',
            name,
            *(
                told(at(found.points, Cell(name, method, budget, maps='experts')))
                for method in ('svd', 'svd-shared', 'tucker', 'cp', 'tensor-train')
            ),
            told(at(found.points, Cell(name, 'experts', budget))),
        )
        for name in ('mixture-8', 'mixture-32')
        for budget in (0.75, 0.5, 0.25)
    ]
    return [
        '## Is a mixture harder?',
        f'![Three models]({found.folder.name}/models.png)',
        table(('method, bits left', *TRAINED_HERE), rows),
        prose(mixture_words(found)),
        prose("""Experts alone, all other weights as they are: a pair for each expert, one basis for all of a layer's experts, a
        core over all of them, and experts dropped by REAP's score, at equal bits:"""),
        table(('bits left', 'model', 'pair for each', 'shared basis', 'Tucker', 'CP', 'tensor train', 'REAP'), forms),
    ]


def mixture_words(found: Found) -> str:
    """What the tables say of mixtures."""
    parts = []
    for name in ('mixture-8', 'mixture-32'):
        pairs = [
            (one, other)
            for budget in (0.9, 0.75, 0.5, 0.25)
            if (one := at(found.points, Cell('dense', 'svd', budget)))
            and (other := at(found.points, Cell(name, 'svd', budget)))
        ]
        if pairs:
            harder = sum(other.cost.low > one.cost.high for one, other in pairs)
            easier = sum(other.cost.high < one.cost.low for one, other in pairs)
            parts.append(
                f'{name} is surely harder than the dense model at {harder} and surely easier at {easier} of {len(pairs)} '
                'budgets with pairs'
            )
        forms = [
            (mine, other)
            for budget in (0.75, 0.5, 0.25)
            for method in ('svd-shared', 'tucker', 'cp', 'tensor-train')
            if (mine := at(found.points, Cell(name, 'svd', budget, maps='experts')))
            and (other := at(found.points, Cell(name, method, budget, maps='experts')))
        ]
        if forms:
            found_ = score(Duel(*pair) for pair in forms)
            parts.append(
                f'forms that share over its experts surely beat a pair for each in {found_.wins} of {len(forms)} comparisons '
                f'at equal bits, and surely lose in {found_.losses}'
            )
    return f'Here {"; ".join(parts)}.' if parts else 'The mixtures have not been measured yet.'
