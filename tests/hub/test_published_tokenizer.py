"""Tokenizers of published models: their ids, the bytes that an id stands for, and the ids that open and end texts."""

import io
import json
import random
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.data.test_tokenizer import TEXT, TRICKY, random_text
from weft.data.tokenizer import Tokenizer
from weft.hub.exported_tokenizer import exported_tokenizer
from weft.hub.published_tokenizer import JsonTokenizer, load_tokenizer, published_tokenizer
from weft.runtime.errors import UserError

SPECIAL = ['<unk>', '<s>', '</s>']


def byte_level() -> tokenizers.Tokenizer:
    """As of GPT-2, Llama 3, Qwen: any bytes."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    return made


def metaspace(**options: Any) -> tokenizers.Tokenizer:
    """As of Llama 2, Gemma: spaces are a letter of their own, rare characters are their bytes."""
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>', fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')])
    made.decoder = decoders.Sequence(
        [decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
    )
    special = [*SPECIAL, *(f'<0x{byte:02X}>' for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False, **options)
    made.train_from_iterator([TEXT], trainer)
    said = json.loads(made.to_str())
    said['added_tokens'] = said['added_tokens'][: len(SPECIAL)]  # bytes are pieces, not special
    made = tokenizers.Tokenizer.from_str(json.dumps(said))
    made.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    return made


def word_pieces() -> tokenizers.Tokenizer:
    """As of BERT: words in small letters."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token='[UNK]'))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix='##', cleanup=False)
    special = ['[UNK]', '[CLS]', '[SEP]']
    made.train_from_iterator(
        [TEXT], trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    template = [('[CLS]', 1), ('[SEP]', 2)]
    made.post_processor = processors.TemplateProcessing(single='[CLS] $A [SEP]', special_tokens=template)
    return made


def unigram() -> tokenizers.Tokenizer:
    """As of T5."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    special = ['<pad>', '</s>', '<unk>']
    made.train_from_iterator(
        [TEXT], trainers.UnigramTrainer(vocab_size=100, special_tokens=special, unk_token='<unk>', show_progress=False)
    )
    made.post_processor = processors.TemplateProcessing(single='$A </s>', special_tokens=[('</s>', 1)])
    return made


MAKERS = {'byte_level': byte_level, 'metaspace': metaspace, 'word_pieces': word_pieces, 'unigram': unigram}


def read(made: tokenizers.Tokenizer, **files: Any) -> Tokenizer:
    """As a published model has it, with other files beside it."""
    content = {'tokenizer.json': made.to_str().encode()}
    content |= {f'{name}.json': json.dumps(fields).encode() for name, fields in files.items()}
    return published_tokenizer(content, 'source')


@pytest.mark.parametrize('kind', MAKERS)
def test_ids_and_text_are_those_of_the_library(kind):
    made = MAKERS[kind]()
    mine = read(made, tokenizer_config={'eos_token': '</s>', 'bos_token': '<s>'})
    text = 'def f(self): return self.x' if kind != 'word_pieces' else 'def f ( self ) : return 1'
    ids = mine.encode(text)
    assert ids == made.encode(text, add_special_tokens=False).ids
    assert mine.encode_batch([text, 'class A']) == [ids, mine.encode('class A')]
    assert mine.vocabulary == made.get_vocab_size()
    assert mine.decode(ids).removeprefix(' ') == made.decode(ids) == text
    stream = mine.stream()
    assert ''.join(stream.push([i]) for i in ids) + stream.finish() == mine.decode(ids)


@pytest.mark.parametrize('text', TRICKY[1:-1], ids=range(1, len(TRICKY) - 1))
def test_bytes_survive(text):
    mine = read(byte_level(), tokenizer_config={'eos_token': '</s>'})
    special = text.replace('<s>', '').replace('</s>', '').replace('<unk>', '')  # these are themselves, not text
    assert mine.decode(mine.encode(special)) == special
    spaced = read(metaspace())
    assert spaced.decode(spaced.encode(special)).removeprefix(' ') == special.replace('\u2581', ' ')


def test_what_opens_and_ends_texts():
    mine = read(metaspace(), generation_config={'eos_token_id': [2, 7]}, config={'eos_token_id': 9})
    assert (mine.prefix, mine.bos, mine.eos) == ((1,), 1, 2)
    assert mine.ends == {2, 7, 9}
    mine = read(
        metaspace(), tokenizer_config={'bos_token': '<s>', 'eos_token': {'content': '</s>'}, 'add_bos_token': False}
    )
    assert (mine.prefix, mine.bos, mine.eos) == ((1,), 1, 2)  # the post-processor decides, as in transformers
    mine = read(byte_level(), tokenizer_config={'eos_token': '</s>', 'bos_token': None, 'add_bos_token': False})
    assert (mine.prefix, mine.bos, mine.eos) == ((), 2, 2)
    mine = read(word_pieces())
    assert (mine.prefix, mine.bos, mine.eos) == ((1,), 1, 2)
    mine = read(unigram())
    assert (mine.prefix, mine.bos, mine.eos) == ((), 1, 1)
    with pytest.raises(UserError, match='no token that opens or ends a text'):
        read(byte_level())


def test_special_tokens_in_a_text_are_themselves_and_stand_for_no_text():
    mine = read(byte_level(), tokenizer_config={'eos_token': '</s>'})
    assert mine.encode('a</s>')[-1] == 2
    assert mine.decode([2, *mine.encode('a')]) == 'a'
    assert mine.stream().push([10**6]) == ''


def sentences(**options: Any) -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()), model_writer=out, vocab_size=330, byte_fallback=True, model_type='bpe',
        minloglevel=2, **options,
    )  # fmt: skip
    return out.getvalue()


def test_a_published_sentencepiece_model_keeps_its_own_normalisation(tmp_path):
    model = sentences()
    mine = published_tokenizer(
        {'tokenizer.model': model, 'generation_config.json': b'{"eos_token_id": [2, 5]}'}, 'source'
    )
    library = sentencepiece.SentencePieceProcessor(model_proto=model)
    text = 'return  \ufb01 self.x'
    assert mine.encode(text) == library.encode(text)
    assert mine.decode(mine.encode(text)) == ' return fi self.x'
    assert (mine.prefix, mine.bos, mine.eos, mine.ends) == ((1,), 1, 2, {2, 5})
    mine.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode(text) == mine.encode(text)
    assert (again.prefix, again.ends, again.sha256) == (mine.prefix, mine.ends, mine.sha256)
    t5 = published_tokenizer({'spiece.model': sentences(bos_id=-1)}, 'source')
    assert t5.prefix == ()
    assert t5.bos == t5.eos


def test_a_run_keeps_a_tokenizer_json(tmp_path):
    mine = read(metaspace(), generation_config={'eos_token_id': [2, 7]})
    mine.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, JsonTokenizer)
    assert (again.pieces, again.prefix, again.ends) == (mine.pieces, mine.prefix, mine.ends)


def test_files_that_are_no_tokenizer_are_the_users_mistake():
    for content in (b'{', b'{}', b'\xff'):
        with pytest.raises(UserError, match=r'tokenizer\.json'):
            published_tokenizer({'tokenizer.json': content}, 'source')
    with pytest.raises(UserError, match=r'tokenizer\.model: not a readable sentencepiece model'):
        published_tokenizer({'tokenizer.model': b'no'}, 'source')
    with pytest.raises(UserError, match=r'tokenizer_config\.json'):
        published_tokenizer({'tokenizer.model': sentences(), 'tokenizer_config.json': b'{'}, 'source')
    made = byte_level()
    made.decoder = decoders.CTC()
    with pytest.raises(UserError, match='CTC'):
        read(made, tokenizer_config={'eos_token': '</s>'})
    assert published_tokenizer({}, 'source') is None
    with pytest.raises(UserError, match='lone surrogate'):
        read(metaspace()).encode('\ud800')


def added(i: Any, content: str = 'new') -> dict:
    flags = dict.fromkeys(('special', 'single_word', 'lstrip', 'rstrip', 'normalized'), False)
    return {'id': i, 'content': content, **flags}


IDS = {  # changes of a tokenizer.json of 304 tokens, and words of the refusal
    'after a gap': (lambda said: said['added_tokens'].append(added(309)), ["'new' has id 309", 'read as 304']),
    'taken': (lambda said: said['added_tokens'].append(added(7)), ["'new' has id 7", 'read as 304']),
    'beyond memory': (lambda said: said['added_tokens'].append(added(4 * 10**9)), ["'new' has id 4000000000"]),
    'beyond memory in the vocabulary': (
        lambda said: said['model']['vocab'].update(huge=3 * 10**9),
        ["'huge' has id 3000000000", f'at most {2**22 - 1} works'],
    ),
    'negative': (lambda said: said['added_tokens'].append(added(-1)), ['-1']),
    'beyond any id': (lambda said: said['added_tokens'].append(added(2**40)), [str(2**40)]),
}


@pytest.mark.parametrize('name', IDS)
def test_ids_that_are_none_of_the_vocabulary_are_the_users_mistake(name):
    change, words = IDS[name]
    said = json.loads(byte_level().to_str())
    assert len(said['model']['vocab']) == 304
    change(said)
    files = {'tokenizer.json': json.dumps(said).encode(), 'tokenizer_config.json': b'{"eos_token": "</s>"}'}
    with pytest.raises(UserError, match=r'tokenizer\.json: ') as error:
        published_tokenizer(files, 'source')
    assert all(word in str(error.value) for word in words), error.value


def test_tokens_may_be_added_after_the_vocabulary():
    said = json.loads(byte_level().to_str())
    said['added_tokens'].append(added(304))
    files = {'tokenizer.json': json.dumps(said).encode(), 'tokenizer_config.json': b'{"eos_token": "</s>"}'}
    mine = published_tokenizer(files, 'source')
    assert (mine.vocabulary, mine.encode('new')) == (305, [304])
    assert mine.decode([304]) == 'new'


@pytest.mark.parametrize('eos', [304, -1, 'x', [2, 'x'], 2**22, True])
def test_ids_that_end_a_text_are_ids(eos):
    with pytest.raises(UserError, match=r'eos_token_id is (304|-1|True|.x.|4194304)'):
        read(byte_level(), config={'eos_token_id': eos, 'bos_token_id': 1})


def test_a_tokenizer_that_was_learnt_here_is_exported_with_the_same_ids():
    mine = Tokenizer.train([TEXT], 400)
    other = published_tokenizer(exported_tokenizer(mine, 64), 'target')
    assert (other.bos, other.eos, other.prefix, other.ends) == (mine.bos, mine.eos, mine.prefix, mine.ends)
    assert other.vocabulary == mine.vocabulary
    source = random.Random(0)
    texts = [TEXT, *TRICKY, *(random_text(source) for _ in range(300))]
    plain = [text.replace('\u2581', '') for text in texts]
    for name in ('<s>', '</s>', '<unk>'):
        plain = [text.replace(name, '') for text in plain]
    # Parts of 65,536 characters would begin within a word, among spaces, within a longer piece.
    plain += [
        'self.x ' * 20_000,
        'a' + ' ' * 140_000,
        '    def g' * 15_000,
        'é漢x' * 30_000,
        'ret' + 'x' * 70_000 + 'urn' * 30_000,
    ]
    assert other.encode_batch(plain) == mine.encode_batch(plain)
    assert [other.decode(ids) for ids in other.encode_batch(plain)] == plain
