"""Choosing tokens, ending texts, and batches in which rows do not disturb each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from tests.hub.test_tokenizer_goldens import read
from weft.data.tokenizer import TWICE, Tokenizer
from weft.inference.generate import TextStream, choices, generate, seeded
from weft.inference.prompts import read_prompts, say_once
from weft.inference.run import own_mesh
from weft.inference.sampling import RowSampling, Sampling, choose, describe
from weft.inference.score import score
from weft.model.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig
from weft.model.decoder import Decoder
from weft.runtime.errors import UserError
from weft.sharding.mesh import BATCH, MeshConfig, make_mesh
from weft.training.config import RunConfig, TrainingConfig
from weft.training.step import init

TEXT = (
    'def read(path):\n    return open(path).read()\n\n\n'
    'class Queue:\n    def put(self, item):\n        self.items.append(item)\n' * 30
)


@pytest.fixture(scope='module')
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 320)


def chosen(logits, count=2000, **sampling) -> np.ndarray:
    """Tokens drawn `count` times from the same logits, at different positions."""
    s = Sampling(**sampling)
    every = lambda value, dtype: jnp.full(count, value, dtype)
    choice = RowSampling(
        every(s.temperature, jnp.float32),
        every(s.top_k, jnp.int32),
        every(s.top_p, jnp.float32),
        every(s.min_p, jnp.float32),
        every(s.seed, jnp.uint32),
    )
    logit_BV = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    with jax.set_mesh(make_mesh(MeshConfig(data=2))):
        place = jax.tree.map(
            lambda a: jax.device_put(a, P(BATCH)), (logit_BV, jnp.arange(count, dtype=jnp.int32), choice)
        )
        return np.asarray(jax.jit(choose)(*place))


PROBABILITIES = np.array([0.05, 0.4, 0.25, 0.2, 0.1])


@pytest.mark.parametrize(
    ('sampling', 'kept'),
    [
        ({'temperature': 0.0}, [1]),
        ({'temperature': 1.0}, [0, 1, 2, 3, 4]),
        ({'temperature': 1.0, 'top_k': 2}, [1, 2]),
        ({'temperature': 1.0, 'top_p': 0.6}, [1, 2]),
        ({'temperature': 1.0, 'top_p': 0.66}, [1, 2, 3]),
        ({'temperature': 1.0, 'min_p': 0.45}, [1, 2, 3]),
        ({'temperature': 1.0, 'top_k': 3, 'top_p': 0.4}, [1]),  # of the three, the best one alone has 0.47
        ({'temperature': 1.0, 'top_k': 1}, [1]),
    ],
)
def test_filters_keep_what_they_say_in_its_proportions(sampling, kept):
    drawn = chosen(np.log(PROBABILITIES), **sampling)
    share = np.bincount(drawn, minlength=5) / len(drawn)
    want = np.where(np.isin(np.arange(5), kept), PROBABILITIES, 0)
    np.testing.assert_allclose(share, want / want.sum(), atol=0.04)
    assert set(drawn) == set(kept)


def test_temperature_sharpens():
    cold = np.bincount(chosen(np.log(PROBABILITIES), temperature=0.5), minlength=5) / 2000
    np.testing.assert_allclose(cold, PROBABILITIES**2 / (PROBABILITIES**2).sum(), atol=0.04)


def test_seed_decides():
    a, b, c = (chosen(np.log(PROBABILITIES), temperature=1.0, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


@pytest.mark.parametrize(
    'field', [{'temperature': -0.1}, {'top_k': -1}, {'top_p': 0.0}, {'top_p': 1.1}, {'min_p': -1.0}, {'seed': -1}]
)
def test_sampling_out_of_range(field):
    with pytest.raises(UserError, match=str(next(iter(field.values())))):
        Sampling(**field)


def test_text_streams_whole_characters_and_holds_back_what_may_be_a_stop(tokenizer):
    ids = tokenizer.encode('añb😀 stop here')
    stream = TextStream(tokenizer, [])
    pieces = [stream.add(i) for i in ids] + [stream.add(None)]
    assert ''.join(pieces) == 'añb😀 stop here'
    assert '\ufffd' not in ''.join(pieces)
    stopping = TextStream(tokenizer, ['st0p', 'stop', 'here'])
    shown = []
    for i in ids:
        shown.append(stopping.add(i))
        assert 's' not in ''.join(shown), 'what may begin a stop text is not shown'
        if stopping.stopped:
            break
    assert ''.join(shown) == 'añb😀 '


def test_a_text_of_its_own_begins_without_the_space_that_its_tokenizer_puts_there():
    t5, ids = read('t5'), read('t5').encode('the dog')
    for whole, text in ((True, 'the dog'), (False, ' the dog')):
        stream = TextStream(t5, ['dogs'], whole)
        assert ''.join(stream.add(i) for i in [*ids, t5.eos, None]) == text


def test_a_prompt_with_two_starts_is_told_once(capfd):
    c, tokenizer = (
        ModelConfig(layers=1, model_dim=8, attention=AttentionConfig(heads=1), mlp=MLPConfig(dim=8)),
        read('llama_chatml'),
    )
    say_once.cache_clear()
    with jax.set_mesh(make_mesh(MeshConfig())):
        for text in ('the dog', '<s>the dog', '<s>'):
            prompt = read_prompts(c, tokenizer, [text], 32)
            assert prompt.tokens_BT[0, : prompt.length_B[0]].tolist() == [tokenizer.bos, *tokenizer.encode(text)]
    assert capfd.readouterr().err == f'{TWICE}\n'


@functools.cache
def born(mesh: MeshConfig, vocabulary: int) -> Decoder:
    """A model on a mesh, the current one."""
    config = RunConfig(
        name='generated',
        model=ModelConfig(
            vocabulary=vocabulary,
            layers=2,
            model_dim=32,
            attention=AttentionConfig(heads=4, kv_heads=2),
            mlp=MLPConfig(dim=32),
            moe=MoEConfig(experts=4, mlp_dim=32),
        ),
        training=TrainingConfig(steps=1, batch=4, sequence_length=64),
    )
    return jax.jit(functools.partial(init, config))().model


def generated(mesh: MeshConfig, tokenizer, prompts, **options):
    with jax.set_mesh(make_mesh(mesh)):
        model = born(mesh, tokenizer.vocabulary)
        return generate(model, tokenizer, prompts, options.pop('sampling', Sampling()), 12, context=64, **options)


@pytest.mark.parametrize('sampling', [Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=5)])
def test_a_prompt_gets_the_same_text_alone_and_in_a_batch_on_any_mesh(tokenizer, sampling):
    prompts = ['def read', 'c', 'class Queue:\n    def put(self', '']
    together = generated(MeshConfig(data=2, expert=2, tensor=2), tokenizer, prompts, sampling=sampling)
    alone = generated(MeshConfig(), tokenizer, prompts[:1], sampling=sampling)
    assert together[0].tokens == alone[0].tokens
    assert all(
        len(completion.tokens) <= 12 and completion.finish_reason in ('stop', 'length') for completion in together
    )
    assert all(completion.text == tokenizer.decode(completion.tokens) for completion in together)


def test_emitted_pieces_add_up_and_stop_texts_end_a_row_alone(tokenizer):
    prompts = ['def read', 'class Queue']
    plain = generated(MeshConfig(tensor=2), tokenizer, prompts)
    stop = plain[0].text[3:5]
    pieces = ['', '']

    def emit(number, text):
        pieces[number] += text

    stopped = generated(MeshConfig(tensor=2), tokenizer, prompts, stops=[stop], emit=emit)
    assert stopped[0].finish_reason == 'stop'
    assert stopped[0].text == plain[0].text[: plain[0].text.find(stop)]
    assert pieces == [completion.text for completion in stopped]


def test_context_is_never_exceeded(tokenizer):
    long = 'x' * 60
    ids = tokenizer.encode(long)
    with pytest.raises(UserError, match='the context is 64'):
        generated(MeshConfig(), tokenizer, ['fine', 'y ' * 80])
    found = generated(MeshConfig(), tokenizer, [long])[0]
    assert found.finish_reason == 'length'
    assert 1 + len(ids) + len(found.tokens) == min(64, 1 + len(ids) + 12)


def test_logits_stay_split_by_rows_while_choosing():
    with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=2, tensor=2))):
        rows = lambda a: jax.device_put(a, P(BATCH))
        choice = RowSampling(
            *map(
                rows,
                (
                    np.ones(4, np.float32),
                    np.zeros(4, np.int32),
                    np.ones(4, np.float32),
                    np.zeros(4, np.float32),
                    np.zeros(4, np.uint32),
                ),
            )
        )
        out = jax.jit(choose)(rows(np.zeros((4, 10), np.float32)), rows(np.arange(4, dtype=np.int32)), choice)
        assert out.sharding.spec == P(('data', 'expert'))  # the axes of BATCH that have several devices


@pytest.mark.parametrize(
    ('mesh', 'wanted'),
    [
        (MeshConfig(stage=2, data=2), MeshConfig(data=4)),
        (MeshConfig(replica=2, context=2), MeshConfig(replica=2, context=2)),
        (MeshConfig(stage=3, data=2), MeshConfig(replica=3, data=2)),  # 6 does not divide model_dim
    ],
)
def test_a_run_with_stages_decodes_on_as_many_devices_without(mesh, wanted, capsys):
    config = ModelConfig(
        vocabulary=300, layers=6, model_dim=32, attention=AttentionConfig(heads=4), mlp=MLPConfig(dim=32)
    )
    run = RunConfig(
        name='staged', mesh=mesh, model=config, training=TrainingConfig(steps=1, batch=12, sequence_length=8)
    )
    assert own_mesh(run) == wanted
    assert ('no pipeline' in capsys.readouterr().err) == (mesh.stage > 1)


def test_log_probabilities_are_those_of_the_logits_whatever_the_sampling(tokenizer):
    """Of three rows in two batches like one of two: each token's, and the most likely ones, before penalty and temperature."""
    prompts, sampling = (
        ['def read', 'c', 'class Queue'],
        Sampling(temperature=0.7, top_k=5, seed=3, repetition_penalty=1.5),
    )
    config = RunConfig(
        name='likely',
        model=ModelConfig(
            vocabulary=tokenizer.vocabulary,
            layers=1,
            model_dim=32,
            attention=AttentionConfig(heads=4),
            mlp=MLPConfig(dim=32),
        ),
        training=TrainingConfig(steps=1, batch=4, sequence_length=64),
    )
    with jax.set_mesh(make_mesh(MeshConfig(data=2))):
        model = jax.jit(functools.partial(init, config))().model
        ask = functools.partial(generate, model, tokenizer, context=64, logprobs=3, sampling=sampling, max_new_tokens=5)
        together = ask(prompts, like=2)
        apart = [*ask(prompts[:2], like=2), *ask(prompts[2:], first=2, like=2)]
        for found, alone in zip(together, apart, strict=True):
            assert found.tokens == alone.tokens
            assert found.text == tokenizer.decode(found.tokens)
            ids = [*tokenizer.prefix, *tokenizer.encode(found.prompt), *found.tokens]
            padded = np.array([[*ids, *[0] * (32 - len(ids))]], np.int32)
            ((_, logit_BTV),) = score(model, padded)
            want = np.asarray(jax.nn.log_softmax(logit_BTV[0]))[len(ids) - 6 : len(ids) - 1]
            assert len(found.tokens) == 5
            assert [one['token'] for one in found.logprobs] == found.tokens
            for row, one in zip(want, found.logprobs, strict=True):
                np.testing.assert_allclose(one['logprob'], row[one['token']], atol=1e-5)
                assert one['text'] == tokenizer.decode([one['token']])
                np.testing.assert_allclose([top['logprob'] for top in one['top']], np.sort(row)[::-1][:3], atol=1e-5)
                np.testing.assert_allclose([row[top['token']] for top in one['top']], np.sort(row)[::-1][:3], atol=1e-5)
        with pytest.raises(UserError, match='logprobs is 999: it must be at least 0 and at most'):
            generate(model, tokenizer, prompts, sampling, 5, context=64, logprobs=999)


