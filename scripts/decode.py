"""Writes what a run's model makes of prompts, one token a step with a sharded cache. An encoder–decoder's prompts are sources.

python scripts/decode.py runs/demo --prompt 'def read(' --prompt 'import ' --temperature 0.8 --top-p 0.9
python scripts/decode.py runs/smollm2 --message 'What is the capital of France?'
python scripts/decode.py runs/smollm2 --prompts-file questions.jsonl --out answers.jsonl -n 4 --temperature 1
"""

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.runtime.errors import LONGEST, UserError, shown
from weft.scripts.answering import NEUTRAL, add_sampling, for_stdout, sampling_of
from weft.scripts.entry import as_json, run
from weft.scripts.options import Parser, finite, whole
from weft.storage.files import check_output, output_file

if TYPE_CHECKING:
    from weft.inference.generate import Completion
    from weft.inference.questions import Question

LINE = '─' * 40  # between texts
MOST_ANSWERS = 10_000  # to a prompt: all of them are kept until they can be told in order
MOST_BEAMS = 1024  # each has a cache of its own
MOST_ROWS = 65_536  # answers at once
MOST_PENALTY = 10  # lengths to the power of it are still numbers


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument('run', metavar='RUN', help='a folder such as runs/demo')
    asked = parser.add_argument_group('what is gone on with', 'each may be given several times')
    asked.add_argument('--prompt', action='append', default=[], metavar='TEXT', help='a text, as it stands')
    lines = (
        'UTF-8: a prompt a line, or as F.jsonl an object a line with "prompt" or "messages", and an "id" if you like'
    )
    asked.add_argument('--prompts-file', action='append', default=[], metavar='FILE', help=lines)
    message = 'a user’s message, by the model’s chat template'
    asked.add_argument('--message', action='append', default=[], metavar='TEXT', help=message)
    chat = 'a conversation by its chat template: a list of messages, or {"messages": …, "tools": …}'
    asked.add_argument('--chat', action='append', default=[], metavar='FILE.json', help=chat)
    parser.add_argument('--max-new-tokens', type=whole(1), default=128, metavar='N', help='of an answer')
    parser.add_argument(
        '-n', type=whole(1, MOST_ANSWERS), default=1, metavar='N', dest='answers', help='answers to each prompt'
    )
    add_sampling(parser, 'answer j of N to prompt i, both from 0, draws with seed S + i N + j')
    beams = 'the likeliest continuation of N that are followed at once'
    parser.add_argument('--beams', type=whole(0, MOST_BEAMS), default=0, metavar='N', help=beams)
    penalty = 'of --beams: a continuation’s log-probability is divided by its length to the power of P'
    parser.add_argument('--length-penalty', type=finite, default=1.0, metavar='P', help=penalty)
    logprobs = (
        'with --json or --out: each token’s log-probability and the K most likely tokens, as the model gives them'
    )
    parser.add_argument('--logprobs', type=whole(0), default=0, metavar='K', help=logprobs)
    parser.add_argument('--batch', type=whole(1, MOST_ROWS), default=16, metavar='N', help='answers at once')
    parser.add_argument('--step', type=whole(0), metavar='N', help='the checkpoint of this step; the newest otherwise')
    parser.add_argument('--mesh', metavar='AXES', help='such as expert=2,tensor=2; the run’s own otherwise')
    objects = 'one JSON object an answer; its tokens_per_second are those of that answer alone'
    parser.add_argument('--json', action='store_true', help=objects)
    out = 'write these objects there, whole or not at all; nothing is shown'
    parser.add_argument('--out', metavar='FILE.jsonl', help=out)
    options = parser.parse_args()
    check(options)

    from weft.inference.questions import read_questions

    questions = read_questions(options.prompt, options.prompts_file, options.message, options.chat)

    from weft.hub.chat import RENDERER, chat_templates

    if any(question.conversation for question in questions):
        RENDERER.start()

    from weft.inference.run import open_run, said_beside
    from weft.training.run_folder import run_folder

    files = said_beside(run_folder(options.run))
    texts = render(questions, chat_templates(files, options.run), options.run)
    sampling = sampling_of(options, {} if options.beams else files, options.run)
    opened = open_run(options.run, options.mesh, step=options.step)
    tokenizer = opened.tokenizer
    assert tokenizer is not None, 'open_run sees to it'

    import jax

    from weft.inference.beams import generate_by_beams
    from weft.inference.generate import PromptBatch, generate
    from weft.inference.prompts import check_prompts
    from weft.runtime.device_memory import explain_oom, gib, shard_bytes

    between = '' if opened.config.model.encoder is None else '\t'  # a source is not what its target goes on with
    quiet = options.json or options.out is not None
    order = [number for number in range(len(questions)) for _ in range(options.answers)]  # the questions of the answers
    spans = [range(begin, min(begin + options.batch, len(order))) for begin in range(0, len(order), options.batch)]
    tell = (
        f'out of memory on a device: weights {gib(shard_bytes(opened.kind))}, the rest the cache of {len(spans[0])} answers; '
        'give a smaller --batch, lower --max-new-tokens, or split them over more devices with --mesh'
    )
    done: list[Completion] = []
    with answers_in(options.out) as write, jax.set_mesh(opened.mesh), explain_oom(lambda: tell):
        check_prompts(opened.config.model, tokenizer, texts, opened.context)
        like = options.batch if len(spans) > 1 else 0
        limits = sampling, options.max_new_tokens, opened.context
        if not options.beams:
            first = [texts[order[i]] for i in spans[0]]
            PromptBatch(opened.kind, tokenizer, first, *limits, options.logprobs, like=like).compile_first()
        for span in spans:
            prompts = [texts[order[i]] for i in span]
            before = ['' if questions[order[i]].conversation else texts[order[i]] + between for i in span]
            if span.start and not quiet:
                print(LINE)
            screen = Screen(before, quiet, for_stdout(options.raw))
            if options.beams:
                completions = generate_by_beams(
                    opened.model, tokenizer, prompts, options.beams, *limits[1:], options.length_penalty
                )
                for number, completion in enumerate(completions):
                    screen.emit(number, completion.text)
            else:
                output = options.stop, screen.emit, options.logprobs
                completions = generate(opened.model, tokenizer, prompts, *limits, *output, span.start, like)
            screen.finish()
            for i, completion in zip(span, completions, strict=True):
                question = questions[order[i]]
                line = as_json(completion_json(completion, question, i % options.answers, options))
                if options.json:
                    print(line, flush=True)
                write(line)
            done += completions
            if len(spans) > 1:
                print(f'{len(done)} of {len(order)} answers', file=sys.stderr)
    if not options.json:
        speed = speed_together([done[span.start : span.stop] for span in spans])
        summary(done, len(questions), options.max_new_tokens, opened.context, opened.step, speed)


