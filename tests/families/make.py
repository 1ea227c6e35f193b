"""Goldens of the cases, by transformers or a NumPy reference: run by an interpreter that has torch (`make goldens`).

python tests/families/make.py [--only PREFIX] [--seed N] [--out FOLDER] [--all-positions] [--odd]
python tests/families/make.py --written FOLDER

Each case becomes NAME.npz: its config, the same as transformers saves it, ids, logits at some positions, and a greedy
continuation with the margin of each choice. Of an encoder instead of that what it predicts of masked tokens; of an
encoder–decoder also the rows that the encoder reads; of a model without an LM head hidden states alone.
"""

import argparse
import importlib
import json
import math
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig
from transformers.modeling_layers import MtpModel

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.families import cases, encoder_cases, weights
from tests.families.odd import odd


def build(name: str, config: dict, seed: int):
    """A model of a config with generated weights, none of them left as it was born; its MTP layers; the config as saved."""
    layers, ahead = config.get('num_hidden_layers', 0), config.get('num_nextn_predict_layers', 0)
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
        shapes |= encoder_cases.not_saved(config)
        if ahead:
            shapes |= shapes_ahead(shapes, layers, ahead)
        offset = cases.family(name) in cases.OFFSET_NORMS
        save_file(dict(weights.all_of(seed, shapes, offset)), path, metadata={'format': 'pt'})
        model, found = architecture.from_pretrained(
            folder, dtype=torch.float32, attn_implementation='eager', output_loading_info=True
        )
        mtp = None
        if ahead:
            # It knows the published models' layers alone.
            model._keys_to_ignore_on_load_unexpected = [rf'model\.layers\.{layers + k}\.' for k in range(ahead)]
            mtp = MtpModel.from_pretrained(model).eval()
            found['unexpected_keys'] = {key for key in found['unexpected_keys'] if int(key.split('.')[2]) < layers}
    assert not any(found[kind] for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), found
    return model.eval(), mtp, saved


def shapes_ahead(shapes: dict, layers: int, ahead: int) -> dict:
    """The tensors of layers that predict further ahead: those of the last layer, and their own."""
    last, found = f'model.layers.{layers - 1}.', {}
    D = shapes['model.norm.weight'][0]
    for k in range(ahead):
        mine = f'model.layers.{layers + k}.'
        found |= {mine + name.removeprefix(last): shape for name, shape in shapes.items() if name.startswith(last)}
        found |= {mine + name: (D,) for name in ('enorm.weight', 'hnorm.weight', 'shared_head.norm.weight')}
        found[mine + 'eh_proj.weight'] = (D, 2 * D)
    return found


@torch.no_grad()
def by_transformers(name: str, config: dict, seed: int, rows: dict[str, np.ndarray]):
    """The config as saved; logits [rows, length, vocabulary]; those that chose each greedy token [steps, vocabulary];
    those of the layers that predict further ahead [layers, rows, length, vocabulary], zeros where there are none.
    """
    model, mtp, saved = build(name, config, seed)
    given = {key: torch.tensor(array, dtype=torch.long) for key, array in encoder_cases.arguments(rows).items()}
    out = model(**given)
    logits = scores(out)
    ahead = logits_ahead(model, mtp, given['input_ids'], logits.shape)
    if cases.headless(config):
        return saved, logits, logits[:0, 0], ahead
    if 'kinds' in rows:
        return saved, logits, logits[encoder_cases.masked(rows['ids'])], ahead
    grows = 'decoder_input_ids' if 'source' in rows else 'input_ids'
    given = {key: array[:1] for key, array in given.items()}
    new, cache, steps = given.pop(grows)[:, : cases.PROMPT], None, []
    for _ in range(cases.NEW):
        out = model(**given, **{grows: new}, past_key_values=cache, use_cache=True)
        last, cache = out.logits[0, -1].float(), out.past_key_values
        new = last.argmax()[None, None]
        steps.append(last.numpy())
    return saved, logits, np.stack(steps), ahead


