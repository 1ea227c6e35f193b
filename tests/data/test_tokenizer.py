"""Text survives the tokenizer whatever it holds, at once and as a stream."""

import random

import pytest
import sentencepiece
import tokenizers

from weft.data.tokenizer import Tokenizer
from weft.hub.exported_tokenizer import exported_tokenizer
from weft.hub.published_tokenizer import load_tokenizer
from weft.runtime import rendezvous as peers
from weft.runtime.errors import UserError

# A little of everything: indentation, both line ends, tabs, two scripts.
TEXT = (
    'def f(self):\r\n\treturn 1\n\nclass A:\n        x = "é ü 漢字"\n    def g(self, text):\n        return self.x\n'
    * 30
)
TRICKY = [
    '',
    ' ',
    '   leading, and trailing   ',
    '\n\n\n',
    'a  b   c    d',
    '\t\tx\r\ny\rz\x0b\x0c\x1c\x85\u2028',
    'nul \0 inside',
    '\u2581',
    ' \u2581 \u2581\u2581 a\u2581b\u2581',
    'reserved \u2585 \u2047 \u2591',
    '<s></s><unk><pad><0x41><0xE2>\n<0x0A>',
    '👩\u200d👩\u200d👧 e\u0301 \ufb01 ½ Ａ \ufeff\ufffe\U0010ffff',
    'x' * 70_000 + '\u2581' + ' ' * 70_000,
]


@pytest.fixture(scope='module')
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 400)


def random_text(source: random.Random) -> str:
    """Up to 60 parts: ASCII, any character but surrogates, what sentencepiece treats in its own way, whitespace."""
    kinds = [
        lambda: chr(source.randrange(128)),
        lambda: chr(source.choice([source.randrange(0xD800), source.randrange(0xE000, 0x110000)])),
        lambda: source.choice(['\u2581', '\u2585', '<s>', '</s>', '<unk>', '<0x41>', '\r\n', '\0', '漢字']),
        lambda: source.choice(' \t\n') * source.randrange(1, 20),
    ]
    return ''.join(source.choice(kinds)() for _ in range(source.randrange(60)))


@pytest.mark.parametrize('text', TRICKY, ids=range(len(TRICKY)))
def test_tricky_text_survives(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_any_text_survives_at_once_and_as_a_stream(tokenizer: Tokenizer) -> None:
    source = random.Random(0)
    texts = [random_text(source) for _ in range(500)]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids == tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocabulary and i not in (tokenizer.bos, tokenizer.eos) for i in ids)
        assert tokenizer.decode(ids) == text
        stream = tokenizer.stream()
        assert ''.join(stream.push([i]) for i in ids) + stream.finish() == text


def test_stream_holds_back_a_part_of_a_character_and_replaces_one_that_never_ends(tokenizer: Tokenizer) -> None:
    first, second, third = tokenizer.encode('\u2581')
    stream = tokenizer.stream()
    assert [stream.push([first]), stream.push([second]), stream.push([third])] == ['', '', '\u2581']
    assert stream.finish() == ''
    assert stream.push([first, second]) == ''
    assert stream.finish() == '\ufffd'


def test_control_pieces_have_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.bos != tokenizer.eos
    assert tokenizer.decode([tokenizer.bos, *tokenizer.encode('a'), tokenizer.eos]) == 'a'


def test_learns_whitespace_runs_and_line_ends() -> None:
    tokenizer = Tokenizer.train([TEXT], 400)
    assert b'        ' in tokenizer.pieces
    assert any(b'\n' in piece and len(piece) > 1 for piece in tokenizer.pieces)
    assert len(tokenizer.encode(TEXT)) < len(TEXT.encode()) / 3


def test_training_is_deterministic_and_a_saved_model_loads_equal(tokenizer: Tokenizer, tmp_path) -> None:
    again = Tokenizer.train(iter([TEXT]), 400)
    assert again.model == tokenizer.model
    again.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.pieces == tokenizer.pieces
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)


def test_the_other_processes_know_while_a_library_keeps_the_lock_that_signs_of_life_need(monkeypatch) -> None:
    said = []

    class Others:
        send = staticmethod(said.append)

    def learn(**options):
        assert said == [{'busy': True}]
        raise KeyboardInterrupt

    monkeypatch.setattr(peers, '_peers', Others)
    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, 'train', learn)
    with pytest.raises(KeyboardInterrupt):
        Tokenizer.train(['some text to learn from\n'] * 100, 300)
    assert said == [{'busy': True}, {'busy': False}]


def test_small_text_gives_fewer_pieces_and_many_characters_fit_a_small_vocabulary() -> None:
    assert Tokenizer.train(['hello world\n' * 100], 1000).vocabulary < 1000
    source = random.Random(1)
    chinese = ''.join(chr(source.randrange(0x4E00, 0x9FA5)) for _ in range(20_000))
    tokenizer = Tokenizer.train([chinese, 'y' * 70_000], 500)
    assert tokenizer.vocabulary <= 500
    assert tokenizer.decode(tokenizer.encode(chinese)) == chinese


@pytest.mark.parametrize('texts', [[], ['short'], ['\n' * 1000], ['\0\u2581\u2585' * 1000]], ids=range(4))
def test_too_little_text_is_the_users_mistake(texts: list[str]) -> None:
    with pytest.raises(UserError, match=r'data\.source: \d+ characters .* data\.vocabulary=400'):
        Tokenizer.train(texts, 400)


def test_surrogates_and_files_that_are_no_model_are_the_users_mistake(tokenizer: Tokenizer, tmp_path) -> None:
    with pytest.raises(UserError, match=r"character 2 is '\\ud800'"):
        tokenizer.encode('ab\ud800')
    assert load_tokenizer(tmp_path) is None
    (tmp_path / 'tokenizer.model').write_bytes(tokenizer.model[:-100])
    with pytest.raises(UserError, match=r'tokenizer\.model: not a readable sentencepiece model'):
        load_tokenizer(tmp_path)


def test_a_long_text_has_the_ids_of_its_whole(tokenizer: Tokenizer) -> None:
    """Wherever it is cut: sentencepiece encodes it as it is."""
    for text in (
        'return self.x' * 8_000,
        '\r\n\t' * 40_000,
        ' ' * 65_535 + 'return' + ' ' * 9,
        'class' * 13_107 + 'A:\n    ',
    ):
        assert len(text) > 65_536
        assert tokenizer.encode(text) == tokenizer._processor.encode(text)
        assert len(tokenizer.encode(text)) < len(text) / 2
    rare = '\u03b1' * 70_000 + 'x\u2581' + '\u03b2' * 70_000  # characters without a piece
    assert tokenizer.decode(tokenizer.encode(rare)) == rare


def test_a_long_text_has_the_ids_that_its_export_has(tokenizer: Tokenizer) -> None:
    exported = tokenizers.Tokenizer.from_str(exported_tokenizer(tokenizer, 128)['tokenizer.json'].decode())
    for text in ('self.width ' * 20_000, 'ab ' * 30_000, ' ' * 70_000, 'é文😀\r\n' * 15_000, 'a' * 140_000):
        ids = exported.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == ids
        assert [i for part in tokenizer.encode_long(text) for i in part] == ids


def test_names_of_special_tokens_are_shown_on_demand(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos, *tokenizer.encode('a b'), tokenizer.eos]
    assert (tokenizer.decode(ids, whole=True), tokenizer.decode(ids, special=True)) == ('a b', '<s>a b</s>')
    assert not tokenizer.starts_twice('<s>a')  # which is text to it