def check(options: argparse.Namespace) -> None:
    """Raises UserError for flags that do not go together or are out of range."""
    if abs(penalty := options.length_penalty) > MOST_PENALTY:
        raise UserError(
            f'--length-penalty {penalty}: it must be between {-MOST_PENALTY} and {MOST_PENALTY}; 1 is usual'
        )
    if options.logprobs and not (options.json or options.out):
        raise UserError(f'--logprobs {options.logprobs}: they are told in objects; add --json or --out FILE.jsonl')
    if options.beams:
        for name, neutral in {**NEUTRAL, 'stop': [], 'answers': 1, 'logprobs': 0}.items():
            if getattr(options, name) not in (None, neutral):
                flag = '-n' if name == 'answers' else f'--{name.replace("_", "-")}'
                raise UserError(f'--beams {options.beams}: it chooses by itself; leave out {flag}')
    if options.out is not None:
        check_output('--out', Path(options.out), [*options.prompts_file, *options.chat])


def render(questions: Sequence['Question'], templates: Any, run: str) -> list[str]:
    """The texts of questions; an assistant's last message is gone on with. Raises UserError where no template is."""
    texts: list[str] = []
    for question in questions:
        if question.conversation is None:
            texts.append(question.prompt)
            continue
        if templates is None:
            raise UserError(
                f'{question.where}: {run} has no chat template; --prompt TEXT has its model go on with a text as it stands'
            )
        try:
            goes_on = question.conversation['messages'][-1]['role'] == 'assistant'
            texts.append(templates.render(**question.conversation, continue_final_message=goes_on))
        except UserError as error:
            raise UserError(f'{question.where}: {error}') from None
    return texts


def completion_json(
    completion: 'Completion', question: 'Question', answer: int, options: argparse.Namespace
) -> dict[str, Any]:
    """An answer as an object of JSON."""
    fields = ['prompt', 'text', 'tokens', 'finish_reason', 'tokens_per_second']
    fields += ['score'] if options.beams else []
    fields += ['logprobs'] if options.logprobs else []
    found = {field: getattr(completion, field) for field in fields}
    found |= {'id': question.id} if question.id is not None else {}
    return found | ({'answer': answer} if options.answers > 1 else {})


def speed_together(batches: Sequence[Sequence['Completion']]) -> float:
    """Tokens a second of batches one after another, each as long as its longest answer took."""
    seconds = sum(max(completion.seconds for completion in batch) for batch in batches)
    return sum(completion.timed_tokens for batch in batches for completion in batch) / seconds if seconds else 0.0


def summary(done: Sequence['Completion'], prompts: int, most: int, context: int, step: int, speed: float) -> None:
    """Says on stderr how it went."""
    tokens = sum(len(completion.tokens) for completion in done)
    full = sum(one.finish_reason == 'length' and len(one.tokens) < most for one in done)
    if full:
        print(f'{full} of them ended where the context of {context} tokens is full', file=sys.stderr)
    answers = f', answers: {len(done)}' if len(done) > prompts else ''
    print(f'prompts: {prompts}{answers}, tokens: {tokens}, {speed:,.0f} tokens/s in all (step {step})', file=sys.stderr)


@contextlib.contextmanager
def answers_in(path: str | None) -> Iterator[Callable[[str], None]]:
    """Writes lines to a file that gets its name when the block ends well; to none where `path` is None.

    What was written before a failure stays in FILE.partial, line by line, and stderr says so.
    """
    if path is None:
        yield lambda line: None
        return
    kept = lambda left: print(f'what was done until then stands in {shown(left, LONGEST)}', file=sys.stderr)
    with output_file('--out', path, 'w', kept) as file:

        def write(line: str) -> None:
            file.write(line + '\n')
            file.flush()

        yield write


@dataclasses.dataclass
class Screen:
    """Texts of a batch, written at once but shown in order: the first as it comes, the others as their turn comes."""

    before: Sequence[str]  # what each text goes on with
    quiet: bool
    visible: Callable[[str], str]

    def __post_init__(self) -> None:
        self.held = [''] * len(self.before)

    def emit(self, number: int, text: str) -> None:
        """Shows a piece of the first text, keeps one of another."""
        if number == 0 and not self.quiet:
            if not self.held[0]:
                print(self.before[0], end='')
            print(self.visible(text), end='', flush=True)
        self.held[number] += text

    def finish(self) -> None:
        if self.quiet:
            return
        print('' if self.held[0] else self.before[0])
        for before, text in zip(self.before[1:], self.held[1:], strict=True):
            print(f'{LINE}\n{before}{self.visible(text)}')


if __name__ == '__main__':
    run(main)
