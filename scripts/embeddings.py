"""A model's vectors of words: nearest neighbours, analogies, a picture.

python scripts/embeddings.py runs/demo --nearest king                       by the embedding, among words of one token
python scripts/embeddings.py runs/demo --nearest bank --layer 6 --text 'The river had a muddy bank'
python scripts/embeddings.py runs/demo --analogies docs/analogies.txt       3CosAdd and 3CosMul, question words left out
python scripts/embeddings.py runs/demo --words words.txt --out words.png    principal axes, coloured by the file's sections

Vectors are rows of the embedding (or of the LM head: --table output), or activations behind a layer. docs/interpret.md explains
each flag.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.runtime.errors import LONGEST, UserError, shown
from weft.scripts.entry import as_json, run
from weft.scripts.options import Parser, whole
from weft.storage.files import check_output, output_file, writing

if TYPE_CHECKING:
    from weft.interpret.word_files import Section
    from weft.interpret.word_sets import WordSet
    from weft.interpret.word_vectors import Placed

OF_A_LAYER = 2000  # candidates, unless told otherwise: each costs a forward pass of its text
OF_A_PICTURE, LETTERS = 100, 3  # its words, and letters of each at least: shorter ones are often only parts of words


def main() -> None:
    options = parse()
    check(options)

    from weft.interpret.word_files import read_questions, read_words

    # What files say wrongly is told before a model is read.
    sections: list[Section] = []
    if options.analogies is not None:
        sections = read_questions('--analogies', options.analogies, options.section)
    listed = read_words('--words', options.words, options.section if not sections else ()) if options.words else []

    if options.projection == 'umap':
        from weft.interpret.projection import umap_package

        umap_package()

    from weft.inference.run import open_run
    from weft.interpret.word_sets import Choice, WordSet

    opened = open_run(options.run, options.mesh, stacked=True, step=options.step)

    import jax

    from weft.runtime.device_memory import explain_oom

    choice = Choice(options.table or 'input', options.layer, options.text, options.form or 'spaced', options.pieces)
    say = lambda line: print(line, file=sys.stderr, flush=True)
    words = WordSet(opened, choice, say, options.nearest)
    if choice.table == 'output' and choice.layer is None and opened.config.model.embedding.tied:
        say('the LM head of this model is tied: its table is the input table')
    tell = 'out of memory on a device: the vectors of some words at once; split the model with --mesh'
    with jax.set_mesh(opened.mesh), explain_oom(lambda: tell):
        if options.nearest is not None:
            figures = nearest_words(words, options, listed)
        elif sections:
            figures = analogies(words, options, sections, listed)
        else:
            figures = picture(words, options, listed)
    figures = {'vectors': choice.name, 'step': opened.step, **figures}
    if options.json:
        print(as_json(figures))
    elif options.nearest is not None:
        tell_nearest(figures)
    elif sections:
        tell_analogies(figures)
    else:
        tell_picture(figures)


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument('run', metavar='RUN', help='a folder such as runs/demo')
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument('--nearest', metavar='WORD', help='the words with the largest cosines to it')
    asked.add_argument(
        '--analogies', metavar='FILE', help='": NAME" begins a section; four words a line are a question'
    )
    asked.add_argument('--out', metavar='FILE', type=Path, help='.png to write: the words as points of a plane')

    which = parser.add_argument_group('which vectors')
    table = 'input (the embedding) or output (the LM head); input otherwise'
    which.add_argument('--table', metavar='NAME', help=table)
    which.add_argument('--layer', type=whole(1), metavar='N', help='activations behind layer N, from 1, not a table')
    text = 'with --layer, where words stand: {} marks the place, or the word itself; alone otherwise'
    which.add_argument('--text', metavar='TEXT', help=text)
    form = 'spaced (as after another word) or bare (as at the beginning of a text); spaced otherwise'
    which.add_argument('--form', metavar='NAME', help=form)
    pieces = (
        'single: only words of one token; mean: of several their mean; single of a table, mean of a layer otherwise'
    )
    which.add_argument('--pieces', metavar='NAME', help=pieces)
    which.add_argument(
        '--centre', action='store_true', help='the mean of all candidates is taken off each vector first'
    )

    among = parser.add_argument_group('among which words')
    among.add_argument('--words', metavar='FILE', help='its words, parted by spaces and lines; may have sections')
    count = (
        f'the N most frequent words of one token; all of a table, {OF_A_LAYER} of a layer, {OF_A_PICTURE} of a picture'
    )
    among.add_argument('--candidates', type=whole(3), metavar='N', help=f'{count} otherwise')
    among.add_argument(
        '--tokens', action='store_true', help='with --nearest: all tokens, words or not; WORD is one, exactly'
    )
    section = 'only this section of --analogies, or of --words; may be given again'
    among.add_argument('--section', action='append', default=[], metavar='NAME', help=section)

    parser.add_argument('--count', type=whole(1), default=10, metavar='N', help='neighbours to tell')
    parser.add_argument('--projection', metavar='NAME', default='pca', help="pca, or umap (pip install 'weft[umap]')")
    parser.add_argument('--step', type=whole(0), metavar='N', help='of a checkpoint; the newest otherwise')
    parser.add_argument('--mesh', metavar='AXES', help='such as expert=2,tensor=2; the run’s own otherwise')
    parser.add_argument('--json', action='store_true', help='one JSON object; of analogies every answer too')
    return parser.parse_args()


def check(options: argparse.Namespace) -> None:
    """Raises UserError for flags that do not go together, and for names that are none."""
    names = (
        ('--table', options.table, ('input', 'output')),
        ('--form', options.form, ('spaced', 'bare')),
        ('--pieces', options.pieces, ('single', 'mean')),
        ('--projection', options.projection, ('pca', 'umap')),
    )
    for flag, value, known in names:
        if value is not None and value not in known:
            raise UserError(f'{flag} {shown(value, 60)}: it must be {" or ".join(known)}')
    apart = (
        ('--layer', options.layer, '--table', options.table, 'activations stand in no table'),
        ('--text', options.text, '--form', options.form, 'the text says what stands before the word'),
        ('--tokens', options.tokens, '--text', options.text, 'a token alone does not stand in a text'),
        ('--tokens', options.tokens, '--words', options.words, 'all tokens are candidates'),
        ('--tokens', options.tokens, '--form', options.form, 'a token is named as it is'),
        ('--tokens', options.tokens, '--pieces', options.pieces, 'a token is one piece'),
        ('--words', options.words, '--candidates', options.candidates, 'the file says which words'),
    )
    for flag, value, other, beside, rule in apart:
        if value and beside:
            raise UserError(f'{flag} and {other} do not go together: {rule}; leave out one')
    if options.text is not None and options.layer is None:
        raise UserError(f'--text {shown(options.text, 60, quoted=True)}: a table knows no context; add --layer N')
    if options.tokens and options.nearest is None:
        raise UserError('--tokens: it goes with --nearest TOKEN alone')
    if options.section and options.analogies is None and options.words is None:
        raise UserError(f'--section {shown(options.section[0], 60)}: it is of --analogies FILE or --words FILE')
    if options.out is not None:
        if options.out.suffix.lower() != '.png':
            name = shown(options.out, LONGEST)
            raise UserError(
                f'--out {name}: a picture is written as PNG; name it {shown(options.out.with_suffix(".png"))}'
            )
        check_output('--out', options.out, [options.words] if options.words else [])


def nearest_words(words: 'WordSet', options: argparse.Namespace, listed: Sequence['Section']) -> dict[str, Any]:
    """The figures of --nearest."""
    from weft.interpret.embeddings import neighbours

    candidates = words.tokens(most(options)) if options.tokens else candidates_of(words, options, listed)
    asked = words.token(options.nearest) if options.tokens else words.asked(options.nearest)
    table = words.vectors(candidates | {options.nearest: asked})
    same = [word for word, one in candidates.items() if one.own == asked.own]
    others = [word for word in table.words if word not in {*same, options.nearest}]
    if not others:
        raise UserError(f'--nearest {shown(options.nearest, 60)}: there is no other word to compare it with')
    x_VD = centred(table.x_VD, options)
    y_D = x_VD[table.words.index(options.nearest)]
    found = neighbours(x_VD, table.words, y_D, options.count, {*same, options.nearest})
    return {
        'word': options.nearest,
        'tokens': [words.name_of(i) for i in asked.own],
        'candidates': len(others),
        'neighbours': [one._asdict() for one in found],
    }


def analogies(
    words: 'WordSet', options: argparse.Namespace, sections: Sequence['Section'], listed: Sequence['Section']
) -> dict[str, Any]:
    """The figures of --analogies."""
    from weft.interpret.embeddings import METHODS, solve_analogies

    candidates = candidates_of(words, options, listed)
    of_file = dict.fromkeys(word for section in sections for question in section.items for word in question)
    known = {one.own for one in candidates.values()}
    more = {word: one for word, one in words.known(list(of_file)).items() if one.own not in known}
    table = words.vectors(candidates | {word: one for word, one in more.items() if word not in candidates})
    found = solve_analogies(centred(table.x_VD, options), table.words, sections)
    scores = [
        {
            'name': one.name,
            'asked': one.asked,
            'skipped': one.skipped,
            **{method: one.accuracy(method) for method in METHODS},
        }
        for one in (*found.sections, found.total)
    ]
    if found.missing:
        some = ', '.join(shown(word, 40) for word in found.missing[:8]) + (', …' if len(found.missing) > 8 else '')
        why = words.why_missing()
        print(f'{found.total.skipped} questions skipped for {len(found.missing)} words {why}: {some}', file=sys.stderr)
    return {
        'candidates': len(table.words),
        'sections': scores[:-1],
        'total': scores[-1],
        'missing': found.missing,
        'questions': [{'section': one.section, 'words': one.question, **one.answers} for one in found.answers],
    }


def picture(words: 'WordSet', options: argparse.Namespace, listed: Sequence['Section']) -> dict[str, Any]:
    """The figures of --out, which is written."""
    from weft.interpret.projection import check_enough, principal_axes, umap_plane
    from weft.interpret.word_picture import draw_words

    candidates = candidates_of(words, options, listed)
    if missing := [word for word in flat(listed) if word not in candidates]:
        some = ', '.join(shown(word, 40) for word in missing[:8]) + (', …' if len(missing) > 8 else '')
        print(f'{len(missing)} words left out {words.why_missing()}: {some}', file=sys.stderr)
    check_enough(len(candidates))
    table = words.vectors(candidates)
    x_ND = centred(table.x_VD, options)
    found = umap_plane(x_ND) if options.projection == 'umap' else principal_axes(x_ND)
    group_of = {word: section.name for section in reversed(listed) for (word,) in section.items}
    groups = [group_of[word] for word in table.words] if len({section.name for section in listed}) > 1 else None
    names = ('UMAP 1', 'UMAP 2')
    shares = None if found.share_A is None else [float(share) for share in found.share_A]
    if shares is not None:
        first, second = (f'principal axis {i}: {share:.1%} of the variance' for i, share in enumerate(shares, 1))
        names = (first, second)
    title = f'{shown(Path(options.run).name, 60)}, {words.choice.name}'
    png, unlabelled = draw_words(found.at_NA, table.words, title, names, groups)
    with output_file('--out', options.out) as file, writing(options.out):
        file.write(png)
    if unlabelled:
        print(
            f'{len(unlabelled)} of {len(table.words)} labels found no room: their points stand alone', file=sys.stderr
        )
    of: list[str | None] = [*groups] if groups else [None] * len(table.words)
    points = zip(table.words, of, found.at_NA.tolist(), strict=True)
    return {
        'out': str(options.out),
        'projection': options.projection,
        'share': shares,
        'unlabelled': unlabelled,
        'words': [{'word': word, 'group': group, 'at': at} for word, group, at in points],
    }


def candidates_of(words: 'WordSet', options: argparse.Namespace, listed: Sequence['Section']) -> 'dict[str, Placed]':
    """The words of --words that have vectors, or else the most frequent ones, of which some have to be longer."""
    if listed:
        return words.known(flat(listed))
    count = most(options)
    # The first ids of BERT are letters of all scripts, and many of the first of other tokenizers parts of words.
    return words.most_frequent(count, LETTERS if options.out else 1 if count is None else 2)


def most(options: argparse.Namespace) -> int | None:
    """How many words are candidates; None: all of them."""
    if options.candidates is not None:
        return int(options.candidates)
    return OF_A_PICTURE if options.out else OF_A_LAYER if options.layer else None


def flat(sections: Sequence['Section']) -> list[str]:
    """All words of a file, each once."""
    return list(dict.fromkeys(word for section in sections for item in section.items for word in item))


def centred(x_VD: Any, options: argparse.Namespace) -> Any:
    """The vectors, with --centre without what all have in common."""
    return x_VD - x_VD.mean(0) if options.centre else x_VD


def tell_nearest(figures: Mapping[str, Any]) -> None:
    tokens = ' '.join(shown(token, 40, quoted=True) for token in figures['tokens'])
    among = f'{figures["vectors"]}, step {figures["step"]}, {figures["candidates"]:,} candidates'
    print(f'{shown(figures["word"], 60)} ({tokens}): {among}')
    for one in figures['neighbours']:
        print(f'  {one["cosine"]:7.4f}  {shown(one["word"], 60)}')


def tell_analogies(figures: Mapping[str, Any]) -> None:
    print(f'{figures["vectors"]}, step {figures["step"]}, {figures["candidates"]:,} candidates')
    rows = [*figures['sections'], figures['total']]
    width = max(len(shown(one['name'], 40)) for one in rows)
    share = lambda value: '–' if value is None else f'{value:.1%}'
    print(f'{"":{width}}  {"asked":>7}  {"skipped":>7}  {"3CosAdd":>7}  {"3CosMul":>7}')
    for one in rows:
        counts = f'{one["asked"]:>7,}  {one["skipped"]:>7,}'
        print(f'{shown(one["name"], 40):{width}}  {counts}  {share(one["3CosAdd"]):>7}  {share(one["3CosMul"]):>7}')


def tell_picture(figures: Mapping[str, Any]) -> None:
    how = 'UMAP'
    if figures['share'] is not None:
        how = f'principal axes, with {" and ".join(f"{share:.1%}" for share in figures["share"])} of the variance'
    what = f'{len(figures["words"])} words, {figures["vectors"]}, step {figures["step"]}'
    print(f'{shown(figures["out"], LONGEST)}: {what}; {how}')


if __name__ == '__main__':
    run(main)
