"""A cache that goes on: text read in pieces, and a conversation of which only what is new is read."""

import functools

import jax
import numpy as np
import pytest

from tests.families.cases import CASES
from tests.families.loading import read
from tests.models import filled
from weft.data.tokenizer import Tokenizer
from weft.hub.chat import Rendered
from weft.inference import session as sessions
from weft.inference.conversation import Conversation
from weft.inference.generate import Completion, generate
from weft.inference.sampling import Sampling
from weft.inference.session import Session
from weft.inference.step import decode, empty_cache, extend, grown
from weft.model.config import changed
from weft.model.forward import logits, place
from weft.runtime.errors import UserError
from weft.sharding.mesh import MeshConfig, make_mesh

ROWS = 4


@pytest.mark.parametrize(
    ('name', 'mesh'),
    [
        ('llama-grouped', MeshConfig(context=2, tensor=4)),
        ('gpt_oss-as-published', MeshConfig(data=2, expert=2, tensor=2)),  # windows, sinks, experts
        ('deepseek_v2-lite', MeshConfig()),  # latent vectors
    ],
    ids=str,
)
def test_text_that_is_read_in_pieces_gives_the_logits_of_all_of_it(name, mesh):
    """Rows of different lengths, a cache that grows on the way, padding beyond its end, and one more token by decoding."""
    c = read(CASES[name])[1]
    rng = np.random.default_rng(0)
    ids = rng.integers(0, c.vocabulary, (ROWS, 40), dtype=np.int32)
    place_BT = np.broadcast_to(np.arange(40, dtype=np.int32), ids.shape)
    with jax.set_mesh(make_mesh(mesh)):
        model = filled(c)
        whole = np.asarray(jax.jit(logits)(model, *place((ids, place_BT, np.ones_like(ids)))))
        cache = jax.jit(functools.partial(empty_cache, rows=ROWS, length=20, chunk=8))(model)
        more, longer = jax.jit(extend), jax.jit(grown, static_argnums=1)
        begin_B, longest = np.zeros(ROWS, np.int32), 0
        for lengths in ([8, 8, 5, 1], [8, 7, 8, 8], [3, 1, 3, 8], [8, 8, 8, 8]):
            if max(begin_B + lengths) > 20 and not longest:
                cache, longest = longer(cache, 30), 30
            piece = np.zeros((ROWS, 8), np.int32)
            for row, length in enumerate(lengths):
                piece[row, :length] = ids[row, begin_B[row] : begin_B[row] + length]
            length_B = np.array(lengths, np.int32)
            found, cache = more(model, cache, *place((piece, begin_B, length_B)))
            begin_B = begin_B + length_B
            want = whole[np.arange(ROWS), begin_B - 1]
            np.testing.assert_allclose(np.asarray(found), want, atol=1e-5 * np.abs(whole).max())
        assert begin_B.tolist() == [27, 24, 24, 25]
        assert longest == 30
        token_B = ids[np.arange(ROWS), begin_B]
        found, _ = jax.jit(decode)(model, cache, *place((token_B, begin_B)))
        np.testing.assert_allclose(np.asarray(found), whole[np.arange(ROWS), begin_B], atol=1e-5 * np.abs(whole).max())


class Bytes(Tokenizer):
    """Ids that are bytes; 10 is the end."""

    def __init__(self) -> None:
        self.vocabulary = self.embedded = 256
        self.bos, self.eos, self.prefix, self.ends = 1, 10, (), frozenset([10])
        self.pieces = [bytes([i]) for i in range(256)]
        self.embedded = 256

    def encode_batch(self, texts):
        return [list(text.encode()) for text in texts]


@pytest.fixture(scope='module')
def small():
    c = read({**CASES['llama-grouped'], 'vocab_size': 256})[1]
    with jax.set_mesh(make_mesh(MeshConfig())):
        yield filled(c, gain=3.0), c


