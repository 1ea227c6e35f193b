"""docs/claims.md: each row names the test here that computes its figures, and has the figures that the test computes."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.planner.test_bill import ffn_share
from weft.inference.step import empty_cache, prefill
from weft.model import cost
from weft.model.compute import DEFAULT
from weft.model.config import (
    AttentionConfig,
    EmbeddingConfig,
    LearnedConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    changed,
)
from weft.model.decoder import init_decoder
from weft.model.forward import logits, place
from weft.model.layers.rope import rope
from weft.planner.bill import bill, cache_bill, rules_of_thumb
from weft.planner.chips import CHIPS
from weft.planner.flops import executed
from weft.proof.claims import CONFIGS, llama_405b, markdown
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.training.config import load_config

PAGE = (Path(__file__).parents[2] / 'docs/claims.md').read_text(encoding='utf-8')
MODELS = {path.stem: load_config(path).model for path in sorted(CONFIGS.glob('*.yaml'))}
LARGE, SMALL, MIXTURE = (MODELS[name] for name in ('llama-3.1-405b', 'llama-3.1-8b', 'mixtral-8x7b'))
GPT3 = ModelConfig(
    vocabulary=50257,
    layers=96,
    model_dim=12288,
    attention=AttentionConfig(heads=96, o_bias=True, qkv_bias=True),
    mlp=MLPConfig(dim=4 * 12288, activation='gelu', bias=True),
    norm=NormConfig(kind='layernorm', bias=True),
    positions=LearnedConfig(max=2048),
)
TINY = ModelConfig(vocabulary=128, layers=2, model_dim=32, attention=AttentionConfig(heads=4), mlp=MLPConfig(dim=64))

Says = Callable[..., None]


@pytest.fixture
def says(request: pytest.FixtureRequest) -> Says:
    """Asserts that the row of the page that names this test has the figures."""
    (row,) = [line for line in PAGE.splitlines() if f'`{request.node.name}`' in line]

    def check(*figures: str) -> None:
        missing = [
            figure for figure in figures if not re.search(rf'(?<![\d.,]){re.escape(figure)}(?![\d]|[.,]\d)', row)
        ]
        assert not missing, (missing, row)

    return check


@pytest.fixture
def one_device() -> Iterator[None]:
    with jax.set_mesh(make_mesh(MeshConfig())):
        yield


def test_each_row_names_a_test_and_each_test_has_its_row():
    tests = {name for name in globals() if name.startswith('test_')} - {
        'test_each_row_names_a_test_and_each_test_has_its_row',
        'test_the_table_is_in_the_page_as_it_is_computed',
    }
    tables = [text.partition('\n\n')[0].splitlines()[2:] for text in PAGE.split('| it says ')[1:]]
    named = [re.findall(r'`(test_\w+)`', row) for rows in tables for row in rows]
    assert all(len(names) == 1 for names in named), 'a row has one test'
    assert sorted(name for names in named for name in names) == sorted(tests)


# What a model is made of ----------------------------------------------------------------------------------------------


def test_the_table_is_in_the_page_as_it_is_computed():
    assert markdown(llama_405b()) in PAGE


def test_layers_times_a_layer(says):
    layer, layers = (one for one in llama_405b() if one.part in ('a layer', 'all layers'))
    assert not layer.holds
    assert layers.holds
    says(f'{126 * 31.87:,.1f}', f'{layer.exact / 1e9:.2f}', f'{layers.exact / 1e9:.1f}')


def test_share_of_the_ffn(says):
    whole = bill(LARGE)
    says(f'{ffn_share(whole):.1%}'.replace('%', ' %'), f'{whole.parts()["mlp"] / whole.total:.1%}'.replace('%', ' %'))
    says(f'{ffn_share(bill(MIXTURE)):.1%}'.replace('%', ' %'))


def test_bytes_of_the_weights(says):
    total = bill(LARGE).bytes['bfloat16']
    says(f'{total / 1e9:.1f} GB', f'{total / 2**30:.0f} GiB')


def test_square_keys_and_values(says):
    square = 4 * LARGE.model_dim**2
    mine = next(row.each for row in bill(LARGE).rows if row.part == 'attention')
    kept = cache_bill(LARGE)
    assert kept.without_sharing == 16 * kept.numbers
    says('16,384 × 1,024', f'{square / 1e9:.2f} B', f'{(square - mine) * 126 / 1e9:.1f} B')
    says(f'{kept.bytes_per_token:,.0f}', f'{kept.without_sharing * 2:,}')


def test_tied_heads(says):
    llama2 = ModelConfig(
        vocabulary=32000,
        layers=32,
        model_dim=4096,
        attention=AttentionConfig(heads=32),
        mlp=MLPConfig(dim=11008),
        embedding=EmbeddingConfig(tied=False),
    )  # meta-llama/Llama-2-7b, config.json
    assert bill(llama2).total == 6_738_415_616, 'as published'
    says('6,738,415,616', f'{bill(changed(llama2, {"embedding.tied": True})).total:,}')
    tied = [name for name, c in MODELS.items() if c.embedding.tied]
    assert {'gpt2', 'gemma-3-27b', 'grok-1'} <= set(tied)
    says(f'{len(tied)} of {len(MODELS)}')


def test_share_of_the_vocabulary(says):
    for c in (LARGE, SMALL, MODELS['gpt2']):
        parts = bill(c).parts()
        says(f'{(parts["embedding"] + parts.get("head", 0)) / bill(c).total:.1%}'.replace('%', ' %'))


def test_widths_of_the_ffn(says):
    assert MODELS['gpt2'].mlp.dim == 4 * MODELS['gpt2'].model_dim
    gated = sum(c.mlp.gated for c in MODELS.values())
    says(f'{gated} of {len(MODELS)}', f'{SMALL.mlp.dim:,}', f'{SMALL.mlp.dim / SMALL.model_dim}')
    says(f'{LARGE.mlp.dim / LARGE.model_dim}')


def test_widths_of_models(says):
    widths = [c.model_dim for c in MODELS.values()]
    says(f'{min(widths):,}', f'{max(widths):,}')


def test_layers_of_the_70b(says):
    assert MODELS['llama-3.1-70b'].layers == 80
    says('80')


# FLOPs ----------------------------------------------------------------------------------------------------------------


def power(x: float, digits: int = 2) -> str:
    """As in 7.15·10¹⁴."""
    mantissa, exponent = f'{x:.{digits}e}'.split('e')
    return f'{mantissa}·10' + str(int(exponent)).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))


def test_the_formula_with_its_numbers(says):
    """What E, V, L, S and H were taken to be, and a model of these sizes."""
    E, V, L, S, H = 4096, 200_000, 100, 128_000, 8
    entered = E * V + L * (8 * E * E * S + 4 * E * S + 8 * S * S)
    assert entered == 1_731_304_652_800_000
    c = ModelConfig(
        vocabulary=V,
        layers=L,
        model_dim=E,
        attention=AttentionConfig(heads=32),
        mlp=MLPConfig(dim=4 * E, activation='gelu'),
    )
    decode = cost.flops_per_token(c, 'decode', S)
    token, prompt = sum(decode.values()), S * sum(cost.flops_per_token(c, 'prefill', S).values())
    says(f'{entered:,}', f'{E * V + L * (8 * E * E * S + 4 * E * H * S + H * S * S):,}')
    says(power(token), f'{entered / token:,.0f}', f'{decode["attention"] / token:.0%}'.replace('%', ' %'))
    says(power(prompt), f'{prompt / entered:.1f}')


def test_two_n_a_token(says):
    two, six, *_ = rules_of_thumb(LARGE, 8192)
    says(f'{two.times:.3f}', f'{six.times:.3f}')
    long, _, *_ = rules_of_thumb(LARGE, 131_072)
    says(f'{long.times:.2f}')


def test_two_n_s_a_token(says):
    rule = rules_of_thumb(LARGE, 8192)[2]
    says(f'{rule.times:,.0f}', power(rule.exact))


def test_a_hundred_billion_and_a_trillion(says):
    for N in (1e11, 1e12):
        assert math.isclose(2 * N * 128_000 / (2 * N), 128_000)
        says(power(2 * N * 128_000), power(2 * N, 0))


def test_gpt3(says):
    N, S = bill(GPT3).total, 2048
    first = sum(cost.forward_flops(GPT3, cost.keys_seen(GPT3, S)).values())
    last = sum(cost.flops_per_token(GPT3, 'decode', S).values())
    says(f'{N / 1e9:.1f} B', power(first), power(last), power(2 * N * S), f'{2 * N * S / 7e11:,.0f}')
    assert 7e11 / last > 1.9


def test_a_token_reads_its_context(says):
    """Decoding one token (whose dots tests/planner/test_flops.py counts) does no more than attend to longer caches."""
    short, long = (executed(TINY, DEFAULT, 'decode', rows=1, length=S) for S in (32, 64))
    assert long['attention'] == 2 * short['attention']
    assert all(long[part] == short[part] for part in short if part != 'attention')
    short, long = (sum(cost.flops_per_token(LARGE, 'decode', S).values()) for S in (2048, 131_072))
    says(power(short), power(long), f'{long / short:.1f}')


def test_quadratic_attention(says):
    for S in (8192, 131_072):
        flops = cost.flops_per_token(LARGE, 'prefill', S)
        says(f'{flops["attention"] / sum(flops.values()):.1%}'.replace('%', ' %'))
    rest, each = (sum(cost.forward_flops(LARGE, keys).values()) for keys in (0, 1))
    says(f'{rest / (each - rest):,.0f}')


def test_the_head_while_decoding(says):
    for c in (LARGE, SMALL):
        flops = cost.flops_per_token(c, 'decode', 1)
        says(f'{flops["head"] / sum(flops.values()):.1%}'.replace('%', ' %'))


def test_share_of_peak(says):
    """One row on an H100, if it held the 70B: all weights read for 2 FLOPs each. The figures of training are Meta's."""
    c, chip = MODELS['llama-3.1-70b'], CHIPS['h100']
    flops = sum(cost.flops_per_token(c, 'decode', 1).values())
    seconds = cost.decode_bytes(c, 1, 1, 2, 2) / chip.bandwidth
    says('38–43 %', f'{flops / seconds / chip.bfloat16_flops:.1%}'.replace('%', ' %'))


