"""What transformers makes of tokenizers as they are published: writes goldens/tokenizers.json (`make goldens`).

The folders are made here, with tokenizers that a few lines of text teach; the golden file holds them too, so that the tests
need neither transformers nor the same trainers. Needs transformers, sentencepiece, protobuf.
"""

import base64
import io
import json
import random
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

OUT = Path(__file__).parent / 'goldens' / 'tokenizers.json'
TEXT = """the quick brown fox jumps over the lazy dog, and the dog does not mind at all.
def read(self, path):
    return self.text[path]  # "quoted" text
Ein schöner Tag; der Hund läuft über die Straße. Où est le café?
in the end there is the word, and the word is the end of the text."""
PIECES = [
    'the', ' the', ' dog', '  ', '   ', ' ', '\n', '\n\n', '\t', '\r\n', 'é', 'e\u0301', '漢字', '\U0001f600', '\ufb01', '½',
    "don't", '▁', '1', '2026', '.', ' ,', '(self)', 'xyz', 'ÿ', '\xa0', '<s>', '</s>', '<unk>', '<pad>', '<|im_start|>',
    '<|im_end|>', '<extra_id_0>', '<extra_id_1>', '<think>', '<|endoftext|>', '<start_of_turn>', '>>fra<<', '<mask>', 'Straße',
]  # fmt: skip
PLAIN = dict.fromkeys(('lstrip', 'rstrip', 'single_word', 'normalized'), False)


def texts() -> list[str]:
    """Some that users write, then pieces at random."""
    source = random.Random(14)
    written = [
        '', ' ', 'the dog', ' the  dog ', 'self.text\n    return  x', '<s>the dog</s>', 'a <s> b', '▁the',
        '<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\n', '<extra_id_0> the <extra_id_1>',
        '漢字 \U0001f600 café\u0301', ' \ufb01 x½', '>>fra<< the dog', 'x<think>y</think> z',
        '<start_of_turn>user\nhi<end_of_turn>',
    ]  # fmt: skip
    return written + [''.join(source.choices(PIECES, k=source.randint(1, 9))) for _ in range(25)]


def spm(text: str = TEXT, **options: Any) -> bytes:
    """A model of sentencepiece: byte pairs, text as it is, unless told otherwise."""
    out = io.BytesIO()
    own = {
        'model_type': 'bpe', 'vocab_size': 360, 'byte_fallback': True, 'normalization_rule_name': 'identity',
        'remove_extra_whitespaces': False, 'hard_vocab_limit': False, 'minloglevel': 2,
    }  # fmt: skip
    options = own | options
    with tempfile.TemporaryDirectory() as folder:
        if 'rules' in options:  # of the normalisation: `ﬁ` is read as `fi`, and so on, for the usual rules are 240 kB
            rules = Path(folder) / 'rules.tsv'
            lines = [
                (f'{ord(old):X}', ' '.join(f'{ord(one):X}' for one in new)) for old, new in options.pop('rules').items()
            ]
            rules.write_text(''.join(f'{old}\t{new}\n' for old, new in lines))
            options = {name: value for name, value in options.items() if name != 'normalization_rule_name'}
            options['normalization_rule_tsv'] = str(rules)
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text.split('\n')), model_writer=out, **options)
    return out.getvalue()


RULES = {'\ufb01': 'fi', '\xa0': ' ', '\n': ' ', '\t': ' ', '½': '1/2'}


