"""Proves on this machine that every mesh gives one device's numbers, and writes the page that shows it.

python scripts/prove.py                      all of it, into benchmarks/sharding.md (about an hour on two cores)
python scripts/prove.py --only 'gradient/dense/*'          some cases; the page says what is missing

A run that was interrupted goes on where it was: figures are kept with a hash of the code that they came from.
"""

import fnmatch
import sys
from pathlib import Path

from weft.runtime.errors import LONGEST, UserError, nearest, shown
from weft.scripts.entry import run
from weft.scripts.options import Parser
from weft.storage.files import check_output, output_file

RESULTS = Path('.cache/proof.jsonl')


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument('--only', metavar='PATTERN', default='*', help='cases to run, such as initial/* or *stage=8*')
    parser.add_argument('--list', action='store_true', help='names of the cases, none of them run')
    parser.add_argument('--page', type=Path, default=Path('benchmarks/sharding.md'), help='where the page goes')
    parser.add_argument('--results', type=Path, default=RESULTS, help='where figures are kept')
    options = parser.parse_args()

    if not options.list:
        if options.results != RESULTS or RESULTS.parent.exists():  # else it is made
            check_output('--results', options.results)
        check_output('--page', options.page, [options.results])

    from weft.sharding.mesh import configure_jax

    configure_jax(8, 'float32')

    import jax

    jax.config.update('jax_disable_most_optimizations', True)  # thrice as fast to compile, and the same arithmetic
    jax.config.update('jax_default_matmul_precision', 'highest')

    from weft.proof import cases as proof_cases
    from weft.proof import page as proof_page

    cases = proof_cases.cases()
    chosen = fnmatch.filter(cases, options.only)
    if not chosen:
        raise UserError(f'--only {options.only!r}: no case has such a name{nearest(options.only, cases)}')
    if options.list:
        print('\n'.join(chosen))
        return 0
    results = proof_cases.Results(options.results)
    failed = []
    for number, case in enumerate(chosen, start=1):
        found, known = results.run(case, cases[case])
        right = proof_cases.holds(case, found)
        if not right:
            failed.append(case)
        verdict = ('as it must be' if right else 'FAILED') + ('  (kept)' if known else '')
        print(f'{number}/{len(chosen)}  {case}  {proof_cases.figures_line(found)}  {verdict}', flush=True)
    with output_file('--page', options.page) as file:
        file.write(proof_page.proof_page(results, cases).encode())
    print(f'{shown(options.page, LONGEST)}: {sum(case in results.found for case in cases)} of {len(cases)} cases')
    for case in failed:
        print(f'FAILED: {case}: {proof_cases.figures_line(results.found[case])}')
    return 1 if failed else 0


if __name__ == '__main__':
    run(main, lasting='--list' not in sys.argv)  # a list is the result itself
