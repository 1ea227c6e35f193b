"""How well a run's model predicts text: nats a token and bits a byte, beside what xz needs for the same bytes.

python scripts/evaluate.py runs/demo --data notes.md src/ 'more/*.jsonl'
"""

import argparse
import json
import math

from scripts.entry import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', metavar='RUN', help='a folder such as runs/demo')
    parser.add_argument(
        '--data', nargs='+', metavar='PATH', help='files, folders or globs; the run’s own validation split otherwise'
    )
    parser.add_argument('--field', default='text', help='the field of a JSONL object that holds the text')
    parser.add_argument('--mesh', metavar='AXES', help='such as expert=2,tensor=2; the run’s own otherwise')
    parser.add_argument('--json', action='store_true', help='one JSON object')
    options = parser.parse_args()

    from data.sources import texts

    found = (
        list(texts(options.data, options.field)) if options.data else None
    )  # a wrong path is told before a model is read

    from decoding.run import open_run

    opened = open_run(options.run, options.mesh)

    import jax
    from jax.sharding import NamedSharding

    from data.baseline import xz_bits_per_byte
    from data.prepare import load, pack_documents
    from model.forward import TOKENS
    from training.loop import evaluate
    from training.loss import loss_sums

    t = opened.config.training
    dataset = load(opened.folder)
    if found is None:
        rows, content = dataset.validation, dataset.validation_bytes()
    else:
        rows = pack_documents(opened.tokenizer, [text for _, text in found], t.sequence_length)
        content = b''.join(text.encode() for _, text in found)
    put = lambda batch: {
        name: jax.device_put(array, NamedSharding(opened.mesh, TOKENS)) for name, array in batch.items()
    }
    ways = opened.mesh.shape['data'] * opened.mesh.shape['expert']
    batch = -(-min(t.batch, len(rows)) // ways) * ways
    with jax.set_mesh(opened.mesh):
        nats, tokens = evaluate(jax.jit(loss_sums), opened.model, rows, len(rows), batch, put)
    figures = {
        'nats_per_token': nats / tokens,
        'bits_per_byte': nats / math.log(2) / len(content),
        'tokens': tokens,
        'bytes': len(content),
        'xz_bits_per_byte': xz_bits_per_byte(content),
        'xz_given_training_bits_per_byte': xz_bits_per_byte(content, dataset.train_bytes()),
        'step': opened.step,
    }
    if options.json:
        print(json.dumps(figures))
        return
    print(f'{tokens:,} tokens of {len(content):,} bytes, after step {opened.step}')
    print(
        f'  model                       {figures["bits_per_byte"]:.4f} bits/byte   ({figures["nats_per_token"]:.4f} nats/token)'
    )
    print(f'  xz -9, these bytes alone    {figures["xz_bits_per_byte"]:.4f} bits/byte')
    print(f'  xz -9, given the training   {figures["xz_given_training_bits_per_byte"]:.4f} bits/byte')


if __name__ == '__main__':
    run(main)