def scores(out) -> np.ndarray:
    """The logits that a model gives, or its last hidden states where it has no LM head."""
    kind = next(kind for kind in ('logits', 'prediction_logits', 'last_hidden_state') if kind in out)
    return out[kind].float().numpy()


def logits_ahead(model, mtp, ids: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """Logits of the layers that predict further ahead."""
    ahead = np.zeros((mtp.num_mtp_layers if mtp else 0, *shape), np.float32)
    hidden = model.model(ids, use_cache=False).last_hidden_state if mtp else None
    for k in range(len(ahead)):
        place = torch.arange(k + 1, ids.shape[1])[None]
        hidden = mtp.forward_layer(k, hidden[:, :-1], place, None, input_ids=ids[:, k + 1 :])
        ahead[k, :, : ids.shape[1] - k - 1] = model.lm_head(hidden).float().numpy()
    return ahead


def by_reference(name: str, config: dict, seed: int, rows: dict[str, np.ndarray]):
    """The same by the family's own reference in NumPy (tests/families/FAMILY_reference.py)."""
    reference = importlib.import_module(f'tests.families.{cases.family(name)}_reference')
    tensors = dict(weights.all_of(seed, reference.shapes(config), False))
    logits = np.stack([reference.logits(tensors, config, row) for row in rows['ids']])
    row, steps = rows['ids'][0, : cases.PROMPT], []
    for _ in range(cases.NEW):
        steps.append(reference.logits(tensors, config, row)[-1])
        row = np.append(row, steps[-1].argmax())
    return config, logits, np.stack(steps), np.zeros((0, *logits.shape))


def golden(name: str, config: dict, seed: int, everywhere: bool) -> dict[str, np.ndarray]:
    """What is kept of a case."""
    rows = encoder_cases.rows(name, config, seed)
    make = by_reference if cases.family(name) in cases.NOT_IN_TRANSFORMERS else by_transformers
    saved, logits, steps, ahead = make(name, config, seed, rows)
    at = weights.places(seed, cases.KEPT, cases.ROWS, cases.LENGTH)
    if everywhere:
        at = np.stack(np.meshgrid(np.arange(cases.ROWS), np.arange(cases.LENGTH), indexing='ij'), -1).reshape(-1, 2)
    if 'kinds' in rows:
        at = at[encoder_cases.live()[at[:, 0], at[:, 1]]]
    second, first = np.sort(steps, -1)[:, -2:].T
    versions = {'transformers': transformers.__version__, 'torch': torch.__version__}
    made_by = versions if make is by_transformers else {'numpy': np.__version__}
    about = {'config': config, 'saved': saved, 'seed': seed, **made_by}
    kept = {
        'about': np.frombuffer(json.dumps(about).encode(), np.uint8),
        **{key: array.astype(np.int16) for key, array in rows.items()},
        'at': at.astype(np.int16),
        'logits': logits[at[:, 0], at[:, 1]].astype(np.float32),
        'greedy': steps.argmax(-1).astype(np.int16),
        'margins': ((first - second) / np.abs(steps).max(-1)).astype(np.float32),
    }
    if name in cases.BEAMS:
        kept |= by_beams(name, config, seed, rows, cases.BEAMS[name])
    return kept | ({'ahead': ahead[:, at[:, 0], at[:, 1]].astype(np.float32)} if len(ahead) else {})


@torch.no_grad()
def by_beams(name: str, config: dict, seed: int, rows: dict[str, np.ndarray], eos: int) -> dict[str, np.ndarray]:
    """What transformers' beam search gives of each row: tokens [rows, NEW], -1 after the last, and scores."""
    model, _, _ = build(name, config, seed)
    given = {key: torch.tensor(array, dtype=torch.long) for key, array in encoder_cases.arguments(rows).items()}
    grows = 'decoder_input_ids' if 'source' in rows else 'input_ids'
    given[grows] = given[grows][:, : cases.PROMPT]
    if 'source' in rows:
        given[grows][:, 0] = config['decoder_start_token_id']  # else it is put before
    how = {'num_beams': 4, 'do_sample': False, 'length_penalty': 1.0, 'early_stopping': False, 'eos_token_id': eos}
    how |= {'max_new_tokens': cases.NEW // 4, 'pad_token_id': 0, 'return_dict_in_generate': True, 'output_scores': True}
    out = model.generate(**given, **how)
    found = np.full((cases.ROWS, cases.NEW // 4), -1)
    for row, tokens in zip(found, out.sequences[:, cases.PROMPT :].tolist(), strict=True):
        tokens = tokens[: tokens.index(eos) + 1] if eos in tokens else tokens
        row[: len(tokens)] = tokens
    return {'beams': found.astype(np.int16), 'beam_scores': out.sequences_scores.numpy(), 'eos': np.int16(eos)}


@torch.no_grad()
def wrong_by(folder: Path) -> float:
    """How far transformers' logits of a folder are from the committed ones of that case; infinity where a tensor is lost."""
    config = json.loads((folder / 'config.json').read_text())
    model, found = getattr(transformers, config['architectures'][0]).from_pretrained(
        folder, dtype=torch.float32, attn_implementation='eager', output_loading_info=True
    )
    layers, of_layer = config.get('num_hidden_layers'), re.compile(r'model\.layers\.(\d+)\.')
    beyond = lambda name: (at := of_layer.match(name)) is not None and int(at[1]) >= layers  # those of MTP
    extra = [name for name in found['unexpected_keys'] if not beyond(name)]
    pooler = lambda name: cases.headless(config) and name.startswith('pooler.')  # no hidden state depends on it
    missing = [name for name in found['missing_keys'] if not pooler(name)]
    if missing or found['mismatched_keys'] or extra:
        return math.inf
    with np.load(Path(__file__).parent / 'goldens' / f'{folder.name}.npz', allow_pickle=False) as file:
        known = {key: file[key] for key in ('ids', 'kinds', 'source', 'at', 'logits') if key in file}
    given = encoder_cases.arguments({key: known[key] for key in ('ids', 'kinds', 'source') if key in known})
    out = model.eval()(**{key: torch.tensor(array, dtype=torch.long) for key, array in given.items()})
    logits = scores(out)
    rows, places = known['at'].T
    return float(np.abs(logits[rows, places] - known['logits']).max() / np.abs(known['logits']).max())


def check_written(folder: Path) -> None:
    """Tells what transformers makes of each folder that tests/families/written.py has made; ends the process if it is wrong."""
    errors = {path.name: wrong_by(path) for path in sorted(folder.iterdir())}
    for name, error in errors.items():
        print(f'{name}: {error:.1e}')
    if max(errors.values()) > 1e-5:
        sys.exit(f'wrong: {", ".join(name for name, error in errors.items() if error > 1e-5)}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='', help='cases whose names begin so')
    parser.add_argument('--seed', type=int, default=cases.SEED)
    parser.add_argument('--out', type=Path, default=Path(__file__).parent / 'goldens')
    parser.add_argument('--all-positions', action='store_true', help='logits of every position')
    parser.add_argument('--odd', action='store_true', help='other settings than the committed ones, by the seed')
    parser.add_argument('--written', type=Path, metavar='FOLDER', help='of folders that were exported: compare them')
    options = parser.parse_args()
    if options.written:
        check_written(options.written)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for name, config in cases.CASES.items():
        if not name.startswith(options.only):
            continue
        if options.odd:
            config = odd(name, config, options.seed)
        np.savez_compressed(options.out / f'{name}.npz', **golden(name, config, options.seed, options.all_positions))
        print(name, flush=True)


if __name__ == '__main__':
    main()
