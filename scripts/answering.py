"""What decode.py and chat.py share: the flags of sampling, with a run's own defaults, and model text on a terminal."""

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from weft.runtime.errors import UserError
from weft.scripts.options import finite, whole

if TYPE_CHECKING:
    from weft.inference.sampling import Sampling

GENERATION = 'generation_config.json'
NEUTRAL = {'temperature': 0.0, 'top_k': 0, 'top_p': 1.0, 'min_p': 0.0, 'repetition_penalty': 1.0}
# Terminals obey these; line ends and tabs are text.
CONTROL = re.compile(r'[\x00-\x08\x0b-\x1f\x7f-\x9f]')


def add_sampling(parser: argparse.ArgumentParser, seeds: str) -> None:
    """The flags that say how tokens are chosen; `seeds`: the help of --seed."""
    of_run = f'an imported run’s {GENERATION} says the default, otherwise'

    def add(flag: str, kind: Callable[[str], float], letter: str, text: str) -> None:
        parser.add_argument(flag, type=kind, metavar=letter, help=text)

    add('--temperature', finite, 'T', f'0 takes the most likely token; {of_run} it is 0')
    add('--top-k', whole(0), 'K', f'only the K most likely; 0: all; {of_run} 0')
    add('--top-p', finite, 'P', f'only the most likely that together reach P; {of_run} 1')
    add('--min-p', finite, 'P', f'only those with at least P of the best one’s probability; {of_run} 0')
    add('--repetition-penalty', finite, 'R', f'of tokens that were there: 1 is none; {of_run} 1')
    parser.add_argument('--seed', type=whole(0, 2**32 - 1), default=0, metavar='S', help=seeds)
    parser.add_argument(
        '--stop', action='append', default=[], metavar='TEXT', help='ends an answer; may be given again'
    )
    parser.add_argument('--raw', action='store_true', help='to a terminal, too, write control characters as they are')


def sampling_of(options: argparse.Namespace, files: Mapping[str, bytes], where: str) -> 'Sampling':
    """How to sample: by the flags, and otherwise by the run's published files; what these do is said on stderr."""
    from weft.inference.sampling import Sampling

    given = {name: value for name in NEUTRAL if (value := getattr(options, name)) is not None}
    own = defaults(files, where)
    taken = {name: value for name, value in own.items() if name not in given and value != NEUTRAL[name]}
    if taken:
        flags = ' '.join(f'--{name.replace("_", "-")} {value}' for name, value in taken.items())
        print(f'{GENERATION} of this run says {flags}', file=sys.stderr)
    return Sampling(**{**NEUTRAL, **own, **given}, seed=options.seed)


def defaults(files: Mapping[str, bytes], where: str) -> dict[str, Any]:
    """What a run's generation_config.json says of sampling. As in transformers, tokens are drawn only where it says so."""
    from weft.storage.foreign import read_object, shown_value

    said = read_object(files.get(GENERATION, b'{}'), f'{where}/source/{GENERATION}')
    drawn = said.get('do_sample') is True
    found = {'temperature': 1.0} if drawn else {}
    for name in NEUTRAL if drawn else ('repetition_penalty',):
        if (value := said.get(name)) is None:
            continue
        whole = name == 'top_k'
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            kind = 'a whole number' if whole else 'a number'
            raise UserError(f'{where}/source/{GENERATION}: {name} is {shown_value(value)}: it must be {kind}')
        try:
            found[name] = value if whole else float(value)
        except OverflowError:
            raise UserError(f'{where}/source/{GENERATION}: {name} is {str(value)[:40]}…: it is too large') from None
    return found


def for_stdout(raw: bool) -> Callable[[str], str]:
    """What stdout is given for model text: to a terminal its control characters are shown, not obeyed, unless `raw`."""
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(errors='backslashreplace')  # a terminal that has not all characters
    return visible if sys.stdout.isatty() and not raw else str


def visible(text: str) -> str:
    """Text whose control characters, but for line ends and tabs, are written as in a Python string."""
    return CONTROL.sub(lambda found: f'\\x{ord(found[0]):02x}', text)