def test_a_penalty_lowers_what_was_there_as_transformers_has_it():
    """Of logits by the rule of arXiv:1909.05858: a positive one is divided, a negative one multiplied, once seen."""
    logit_BV = np.array([[3.0, 2.5, -1.0, -1.2], [3.0, 2.5, -1.0, -1.2]], np.float32)
    seen_BV = np.array([[True, False, False, False], [False, False, True, False]])
    with jax.set_mesh(make_mesh(MeshConfig(data=2))):
        choice = choices([Sampling(repetition_penalty=1.5), Sampling()], 2)
        assert choices([Sampling()], 2) is None
        place_rows = lambda tree: jax.tree.map(lambda a: jax.device_put(a, P(BATCH)), tree)
        run = jax.jit(describe, static_argnums=4)
        token_B, beside = run(*place_rows((logit_BV, np.zeros(2, np.int32), choice, seen_BV)), 0)
    assert np.asarray(token_B).tolist() == [1, 0]
    assert np.asarray(beside.seen_BV).tolist() == [[True, True, False, False], [True, False, True, False]]
    with pytest.raises(UserError, match=r'repetition-penalty is 0\.0'):
        Sampling(repetition_penalty=0.0)


def test_seeds_are_by_the_number_of_the_prompt():
    assert [seeded(Sampling(seed=2**32 - 2), number).seed for number in range(4)] == [2**32 - 2, 2**32 - 1, 0, 1]
