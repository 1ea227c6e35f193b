"""The bill adds up to the publisher's parameters; rules of thumb, caches and the table of Llama 3 405B."""

import dataclasses
import json

import pytest

from tests.families import cases
from tests.families.loading import read
from tests.hub.test_published import PUBLISHED, copied
from weft.model import cost
from weft.model.config import ModelConfig
from weft.planner.bill import BYTES, Bill, bill, cache_bill, rules_of_thumb
from weft.proof.claims import CONFIGS, llama_405b, markdown
from weft.training.config import load_config

NAMES = sorted(path.stem for path in CONFIGS.glob('*.yaml'))


def ffn_share(whole: Bill) -> float:
    """What MLPs and experts have of the parameters of all layers."""
    ffn = sum(row.total for row in whole.rows if row.layer and row.part in ('mlp', 'experts', 'shared_experts'))
    return ffn / sum(row.total for row in whole.rows if row.layer)


def model(name: str) -> ModelConfig:
    return load_config(CONFIGS / f'{name}.yaml').model


@pytest.mark.parametrize('name', NAMES)
def test_totals_are_exactly_the_publishers(name):
    c, published = model(name), PUBLISHED[name]
    found = bill(c)
    assert found.total + copied(c) == published.total
    assert found.active == (published.active or published.total)
    assert found.bytes['bfloat16'] == 2 * found.total


@pytest.mark.parametrize('name', cases.CASES)
def test_rows_are_the_parameters_by_part(name):
    _, c = read(cases.CASES[name])
    c = dataclasses.replace(c, vocabulary=256)  # no padding
    found, parts = bill(c), cost.parameters(c)
    assert (found.total, found.active) == (sum(parts.values()), cost.active_parameters(c))
    assert sum(row.total for row in found.layers) == sum(row.total for row in found.rows if row.layer)
    for part in ('mlp', 'router', 'experts', 'shared_experts', 'mtp'):
        mine = sum(row.total for row in found.rows if row.part == part and 'encoder' not in row.layer)
        assert mine == parts.get(part, 0), part
    assert json.loads(json.dumps(found.to_json()))['bytes'].keys() == BYTES.keys()


def test_the_table_of_llama_405b_with_its_errors_marked():
    """Attention, FFN and so a layer are ten times too large; what is made of them is not."""
    lines = {one.part: one for one in llama_405b()}
    billions = {part: round(one.exact / 1e9, 2) for part, one in lines.items()}
    assert billions == {
        'embedding': 2.10,
        'attention, a layer': 0.57,
        'FFN, a layer': 2.62,
        'a layer': 3.19,
        'all layers': 401.65,
        'head': 2.10,
        'total': 405.85,
    }
    wrong = {part for part, one in lines.items() if not one.holds}
    assert wrong == {'attention, a layer', 'FFN, a layer', 'a layer'}
    assert {lines[part].verdict for part in wrong} == {'10.0 times too large'}
    assert lines['total'].exact == 405_853_388_800
    assert lines['attention, a layer'].shapes == '2 × 16,384 × 16,384 + 2 × 16,384 × 1,024'
    assert (
        '| FFN, a layer | 3 × 16,384 × 53,248 | 26.17 B | 2.62 B | 2,617,245,696 | 10.0 times too large |'
        in markdown(tuple(lines.values()))
    )
    assert round(ffn_share(bill(model('llama-3.1-405b'))), 3) == 0.821


def test_rules_of_thumb_beside_the_exact_count():
    c, S = model('llama-3.1-405b'), 8192
    rules = {rule.name: rule for rule in rules_of_thumb(c, S)}
    N = bill(c).total
    assert [rules[name].rule for name in ('2N', '6N', '2N·S')] == [2 * N, 6 * N, 2 * N * S]
    # By hand: matrices that a token is multiplied with, and 4,096.5 keys in each of 126 layers, 2 products a number.
    matrices = N - c.vocabulary * c.model_dim - (2 * c.layers + 1) * c.model_dim
    forward = 2 * matrices + 126 * 2 * 2 * 16384 * 4096.5
    assert rules['2N'].exact == forward
    assert rules['6N'].exact == 3 * forward
    assert rules['2N·S'].exact == 2 * matrices + 126 * 2 * 2 * 16384 * S
    long = rules['E·V + L(8E²S + 4EHS + HS²)']
    assert long.rule == 16384 * 128256 + 126 * (8 * 16384**2 * S + 4 * 16384 * 128 * S + 128 * S**2)
    assert all(rule.times > 1000 for rule in (rules['2N·S'], long)), 'a prompt, not a token'
    assert 0.9 < rules['2N'].times < 1
    assert len(rules_of_thumb(model('bert-base'), 512)) == len(rules_of_thumb(model('t5-v1.1-base'), 512)) == 2


def test_caches_of_each_kind():
    """Numbers a token and layer: two for each head and width, of KV heads only, or a latent vector and a rotary key."""
    numbers = {name: cache_bill(model(name)) for name in ('gpt2', 'llama-3.1-405b', 'deepseek-v3', 'gpt-oss-120b')}
    kinds = {name: (one.kind, one.numbers // one.layers) for name, one in numbers.items()}
    assert kinds == {
        'gpt2': ('MHA', 2 * 768),
        'llama-3.1-405b': ('GQA', 2 * 8 * 128),
        'deepseek-v3': ('MLA', 512 + 64),
        'gpt-oss-120b': ('GQA', 2 * 8 * 64),
    }
    assert numbers['llama-3.1-405b'].bytes_per_token == 516_096
    assert numbers['llama-3.1-405b'].without_sharing == 16 * numbers['llama-3.1-405b'].numbers
    local = numbers['gpt-oss-120b']
    assert (local.layers, local.windowed, local.window) == (36, 18, 128)
    assert local.bytes(131_072) == 2 * 2 * 8 * 64 * (18 * 131_072 + 18 * 128)
    assert local.full_bytes(131_072) == 2 * 2 * 8 * 64 * 36 * 131_072
    assert local.bytes(100) == local.full_bytes(100), 'no window is full'
