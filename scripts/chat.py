"""A conversation with a run's model in the terminal, by the model's own chat template. Lines of a pipe are messages, too.

python scripts/chat.py runs/smollm2 --system 'You are a pirate.'
echo 'What is the capital of France?' | python scripts/chat.py runs/smollm2
"""

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from weft.runtime.errors import UserError
from weft.scripts.answering import add_sampling, for_stdout, sampling_of
from weft.scripts.entry import run
from weft.scripts.options import Parser, whole

if TYPE_CHECKING:
    from weft.inference.conversation import Conversation

PROMPT = '> '
HELP = """\
/system TEXT   says TEXT to the model before all else, from here on; without TEXT, what the model's template says of its own
/reset         forgets the conversation
/help          these lines
/exit          leaves, as the end of input does
Ctrl-C ends an answer; where you are to write, it leaves. A line that begins with a space is a message whatever follows."""


def main() -> int:
    parser = Parser(description=__doc__, epilog=HELP)
    parser.add_argument('run', metavar='RUN', help='a folder such as runs/smollm2, of a model with a chat template')
    parser.add_argument('--system', metavar='TEXT', help='what the model is told before all else')
    parser.add_argument('--max-new-tokens', type=whole(1), default=1024, metavar='N', help='of an answer')
    add_sampling(parser, 'answer i, from 0, draws with seed S + i')
    parser.add_argument('--step', type=whole(0), metavar='N', help='the checkpoint of this step; the newest otherwise')
    parser.add_argument('--mesh', metavar='AXES', help='such as expert=2,tensor=2; the run’s own otherwise')
    options = parser.parse_args()

    from weft.hub.chat import RENDERER, chat_templates

    RENDERER.start()

    from weft.inference.run import open_run, said_beside
    from weft.training.run_folder import run_folder

    folder = run_folder(options.run)
    files = said_beside(folder)
    templates = chat_templates(files, options.run)
    if templates is None:
        raise UserError(
            f'{options.run} has no chat template, as models that were made to converse have; one that predicts the next token '
            f'goes on with a text: python scripts/decode.py {options.run} --prompt TEXT'
        )
    sampling = sampling_of(options, files, options.run)
    opened = open_run(options.run, options.mesh, step=options.step)

    import jax

    from weft.inference.conversation import Conversation
    from weft.inference.session import Session
    from weft.runtime.device_memory import explain_oom, gib, shard_bytes

    tell = (
        f'out of memory on a device: weights {gib(shard_bytes(opened.kind))}, the rest the cache of a conversation; split '
        'them over more devices with --mesh'
    )
    assert opened.tokenizer is not None, 'open_run sees to it'
    with jax.set_mesh(opened.mesh), explain_oom(lambda: tell):
        session = Session(opened.kind, opened.tokenizer, opened.context, lambda: opened.model)
        session.prepare(sampling)
        conversation = Conversation(session, templates, sampling, options.max_new_tokens, options.stop, options.system)
        return converse(conversation, for_stdout(options.raw))


def converse(conversation: 'Conversation', visible: Callable[[str], str]) -> int:
    """Reads lines and answers them until the last one; the exit code."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (input() has editing and a history with it)
        print('/help says what else there is', file=sys.stderr)
    for line in lines(terminal):
        word, _, rest = line.partition(' ')
        if not line.strip():
            continue
        if word == '/exit':
            return 0
        if word == '/help':
            print(HELP, file=sys.stderr)
        elif word == '/reset':
            conversation.reset()
        elif word == '/system':
            conversation.system = rest.strip() or None
        elif line.startswith('/'):
            rule = '/help says what there is; begin with a space to say it to the model'
            refuse(UserError(f'there is no {word!r}: {rule}'), terminal)
        else:
            try:
                answer(conversation, line.strip(), visible)
            except UserError as error:
                refuse(error, terminal)
    return 0


def refuse(error: UserError, terminal: bool) -> None:
    """Tells a person that a line was not answered; where nobody sits there, that is the end."""
    if not terminal:
        raise error
    print(f'error: {error}', file=sys.stderr)


def lines(terminal: bool) -> Iterator[str]:
    """The lines of the terminal, each asked for, or of a pipe or file."""
    if not terminal:
        for number, line in enumerate(sys.stdin.buffer, 1):
            try:
                text = line.decode('utf-8-sig' if number == 1 else 'utf-8')
            except UnicodeDecodeError as error:
                raise UserError(f'line {number} of the input: not UTF-8 at byte {error.start}') from None
            yield text.rstrip('\r\n')
        return
    while True:
        try:
            if sys.stdout.isatty():
                line = input(PROMPT)
            else:  # the answers go elsewhere
                print(PROMPT, end='', file=sys.stderr, flush=True)
                if not (line := sys.stdin.readline()):
                    return
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
            raise
        # Half of a character, which a terminal may send, is no text.
        yield line.rstrip('\n').encode('utf-8', 'replace').decode()


def answer(conversation: 'Conversation', message: str, visible: Callable[[str], str]) -> None:
    """Shows the answer to a message as it comes. Ctrl-C ends it; a second one, before it has ended, ends everything."""
    asked: list[bool] = []

    def interrupt(*_: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        emit = lambda text: print(visible(text), end='', flush=True)
        notes = conversation.answer(message, emit, stop=lambda: bool(asked))
    finally:
        signal.signal(signal.SIGINT, before)
    print(flush=True)
    for note in notes:
        print(f'({note})', file=sys.stderr)


if __name__ == '__main__':
    run(main)
