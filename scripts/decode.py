"""Writes what a run's model makes of prompts, one token a step with a sharded cache. An encoder–decoder's prompts are sources.

python scripts/decode.py runs/demo --prompt 'def read(' --prompt 'import ' --temperature 0.8 --top-p 0.9
"""

import argparse
import json
import sys
from pathlib import Path

from scripts.entry import run
from sharding.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', metavar='RUN', help='a folder such as runs/demo')
    parser.add_argument(
        '--prompt', action='append', default=[], metavar='TEXT', help='may be given several times: they are one batch'
    )
    parser.add_argument('--prompts-file', metavar='FILE', help='one prompt a line, UTF-8')
    parser.add_argument('--max-new-tokens', type=int, default=128, metavar='N')
    parser.add_argument(
        '--temperature', type=float, default=0.0, metavar='T', help='0 (the default) takes the most likely token'
    )
    parser.add_argument('--top-k', type=int, default=0, metavar='K', help='only the K most likely; 0: all')
    parser.add_argument('--top-p', type=float, default=1.0, metavar='P', help='the most likely that together reach P')
    parser.add_argument(
        '--min-p', type=float, default=0.0, metavar='P', help='only those with at least P of the best one’s probability'
    )
    parser.add_argument('--seed', type=int, default=0, metavar='S', help='prompt i draws with seed S + i')
    parser.add_argument(
        '--stop', action='append', default=[], metavar='TEXT', help='ends a completion; may be given several times'
    )
    parser.add_argument(
        '--beams', type=int, default=0, metavar='N', help='the likeliest continuation of N that are followed at once'
    )
    parser.add_argument(
        '--length-penalty',
        type=float,
        default=1.0,
        metavar='P',
        help='of --beams: a continuation’s log-probability is divided by its length to the power of P',
    )
    parser.add_argument('--mesh', metavar='AXES', help='such as expert=2,tensor=2; the run’s own otherwise')
    parser.add_argument('--json', action='store_true', help='one JSON object a prompt')
    options = parser.parse_args()

    from decoding.sampling import Sampling

    sampling = Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        seed=options.seed,
    )
    if options.beams:
        for name, plain in (('temperature', 0), ('top_k', 0), ('top_p', 1), ('min_p', 0), ('stop', [])):
            if getattr(options, name) != plain:
                raise UserError(f'--beams {options.beams}: it chooses by itself; leave out --{name.replace("_", "-")}')
    prompts = options.prompt + (read_prompts(options.prompts_file) if options.prompts_file else [])
    if not prompts:
        raise UserError('no prompt: give --prompt TEXT or --prompts-file FILE')

    from decoding.run import open_run

    opened = open_run(options.run, options.mesh)

    import jax

    from decoding.beams import generate_by_beams
    from decoding.generate import compile_ahead, generate
    from sharding.memory import explaining, gib, shard_bytes

    between = '' if opened.config.model.encoder is None else '\t'  # a source is not what its target goes on with
    screen = Screen([prompt + between for prompt in prompts], quiet=options.json)
    tell = (
        f'out of memory on a device: weights {gib(shard_bytes(opened.kind))}, the rest the cache of {len(prompts)} prompts; '
        'give fewer at a time, lower --max-new-tokens, or split them over more devices with --mesh'
    )
    with jax.set_mesh(opened.mesh), explaining(lambda: tell):
        if not options.beams:
            compile_ahead(opened.kind, opened.tokenizer, prompts, sampling, options.max_new_tokens, opened.context)
        if options.beams:
            completions = generate_by_beams(
                opened.model,
                opened.tokenizer,
                prompts,
                options.beams,
                options.max_new_tokens,
                context=opened.context,
                length_penalty=options.length_penalty,
            )
            for number, completion in enumerate(completions):
                screen.emit(number, completion.text)
        else:
            completions = generate(
                opened.model,
                opened.tokenizer,
                prompts,
                sampling,
                options.max_new_tokens,
                context=opened.context,
                stops=options.stop,
                emit=screen.emit,
            )
    screen.finish()
    if options.json:
        for completion in completions:
            fields = (
                'prompt',
                'text',
                'tokens',
                'finish_reason',
                'tokens_per_second',
                *(('score',) if options.beams else ()),
            )
            print(json.dumps({field: getattr(completion, field) for field in fields}))
    else:
        speed = sum(completion.tokens_per_second for completion in completions)
        tokens = sum(len(completion.tokens) for completion in completions)
        full = sum(one.finish_reason == 'length' and len(one.tokens) < options.max_new_tokens for one in completions)
        if full:
            context = opened.context
            print(f'{full} of them ended where the context of {context} tokens is full', file=sys.stderr)
        print(
            f'prompts: {len(completions)}, tokens: {tokens}, {speed:,.0f} tokens/s (step {opened.step})',
            file=sys.stderr,
        )


def read_prompts(path: str) -> list[str]:
    """The lines of a file, empty ones left out. Only line feeds end a line: a prompt may hold any other character."""
    try:
        lines = Path(path).read_text(encoding='utf-8').split('\n')
    except UnicodeDecodeError as error:
        raise UserError(f'--prompts-file {path}: not UTF-8 at byte {error.start}') from None
    except OSError as error:
        raise UserError(f'--prompts-file {path}: {error.strerror}') from None
    return [line for line in lines if line]


class Screen:
    """Texts of several prompts, written at once but shown in order: the first as it comes, the others as their turn comes."""

    def __init__(self, prompts: list[str], quiet: bool):
        self.prompts, self.quiet = prompts, quiet
        self.held = [''] * len(prompts)

    def emit(self, number: int, text: str) -> None:
        """Shows a piece of the first prompt, keeps one of another."""
        self.held[number] += text
        if number == 0 and not self.quiet:
            if self.held[0] == text:
                print(self.prompts[0], end='')
            print(text, end='', flush=True)

    def finish(self) -> None:
        """Shows the other prompts' texts."""
        if self.quiet:
            return
        print('' if self.held[0] else self.prompts[0])
        for prompt, text in zip(self.prompts[1:], self.held[1:], strict=True):
            print(f'{"─" * 40}\n{prompt}{text}')


if __name__ == '__main__':
    run(main)
