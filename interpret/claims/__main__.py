"""Tries on a run what is commonly said of how models behave; docs/claims.md has what came of it.

python -m weft.interpret.claims runs/smollm2                     all claims of a dense model
python -m weft.interpret.claims runs/demo --only experts         that of mixtures
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from weft.runtime.errors import UserError, nearest
from weft.storage.files import make_folder, write

EVERY = 5.0  # seconds between lines that say how far the work is
DENSE, MIXTURE = ('grammar', 'coreference', 'layers', 'lens', 'facts'), ('experts',)


def main(arguments: Sequence[str]) -> None:
    """Tries them one by one; what is done is kept in RUN/claims, and not done again."""
    parser = argparse.ArgumentParser(
        prog='python -m weft.interpret.claims',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('run', metavar='RUN', help='a folder such as runs/smollm2')
    parser.add_argument(
        '--only', action='append', metavar='NAME', help=f'of {", ".join((*DENSE, *MIXTURE))}; several times'
    )
    parser.add_argument(
        '--seed', type=int, default=0, metavar='N', help='of words, sentences and random heads (default: 0)'
    )
    parser.add_argument('--again', action='store_true', help='also those that are in RUN/claims')
    parser.add_argument('--json', action='store_true', help='figures on stdout')
    parser.add_argument('--mesh', metavar='MESH', help='such as tensor=2 (default: that of the run)')
    options = parser.parse_args(arguments)
    for name in options.only or ():
        if name not in (*DENSE, *MIXTURE):
            raise UserError(f'--only {name!r}: there is no such claim{nearest(name, (*DENSE, *MIXTURE))}')
    if options.seed < 0:
        raise UserError(f'--seed is {options.seed}: it must be at least 0')

    import jax

    from weft.inference.run import open_run
    from weft.interpret.xray.observed import check_model
    from weft.training.run_folder import run_folder

    folder = run_folder(options.run)
    if not isinstance(folder, Path):
        raise UserError(f'{options.run} is in a bucket: what is done is kept in the folder; fetch the run first')
    run = open_run(folder, options.mesh, stacked=True)
    check_model(run.model)
    mixture = run.model.config.moe is not None
    for name in options.only or ():
        if (name in MIXTURE) != mixture:
            what = 'a mixture of experts' if mixture else 'a dense model'
            raise UserError(
                f'--only {name}: {options.run} is {what}; of such are tried {", ".join(MIXTURE if mixture else DENSE)}'
            )
    found = {}
    for name in options.only or (MIXTURE if mixture else DENSE):
        kept = folder / 'claims' / f'{name}-{options.seed}.json'
        if kept.exists() and not options.again:
            found[name] = json.loads(kept.read_text(encoding='utf-8'))
            continue
        begin = time.monotonic()
        with jax.set_mesh(run.mesh):
            figures = experiment(name)(run, options.seed, teller(name))
        found[name] = plain(figures | {'seed': options.seed, 'seconds': round(time.monotonic() - begin, 1)})
        make_folder(kept.parent)
        write(kept, (json.dumps(found[name], indent=1) + '\n').encode())
        if not options.json:
            say(name, found[name])
    if options.json:
        print(json.dumps(found, indent=1))


def experiment(name: str) -> Callable[..., dict[str, Any]]:
    """The function that tries a claim."""
    from weft.interpret.claims.coreference import coreference
    from weft.interpret.claims.experts import experts
    from weft.interpret.claims.facts import facts
    from weft.interpret.claims.grammar import grammar
    from weft.interpret.claims.layers import layers
    from weft.interpret.claims.lens import lens

    each = {one.__name__: one for one in (grammar, coreference, layers, lens, facts, experts)}
    return each[name]


def teller(name: str) -> Callable[[str], None]:
    """Says on stderr how far a claim is, now and then."""
    last = 0.0

    def tell(line: str) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            print(f'{name}: {line}', file=sys.stderr, flush=True)

    return tell


def plain(figures: Any) -> Any:
    """As JSON has it, six digits of each number."""
    if isinstance(figures, dict):
        return {key: plain(value) for key, value in figures.items()}
    if hasattr(figures, '_asdict'):
        return plain(figures._asdict())
    if isinstance(figures, list | tuple):
        return [plain(one) for one in figures]
    return float(f'{figures:.6g}') if isinstance(figures, float) else figures


def say(name: str, figures: dict[str, Any]) -> None:
    """A claim's figures, a line each."""
    print(f'{name}: {figures["seconds"]:.0f} s')
    for key, value in figures.items():
        if isinstance(value, dict) and 'low' in value:
            value = f'{value["value"]:.3g} [{value["low"]:.3g}, {value["high"]:.3g}] of {value["of"]}'
        elif isinstance(value, dict | list):
            value = json.dumps(value)
        print(f'    {key.replace("_", " ")}: {value}')


if __name__ == '__main__':
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        sys.exit(2)
