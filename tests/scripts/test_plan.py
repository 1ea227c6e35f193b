"""scripts/plan.py: its figures as JSON, its page, its time, and mistakes."""

import json
import re
import resource
from html.parser import HTMLParser

import pytest

from analysis.plan_page import memory_picture, page
from model import cost
from scripts.plan import make, parse
from sharding.errors import UserError
from tests.scripts.runs import ROOT, run
from training.config import load

LLAMA = 'configs/models/llama-3.1-70b.yaml'


def plan(*arguments: str) -> dict:
    """As JSON has it."""
    return json.loads(json.dumps(make(parse([*arguments]))))


def test_json_has_the_contract_s_keys_and_the_model_s_own_counts():
    began = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    arguments = (
        '--chip',
        'h100',
        '--chips',
        '64',
        '--price',
        '2.5',
        '--tokens',
        '1e12',
        'training.batch=256',
        'training.accumulation=2',
    )
    found = json.loads(run(ROOT, 'plan', LLAMA, *arguments, '--json').stdout)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - began < 5
    model = load(LLAMA).model
    assert found['parameters']['total'] == sum(cost.parameters(model).values()) == 70_553_706_496
    assert found['flops_per_token']['train'] == cost.training_flops(model, found['context'])
    assert set(found['flops_per_token']) >= {'train', 'prefill', 'decode'}
    memory = found['memory_per_chip_bytes']
    assert memory['total'] == pytest.approx(sum(size for part, size in memory.items() if part != 'total'))
    assert found['fits']
    assert memory['total'] <= found['memory_available_bytes']
    devices = 1
    for size in found['mesh'].values():
        devices *= size
    assert devices == 64
    tokens = 256 * found['run']['sequence_length']
    assert found['tokens_per_second'] == pytest.approx(tokens / found['step_seconds'])
    assert found['mfu'] == pytest.approx(
        found['flops_per_token']['train'] * found['tokens_per_second'] / (64 * 989.4e12)
    )
    assert found['time']['bound_seconds'] <= found['step_seconds'] * found['time']['efficiency']
    assert found['time']['bound_seconds'] <= found['time']['apart_seconds']
    training = found['training']
    assert training['days'] == pytest.approx(1e12 / found['tokens_per_second'] / 86_400)
    assert training['cost'] == pytest.approx(training['days'] * 24 * 64 * 2.5)
    assert training['energy_kwh'] == pytest.approx(training['days'] * 24 * 64 * 0.7)
    assert training['chinchilla_tokens'] == 20 * 70_553_706_496


def test_serving_reads_the_weights_once_for_all_rows():
    arguments = ('configs/models/llama-3.1-8b.yaml', '--chip', 'h100', '--chips', '1', '--serve', '--length', '4096')
    one, many = (plan(*arguments, '--rows', rows) for rows in ('1', '16'))
    weights = 2 * (one['parameters']['total'] - one['parameters']['by_part']['embedding'])
    cache = 4096 * one['cache_bytes_per_token']
    assert one['time']['memory_seconds'] * 3.35e12 == pytest.approx(weights + cache, rel=0.01)
    assert many['time']['memory_seconds'] * 3.35e12 == pytest.approx(weights + 16 * cache, rel=0.01)
    assert many['tokens_per_second'] > 10 * one['tokens_per_second']


def test_an_encoder_alone_has_a_bill_and_no_step():
    found = plan('configs/models/bert-base.yaml', '--chip', 'h100', '--chips', '8')
    assert found['what'] == 'bill'
    assert found['parameters']['total'] == 110_106_428
    assert page(found).count('<table') == 3


def test_serving_searches_where_no_mesh_is_given():
    found = plan('configs/models/llama-3.1-8b.yaml', '--chip', 'h100', '--chips', '8', '--serve')
    assert found['search']['meshes'] > 10
    assert found['mesh']['tensor'] == 8


class Checker(HTMLParser):
    """Fails on tags that do not close, and gathers what is loaded from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.outside, self.found = [], [], set()

    def handle_starttag(self, tag, attributes):
        self.found.add(tag)
        self.outside += [value for name, value in attributes if name in ('src', 'href')]
        if tag not in ('meta', 'rect', 'line', 'circle', 'polyline'):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_whole_and_loads_nothing():
    found = plan('configs/demo.yaml', '--chip', 'v6e', '--chips', '4')
    text = page(found)
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert checker.outside == []
    assert text.count('<svg') == 3
    assert {'rect', 'circle', 'polyline', 'table'} <= checker.found
    assert f'{found["memory_available_bytes"] / 2**30:.1f} GiB' in text


def test_text_is_escaped_in_the_page():
    plan = {'memory_per_chip_bytes': {'<script>': 1e9, 'total': 1e9}, 'memory_available_bytes': 2e9}
    assert '<script>' not in memory_picture(plan)
    assert '&lt;script&gt;' in memory_picture(plan)


@pytest.mark.parametrize(
    ('arguments', 'says'),
    [
        (('--chip', 'h10', '--chips', '8'), "--chip 'h10': no such chip; did you mean 'h100'"),
        (('--chip', 'h100', '--chips', '0'), '--chips is 0: it must be above 0'),
        (('--chip', 'h100', '--chips', '8', '--mesh', 'data=4'), '--chips is 8 and the mesh (data=4) has 4 devices'),
        (('--chip', 'h100', '--chips', '7'), '--chips 7: no mesh of 7 devices divides this model'),
        (('--chip', 'h100', '--chips', '16', '--mesh', 'tensor=16'), 'mesh.tensor is 16 and'),
        (('--chip', 'h100', '--chips', '8', '--serve', '--mesh', 'stage=2,data=4'), 'decoding, which has no pipeline'),
    ],
)
def test_mistakes_are_named(arguments, says):
    with pytest.raises(UserError, match=re.escape(says)):
        make(parse(['configs/models/gpt2.yaml', *arguments]))


def test_a_mistake_is_one_line_and_exit_code_2():
    done = run(ROOT, 'plan', 'configs/models/gpt2.yaml', '--chip', 'h100', '--chips', '0', code=2)
    assert done.stderr == 'error: --chips is 0: it must be above 0\n'
