"""A run's own tokenizer as a tokenizer.json, which transformers and the tokenizers library read."""

import json
from typing import Any

from weft.data.tokenizer import SPACE, Tokenizer
from weft.hub.tokenizers.built import added_token, pieces_decoder, ranked_merges, replace, template


def exported_tokenizer(tokenizer: Tokenizer, context: int) -> dict[str, bytes]:
    """The files of a published folder for a tokenizer that was learnt here; `context` is the most tokens of a text.

    The ids are the same, but for texts with U+2581, which becomes a space, or with the name of a control piece, which is that.
    """
    processor = tokenizer._processor
    names = [processor.id_to_piece(i) for i in range(tokenizer.vocabulary)]
    special = [i for i in range(tokenizer.vocabulary) if processor.is_control(i) or processor.is_unknown(i)]
    fallback = [i for i in range(tokenizer.vocabulary) if processor.is_byte(i)]
    learnt = {name: i for i, name in enumerate(names) if i not in {*special, *fallback}}
    pair = [{'Sequence': {'id': 'A', 'type_id': 0}}, {'Sequence': {'id': 'B', 'type_id': 1}}]
    description = {
        'version': '1.0',
        'added_tokens': [added_token(i, names[i], special=True) for i in special],
        'normalizer': replace({'String': ' '}, SPACE),
        'pre_tokenizer': None,
        'post_processor': template({names[tokenizer.bos]: tokenizer.bos}, {}) | {'pair': pair},
        'decoder': pieces_decoder(strips=False, falls_back=True),
        'model': {
            'type': 'BPE',
            'byte_fallback': True,
            'unk_token': names[processor.unk_id()],
            'fuse_unk': True,
            'vocab': {name: i for i, name in enumerate(names)},
            # sentencepiece joins whatever pair makes the piece learnt earliest
            'merges': ranked_merges(learnt, lambda piece, left: (learnt[piece], learnt[left])),
        },
    }
    config: dict[str, Any] = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'bos_token': names[tokenizer.bos],
        'eos_token': names[tokenizer.eos],
        'unk_token': names[processor.unk_id()],
        'clean_up_tokenization_spaces': False,
        'model_max_length': context,
    }
    write = lambda value: (json.dumps(value, ensure_ascii=False, indent=1) + '\n').encode()
    return {'tokenizer.json': write(description), 'tokenizer_config.json': write(config)}