# Mixtures of experts --------------------------------------------------------------------------------------------------


def test_a_mixture_saves_arithmetic_and_no_memory(says):
    """Four times the experts: the same FLOPs but for the router, and four times their parameters."""
    few, many = (dataclasses.replace(TINY, moe=MoEConfig(experts=experts, top_k=2, mlp_dim=64)) for experts in (4, 16))
    a, b = (executed(c, DEFAULT, 'train', rows=2, length=32) for c in (few, many))
    assert {part for part in a if a[part] != b[part]} == {'router'}
    assert bill(many).parts()['experts'] == 4 * bill(few).parts()['experts']
    found = bill(MIXTURE)
    says(f'{found.total / 1e9:.1f} B', f'{found.active / 1e9:.1f} B', f'{found.total / found.active:.1f}')
    says(f'{found.bytes["bfloat16"] / 1e9:.1f} GB')
    for rows in (1, 64):
        says(f'{rows * cost.decode_bytes(MIXTURE, rows, 0, 2, 2) / 1e9:.1f} GB')


def test_numbers_of_experts(says):
    experts = [c.moe.experts for c in MODELS.values() if c.moe]
    found = bill(MODELS['deepseek-v3'])
    says(
        f'{min(experts)} to {max(experts)}',
        f'{found.active / 1e9:.1f} of {(found.total - found.parts()["mtp"]) / 1e9:.1f}',
    )


