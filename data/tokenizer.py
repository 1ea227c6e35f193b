"""Text to pieces and back, without loss: decode(encode(text)) == text for every text that UTF-8 can hold.

The pieces are byte pair encoding (Sennrich et al. 2016, arXiv:1508.07909) as sentencepiece learns it, on text as it is:
nothing is normalised, and characters that are not in the vocabulary become their UTF-8 bytes. sentencepiece writes a
space as U+2581, so a literal U+2581 would come back as a space; it is cut out of the text and written as its bytes.
"""

import codecs
import contextlib
import functools
import hashlib
import io
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import sentencepiece

from weft.runtime import rendezvous as peers
from weft.runtime.errors import UserError, shown
from weft.storage import files as disk
from weft.storage.foreign import lone_surrogate

SPACE = '\u2581'
PART = 65536  # characters: a longer text is cut where no piece can span the cut, for sentencepiece holds many bytes for each
SOME_PARTS = 64  # that are encoded at once
# The trainer aborts on a word (between two spaces) of more than 65,535 characters, so it sees shorter samples.
SAMPLE_CHARACTERS = 4096
CONTROL_PIECES = 3
COVERAGE = 0.9995
# sentencepiece's trainer keeps these for itself.
RESERVED = '\0\u2581\u2585'
# For a prompt that is encoded as `Tokenizer.starts_twice` says.
TWICE = 'the prompt begins with the token that begins every prompt anyway: the model reads it twice; leave it out'