def recording(monkeypatch):
    """The lengths of the pieces that sessions read."""
    lengths, read_more = [], sessions.read_more

    @functools.wraps(read_more)
    def recorded(model, cache, tokens_BT, begin_B, length_B, *rest):
        lengths.append((int(begin_B[0]), int(length_B[0])))
        return read_more(model, cache, tokens_BT, begin_B, length_B, *rest)

    monkeypatch.setattr(sessions, 'read_more', recorded)
    return lengths


@pytest.mark.parametrize(
    'sampling', [Sampling(), Sampling(temperature=1.0, seed=3, repetition_penalty=1.3)], ids=['greedy', 'drawn']
)
def test_only_what_is_new_is_read_and_the_answers_are_those_of_a_new_reading(small, sampling, monkeypatch):
    model, _ = small
    monkeypatch.setattr(sessions, 'CHUNKS', (16, 4))
    monkeypatch.setattr(sessions, 'SLOTS', 32)
    lengths = recording(monkeypatch)
    going_on = Session(model, Bytes(), 128)
    text = b'Hello there'
    first = going_on.answer(list(text), sampling, 6)
    assert lengths == [(0, 4), (4, 4), (8, 3)]
    assert (len(first.tokens), first.finish_reason) == (6, 'length')
    again = [*text, *first.tokens, *b' and more, much more!']
    second = going_on.answer(again, sampling, 6)
    assert lengths[3:] == [(16, 16), (32, 4), (36, 2)]  # the last token of the answer was not in the cache yet
    assert going_on.slots == 64
    if sampling.temperature:
        assert second.tokens == Session(model, Bytes(), 128).answer(again, sampling, 6).tokens
        return
    changed = [*again[:20], *b'XY']
    third = going_on.answer(changed, sampling, 6)
    assert lengths[6:] == [(20, 2)]
    repeated = going_on.answer(changed, sampling, 6)
    assert lengths[7:] == [(21, 1)]
    (alone,) = generate(model, Bytes(), [Rendered(text.decode())], sampling, 6, context=128)
    assert first.tokens == alone.tokens
    for found, ids in ((second, again), (third, changed), (repeated, changed)):
        assert found.tokens == Session(model, Bytes(), 128).answer(ids, sampling, 6).tokens


def test_a_window_goes_on_where_it_can_and_else_all_is_read_again(monkeypatch):
    """A window of 6 and chunks of at most 16: a ring of 21 slots, of which a text may go back by 16 tokens."""
    c = changed(
        read({**CASES['llama-grouped'], 'vocab_size': 256})[1],
        {
            'attention.window': 6,
            'attention.window_pattern': (True, False),
        },
    )
    monkeypatch.setattr(sessions, 'CHUNKS', (16, 4))
    monkeypatch.setattr(sessions, 'SLOTS', 32)
    lengths, endless = recording(monkeypatch), Bytes()
    endless.ends = frozenset()  # so that each answer has 6 tokens, whatever the weights
    with jax.set_mesh(make_mesh(MeshConfig())):
        model = filled(c, gain=3.0)
        going_on = Session(model, endless, 128)
        first = going_on.answer(list(b'Hello there'), Sampling(), 6)
        again = [*b'Hello there', *first.tokens, *b' and more, much more!']
        answers = [(b'Hello there', first), (again, going_on.answer(again, Sampling(), 6))]
        assert lengths == [(0, 4), (4, 4), (8, 3), (16, 16), (32, 4), (36, 2)]
        kept = (cache.arrays[0].shape[2] for cache in going_on.cache.groups)
        assert sorted(kept) == [21, 64]
        # 43 tokens have been in the cache, the last answer's among them.
        asked = [
            ([*again[:27], *b'XY'], [(27, 2)]),
            ([*again[:26], *b'Z'], [(0, 16), (16, 4), (20, 4), (24, 3)]),  # from 43 on back to 26: too far
            ([*again[:26], *b'Z'], [(26, 1)]),  # of the text that was read again 32 tokens
        ]
        for ids, want in asked:
            del lengths[:]
            answers.append((ids, going_on.answer(ids, Sampling(), 6)))
            assert lengths == want
        for ids, found in answers:
            assert found.tokens == Session(model, endless, 128).answer(list(ids), Sampling(), 6).tokens
        (alone,) = generate(model, endless, [Rendered('Hello there')], Sampling(), 6, context=128)
        assert first.tokens == alone.tokens


