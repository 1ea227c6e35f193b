"""From a source of text to a run's data, once: split, tokenizer, tokens, packed rows, all in the run's folder.

A run that goes on later reads what is there (data/prepared.py), even if the source has changed since.
"""

import hashlib
import itertools
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sentencepiece

from weft.data import prepared
from weft.data.config import DataConfig
from weft.data.packing import Samples, encode_documents, pack
from weft.data.pairs import Pair, pack_pairs, read_pairs
from weft.data.prepared import SPLITS, Dataset
from weft.data.sources import documents
from weft.data.split import TELL, bytes_after, checked, cut, held_out, split_of
from weft.data.tokenizer import Tokenizer, own_tokenizer
from weft.data.walk import LeftOut, left_out_text
from weft.runtime.errors import UserError

FORMAT = 1
# The tokenizer learns from about this many characters, spread over the training text: more takes long, changes little.
TOKENIZER_CHARACTERS = 32_000_000
# Names of special tokens are looked for in the first so many characters: for a thousand names it takes as long as tokenizing.
SEARCHED = 8_000_000


def prepare(
    config: DataConfig,
    folder: Path,
    sequence_length: int,
    say: Callable[[str], None] = print,
    check: Callable[[Dataset], object] | None = None,
    pairs: bool = False,
    tokenizer: Tokenizer | None = None,
    start: int | None = None,
    read_tokenizer: Callable[[Path], Tokenizer | None] = own_tokenizer,
) -> Dataset:
    """The data of the run in `folder`: loaded if it is there, of the same config and length, else made and saved.

    Writes `folder/tokenizer.*` and `folder/data/`; the tokenizer is learnt from the text unless one is given. Rows have
    `sequence_length` inputs. One process at a time may call this on a folder. With `pairs` the text is sources and targets
    (data/pairs.py), the targets opened by the token `start` or the tokenizer's own. `check` may refuse what was made before it
    is written; `read_tokenizer` gives the tokenizer that is in the folder already. UserError for a source that cannot be read
    or has too little text, and for damaged files in the folder.
    """
    if sequence_length < 1:
        raise UserError(f'training.sequence_length={sequence_length}: must be at least 1; try 256')
    if tokenizer is None and config.vocabulary is None:
        raise UserError(
            'data.vocabulary is null: say how many pieces the tokenizer that is learnt may have, such as 4096'
        )
    key = {'format': FORMAT, 'sequence_length': sequence_length, **asdict(config), 'source': list(config.paths)}
    if not config.special_tokens:  # runs that were prepared before there was a choice
        del key['special_tokens']
    key |= {'pairs': True, 'start': start} if pairs else {}
    prepared.clear(folder)
    if (saved := prepared.load(folder, say, read_tokenizer)) and saved.key == key:
        return saved
    begin = time.perf_counter()
    dataset = (_build_pairs if pairs else _build)(config, key, say, tokenizer)
    if check:
        check(dataset)  # raises while nothing is written
    prepared.save(folder, dataset)
    say(f'data: prepared in {time.perf_counter() - begin:.1f} s')
    return dataset


def load(
    folder: Path,
    say: Callable[[str], None] = print,
    read_tokenizer: Callable[[Path], Tokenizer | None] = own_tokenizer,
) -> Dataset:
    """The data of a run as it was prepared; nothing is written. UserError where there is none or it is damaged."""
    saved = prepared.load(folder, say, read_tokenizer)
    if saved is None:
        raise UserError(f'{folder / "data"}: not there; a run that scripts/train.py made holds its data')
    return saved