class StreamDecoder:
    """Text from ids that come a few at a time; the bytes of a character are held back until it is complete.

    Args:
        pieces: the bytes that each id stands for.
        names: the bytes of ids that are to be written otherwise.
        first: the bytes of an id that begins the text, where they are others.
        spaces: at the beginning of the text that are left out.
    """

    def __init__(
        self,
        pieces: Sequence[bytes],
        names: Mapping[int, bytes] | None = None,
        first: Callable[[int], bytes] | None = None,
        spaces: int = 0,
    ) -> None:
        self._pieces, self._names, self._first, self._spaces = pieces, names or {}, first, spaces
        self._utf8 = codecs.getincrementaldecoder('utf-8')('replace')

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete, '' if none; ids that no text has stand for none."""
        return self._begun(self._utf8.decode(b''.join(map(self._bytes, ids))))

    def finish(self) -> str:
        """What is left at the end: U+FFFD if a character stayed incomplete, else ''."""
        return self._begun(self._utf8.decode(b'', final=True))

    def _bytes(self, i: int) -> bytes:
        found = self._names.get(i) or (self._pieces[i] if i < len(self._pieces) else b'')
        if found and self._first:
            found, self._first = found if i in self._names else self._first(i), None
        return found

    def _begun(self, text: str) -> str:
        """Without the spaces that are left out."""
        if self._spaces and text:
            out = min(len(text) - len(text.lstrip(' ')), self._spaces)
            self._spaces = self._spaces - out if out == len(text) else 0
            text = text[out:]
        return text


class Tokenizer:
    """`vocabulary` ids from 0; `bos` opens a document, `eos` ends it; `model` is what sentencepiece's file holds.

    `prefix` stands before a prompt, `suffix` after a text that is complete, and any of `ends` ends an answer. `embedded` is the
    number of ids that the model knows, where those of the tokenizer are more: others are refused when a text has them.
    hub/published_tokenizer.py has the tokenizers of published models, which are not `lossless`: what they decode may differ
    from what they encoded.
    """

    name = 'tokenizer.model'
    lossless = True

    def __init__(self, model: bytes) -> None:
        if not model:  # which sentencepiece takes for none
            raise RuntimeError('it is empty')
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocabulary: int = self._processor.vocab_size()
        self.embedded = self.vocabulary
        self.bos: int = self._processor.bos_id()
        self.eos: int = self._processor.eos_id()
        self.prefix: tuple[int, ...] = (self.bos,)
        self.suffix: tuple[int, ...] = ()
        self.ends = frozenset([self.eos])
        self._space = [self._processor.piece_to_id(f'<0x{byte:02X}>') for byte in SPACE.encode()]
        # The bytes that each id stands for; control pieces stand for none.
        self.pieces: list[bytes] = [self._bytes_of(i) for i in range(self.vocabulary)]

    def _bytes_of(self, i: int) -> bytes:
        piece = self._processor.id_to_piece(i)
        if self._processor.is_byte(i):
            return bytes([int(piece[3:5], 16)])
        if self._processor.is_control(i) or self._processor.is_unknown(i):
            return b''
        return piece.replace(SPACE, ' ').encode()

    def name_of(self, i: int) -> str:
        """What a token is called; '' for an id that is none."""
        return self._processor.id_to_piece(i) if 0 <= i < self.vocabulary else ''

    def id_of(self, piece: str) -> int | None:
        """The id of a piece; None if there is none."""
        found = self._processor.piece_to_id(piece)
        return found if self._processor.id_to_piece(found) == piece else None

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos and eos."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, on all cores. UserError for half of a surrogate pair, which UTF-8 cannot write."""
        check_unicode(texts)
        parts_of = [self._parts(text) for text in texts]
        encoded = iter(self._encoded([part for parts in parts_of for part in parts]))
        return [list(itertools.chain.from_iterable(itertools.islice(encoded, len(parts)))) for parts in parts_of]

    def encode_long(self, text: str) -> Iterator[Sequence[int]]:
        """Ids of a text, some at a time: those of a book, as Python has them, need forty times its memory."""
        check_unicode([text])
        parts = self._parts(text)
        for begin in range(0, len(parts), SOME_PARTS):
            yield from self._encoded(parts[begin : begin + SOME_PARTS])

    def _encoded(self, parts: Sequence[str]) -> list[Sequence[int]]:
        found = self._processor.encode(list(parts), num_threads=os.cpu_count() or 1)
        return [self._space if part == SPACE else ids for part, ids in zip(parts, found, strict=True)]

    @contextlib.contextmanager
    def names_as_text(self) -> Iterator[None]:
        """Within it the names of special tokens in a text are text as any other, as a learnt tokenizer has it everywhere."""
        yield

    @property
    def special_names(self) -> re.Pattern[str] | None:
        """Finds the names that `encode_batch` would read as special tokens; None if there are none."""
        return None

    def encode_targets(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each target of a pair, which may be written in another language than its source."""
        return self.encode_batch(texts)

    def _parts(self, text: str) -> list[str]:
        """A text cut up: each U+2581 by itself, and long text where no piece holds the two characters beside the cut.

        So the parts' ids are the text's own: pieces are joined from within, and none could be joined over such a cut.
        """
        if len(text) <= PART and SPACE not in text:
            return [text] if text else []
        parts = []
        for run in re.split(f'({SPACE})', text):
            begin, end = 0, PART
            while end < len(run):
                if run[end - 1 : end + 1] not in self._joined:
                    parts.append(run[begin:end])
                    begin, end = end, end + PART
                else:
                    end += 1
            if run[begin:]:
                parts.append(run[begin:])
        return parts

    @functools.cached_property
    def _joined(self) -> frozenset[str]:
        """Every two characters that stand beside each other in a piece."""
        texts = (piece.decode('utf-8', 'replace') for piece in self.pieces)
        return frozenset(text[at : at + 2] for text in texts for at in range(len(text) - 1))

    def check(self, ids: Iterable[int]) -> None:
        """Raises UserError for an id that the tokenizer has and the model's embedding lacks."""
        if self.embedded >= self.vocabulary:
            return
        for i in ids:
            if i >= self.embedded:
                raise UserError(
                    f'text: token {shown(self.name_of(i), 60, quoted=True)} has id {i}, and the model’s embedding has '
                    f'{self.embedded} rows: it never '
                    'learnt that token; leave it out'
                )

    def starts_twice(self, text: str) -> bool:
        """Whether a prompt's text itself begins with the token that `prefix` puts before it."""
        return self.prefix[-1:] == (self.bos,) and self.encode(text[:256])[:1] == [self.bos]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes that `ids` stand for; a model's ids may end in the middle of a character, or stand for no text."""
        return b''.join(self.pieces[i] for i in ids if i < len(self.pieces))

    def decode(self, ids: Iterable[int], whole: bool = False, special: bool = False) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. The arguments are those of `stream`."""
        if not whole and not special:
            return self.decode_bytes(ids).decode('utf-8', 'replace')
        stream = self.stream(whole, special)
        return stream.push(ids) + stream.finish()

    def stream(self, whole: bool = False, special: bool = False) -> StreamDecoder:
        """Decodes ids that come a few at a time.

        Args:
            whole: the ids are a text of their own, not one that goes on: a published tokenizer may write a space before the
                first word that is none of the text's.
            special: names of special tokens are part of the text.
        """
        names = {i: self.name_of(i).encode() for i, piece in enumerate(self.pieces) if special and not piece}
        return StreamDecoder(self.pieces, names)

    def files(self) -> dict[str, bytes]:
        """What a run keeps of it, by name."""
        return {self.name: self.model}

    @property
    def sha256(self) -> str:
        return hashlib.sha256(b''.join(self.files().values())).hexdigest()

    def save(self, folder: Path) -> None:
        """Write each of its files so that the folder holds all of it or what it held before."""
        for name, content in self.files().items():
            disk.write(folder / name, content)

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary: int) -> 'Tokenizer':
        """Learn at most `vocabulary` pieces from `texts`, the same ones each time.

        Small texts give fewer pieces. UserError where there is next to nothing to learn from.
        """
        samples = [text[i : i + SAMPLE_CHARACTERS] for text in texts for i in range(0, len(text), SAMPLE_CHARACTERS)]
        count_of: Counter[str] = Counter()
        for sample in samples:
            count_of.update(sample)
        frequent = _frequent(count_of, (vocabulary - 256 - CONTROL_PIECES) // 2)
        rare = re.compile(f'[^{re.escape(frequent)}]') if frequent else re.compile('.', re.DOTALL)
        sentences = [part for sample in samples for part in rare.split(sample) if part.strip()]
        characters = sum(map(len, sentences))
        if characters < vocabulary:
            found = f'{characters} characters of training text are too few for data.vocabulary={vocabulary}'
            raise UserError(
                f'data.source: {found}; give at least as many characters as pieces, better a hundred times as many'
            )
        model = io.BytesIO()
        with peers.busy():  # it keeps Python's lock for seconds, of much text without spaces for a quarter of a minute
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=model,
                model_type='bpe',
                vocab_size=vocabulary,
                hard_vocab_limit=False,
                byte_fallback=True,
                character_coverage=1.0,
                normalization_rule_name='identity',
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                # Pieces may join letters, signs and digits, hold line ends, and span deep indentation: Python source has
                # 3.79 bytes a piece then, 3.29 with the defaults.
                split_by_unicode_script=False,
                split_by_number=False,
                max_sentencepiece_length=32,
                max_sentence_length=SAMPLE_CHARACTERS * 4,
                minloglevel=2,
            )
        return cls(model.getvalue())


def check_unicode(texts: Iterable[str]) -> None:
    """Raises UserError for half of a surrogate pair, which UTF-8 cannot write."""
    for text in texts:
        if (at := lone_surrogate(text)) is not None:
            raise UserError(f'text: character {at} is {text[at]!r}: a lone surrogate is not Unicode text; leave it out')


def _frequent(count_of: Counter[str], most: int) -> str:
    """The characters that get pieces, the others being left to their bytes: those that make up COVERAGE of the text.

    At most `most` of them, because in Chinese, say, they would fill a small vocabulary.
    """
    wanted = COVERAGE * count_of.total()
    frequent, covered = '', 0
    for character, count in sorted(count_of.items(), key=lambda item: (-item[1], item[0]))[:most]:
        if covered >= wanted:
            break
        covered += count
        if character not in RESERVED:
            frequent += character
    return frequent


def own_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer that was learnt for the run in `folder`; None where there is none."""
    path = folder / Tokenizer.name
    if not path.is_file():
        return None
    try:
        return Tokenizer(path.read_bytes())
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}') from None
    except (RuntimeError, UnicodeDecodeError) as error:  # what sentencepiece says to a file that is none of its own
        raise UserError(f'{path}: not a readable sentencepiece model ({shown(error)})') from None