def test_an_answer_ends_where_it_is_stopped_or_the_context_is_full(small):
    model, _ = small
    seen = []
    going_on = Session(model, Bytes(), 20)
    stopped = going_on.answer(list(b'Hello there'), Sampling(), 9, emit=seen.append, stop=lambda: len(seen) >= 2)
    assert (stopped.finish_reason, len(stopped.tokens)) == ('stopped', 3)
    assert ''.join(seen) == stopped.text
    full = going_on.answer(list(b'Hello there'), Sampling(), 50)
    assert (full.finish_reason, len(full.tokens)) == ('length', 9)
    assert full.tokens[:3] == stopped.tokens


def test_rows_that_are_turned_by_their_length_are_read_anew(small, monkeypatch):
    c = read({**CASES['llama-dynamic-scaling-long'], 'vocab_size': 256})[1]
    lengths = recording(monkeypatch)
    model = filled(c, gain=3.0)
    going_on = Session(model, Bytes(), 128)
    first = going_on.answer(list(b'a' * 20), Sampling(), 4)
    ids = [*b'a' * 20, *first.tokens, *b'b' * 30]
    second = going_on.answer(ids, Sampling(), 4)
    assert lengths == []
    assert second.tokens == Session(model, Bytes(), 128).answer(ids, Sampling(), 4).tokens


class Scripted:
    """A session that says what it is told to, and templates of a letter a role."""

    def __init__(self, context: int, *answers: Completion) -> None:
        self.context, self.tokenizer, self.answers, self.asked = context, Bytes(), list(answers), []

    def answer(self, ids, sampling, max_new_tokens, stops, emit, stop):
        self.asked.append((bytes(ids).decode(), sampling.seed))
        return self.answers.pop(0)

    def render(self, messages):
        if messages[-1]['content'] == 'bad':
            raise UserError('no')
        return Rendered(''.join(f'{one["role"][0]}{one["content"]}.' for one in messages) + 'a')


def said(text: str, reason: str = 'stop') -> Completion:
    return Completion('', text, list(text.encode()), reason)


def conversing(session: Scripted, most: int = 8, **options) -> Conversation:
    return Conversation(session, session, Sampling(seed=5), most, **options)


def test_the_oldest_messages_are_left_out_where_the_context_is_full():
    session = Scripted(56, *[said('yes')] * 5, said('x' * 40, 'length'))
    talk = conversing(session, system='S')
    assert [talk.answer(f'question{i}') for i in range(3)] == [[], [], []]
    told = 'uquestion0.ayes.uquestion1.ayes.uquestion2.a'
    assert session.asked == [(f'sS.{told[:12]}', 5), (f'sS.{told[:28]}', 6), (f'sS.{told}', 7)]
    # Of the 48 tokens that leave room for an answer, what stays takes three quarters at most.
    assert talk.answer('question3') == ['the oldest 4 messages are left out: the context holds 56 tokens']
    assert session.asked[-1] == ('sS.uquestion2.ayes.uquestion3.a', 8)
    with pytest.raises(UserError, match=r'this message has 56 tokens .* at most 48 leave room'):
        talk.answer('q' * 50)
    assert talk.answer('q' * 42) == ['the oldest 4 messages are left out: the context holds 56 tokens']
    assert talk.turns[0]['content'] == 'q' * 42
    talk.reset()
    assert talk.answer('last') == ['--max-new-tokens 8: the answer ends here']
    assert session.asked[-1] == ('sS.ulast.a', 10)


def test_what_was_stopped_stays_where_it_said_something():
    session = Scripted(100, said('', 'stopped'), said('ye', 'stopped'), said('ok'))
    talk = conversing(session)
    assert talk.answer('one') == ['stopped']
    assert talk.turns == []
    talk.answer('two')
    with pytest.raises(UserError, match='no'):
        talk.answer('bad')
    talk.system = 'S'
    talk.answer('three')
    assert session.asked[-1][0] == 'sS.utwo.aye.uthree.a'
