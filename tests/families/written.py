"""Folders as an export writes them, of every case: what `make parity` has transformers load (make.py --written).

python -m tests.families.written FOLDER [--only PREFIX]
"""

import argparse
from pathlib import Path

import tests.conftest  # noqa: F401  (devices and settings as in the tests)
from tests.families import cases, folders
from tests.families.loading import read
from weft.hub.write import published_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    parser.add_argument('--only', default='', help='cases whose names begin so')
    options = parser.parse_args()
    for name, config in cases.CASES.items():
        if name.startswith(options.only) and cases.family(name) not in cases.NOT_IN_TRANSFORMERS:
            family, c = read(config)
            # As of a run that was not imported: from the model alone.
            folders.write(options.folder / name, published_config(c, 512, family.name)[1], folders.named(name))


if __name__ == '__main__':
    main()