def test_sixteen_experts(says):
    says(f'{16 * 111:,}', f'{2 * 111}')


# Attention and positions ----------------------------------------------------------------------------------------------


def turned_products(q_NH: np.ndarray, k_NH: np.ndarray, distances: list[int]) -> np.ndarray:
    """[distances, N]: q · k, each turned by its position, the key so many before the query; θ is 10,000."""
    N, H = q_NH.shape
    c = changed(TINY, {'model_dim': H, 'attention.heads': 1, 'attention.kv_heads': None, 'attention.head_dim': None})
    turn = lambda x_NH, position: np.asarray(
        rope(jnp.asarray(x_NH, jnp.float32)[None, :, None], *jnp.full((2, 1, N), position, jnp.int32), c)[0, :, 0]
    )
    return np.stack([(turn(q_NH, 3000) * turn(k_NH, 3000 - distance)).sum(-1) for distance in distances])


def test_closer_words_have_larger_products(says):
    draw = np.random.default_rng(0)
    q_NH, k_NH = draw.standard_normal((2, 1000, 128))
    near, far = turned_products(q_NH, k_NH, [1, 100])
    assert 0.45 < (near > far).mean() < 0.55
    says(f'{(near > far).mean():.0%}'.replace('%', ' %'))
    equal_D = turned_products(np.ones((1, 128)), np.ones((1, 128)), list(range(60)))[:, 0] / 128
    assert equal_D.argmax() == 0
    first = next(d for d in range(1, 60) if equal_D[d] > equal_D[d - 1])
    says(f'{first - 1} to {first}', f'{equal_D[10]:.2f}')
    opposite_D = turned_products(np.ones((1, 128)), -np.ones((1, 128)), [0, 1, 10])[:, 0]
    assert opposite_D[0] < opposite_D[1] < opposite_D[2], 'the closest is the smallest'