def byte_level(size: int = 300) -> Tokenizer:
    """A tokenizer of bytes, as GPT-2's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=['<s>', '</s>'],
    )
    made.train_from_iterator(TEXT.split('\n'), trainer)
    return made


def added(**ids: Any) -> dict[str, Any]:
    """added_tokens_decoder of names by id."""
    return {str(i): {'content': name, 'special': not name.startswith('<think')} | PLAIN for name, i in ids.items()}


def vocab_and_merges(tail: list[str]) -> dict[str, Any]:
    """vocab.json and merges.txt, with more names at the end of the vocabulary."""
    model = json.loads(byte_level().to_str())['model']
    vocab = {token: i - 2 for token, i in model['vocab'].items() if i > 1}
    vocab |= {name: len(vocab) + i for i, name in enumerate(tail)}
    merges = ''.join(' '.join(pair) + '\n' for pair in model['merges'])
    return {'vocab.json': vocab, 'merges.txt': f'#version: 0.2\n{merges}'}


def folders() -> dict[str, dict[str, Any]]:
    """The files of each folder: texts as they are, models of sentencepiece as bytes, the others as JSON."""
    llama = spm()
    n = sentencepiece.SentencePieceProcessor(model_proto=llama).vocab_size()
    chatml = {'<unk>': 0, '<s>': 1, '</s>': 2, '<|im_start|>': n, '<|im_end|>': n + 1, '<think>': n + 2}
    ordinary = {'bos_token': '<s>', 'eos_token': '</s>', 'unk_token': '<unk>'}
    config = lambda model_type, **more: {'model_type': model_type, **more}
    of = lambda kind, **more: {'tokenizer_class': kind, **more}
    found: dict[str, dict[str, Any]] = {
        'llama_chatml': {
            'tokenizer.model': llama,
            'added_tokens.json': {'<|im_end|>': n + 1, '<|im_start|>': n},
            'tokenizer_config.json': of(
                'LlamaTokenizer', add_bos_token=True, added_tokens_decoder=added(**chatml), legacy=False,
                **(ordinary | {'eos_token': '<|im_end|>'}),
            ),
            'config.json': config('llama'),
        },
        'llama_old': {
            'tokenizer.model': llama,
            'added_tokens.json': {'<|im_end|>': n + 1, '<|im_start|>': n},
            'special_tokens_map.json': ordinary | {'eos_token': {'content': '<|im_end|>'} | PLAIN},
            'tokenizer_config.json': of('LlamaTokenizer', add_bos_token=True, add_eos_token=True, legacy=True),
            'config.json': config('llama'),
        },
        'llama_bare': {'tokenizer.model': llama, 'tokenizer_config.json': of('LlamaTokenizer'), 'config.json': config('llama')},
        'llama_without_space': {
            'tokenizer.model': llama,
            'tokenizer_config.json': of('LlamaTokenizer', add_prefix_space=False, add_bos_token=True, **ordinary),
            'config.json': config('llama'),
        },
        'llama_pad': {
            'tokenizer.model': llama,
            'tokenizer_config.json': of(
                'LlamaTokenizer', pad_token='<pad>', additional_special_tokens=['<mask>', '<s>'], **ordinary
            ),
            'config.json': config('llama'),
        },
        'llama_normalised': {
            'tokenizer.model': spm(rules=RULES, remove_extra_whitespaces=True),
            'tokenizer_config.json': of('LlamaTokenizer', add_bos_token=True, **ordinary),
            'config.json': config('llama'),
        },
        'mistral': {
            'tokenizer.model': spm(user_defined_symbols=['<think>', '  ', 'the'], control_symbols=['<mask>']),
            'tokenizer_config.json': of('LlamaTokenizer', add_bos_token=True, legacy=False, **ordinary),
            'config.json': config('mistral'),
        },
        'mistral_legacy': {
            'tokenizer.model': llama,
            'tokenizer_config.json': of(
                'LlamaTokenizer', add_bos_token=True, added_tokens_decoder=added(**chatml), **ordinary
            ),
            'config.json': config('mistral'),
        },
        'mixtral_normalised': {
            'tokenizer.model': spm(rules=RULES, remove_extra_whitespaces=True),
            'tokenizer_config.json': of('LlamaTokenizer', add_bos_token=True, **ordinary),
            'config.json': config('mixtral'),
        },
        'phi3_renamed': {
            'tokenizer.model': llama,
            'tokenizer_config.json': of(
                'LlamaTokenizer', add_bos_token=False, legacy=False, added_tokens_decoder=added(**{**chatml, '<pad>': n - 1}),
                **(ordinary | {'pad_token': '<pad>'}),
            ),
            'config.json': config('phi3'),
        },
        'unigram': {
            'tokenizer.model': spm(model_type='unigram', rules=RULES, remove_extra_whitespaces=True),
            'tokenizer_config.json': of('LlamaTokenizer', add_bos_token=True, **ordinary),
            'config.json': config('mistral'),
        },
        'gemma': {
            'tokenizer.model': spm(
                pad_id=0, eos_id=1, bos_id=2, unk_id=3, bos_piece='<bos>', eos_piece='<eos>', add_dummy_prefix=False,
                user_defined_symbols=['<mask>', '<start_of_turn>', '<end_of_turn>', '\n\n'], allow_whitespace_only_pieces=True,
            ),
            'tokenizer_config.json': of('GemmaTokenizer', add_bos_token=True),
            'config.json': config('gemma2', eos_token_id=[1, 6]),
        },
        't5': {
            'spiece.model': spm(
                model_type='unigram', vocab_size=110, byte_fallback=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
                rules=RULES, remove_extra_whitespaces=True,
            ),
            'tokenizer_config.json': of(
                'T5Tokenizer', extra_ids=4, additional_special_tokens=[f'<extra_id_{i}>' for i in range(4)],
                eos_token='</s>', pad_token='<pad>', unk_token='<unk>',
            ),
            'config.json': config('t5'),
        },
        't5_by_its_config': {
            'spiece.model': spm(
                model_type='unigram', vocab_size=110, byte_fallback=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1
            ),
            'config.json': config('t5'),
        },
        'gpt2': {
            **vocab_and_merges(['<|endoftext|>']),
            'tokenizer_config.json': {'model_max_length': 1024},
            'config.json': config('gpt2', eos_token_id=298),
        },
        'gpt2_spaced': {
            **vocab_and_merges(['<|endoftext|>', '<pad>']),
            'tokenizer_config.json': of(
                'GPT2Tokenizer', add_prefix_space=True, add_bos_token=True, bos_token='<|endoftext|>', pad_token='<pad>'
            ),
            'special_tokens_map.json': {'eos_token': '<|endoftext|>'},
            'config.json': config('gpt2'),
        },
        'qwen2': {
            **vocab_and_merges([]),
            'tokenizer_config.json': of(
                'Qwen2Tokenizer', eos_token='<|im_end|>', pad_token='<|endoftext|>', bos_token=None,
                added_tokens_decoder=added(**{'<|endoftext|>': 298, '<|im_start|>': 299, '<|im_end|>': 300}),
            ),
            'generation_config.json': {'eos_token_id': [300, 298]},
            'config.json': config('qwen2', eos_token_id=300),
        },
        'marian': marian(),
    }  # fmt: skip
    return found | json_folders(of, config)


def marian() -> dict[str, Any]:
    """Two models, and one vocabulary that has most of their pieces."""
    unigram = {
        'model_type': 'unigram', 'byte_fallback': False, 'remove_extra_whitespaces': True, 'rules': RULES, 'unk_id': 0,
    }  # fmt: skip
    source, target = spm(vocab_size=110, **unigram), spm(TEXT[200:], vocab_size=70, **unigram)
    pieces: dict[str, None] = dict.fromkeys(['</s>', '<unk>'])
    for model in (target, source):
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        pieces |= dict.fromkeys(processor.id_to_piece(i) for i in range(3, processor.vocab_size()) if i % 11)
    vocab = {piece: i for i, piece in enumerate([*pieces, '>>fra<<', '<pad>'])}
    return {
        'source.spm': source, 'target.spm': target, 'vocab.json': vocab,
        'tokenizer_config.json': {'tokenizer_class': 'MarianTokenizer', 'source_lang': 'en', 'target_lang': 'de'},
        'config.json': {'model_type': 'marian', 'eos_token_id': 0},
    }  # fmt: skip


def json_folders(of: Any, config: Any) -> dict[str, dict[str, Any]]:
    """A tokenizer.json, with and without a post-processor, under classes that say what it does to a text."""
    plain, template, both, more = byte_level(), byte_level(), byte_level(), byte_level()
    template.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 0)])
    both.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.RobertaProcessing(('</s>', 1), ('<s>', 0), trim_offsets=False),
        ]
    )
    more.add_tokens([AddedToken('<think>', normalized=False), AddedToken('the', single_word=True)])
    more.add_special_tokens([AddedToken('<mask>', lstrip=True, rstrip=True)])
    read = lambda made: json.loads(made.to_str())
    names = {'bos_token': '<s>', 'eos_token': '</s>'}
    late = added(**{'<|im_start|>': 300, '<|im_end|>': 301})
    found = {}
    for name, made in {'plain': plain, 'template': template}.items():
        for kind in ('PreTrainedTokenizerFast', 'LlamaTokenizerFast'):
            for flag in (True, False):
                found[f'json_{name}_{kind}_{flag}'] = {
                    'tokenizer.json': read(made),
                    'tokenizer_config.json': of(kind, add_bos_token=flag, add_eos_token=flag, **names),
                    'config.json': config('llama'),
                }
    fast = of('PreTrainedTokenizerFast', **names)
    return found | {
        'json_roberta': {'tokenizer.json': read(both), 'tokenizer_config.json': fast, 'config.json': config('llama')},
        'json_flags': {'tokenizer.json': read(more), 'tokenizer_config.json': fast, 'config.json': config('llama')},
        'json_added_by_its_config': {
            'tokenizer.json': read(plain),
            'tokenizer_config.json': fast | {'eos_token': '<|im_end|>', 'added_tokens_decoder': late},
            'config.json': config('llama'),
        },
    }


def golden(folder: Path, lines: list[str]) -> dict[str, Any]:
    """Ids of each text, what becomes of them again, and the ids that the class names."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(line).input_ids for line in lines]
    found = {
        'class': type(tokenizer).__name__,
        'eos': tokenizer.eos_token_id,
        'ids': ids,
        'texts': [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
    }
    if found['class'] == 'MarianTokenizer':
        found['targets'] = tokenizer(text_target=lines).input_ids
    return found


def main() -> None:
    lines, files, cases = texts(), dict[str, Any](), {}
    for name, content in folders().items():
        with tempfile.TemporaryDirectory() as folder:
            for file, value in content.items():
                data = (
                    value
                    if isinstance(value, bytes)
                    else (value if isinstance(value, str) else json.dumps(value)).encode()
                )
                (Path(folder) / file).write_bytes(data)
            cases[name] = {'files': {file: kept(value, files) for file, value in content.items()}}
            cases[name] |= golden(Path(folder), lines)
    made = {'transformers': transformers.__version__, 'lines': lines, 'files': files, 'cases': cases}
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(made, ensure_ascii=False, separators=(',', ':')) + '\n', encoding='utf-8')
    print(f'{OUT}: {len(cases)} folders, {OUT.stat().st_size} bytes')


def kept(value: Any, files: dict[str, Any]) -> Any:
    """A file as the golden file has it: by a name among those that several folders share, where it is large."""
    said = {'base64': base64.b64encode(value).decode()} if isinstance(value, bytes) else value
    if len(json.dumps(said)) < 1000:
        return said
    same: Mapping[str, str] = {json.dumps(other): name for name, other in files.items()}
    name = same.get(json.dumps(said), f'file {len(files)}')
    files[name] = said
    return {'file': name}


if __name__ == '__main__':
    main()
