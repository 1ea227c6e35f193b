"""Trains a run: runs/NAME/ gets its config, tokenizer, metrics, picture and checkpoints. Run again, it continues.

python scripts/train.py configs/demo.yaml training.steps=100 mesh.data=2
"""

import argparse
from pathlib import Path

from scripts.entry import run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='a YAML file, such as configs/demo.yaml')
    parser.add_argument('overrides', nargs='*', metavar='key=value', help='such as training.steps=100')
    parser.add_argument('--fresh', action='store_true', help='move a run of that name aside and begin anew')
    options = parser.parse_intermixed_args()

    from training.config import load

    config = load(options.config, options.overrides)

    from sharding.mesh import start

    start(config.mesh.size, config.model.dtype)

    from training.loop import train

    return train(config, Path('runs'), options.fresh)


if __name__ == '__main__':
    run(main)
