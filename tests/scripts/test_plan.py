"""scripts/plan.py: its figures as JSON, its page, its time, and mistakes."""

import io
import json
import re
import resource
import time
from html.parser import HTMLParser

import pytest
from rich.console import Console

from tests.scripts.runs import ROOT, run
from weft.model import cost
from weft.planner.aot import Compiled
from weft.planner.plan import compiled_part
from weft.planner.plan_page import memory_picture, plan_page
from weft.planner.plan_text import flops_line, print_plan, tables, verdict
from weft.planner.traffic.tables import Traffic
from weft.runtime.errors import UserError
from weft.scripts.plan import make, parse
from weft.training.config import load_config

SMALL = ('configs/demo.yaml', '--chip', 'h100', '--chips', '4')
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
    model = load_config(LLAMA).model
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
    assert plan_page(found).count('<table') == 3


def test_serving_searches_where_no_mesh_is_given():
    found = plan('configs/models/llama-3.1-8b.yaml', '--chip', 'h100', '--chips', '8', '--serve')
    assert found['search']['meshes'] > 10
    assert found['mesh']['tensor'] == 8


MISFIT = ('configs/models/mixtral-8x7b.yaml', '--chip', 'h100', '--chips', '8', '--price', '2', '--tokens', '1e12')


def test_what_does_not_fit_has_no_speed_and_no_price():
    found = plan(*MISFIT)
    assert not found['fits']
    speed = ('time', 'step_seconds', 'mfu', 'mfu_at_most', 'tokens_per_second', 'tokens_per_day')
    assert {found[name] for name in speed} == {None}
    training = found['training']
    assert {training[name] for name in ('days', 'chip_hours', 'cost', 'energy_kwh')} == {None}
    assert training['tokens'] == 1e12
    assert {choice['step_seconds'] for choice in found['search']['ranked']} == {None}
    served = plan(*MISFIT[:3], '--chips', '1', '--price', '2', '--serve')
    assert (served['fits'], served['mfu'], served['tokens_per_second']) == (False, None, None)
    assert {served['serving'][name] for name in ('prefill_seconds', 'cost_per_million_tokens', 'joules_per_token')} == {
        None
    }
    for one, chips in ((found, 8), (served, 1)):
        text, shown = plan_page(one), terminal(one, 120)
        for said in (text, shown):
            assert 'DOES NOT FIT' in said
            assert f'--chips {one["fits_from"]["chips"]}' in re.sub(
                '<.*?>|\xa0', lambda m: ' ' * (m[0] == '\xa0'), said
            )
            assert not re.search(r'\bMFU\b|tokens/s|\bdays\b|kWh|predicted', said)
        assert one['fits_from']['chips'] > chips


@pytest.mark.parametrize('more', [(), ('--serve',)], ids=['train', 'serve'])
def test_the_number_of_chips_that_is_named_is_the_first_that_fits(more):
    arguments = (*MISFIT[:3], '--chips', '1', *more)
    needed = plan(*arguments)['fits_from']['chips']
    fits = {}
    for chips in (2, 4, 8, 16):
        fits[chips] = plan(*MISFIT[:3], '--chips', str(chips), '--mesh', 'auto', *more)['fits']
    assert min(chips for chips, one in fits.items() if one) == needed


