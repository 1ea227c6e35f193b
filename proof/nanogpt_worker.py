"""Trains nanoGPT step by step, as often as a line on stdin says: the peer's side of `benchmark.py nanogpt`.

Runs with the peer's own Python (torch); arguments: a folder with nanoGPT's model.py, and the recipe as JSON: layers, heads,
model_dim, sequence_length, vocabulary, bias, batch, dtype. On a GPU it does what nanoGPT's train.py does there: autocast to the
dtype, TF32 matmuls for the rest, torch.compile, a fused optimizer. Prints 'ready', then for each number of steps that it reads
their times in seconds as a JSON list.
"""

import contextlib
import importlib
import json
import sys
import time

import torch


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    recipe = json.loads(sys.argv[2])
    GPT, GPTConfig = (getattr(importlib.import_module('model'), name) for name in ('GPT', 'GPTConfig'))

    torch.manual_seed(0)
    torch.set_float32_matmul_precision('high')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    config = GPTConfig(
        n_layer=recipe['layers'],
        n_head=recipe['heads'],
        n_embd=recipe['model_dim'],
        block_size=recipe['sequence_length'],
        vocab_size=recipe['vocabulary'],
        dropout=0.0,
        bias=recipe['bias'],
    )
    model = GPT(config).to(device)
    optimizer = model.configure_optimizers(1e-1, 1e-3, (0.9, 0.99), device)
    run = torch.compile(model) if device == 'cuda' else model
    narrow = recipe['dtype'] != 'float32'
    cast = torch.autocast(device, getattr(torch, recipe['dtype'])) if narrow else contextlib.nullcontext()
    x, y = torch.randint(recipe['vocabulary'], (2, recipe['batch'], recipe['sequence_length']), device=device)

    def step() -> float:
        began = time.perf_counter()
        with cast:
            _, loss = run(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        return time.perf_counter() - began

    for _ in range(5):
        step()
    where = torch.cuda.get_device_name() if device == 'cuda' else f'{torch.get_num_threads()} threads'
    print(f'ready torch {torch.__version__}, {where}', flush=True)
    for line in sys.stdin:
        print(json.dumps([step() for _ in range(int(line))]), flush=True)


if __name__ == '__main__':
    main()