def _build(config: DataConfig, key: dict[str, Any], say: Callable[[str], None], tokenizer: Tokenizer | None) -> Dataset:
    """Rows of documents, with a tokenizer learnt from the training split if none is given."""
    skipped: list[LeftOut] = []
    sha256 = hashlib.sha256()
    group_of: dict[str, str] = {}  # by the text's hash, so that copies of a text fall on the same side
    size_of_group, size_of_text = Counter[str](), Counter[str]()
    characters = count = ends = 0
    names = _Names(tokenizer)
    end_bytes = lambda text, share: bytes_after(text, cut(text, share))
    for document in documents(config, skipped):
        digest, size = _digest(document.text), len(document.text.encode())
        sha256.update(bytes.fromhex(digest))
        size_of_group[group_of.setdefault(digest, document.group)] += size
        size_of_text[digest] += size
        characters += len(document.text)
        names.look(document.text)
        ends += end_bytes(document.text, config.validation_share)
        count += 1
    ends_of = lambda share: sum(end_bytes(document.text, share) for document in documents(config, []))
    split, held = split_of(config, size_of_group, size_of_text, ends, ends_of)
    size = size_of_group.total()
    say(f'data: {count} documents, {size / 1e6:.2f} MB; sha256 {sha256.hexdigest()[:16]}{left_out_text(skipped)}')
    say(f'data: {held:.1%} of the bytes held out for validation, {TELL[split.by]} ({split.share:.1%} asked for)')
    names.tell(say, 'documents', config)

    def texts(part: str) -> Iterator[str]:
        again = hashlib.sha256()
        for document in documents(config, []):
            digest = _digest(document.text)
            again.update(bytes.fromhex(digest))
            group = digest if split.by == 'document' else group_of.get(digest, '')
            if text := split.parts(document, group).get(part):
                yield text
        if again.digest() != sha256.digest():
            raise UserError(
                f'data.source={config.source!r}: changed while it was read; start again when nothing writes to it'
            )

    learnt = 'elsewhere: it was imported'
    if tokenizer is None:
        tokenizer, every = _learn(texts('train'), config, characters)
        learnt = f'one in {every} blocks of the training text' if every > 1 else 'the whole training text'
    rows, facts_of = {}, {}
    for part in SPLITS:
        stream_S, length_D, bytes_ = encode_documents(tokenizer, texts(part), config.special_tokens)
        rows[part] = pack(stream_S, length_D, key['sequence_length'], bytes_)
        facts_of[part] = {'documents': len(length_D), **_size(rows[part])}
    for part, facts in facts_of.items():
        if not facts['rows']:
            raise UserError(f'data.source={config.source!r}: {size} bytes leave no text for {part}; give more text')
        facts['padding_share'] = 1 - facts['tokens'] / (facts['rows'] * key['sequence_length'])
    for part, facts in facts_of.items():
        say(f'data: {part}: {facts["documents"]} documents, {facts["tokens"]} tokens in {facts["rows"]} rows')
    return Dataset(
        tokenizer,
        key=key,
        facts={
            'source': list(config.paths),
            'sha256': sha256.hexdigest(),
            'documents': count,
            'bytes': size,
            'characters': characters,
            'tokens': sum(rows[part].tokens for part in SPLITS),
            'skipped': {'count': len(skipped), 'first': [one.path for one in skipped[:5]]},
            'split': {
                'by': split.by,
                'share': held,
                'groups': len(size_of_group),
                'validation_groups': sorted(split.held_out)[:50],
            },
            'tokenizer': {
                'vocabulary': tokenizer.vocabulary,
                'bytes_per_token': rows['validation'].bytes / rows['validation'].tokens,
                'trained_on': learnt,
            },
            'versions': {'python': platform.python_version(), 'sentencepiece': sentencepiece.__version__},
            **facts_of,
        },
        **rows,
    )


