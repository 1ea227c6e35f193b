"""The command `weft`: `weft train CONFIG.yaml …` is `python scripts/train.py CONFIG.yaml …`, where the package is installed."""

import runpy
import sys
from pathlib import Path

NOT_COMMANDS = {'__init__', 'answering', 'command', 'compression_study', 'entry', 'options'}


def main() -> None:
    """Runs the script that the first argument names, with the others."""
    from weft.scripts import options

    known = sorted({path.stem for path in Path(__file__).parent.glob('*.py')} - NOT_COMMANDS)
    name = sys.argv[1] if len(sys.argv) > 1 else '--help'
    if name in ('-h', '--help'):
        print(f'usage: weft NAME …, as in weft train --help\n\nNAME: {", ".join(known)}')
        return
    if name == '--version':
        print(options.version())
        return
    if name not in known:
        from weft.runtime.errors import nearest, shown

        hint = nearest(name, known)
        print(f'error: weft {shown(name, 60)}: no such command{hint}; weft --help lists them', file=sys.stderr)
        sys.exit(2)
    options.prog = f'weft {name}'
    sys.argv = [sys.argv[0], *sys.argv[2:]]
    runpy.run_module(f'weft.scripts.{name}', run_name='__main__', alter_sys=True)
