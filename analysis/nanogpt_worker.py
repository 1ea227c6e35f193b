"""Trains nanoGPT's CPU recipe step by step, as often as a line on stdin says: the peer's side of `benchmark.py nanogpt`.

Runs with the peer's own Python (torch); argument: a folder with nanoGPT's model.py. Prints 'ready', then for each number
of steps that it reads, their times in seconds as a JSON list.
"""

import importlib
import json
import sys
import time

import torch


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    GPT, GPTConfig = (getattr(importlib.import_module('model'), name) for name in ('GPT', 'GPTConfig'))

    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65, dropout=0.0, bias=False))
    optimizer = model.configure_optimizers(1e-1, 1e-3, (0.9, 0.99), 'cpu')
    x, y = torch.randint(65, (2, 12, 64))

    def step() -> float:
        began = time.perf_counter()
        _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        return time.perf_counter() - began

    for _ in range(5):
        step()
    print(f'ready torch {torch.__version__}, {torch.get_num_threads()} threads', flush=True)
    for line in sys.stdin:
        print(json.dumps([step() for _ in range(int(line))]), flush=True)


if __name__ == '__main__':
    main()