def _build_pairs(
    config: DataConfig, key: dict[str, Any], say: Callable[[str], None], tokenizer: Tokenizer | None
) -> Dataset:
    """Rows of pairs of a source and a target, with a tokenizer learnt from the training split if none is given.

    Pairs of one source stay on one side of the split. Raises UserError where the sources hold none, or too few.
    """
    sha256, size_of_source, count = hashlib.sha256(), Counter[str](), 0
    skipped: list[LeftOut] = []
    names = _Names(tokenizer)
    for pair in read_pairs(config.paths, 'data.source', skipped):
        names.look(*pair)
        sha256.update('\t'.join(map(_digest, pair)).encode())
        size_of_source[_digest(pair.source)] += len(''.join(pair).encode())
        count += 1
    if not count:
        raise UserError(f'data.source={config.source!r}: holds no pairs; a line must be a source, a tab, and a target')
    size = size_of_source.total()
    held_by = lambda share: sum(size_of_source[source] for source in held_out(size_of_source, share))
    held = held_out(size_of_source, config.validation_share)
    share = checked(held_by(config.validation_share), size, config, held_by)
    say(
        f'data: {count} pairs, {share:.1%} of their bytes held out ({config.validation_share:.1%} asked for)'
        f'{left_out_text(skipped)}'
    )
    names.tell(say, 'pairs', config)

    def of(part: str) -> Iterator[Pair]:
        for pair in read_pairs(config.paths, 'data.source'):
            if (_digest(pair.source) in held) == (part == 'validation'):
                yield pair

    if tokenizer is None:
        tokenizer, _ = _learn((side for pair in of('train') for side in pair), config, size)
    length = key['sequence_length']
    rows, facts_of = {}, {}
    for part in SPLITS:
        rows[part], left_out = pack_pairs(tokenizer, of(part), length, key['start'], config.special_tokens)
        if len(rows[part]) == 0:
            raise UserError(
                f'data.source={config.source!r}: {count} pairs leave none for {part}, {left_out} of them for having more than '
                f'training.sequence_length={length} tokens on a side; give more'
            )
        pairs = len(rows[part].start_P)
        facts_of[part] = {'pairs': pairs, 'too_long': left_out, **_size(rows[part])}
        long = f'; {left_out} left out, of more than {length} tokens on a side' if left_out else ''
        say(f'data: {part}: {pairs} pairs, {rows[part].tokens} target tokens in {len(rows[part])} rows{long}')
    facts = {'source': list(config.paths), 'sha256': sha256.hexdigest(), 'pairs': count, 'bytes': size, **facts_of}
    return Dataset(tokenizer, facts={**facts, 'tokenizer': {'vocabulary': tokenizer.vocabulary}}, key=key, **rows)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _size(rows: Samples) -> dict[str, Any]:
    return {'bytes': rows.bytes, 'tokens': rows.tokens, 'rows': len(rows)}


def _learn(texts: Iterator[str], config: DataConfig, characters: int, block: int = 1 << 16) -> tuple[Tokenizer, int]:
    """A tokenizer learnt from one in so many blocks of texts that have so many characters; and of how many."""
    assert config.vocabulary is not None, 'checked by `prepare`'
    every = 1 + characters // TOKENIZER_CHARACTERS
    blocks = (text[begin : begin + block] for text in texts for begin in range(0, len(text), block))
    return Tokenizer.train(itertools.islice(blocks, 0, None, every), config.vocabulary), every


class _Names:
    """Counts the documents that have names of special tokens in them, as far as it looks."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.pattern = tokenizer.special_names if tokenizer else None
        self.found, self.left, self.all = 0, SEARCHED, True

    def look(self, *texts: str) -> None:
        """Looks for names in the texts of one document."""
        if self.pattern is None:
            return
        for text in texts:
            match = self.pattern.search(text, 0, self.left)
            self.all &= bool(match) or len(text) <= self.left
            self.left = max(0, self.left - (match.end() if match else len(text)))
            if match:
                self.found += 1
                return

    def tell(self, say: Callable[[str], None], documents: str, config: DataConfig) -> None:
        """Says how many there are, and what becomes of the names."""
        if not self.found:
            return
        read, other = 'text', 'data.special_tokens=true reads them as those tokens'
        if config.special_tokens:
            read, other = 'those tokens', 'data.special_tokens=false reads them as text'
        many = f'{self.found}' if self.all else f'at least {self.found}'
        say(f'data: {many} {documents} have names of special tokens in them, which are read as {read}; {other}')
