"""A tokenizer.json whose model finds no special token in a text, whatever the text says."""

from collections.abc import Iterator, Mapping, Set
from typing import Any

NOWHERE = '\U000f7357'  # a private character, which no text has


def without_names(fields: Mapping[str, Any], special: Set[str]) -> dict[str, Any] | None:
    """The fields of a tokenizer.json with other names for the tokens `special`; None where no text becomes one of them.

    The library looks for names of added tokens before its model runs, and leaves that out when it is told to. Then the model
    may find them: a Unigram or WordPiece model in any text, WordLevel in a whole word, BPE where merges make them, where it
    takes words that it knows whole, or of one character. All ids stay as they are.
    """
    model = fields['model']
    hidden = special & (
        {name for name, _ in model['vocab']} if isinstance(model['vocab'], list) else model['vocab'].keys()
    )
    if 'merges' in model and not model.get('ignore_merges'):
        # Of one character: with what is put before or after it where it begins no word, or ends one.
        around = sum(len(model.get(side) or '') for side in ('continuing_subword_prefix', 'end_of_word_suffix'))
        made = {whole for *_, whole in _merges(model)}
        if not any(name in made or len(name) <= 1 + around for name in hidden):
            return None
    if not hidden:
        return None

    def hide(name: str) -> str:
        return NOWHERE + name if name in special else name

    changed = dict(model)
    if isinstance(model['vocab'], list):
        changed['vocab'] = [[hide(name), score] for name, score in model['vocab']]
    else:
        changed['vocab'] = {hide(name): i for name, i in model['vocab'].items()}
    if 'merges' in model:
        changed['merges'] = [merge for merge, *names in _merges(model) if hidden.isdisjoint(names)]
    if isinstance(model.get('unk_token'), str):
        changed['unk_token'] = hide(model['unk_token'])
    added = [{**token, 'content': hide(token['content'])} for token in fields.get('added_tokens') or ()]
    return {**fields, 'model': changed, 'added_tokens': added, 'post_processor': None}


def _merges(model: Mapping[str, Any]) -> Iterator[tuple[Any, str, str, str]]:
    """Each merge as the file has it, both its halves, and the token that it makes of them."""
    prefix = len(model.get('continuing_subword_prefix') or '')
    for merge in model['merges']:
        if isinstance(merge, str) and merge.startswith('#version'):  # of a merges.txt, which the library passes over
            yield merge, '', '', ''
            continue
        first, second = merge.split(' ') if isinstance(merge, str) else merge
        yield merge, first, second, first + second[prefix:]
