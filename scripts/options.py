"""The command line of every script: mistakes in one line with the flag that may have been meant, defaults, --version."""

import argparse
import contextlib
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from weft.runtime.errors import UserError, closest, shown

WHOLE = re.compile(r'[-+]?[0-9]+')
DIGITS = 30  # of a number on the command line at most
MOST = 2**31 - 1  # what a count of tokens, rows or steps fits


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a script's own text, and says each option's default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help or '', action.default
        none = default is None or default is argparse.SUPPRESS or isinstance(default, bool | list)
        if none or '(default' in text or '%(default)' in text:
            return action.help
        return f'{text} (default: %(default)s)'.lstrip()


class Version(argparse.Action):
    """Prints the versions of what makes the numbers."""

    def __init__(self, option_strings: Sequence[str], dest: str, **_: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help='versions of what runs')

    def __call__(self, *_: Any) -> NoReturn:
        print(version())
        sys.exit(0)


def version() -> str:
    """Of Weft, what it stands on, Python and the platform."""
    import importlib.metadata
    import platform

    found = []
    for name in ('weft', 'jax', 'jaxlib'):
        try:
            found.append(f'{name} {importlib.metadata.version(name)}')
        except importlib.metadata.PackageNotFoundError:
            found.append(f'{name} not installed')
    return ', '.join([*found, f'Python {platform.python_version()}', platform.platform()])


prog: str | None = None  # what a script is called by, where that is not its file


class Parser(argparse.ArgumentParser):
    """Argparse's parser without abbreviations: a flag that is added later would change what one means."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{'prog': prog, 'formatter_class': Formatter, 'allow_abbrev': False, **options})
        if ' ' not in self.prog.removeprefix('weft '):  # that of a subcommand has the command before it
            self.add_argument('--version', action=Version)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        found, rest = self.parse_known_args(args, namespace)
        self.none_left(rest)
        return found

    def parse_intermixed_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        found, rest = self.parse_known_intermixed_args(args, namespace)
        self.none_left(rest)
        return found

    def error(self, message: str) -> NoReturn:
        if message.endswith('expected one argument'):
            flag = message.removeprefix('argument ').partition(':')[0].split('/')[-1]
            message += f' (one that begins with a dash is given as {flag}=…)'
        raise UserError(f'{shown(message, 400)}; --help says what there is')

    def none_left(self, rest: Sequence[str]) -> None:
        """Raises UserError for the first of the arguments that nothing takes."""
        if not rest:
            return
        flag, flags = rest[0].partition('=')[0], self.flags()
        if not flag.startswith('-'):
            text = 'a text to go on with is given as --prompt TEXT'
            rule = text if '--prompt' in flags else 'one argument too many; --help says what there is'
            raise UserError(f'{shown(rest[0], quoted=True)}: {rule}')
        by_name = {one.lstrip('-'): one for one in flags}
        name = flag.lstrip('-')
        begun = [one for one in by_name if name and one.startswith(name)]
        near = name if name in by_name else begun[0] if len(begun) == 1 else closest(name, by_name)
        hint = f'; did you mean {by_name[near]!r}?' if near in by_name else self._of_config(name, rest)
        raise UserError(f'there is no option {shown(flag, 80)}{hint or "; --help says which there are"}')

    def flags(self) -> list[str]:
        """All flags, those of subcommands too."""
        found = [*self._option_string_actions]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found += [flag for parser in action.choices.values() for flag in parser.flags()]
        return found

    def _of_config(self, name: str, rest: Sequence[str]) -> str:
        """The key of a config that has such a name, where the script takes them."""
        if not any(action.dest == 'overrides' for action in self._actions):
            return ''
        from weft.training.config import RunConfig
        from weft.training.overrides import keys

        key = next((key for key in keys(RunConfig) if key.rpartition('.')[2] == name.replace('-', '_')), None)
        value = rest[0].partition('=')[2] or (rest[1] if len(rest) > 1 and not rest[1].startswith('-') else 'VALUE')
        return f'; did you mean {key}={shown(value, 40)}?' if key else ''


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """The type of an option: a whole number in these bounds."""

    def read(text: str) -> int:
        if not WHOLE.fullmatch(text):
            raise argparse.ArgumentTypeError(f'{shown(text, 40, quoted=True)} is no whole number; one of {rule} works')
        if len(text) > DIGITS or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f'{shown(text, 40)}: it must be {rule}')
        return int(text)

    rule = f'at least {least} and at most {most:,}'
    return read


def finite(text: str) -> float:
    """The type of an option: a finite number."""
    with contextlib.suppress(ValueError):
        if text.isascii() and math.isfinite(found := float(text)):
            return found
    raise argparse.ArgumentTypeError(f'{shown(text, 40, quoted=True)} is no finite number')
