"""Text to pieces and back, without loss: decode(encode(text)) == text for every text that UTF-8 can hold.

The pieces are byte pair encoding (Sennrich et al. 2016, arXiv:1508.07909) as sentencepiece learns it, on text as it is:
nothing is normalised, and characters that are not in the vocabulary become their UTF-8 bytes. sentencepiece writes a
space as U+2581, so a literal U+2581 would come back as a space; it is cut out of the text and written as its bytes.
"""

import codecs
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from sharding.errors import UserError

SPACE = '\u2581'
# A part is a lone U+2581 or other text. Parts have a limit because sentencepiece holds many bytes for each character.
PARTS = re.compile(f'{SPACE}|[^{SPACE}]{{1,65536}}')
# The trainer aborts on a word (between two spaces) of more than 65,535 characters, so it sees shorter samples.
SAMPLE_CHARACTERS = 4096
CONTROL_PIECES = 3
COVERAGE = 0.9995
# sentencepiece's trainer keeps these for itself.
RESERVED = '\0\u2581\u2585'


class StreamDecoder:
    """Text from ids that come a few at a time; the bytes of a character are held back until it is complete."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder('utf-8')('replace')

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete, '' if none; ids that no text has stand for none."""
        return self._utf8.decode(b''.join(self._pieces[i] for i in ids if i < len(self._pieces)))

    def finish(self) -> str:
        """What is left at the end: U+FFFD if a character stayed incomplete, else ''."""
        return self._utf8.decode(b'', final=True)


class Tokenizer:
    """`vocabulary` ids from 0; `bos` opens a document, `eos` ends it; `model` is what sentencepiece's file holds.

    `prefix` stands before a prompt, and any of `ends` ends an answer. data/published_tokenizer.py has those of published
    models, which are not `lossless`: what they decode may differ from what they encoded.
    """

    name = 'tokenizer.model'
    lossless = True

    def __init__(self, model: bytes) -> None:
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocabulary: int = self._processor.vocab_size()
        self.bos: int = self._processor.bos_id()
        self.eos: int = self._processor.eos_id()
        self.prefix: tuple[int, ...] = (self.bos,)
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
        parts_of = [PARTS.findall(text) for text in texts]
        encoded = iter(
            self._processor.encode([part for parts in parts_of for part in parts], num_threads=os.cpu_count() or 1)
        )
        ids_of = []
        for parts in parts_of:
            ids: list[int] = []
            for part, part_ids in zip(parts, encoded, strict=False):
                ids += self._space if part == SPACE else part_ids
            ids_of.append(ids)
        return ids_of

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The UTF-8 bytes that `ids` stand for; a model's ids may end in the middle of a character, or stand for no text."""
        return b''.join(self.pieces[i] for i in ids if i < len(self.pieces))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode('utf-8', 'replace')

    def stream(self) -> StreamDecoder:
        return StreamDecoder(self.pieces)

    def files(self) -> dict[str, bytes]:
        """What a run keeps of it, by name."""
        return {self.name: self.model}

    @property
    def sha256(self) -> str:
        return hashlib.sha256(b''.join(self.files().values())).hexdigest()

    def save(self, folder: Path) -> None:
        """Write each of its files so that the folder holds all of it or what it held before."""
        for name, content in self.files().items():
            partial = folder / f'{name}.partial'
            partial.write_bytes(content)
            os.replace(partial, folder / name)

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
        try:
            text.encode()
        except UnicodeEncodeError as error:
            rule = 'a lone surrogate is not Unicode text; leave it out'
            raise UserError(f'text: character {error.start} is {text[error.start]!r}: {rule}') from None


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
