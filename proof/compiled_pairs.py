"""Steps compiled for machines of many sizes, kept as records: `python -m weft.proof.compiled_pairs [--only PATTERN]`.

One JSON file a pair in benchmarks/compiled/, written as soon as its compiler is done; what is there is not compiled again.
"""

import argparse
import dataclasses
import fnmatch
import json
import sys
import time
from pathlib import Path
from typing import Any, Literal

from weft.planner.aot import ROOT, Compiled, compile_step, read_compiled
from weft.sharding.mesh import AXES
from weft.storage import files
from weft.training import config as configs
from weft.training.config import RunConfig

RECORDS = ROOT / 'benchmarks' / 'compiled'


@dataclasses.dataclass(frozen=True)
class ProgramPair:
    """A step of a published model, and the machine that it is compiled for."""

    model: str  # of configs/models
    chip: str
    what: Literal['train', 'decode', 'prefill']
    overrides: str  # of the config: its mesh, its batch (rows) and its sequence length (slots of a cache)
    shown: bool = False  # with a page of its own in benchmarks/plan.md

    @property
    def config(self) -> RunConfig:
        return configs.load_config(ROOT / 'configs' / 'models' / f'{self.model}.yaml', self.overrides.split())

    @property
    def name(self) -> str:
        """Of its record."""
        return f'{self.model}-{self.what}-{self.config.mesh.size}-{self.chip}'

    def request(self) -> dict[str, Any]:
        """What is asked, which a record keeps: another request is compiled anew."""
        return {name: getattr(self, name) for name in ('model', 'chip', 'what', 'overrides')}


def mesh(text: str, batch: int, length: int, more: str = '') -> str:
    """Overrides: `data=4 tensor=2`, rows and tokens, and others."""
    axes = dict.fromkeys(AXES, 1) | {axis: int(size) for axis, size in (part.split('=') for part in text.split())}
    sizes = ' '.join(f'mesh.{axis}={size}' for axis, size in axes.items())
    return f'{sizes} training.batch={batch} training.sequence_length={length} {more}'.strip()


PAIRS = (
    # What compiles soonest first.
    ProgramPair('llama-3.1-8b', 'h100', 'train', mesh('data=8', 8, 8192)),
    ProgramPair('llama-3.1-70b', 'h100', 'train', mesh('data=32 tensor=8', 32, 8192), shown=True),
    ProgramPair('mixtral-8x7b', 'h100', 'train', mesh('data=8 expert=8', 64, 4096)),
    ProgramPair('gpt-oss-120b', 'h100', 'decode', mesh('expert=8', 64, 8192), shown=True),
    ProgramPair('llama-3.1-8b', 'h100', 'decode', mesh('tensor=8', 32, 8192)),
    ProgramPair(
        'llama-3.1-405b', 'v5p', 'train', mesh('data=128 tensor=8', 2048, 8192, 'training.accumulation=16'), shown=True
    ),
    ProgramPair('llama-3.1-8b', 'v5p', 'train', mesh('data=4 tensor=2', 8, 8192)),
    ProgramPair('llama-3.1-70b', 'v5p', 'decode', mesh('tensor=8', 32, 8192)),
    ProgramPair('mixtral-8x7b', 'v6e', 'train', mesh('data=16 expert=4', 64, 4096), shown=True),
    ProgramPair('olmoe-1b-7b', 'h100', 'train', mesh('expert=8', 16, 4096)),
    ProgramPair('deepseek-v3', 'v5p', 'decode', mesh('expert=16 tensor=4', 256, 4096), shown=True),
    ProgramPair(
        'deepseek-v3',
        'v5p',
        'train',
        mesh('data=16 expert=16 tensor=8', 4096, 4096, 'training.accumulation=16 compute.dispatch=all_to_all'),
        shown=True,
    ),
    ProgramPair('llama-3.1-70b', 'v5p', 'train', mesh('data=16 tensor=4', 32, 8192)),
    ProgramPair('mixtral-8x7b', 'v5p', 'decode', mesh('tensor=8', 64, 8192)),
    ProgramPair('qwen3-30b-a3b', 'v5p', 'train', mesh('data=8 expert=8', 64, 4096)),
    ProgramPair('qwen3-8b', 'v6e', 'train', mesh('data=8 tensor=2', 16, 4096)),
    ProgramPair('llama-3.1-8b', 'v6e', 'decode', mesh('tensor=8', 32, 8192)),
    ProgramPair('gemma-2-9b', 'v5p', 'train', mesh('data=8 tensor=2', 16, 8192)),
    ProgramPair('gemma-3-27b', 'v6e', 'decode', mesh('tensor=8', 32, 8192)),
    ProgramPair('qwen3-235b-a22b', 'v5p', 'decode', mesh('expert=16 tensor=2', 64, 4096)),
    ProgramPair('qwen3-30b-a3b', 'h100', 'decode', mesh('expert=8', 64, 8192)),
    ProgramPair('llama-3.1-405b', 'h100', 'train', mesh('data=128 tensor=8', 128, 8192)),
    ProgramPair('deepseek-v2-lite', 'v5p', 'train', mesh('data=2 expert=8', 32, 4096)),
    # Fits by its fullest moment, and would not by its arguments and temporaries (planner/aot_worker.py).
    ProgramPair('llama-3.1-8b', 'v6e', 'train', mesh('data=4 tensor=2', 12, 16384)),
    # Does not fit.
    ProgramPair('llama-3.1-8b', 'v5e', 'train', mesh('data=4 tensor=2', 8, 2048)),
)


def read_record(path: Path) -> tuple[dict[str, Any], Compiled]:
    """A record: what was asked, and what came of it."""
    record = json.loads(path.read_text(encoding='utf-8'))
    return record['request'], read_compiled(record)


def write_record(path: Path, request: dict[str, Any], found: Compiled) -> None:
    plain = {name: getattr(found, name) for name in ('status', 'seconds', 'memory', 'available', 'message', 'versions')}
    record = {'request': request, **plain, 'fits': found.fits, 'unplanned': found.unplanned()}
    record |= {'sent': found.sent.to_json(), 'asked': found.asked.to_json()}
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, (json.dumps(record, indent=1) + '\n').encode())


def compiled_before(pair: ProgramPair) -> Compiled | None:
    """What came of exactly this pair, if it has a record of a compiler that came to an end."""
    path = RECORDS / f'{pair.name}.json'
    if not path.exists():
        return None
    request, found = read_record(path)
    return found if request == pair.request() and found.status in ('compiled', 'does not fit') else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--only', default='*', metavar='PATTERN', help='of names, as in mixtral-*-h100*')
    wanted = parser.parse_args().only
    for pair in PAIRS:
        if not fnmatch.fnmatch(pair.name, wanted) or compiled_before(pair):
            continue
        began = time.perf_counter()
        found = compile_step(pair.config, pair.chip, pair.what, timeout=3600)
        write_record(RECORDS / f'{pair.name}.json', pair.request(), found)
        total = found.memory.get('total', 0) / 1e9
        print(f'{pair.name}: {found.status}, {total:.2f} GB, {time.perf_counter() - began:.0f} s', flush=True)
        if found.message:
            print(f'  {found.message[:2000]}', file=sys.stderr)


if __name__ == '__main__':
    main()
