"""What transformers makes of GGUF files: logits and token ids, for `make parity`; run by an interpreter that has torch.

python tests/gguf/reference.py --out FOLDER FILE.gguf …
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.gguf.texts import texts

TEXTS, LENGTH, KEPT = 10_000, 96, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', required=True, type=Path)
    parser.add_argument('files', nargs='*', type=Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for file in options.files:
        np.savez(options.out / f'{file.stem}.npz', path=str(file), **made(file))
        print(f'{file.name}: done')


def made(file: Path) -> dict[str, np.ndarray]:
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special][:40]
    if pre(file) == 'smollm':  # transformers leaves out that digits are cut from what stands before them, as published
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ids = [tokenizer(text, add_special_tokens=False)['input_ids'] for text in texts(special, TEXTS)]
    tokens = np.array([one for row in ids for one in row][:LENGTH], np.int64)[None]
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    with torch.inference_mode():
        logits = model(torch.from_numpy(tokens)).logits[0].numpy()
    at = np.linspace(0, LENGTH - 1, KEPT).astype(np.int64)
    return {
        'special': np.array(special),
        'ids': np.concatenate([np.array(row, np.int32) for row in ids]),
        'lengths': np.array([len(row) for row in ids], np.int32),
        'tokens': tokens.astype(np.int32),
        'at': at,
        'logits': logits[at],
        'prefix': np.array(tokenizer('a')['input_ids'], np.int32),
    }


def pre(file: Path) -> str:
    """What the file calls its way of cutting text."""
    raw = file.read_bytes()[: 2**24]
    at = raw.find(b'tokenizer.ggml.pre')
    if at < 0:
        return ''
    at += len(b'tokenizer.ggml.pre') + 4
    length = int.from_bytes(raw[at : at + 8], 'little')
    return raw[at + 8 : at + 8 + length].decode()


if __name__ == '__main__':
    main()
