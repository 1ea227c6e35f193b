"""Goldens of tests/hub/chat_cases.py by transformers: run by an interpreter that has it (`make goldens`).

python tests/hub/make_chat.py                  tests/hub/chat.json
python tests/hub/make_chat.py FOLDER … > out   what published folders' templates make of a few conversations
"""

import datetime
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.hub import chat_cases as cases


class Stopped(datetime.datetime):
    """A clock that stands."""

    @classmethod
    def now(cls, tz=None):
        return cls.fromisoformat(cases.NOW)


def tokenizer_file() -> str:
    """A tokenizer.json of bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(['<s>', '</s>', '<|a|>', '<|user|>'])
    return made.to_str()


def opened(folder: str, files: dict[str, str] | None = None):
    """transformers' tokenizer of a folder, with these files in it."""
    for name, content in (files or {}).items():
        Path(folder, name).parent.mkdir(exist_ok=True)
        Path(folder, name).write_text(content, encoding='utf-8')
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def rendered(tokenizer, arguments: dict) -> dict:
    """The text, or that there was an error."""
    with mock.patch.object(chat_template_utils, 'datetime', Stopped):
        chat_template_utils._compile_jinja_template.cache_clear()
        try:
            return {'text': tokenizer.apply_chat_template(**arguments, tokenize=False)}
        except Exception as error:
            return {'error': f'{type(error).__name__}: {error}'[:200]}


def mask(tokenizer, arguments: dict) -> dict:
    """The ids of a conversation, and which of them are the assistant's."""
    found = tokenizer.apply_chat_template(
        **arguments, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return {'ids': found['input_ids'], 'mask': found['assistant_masks']}


def main() -> None:
    made = {}
    for name, one in cases.CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            kind = {'config.json': '{"model_type": "llama"}', 'tokenizer.json': tokenizer_file()}
            config = json.loads(one['files']['tokenizer_config.json']) | {'tokenizer_class': 'PreTrainedTokenizerFast'}
            tokenizer = opened(folder, kind | one['files'] | {'tokenizer_config.json': json.dumps(config)})
            made[name] = rendered(tokenizer, one['arguments'])
            if 'generation %}' in one['files']['tokenizer_config.json']:
                made[name] |= mask(tokenizer, one['arguments'])
    about = {'transformers': transformers.__version__, 'tokenizer': json.loads(tokenizer_file())}
    text = json.dumps({'about': about, 'rendered': made}, ensure_ascii=False, separators=(',', ':'))
    text = text.replace('},"', '},\n"')
    Path(__file__).with_name('chat.json').write_text(text + '\n', encoding='utf-8')


def published(folders: list[str]) -> None:
    """Of each folder what it makes of `chat_cases.PUBLISHED`, as JSON on stdout."""
    found = {
        folder: {name: rendered(opened(folder), one) for name, one in cases.PUBLISHED.items()} for folder in folders
    }
    print(json.dumps(found))


if __name__ == '__main__':
    published(sys.argv[1:]) if len(sys.argv) > 1 else main()