@pytest.mark.parametrize(
    ('model', 'rows', 'length', 'needed'), [('llama-3.1-405b', 4096, 131072, 32768), ('deepseek-v3', 1024, 32768, 512)]
)
def test_the_fewest_chips_that_serve_are_found_among_all_meshes(model, rows, length, needed):
    sizes = ('--serve', '--rows', str(rows), '--length', str(length))
    found = plan(f'configs/models/{model}.yaml', '--chip', 'v5e', '--chips', str(needed // 2), *sizes)
    assert (found['fits'], found['fits_from']['chips']) == (False, needed)
    assert plan(f'configs/models/{model}.yaml', '--chip', 'v5e', '--chips', str(needed), *sizes)['fits']


@pytest.mark.parametrize(
    'target',
    [('--latency', '19'), ('--latency', '30'), ('--throughput', '10000'), ('--throughput', '30000')],
    ids=' '.join,
)
def test_chips_that_are_named_reach_the_target_too(target):
    model = ('configs/models/llama-3.1-70b.yaml', '--chip', 'h100', '--serve', '--length', '4096', *target)
    found = plan(*model, '--chips', '1')['fits_from']
    assert found['without'] is None
    assert plan(*model, '--chips', str(found['chips']))['fits']
    with pytest.raises(UserError, match=f'^{target[0]} .*no mesh of {found["chips"] // 2} chips reaches it'):
        plan(*model, '--chips', str(found['chips'] // 2))


def test_a_target_that_no_chips_reach_is_said():
    target = ('--serve', '--latency', '0.001')
    found = plan('configs/models/llama-3.1-70b.yaml', '--chip', 'h100', '--chips', '1', *target)
    assert (found['fits_from']['chips'], found['fits_from']['without']) == (2, 'latency')
    text = re.sub(r'\s+', ' ', terminal(found, 100))
    assert (
        'fits from 2 chips, but no number of them that was tried reaches --latency: --chips 2 --rows 1 --mesh auto w'
        in text
    )
    assert plan('configs/models/llama-3.1-70b.yaml', '--chip', 'h100', '--chips', '2', '--rows', '1', '--serve')['fits']


def test_a_mesh_that_does_not_fit_on_chips_of_which_another_does_is_answered_with_that():
    found = plan('configs/models/llama-3.1-8b.yaml', '--chip', 'h100', '--chips', '8', '--mesh', 'replica=8')
    assert not found['fits']
    assert found['fits_from']['chips'] <= 8
    assert '--mesh auto' in terminal(found, 100)


def test_a_plan_says_which_mesh_it_has():
    arguments = ('configs/demo.yaml', '--chip', 'h100', '--chips', '4')
    assert plan(*arguments)['mesh_is'] == 'the config’s; --mesh auto searches'
    assert plan(*arguments, '--mesh', 'auto')['mesh_is'] == 'found by a search'
    assert plan(*arguments, '--mesh', 'data=4')['mesh_is'] == 'as given'
    assert plan(*arguments, 'mesh.data=2', 'mesh.expert=1')['mesh_is'] == 'as given'
    assert '(the config’s; --mesh auto searches)' in terminal(plan(*arguments), 200)


def test_a_config_s_own_mesh_that_does_not_fit_is_searched_for():
    found = plan(
        'configs/demo.yaml', '--chip', 'v5e', '--chips', '4', 'training.batch=65536', 'training.sequence_length=512'
    )
    assert found['mesh_is'] == 'found by a search'
    assert found['fits']


def test_costs_have_a_currency():
    arguments = ('configs/demo.yaml', '--chip', 'h100', '--chips', '4', '--price', '2.5', '--tokens', '1e15')
    assert re.search(r'cost USD [\d,]{5,}', terminal(plan(*arguments), 200))
    assert re.search(r'cost EUR [\d,]{5,}', terminal(plan(*arguments, '--currency', 'EUR'), 200))
    assert re.search(
        r'A million tokens cost CHF [\d.]+', terminal(plan(*arguments, '--serve', '--currency', 'CHF'), 200)
    )


def terminal(plan: dict, width: int) -> str:
    """What a terminal of so many columns shows."""
    console = Console(file=io.StringIO(), width=width)
    print_plan(plan, console)
    return console.file.getvalue()


@pytest.mark.parametrize('kind', ['train', 'misfit', 'serve', 'compiled'])
def test_numbers_stand_whole_with_their_units_in_a_terminal_of_any_width(kind):
    found = plan(*MISFIT) if kind == 'misfit' else plan(*SMALL, *(('--serve',) if kind == 'serve' else ()))
    if kind == 'compiled':
        sent = Traffic()
        sent.add('all_gather', 'data', 1.25e9, 7)
        made = Compiled('compiled', {'all': 3.0}, {'total': 2 * 10**9, 'temporaries': 10**9}, 80 * 10**9, sent, sent)
        found['compiled'] = compiled_part(made, found)
    told = [f'{cell}' for table in tables(found) for column in table.columns for cell in column.cells]
    told += [flops_line(found), *verdict(found)]
    numbers = {one for text in told for one in re.findall(r'[\d,.e+-]*\d(?: [kMGTP]?i?B\b| GiB\b| s\b)?', text)}
    for width in (40, 57, 79, 80, 100, 120, 160, 200):
        said = terminal(found, width)
        assert max(map(len, said.splitlines())) <= width
        lines = ' '.join(re.findall(r'[^\s]+(?: [^\s]+)*', said))
        assert not [number for number in numbers if number not in lines]
        assert '…' not in said


def test_more_chips_than_there_are_and_figures_that_are_none_are_refused():
    for option, value in (
        ('--chips', '1000003'),
        ('--chips', '1000000000000'),
        ('--tokens', 'inf'),
        ('--tokens', 'nan'),
        ('--price', '1e308'),
        ('--watts', 'inf'),
        ('--rows', '1000000000000'),
        ('--length', str(10**21)),
        ('--latency', 'inf'),
        ('--timeout', 'inf'),
    ):
        arguments = [*SMALL[:3], *(('--chips', '4') if option != '--chips' else ()), '--serve', option, value]
        with pytest.raises(UserError, match=rf'^{option} is (1e.308|{value}): it must be (at most \d|above 0)'):
            make(parse(arguments))


@pytest.mark.parametrize('chips', [262_144, 166_320, 65_537])
def test_many_chips_and_primes_take_seconds(chips):
    began = time.process_time()
    with pytest.raises(UserError, match=r'no mesh of .* devices divides this model .*; nearest that works: \d+$'):
        make(parse(['configs/demo.yaml', '--chip', 'h100', '--chips', str(chips)]))
    assert time.process_time() - began < 10


def test_ten_thousand_layers_take_seconds():
    began = time.process_time()
    assert plan(*SMALL, 'model.layers=10000')['parameters']['total'] > 1e10
    assert time.process_time() - began < 20


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
    text = plan_page(found)
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
        (
            ('--chip', 'h100', '--chips', '8', '--serve', '--length', '2048'),
            '--length is 2048: this model has 1024 positions',
        ),
        (
            ('--chip', 'h100', '--chips', '8', '--serve', '--length', '64', '--prompt', '65'),
            '--prompt is 65: it must be at',
        ),
    ],
)
def test_mistakes_are_named(arguments, says):
    with pytest.raises(UserError, match=re.escape(says)):
        make(parse(['configs/models/gpt2.yaml', *arguments]))


def test_a_mistake_is_one_line_and_exit_code_2():
    done = run(ROOT, 'plan', 'configs/models/gpt2.yaml', '--chip', 'h100', '--chips', '0', code=2)
    assert done.stderr == 'error: --chips is 0: it must be above 0\n'
