"""Recurrent nets equal NumPy step by step; norms are what they say; training takes steps that help."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from weft.data.config import DataConfig
from weft.data.prepare import Dataset, prepare
from weft.interpret.history import net_training
from weft.interpret.history.net_training import COMPILING, Plan, bits_per_byte, continued, train
from weft.interpret.history.nets import KEPT, LSTM, Elman, Net, PlainDecoder, sinusoids
from weft.runtime.errors import Diverged
from weft.training.optimizers import AdamW

SEGMENT_BT = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 1, 1, 1, 1, 0]], np.int32)
SIGMOID = lambda x: 1 / (1 + np.exp(-x))


def of(net: Net, seed: int = 0) -> tuple[dict[str, jax.Array], np.ndarray]:
    """Weights with biases and scales that are neither 0 nor 1, and vectors of two rows of seven tokens."""
    w = net.initial(jax.random.key(seed))
    noise = np.random.default_rng(seed)
    w = {name: x + 0.1 * noise.normal(size=x.shape).astype(np.float32) if x.ndim == 1 else x for name, x in w.items()}
    return w, noise.normal(size=(2, 7, net.dim)).astype(np.float32)


def by_rows(step, x_BTD: np.ndarray, dim: int, states: int) -> np.ndarray:
    """What a step of one token gives for each token of each row, the state 0 where a document begins."""
    found = np.zeros((*x_BTD.shape[:2], dim))
    for row in range(len(x_BTD)):
        for t in range(x_BTD.shape[1]):
            if t == 0 or SEGMENT_BT[row, t] != SEGMENT_BT[row, t - 1]:
                state = [np.zeros(dim)] * states
            state = step(state, x_BTD[row, t].astype(np.float64))
            found[row, t] = state[0]
    return found


def test_elman_s_network_equals_numpy():
    net = Elman(vocabulary=5, dim=6)
    w, x_BTD = of(net)
    m = {name: np.asarray(a, np.float64) for name, a in w.items()}
    step = lambda state, x: [np.tanh(x @ m['input_DH'] + state[0] @ m['recurrent_HH'] + m['bias_H'])]
    found, _ = net.mix(w, jnp.asarray(x_BTD), jnp.asarray(SEGMENT_BT), {}, False)
    np.testing.assert_allclose(found, by_rows(step, x_BTD, 6, 1), atol=1e-5)


def test_the_lstm_equals_numpy():
    net = LSTM(vocabulary=5, dim=6)
    w, x_BTD = of(net)
    m = {name: np.asarray(a, np.float64) for name, a in w.items()}

    def step(state: list[np.ndarray], x: np.ndarray) -> list[np.ndarray]:
        i, f, g, o = np.split(x @ m['input_DG'] + state[0] @ m['recurrent_HG'] + m['bias_G'], 4)
        cell = SIGMOID(f) * state[1] + SIGMOID(i) * np.tanh(g)
        return [SIGMOID(o) * np.tanh(cell), cell]

    found, _ = net.mix(w, jnp.asarray(x_BTD), jnp.asarray(SEGMENT_BT), {}, False)
    np.testing.assert_allclose(found, by_rows(step, x_BTD, 6, 2), atol=1e-5)
    born = np.asarray(net.initial(jax.random.key(1))['bias_G'])
    assert born.tolist() == [0] * 6 + [1] * 6 + [0] * 12


def decoder(norm) -> PlainDecoder:
    return PlainDecoder(vocabulary=5, dim=8, layers=2, heads=2, norm=norm)


@pytest.mark.parametrize('norm', ['layer', 'batch', 'none'])
def test_a_token_sees_what_is_before_it_in_its_document(norm):
    net = decoder(norm)
    w, x_BTD = of(net)
    mix = jax.jit(lambda x_BTD: net.mix(w, x_BTD, jnp.asarray(SEGMENT_BT), net.statistics(), False)[0])
    before, changed_BTD = np.asarray(mix(x_BTD)), x_BTD.copy()
    changed_BTD[0, 1, 0] += 1
    differs_T = np.abs(np.asarray(mix(changed_BTD)) - before)[0].max(-1) > 1e-6
    assert differs_T.tolist() == [False, True, True, False, False, False, False]


def test_batch_norm_tells_of_later_tokens_while_it_learns_and_layer_norm_does_not():
    for norm, told in (('batch', True), ('layer', False), ('none', False)):
        net = decoder(norm)
        w, x_BTD = of(net)
        mix = jax.jit(lambda x_BTD, net=net, w=w: net.mix(w, x_BTD, jnp.asarray(SEGMENT_BT), net.statistics(), True)[0])
        changed_BTD = x_BTD.copy()
        changed_BTD[0, 6, 0] += 1
        first = np.abs(np.asarray(mix(jnp.asarray(changed_BTD)) - mix(jnp.asarray(x_BTD))))[0, 0].max()
        assert (first > 1e-4) == told


def test_statistics_of_batch_norms_are_those_of_the_real_tokens():
    net = PlainDecoder(vocabulary=5, dim=8, layers=1, heads=2, norm='batch')
    w, x_BTD = of(net)
    w['0.out_DD'] = jnp.zeros((8, 8))  # the second norm of the layer is given what the first was
    _, after = net.mix(w, jnp.asarray(x_BTD), jnp.asarray(SEGMENT_BT), net.statistics(), True)
    given_ND = (x_BTD + np.asarray(sinusoids(7, 8))[None])[SEGMENT_BT > 0]
    for part in ('attention', 'mlp'):
        np.testing.assert_allclose(after[f'0.{part}.mean_D'], (1 - KEPT) * given_ND.mean(0), atol=1e-6)
        np.testing.assert_allclose(after[f'0.{part}.variance_D'], KEPT + (1 - KEPT) * given_ND.var(0), rtol=1e-5)


@pytest.mark.parametrize(
    'net',
    [Elman(vocabulary=5, dim=4), LSTM(vocabulary=5, dim=4), decoder('none'), decoder('batch')],
    ids=['elman', 'lstm', 'none', 'batch'],
)
def test_parameters_and_flops_are_those_of_the_weights(net):
    w = net.initial(jax.random.key(0))
    assert net.parameters == sum(x.size for x in w.values())
    matrices = sum(x.size for name, x in w.items() if x.ndim == 2 and name != 'embed_VD')
    attention = 12 * 2 * 8 * 5 if isinstance(net, PlainDecoder) else 0  # 9 tokens see 5 on average
    assert net.training_flops(9) == 6 * matrices + attention


@pytest.fixture(scope='module')
def dataset(tmp_path_factory) -> Dataset:
    folder = tmp_path_factory.mktemp('corpus')
    for number in range(12):
        lines = [f'def f{number}_{i}(x):\n    return x + {i * number}\n\n' for i in range(60)]
        (folder / f'{number}.py').write_text(''.join(lines), encoding='utf-8')
    config = DataConfig(source=str(folder), vocabulary=300, validation_share=0.1)
    return prepare(config, tmp_path_factory.mktemp('run'), 32, say=lambda line: None)


def plan_of(dataset: Dataset, rate: float = 1e-2) -> Plan:
    optimizer = AdamW(learning_rate=rate, warmup_steps=2)
    return Plan(dataset.train, dataset.validation, dataset.tokenizer, optimizer, 12, 4, 0, 6, 4)


def test_training_lowers_the_bits_and_says_how_far_it_is(dataset):
    net, plan, said = Elman(vocabulary=dataset.tokenizer.vocabulary, dim=16), plan_of(dataset), list[str]()
    trained = train(net, plan, said.append)
    assert [line.split('  ')[0] for line in said] == ['step 6/12', 'step 12/12']
    tokens = [point.tokens for point in trained.curve]
    assert tokens == [sum(int((plan.train.batch(0, n, 4).segment_BT > 0).sum()) for n in range(k)) for k in (6, 12)]
    assert all(point.seconds > 0 for point in trained.curve)
    assert trained.curve[1].bits_per_byte < trained.curve[0].bits_per_byte
    # The measure by its definition, row by row.
    batch = plan.validation.take(range(len(plan.validation)))
    mixed_BTD, _ = net.mix(
        trained.weights, trained.weights['embed_VD'][batch.tokens_BT], jnp.asarray(batch.segment_BT), {}, False
    )
    log_p = np.asarray(jax.nn.log_softmax(net.logits(trained.weights, mixed_BTD)), np.float64)
    live_BT = batch.segment_BT > 0
    nats = -np.take_along_axis(log_p, batch.target_BT[..., None], 2)[..., 0][live_BT].sum()
    wanted = nats / math.log(2) / dataset.facts['validation']['bytes']
    assert trained.curve[1].bits_per_byte == pytest.approx(wanted, rel=1e-5)


def test_seconds_leave_out_what_compiled(dataset, monkeypatch):
    clock = iter([x for n in range(12) for x in (100 * n, 100 * n + (50 if n < COMPILING else 2))])
    monkeypatch.setattr(net_training.time, 'perf_counter', lambda: next(clock))
    trained = train(Elman(vocabulary=dataset.tokenizer.vocabulary, dim=16), plan_of(dataset), str)
    assert [point.seconds for point in trained.curve] == [12, 24]


def test_a_loss_that_is_not_finite_is_told(dataset):
    class Broken(Elman):
        def logits(self, w, mixed_BTD):
            return super().logits(w, mixed_BTD) * jnp.nan

    with pytest.raises(Diverged, match=r'^step 1 of 12 has loss nan$'):
        train(Broken(vocabulary=dataset.tokenizer.vocabulary, dim=16), plan_of(dataset), str)


def test_a_sample_goes_on_from_its_prompt_token_by_token(dataset):
    net = LSTM(vocabulary=dataset.tokenizer.vocabulary, dim=8)
    w = net.initial(jax.random.key(3))
    likeliest = lambda p_V: int(np.argmax(p_V))
    found = continued(net, w, {}, [1, 5], likeliest, 6, ends=[])
    ids = jnp.asarray([[1, 5, *found]])
    mixed_BTD, _ = net.mix(w, w['embed_VD'][ids], jnp.ones_like(ids), {}, False)
    assert found == jnp.argmax(net.logits(w, mixed_BTD)[0, 1:-1], -1).tolist()
    assert continued(net, w, {}, [1, 5], likeliest, 6, ends=[found[0]]) == found[:1]
    plan = plan_of(dataset)
    assert bits_per_byte(net, w, {}, plan, [0, 1]) > 0