def last_logits(c: ModelConfig, tokens_BT: np.ndarray) -> np.ndarray:
    """After the last token of each row."""
    model = jax.jit(lambda: init_decoder(c, DEFAULT, jax.random.key(0)))()
    T = tokens_BT.shape[1]
    places = np.broadcast_to(np.arange(T, dtype=np.int32), tokens_BT.shape)
    return np.asarray(logits(model, *place((tokens_BT, places, np.ones_like(tokens_BT)))))[:, -1]


def test_attention_is_blind_to_order(says, one_device):
    """A sentence, and the same with its first words in another order: what the last word makes of them."""
    tokens_BT = np.array([[5, 9, 2, 7, 3], [2, 5, 7, 9, 3]], np.int32)
    plain = changed(TINY, {'positions.kind': 'none'})

    def apart(**fields) -> float:
        a, b = last_logits(changed(plain, fields), tokens_BT)
        return float(np.abs(a - b).max() / np.abs(a).max())

    assert apart(layers=1) < 1e-5, 'one layer is blind, with a causal mask too'
    assert apart(layers=2, causal=False) < 1e-5, 'any number of layers without a mask'
    assert apart(layers=2) > 0.01, (
        'two layers under a causal mask are not: how many tokens each has seen tells them apart'
    )
    says('1', '2')


def test_the_scale_is_of_a_head(says):
    """Products of independent numbers of variance 1: their variance is how many are added."""
    q_NH, k_NH = np.random.default_rng(0).standard_normal((2, 20_000, 128))
    assert math.isclose((q_NH * k_NH).sum(-1).var(), 128, rel_tol=0.05)
    says(f'{LARGE.attention.head_dim}')


def test_heads_and_scores(says):
    assert LARGE.attention.heads * LARGE.attention.head_dim == LARGE.model_dim == 16_384
    seen = cost.keys_seen(LARGE, 8192) / 8192
    says('128', f'{seen:.1%}'.replace('%', ' %'))


def test_what_a_word_sees_in_the_first_layer(says, one_device):
    """Other first words: the third word's key is the same in layer 1, and another in layer 2."""
    model = jax.jit(lambda: init_decoder(TINY, DEFAULT, jax.random.key(0)))()
    tokens_BT, lengths = np.array([[5, 9, 2, 7], [8, 1, 2, 7]], np.int32), np.full(2, 4, np.int32)
    _, cache = prefill(model, empty_cache(model, 2, 4), *place((tokens_BT, lengths)))
    first, second = (np.asarray(k_BSM[:, 2]) for k_BSM in cache.groups[0].arrays[0])
    assert np.array_equal(first[0], first[1])
    assert not np.allclose(second[0], second[1], atol=0.01)
    says('1', '2')


def test_softmax_of_the_example(says):
    says(f'{math.exp(12.5 - 8.2):.1f}', f'{0.7 / 0.2:.1f}')


def test_a_story_of_a_thousand_words(says):
    """A prompt of 5 tokens and 1,000 more, by Llama 3.1 8B: each once, or everything before it again each time."""
    seen = range(5, 1005)
    once = sum(sum(cost.flops_per_token(SMALL, 'decode', S).values()) for S in seen)
    dense = dataclasses.replace(SMALL, layers=1)  # layers are alike
    again = sum(
        S * (SMALL.layers * (sum(layer.values()) - layer['head']) + layer['head'])
        for S in seen
        for layer in [cost.flops_per_token(dense, 'prefill', S)]
    )
    says(f'{once / 1e12:.1f}', f'{again / 1e12:,.0f}', f'{again / once:.0f}')
