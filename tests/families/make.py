"""Goldens of the cases, by transformers: run by an interpreter that has torch and transformers (`make goldens`).

python tests/families/make.py [--only PREFIX] [--seed N] [--out FOLDER] [--all-positions]

Each case becomes NAME.npz: its config, the same as transformers saves it, ids, logits at some positions, and a greedy
continuation with the margin of each choice. Of an encoder instead of that what it predicts of masked tokens; of an
encoder–decoder also the rows that the encoder reads.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.families import cases, weights


def build(name: str, config: dict, seed: int):
    """A model of a config with generated weights, none of its tensors left as it was born; the config as it is saved."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, 'config.json').write_text(json.dumps(config))
        described = AutoConfig.from_pretrained(folder)
        torch.manual_seed(0)
        architecture = getattr(transformers, config['architectures'][0])
        architecture(described).save_pretrained(folder)
        saved = json.loads(Path(folder, 'config.json').read_text())
        Path(folder, 'config.json').write_text(json.dumps(config))
        path = Path(folder, 'model.safetensors')
        shapes = {tensor: array.shape for tensor, array in load_file(path).items()}
        offset = cases.family(name) in cases.OFFSET_NORMS
        save_file(dict(weights.all_of(seed, shapes, offset)), path, metadata={'format': 'pt'})
        model, found = architecture.from_pretrained(
            folder, dtype=torch.float32, attn_implementation='eager', output_loading_info=True
        )
    assert not any(found[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), found
    return model.eval(), saved


@torch.no_grad()
def golden(name: str, config: dict, seed: int, everywhere: bool) -> dict[str, np.ndarray]:
    """What is kept of a case."""
    model, saved = build(name, config, seed)
    ids = weights.ids(seed, cases.ROWS, cases.LENGTH, config['vocab_size'])
    at = weights.places(seed, cases.KEPT, cases.ROWS, cases.LENGTH)
    if everywhere:
        at = np.stack(np.meshgrid(np.arange(cases.ROWS), np.arange(cases.LENGTH), indexing='ij'), -1).reshape(-1, 2)
    alone = cases.family(name) in cases.ENCODERS
    more = of_encoder(config, seed, ids) if alone else of_both(config, seed) if cases.family(name) in cases.BOTH else {}
    if alone:
        ids, at = more.pop('masked'), at[at[:, 1] < np.array(cases.LENGTHS)[at[:, 0]]]
        out = model(
            torch.tensor(ids, dtype=torch.long),
            attention_mask=live(),
            token_type_ids=torch.tensor(more['kinds'], dtype=torch.long),
        )
        logits = (out.logits if 'logits' in out else out.prediction_logits).float().numpy()
        asked = logits[(ids == cases.MASK) & live().bool().numpy()]
        greedy, margins = list(asked.argmax(-1)), [margin(torch.tensor(one)) for one in asked]
    else:
        rows = {'decoder_input_ids' if more else 'input_ids': torch.tensor(ids, dtype=torch.long)}
        whole = {'input_ids': torch.tensor(more['source'], dtype=torch.long), 'attention_mask': live()} if more else {}
        logits = model(**rows, **whole, use_cache=False).logits.float().numpy()
        greedy, margins = continuation(model, ids[:1, : cases.PROMPT], {key: value[:1] for key, value in whole.items()})
    versions = {'transformers': transformers.__version__, 'torch': torch.__version__}
    about = {'config': config, 'saved': saved, 'seed': seed, **versions}
    return {
        'about': np.frombuffer(json.dumps(about).encode(), np.uint8),
        'ids': ids.astype(np.int16),
        'at': at.astype(np.int16),
        'logits': logits[at[:, 0], at[:, 1]],
        'greedy': np.array(greedy, np.int16),
        'margins': np.array(margins, np.float32),
        **{key: array.astype(np.int16) for key, array in more.items()},
    }


def live() -> torch.Tensor:
    """Which tokens of an encoder's rows are no padding."""
    return torch.tensor(np.arange(cases.LENGTH)[None] < np.array(cases.LENGTHS)[:, None], dtype=torch.long)


def of_encoder(config: dict, seed: int, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The rows with some tokens masked, and of what kind of text each token is."""
    draw = lambda below, name: weights.ids(seed, cases.ROWS, cases.LENGTH, below, name)
    return {
        'masked': np.where(draw(8, 'masks') == 0, cases.MASK, ids),
        'kinds': draw(config.get('type_vocab_size', 2), 'kinds'),
    }


def of_both(config: dict, seed: int) -> dict[str, np.ndarray]:
    """The rows that the encoder reads."""
    return {'source': weights.ids(seed, cases.ROWS, cases.LENGTH, config['vocab_size'], 'source')}


def margin(logits: torch.Tensor) -> float:
    best = torch.topk(logits, 2).values
    return float((best[0] - best[1]) / logits.abs().max())


def continuation(model, prompt: np.ndarray, source: dict[str, torch.Tensor]) -> tuple[list[int], list[float]]:
    """Greedy tokens after a prompt, and the margin of each choice."""
    new, cache, greedy, margins = torch.tensor(prompt, dtype=torch.long), None, [], []
    for _ in range(cases.NEW):
        rows = {'decoder_input_ids' if source else 'input_ids': new}
        out = model(**rows, **source, past_key_values=cache, use_cache=True)
        last, cache = out.logits[0, -1].float(), out.past_key_values
        margins.append(margin(last))
        new = last.argmax()[None, None]
        greedy.append(int(new))
    return greedy, margins


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='', help='cases whose names begin so')
    parser.add_argument('--seed', type=int, default=cases.SEED)
    parser.add_argument('--out', type=Path, default=Path(__file__).parent / 'goldens')
    parser.add_argument('--all-positions', action='store_true', help='logits of every position')
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, config in cases.CASES.items():
        if not name.startswith(options.only) or cases.family(name) in cases.NOT_IN_TRANSFORMERS:
            continue
        np.savez_compressed(options.out / f'{name}.npz', **golden(name, config, options.seed, options.all_positions))
        print(name, flush=True)


if __name__ == '__main__':
    main()
