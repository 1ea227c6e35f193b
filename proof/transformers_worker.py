"""Decodes with transformers, asked line by line on stdin: `python transformers_worker.py FOLDER ROWS PROMPT NEW`.

Runs in an environment that has torch and transformers. Says `ready`, then for each line `go` the seconds of each step after
the prompt and the tokens of the first row, as JSON.
"""

import itertools
import json
import os
import sys
import time

import torch
import transformers
from transformers import AutoModelForCausalLM, LogitsProcessorList


def main() -> None:
    folder, rows, prompt, new = sys.argv[1], *map(int, sys.argv[2:5])
    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(json.loads(sys.stdin.readline()))
    assert ids.shape == (rows, prompt), ids.shape
    times: list[float] = []

    def note(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        times.append(time.perf_counter())
        return scores

    print(f'ready torch {torch.__version__}, transformers {transformers.__version__}', flush=True)
    for _ in sys.stdin:
        times.clear()
        with torch.inference_mode():
            tokens = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                logits_processor=LogitsProcessorList([note]),
            )
        steps = [after - before for before, after in itertools.pairwise(times)]
        print(json.dumps({'seconds': steps, 'tokens': tokens[0, prompt:].tolist()}), flush=True)


main()
