"""A conversation with a model: what was said, and which of it fits the context."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from weft.hub.chat import ChatTemplates
from weft.inference.generate import seeded
from weft.inference.sampling import Sampling
from weft.inference.session import Session
from weft.runtime.errors import UserError

SHARE = 4  # a message leaves at least a quarter of the context to its answer
# Of the room, by messages, once the oldest must go: what is left is read anew, and not again with each message.
KEPT = 3 / 4


@dataclasses.dataclass
class Conversation:
    """Messages of a user and a model in turns, with what a system says before them where it says something."""

    session: Session
    templates: ChatTemplates
    sampling: Sampling
    max_new_tokens: int
    stops: Sequence[str] = ()
    system: str | None = None
    turns: list[dict[str, str]] = dataclasses.field(default_factory=list)
    answers: int = 0  # so far: each draws with a seed of its own

    def reset(self) -> None:
        """Forgets what was said, but for the system's message."""
        self.turns = []

    def answer(
        self, message: str, emit: Callable[[str], None] = lambda text: None, stop: Callable[[], bool] = lambda: False
    ) -> list[str]:
        """Answers a message: `emit` gets the text, until `stop`; returns notes. Raises UserError if it is refused."""
        turns = [*self.turns, {'role': 'user', 'content': message}]
        notes = []
        ids, left_out = self.fit(turns)
        if left_out:
            notes.append(
                f'the oldest {left_out} messages are left out: the context holds {self.session.context} tokens'
            )
        completion = self.session.answer(
            ids, seeded(self.sampling, self.answers), self.max_new_tokens, self.stops, emit=emit, stop=stop
        )
        self.answers += 1
        if completion.finish_reason == 'stopped':
            notes.append('stopped')
        elif completion.finish_reason == 'length':
            limit = f'--max-new-tokens {self.max_new_tokens}'
            if len(completion.tokens) < self.max_new_tokens:
                limit = f'the context of {self.session.context} tokens is full'
            notes.append(f'{limit}: the answer ends here')
        # Where nothing was said before it was stopped, the message is as if it had not been.
        if completion.text or completion.finish_reason != 'stopped':
            self.turns = [*turns[left_out:], {'role': 'assistant', 'content': completion.text}]
        return notes

    def fit(self, turns: Sequence[dict[str, Any]]) -> tuple[list[int], int]:
        """The tokens of a conversation that leaves room for an answer, and how many of its oldest messages it is without."""
        context = self.session.context
        most = context - max(min(self.max_new_tokens, context // SHARE), 1)
        for begin in range(0, len(turns), 2):  # a user's message and its answer
            ids = self.encode(turns[begin:])
            if len(ids) <= (most * KEPT if 0 < begin < len(turns) - 1 else most):
                return ids, begin
        raise UserError(
            f'this message has {len(ids)} tokens with what the template writes around it, and the context holds {context}: at '
            f'most {most} leave room for an answer'
        )

    def encode(self, turns: Sequence[dict[str, Any]]) -> list[int]:
        """The tokens of a conversation up to where the model's next message begins."""
        system = [] if self.system is None else [{'role': 'system', 'content': self.system}]
        return self.session.tokenizer.encode(self.templates.render([*system, *turns])) or [self.session.tokenizer.bos]
