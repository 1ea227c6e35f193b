"""What a run prints of its mesh and weights, and tables in general, at any width."""

import io
import re

import jax
import pytest
from rich.console import Console
from rich.table import Table

from tests.house import ROOMS
from tests.scripts.runs import ROOT
from weft.model.config import AttentionConfig, EmbeddingConfig, MLPConfig, ModelConfig, MoEConfig
from weft.sharding.mesh import MeshConfig, make_mesh
from weft.training.config import RunConfig, TrainingConfig
from weft.training.progress import progress_bar
from weft.training.report import layout, mesh_table, weights_table
from weft.training.state import abstract_state
from weft.training.tables import Fitted, wrapped

WIDTHS = (40, 41, 60, 79, 80, 100, 120, 160, 200)
RUN = RunConfig(
    name='x',
    mesh=MeshConfig(stage=2, expert=2, tensor=2),
    model=ModelConfig(
        vocabulary=1000,
        layers=6,
        model_dim=128,
        attention=AttentionConfig(heads=4),
        mlp=MLPConfig(dim=4096),
        embedding=EmbeddingConfig(tied=False),
        moe=MoEConfig(experts=128, mlp_dim=512, first_dense_layers=2),
    ),
    training=TrainingConfig(steps=1, batch=16, sequence_length=32),
)


def printed(what, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, soft_wrap=True)
    console.print(what)
    return console.file.getvalue()


@pytest.mark.parametrize('width', WIDTHS)
def test_every_shape_and_number_of_the_layout_stands_whole(width):
    with jax.set_mesh(make_mesh(RUN.mesh)):
        model = abstract_state(RUN).model
    said = printed(layout(RUN, model), width)
    assert max(map(len, said.splitlines())) <= width
    assert '…' not in said
    words = ' '.join(said.split())
    weights = weights_table(model)
    for column in (*weights.columns[:2], weights.columns[3], *mesh_table(RUN).columns[:2]):
        for cell in column.cells:
            assert cell in words, (width, cell)
    for cell in (*weights.columns[2].cells, *mesh_table(RUN).columns[2].cells):
        assert all(word in words for word in cell.split()), (width, cell)
    assert '4 × 128 × 128 × 512' in said


def test_a_table_that_has_room_is_as_wide_as_its_cells():
    table = Table(pad_edge=False, box=None)
    table.add_column('name')
    table.add_column('n', justify='right', no_wrap=True)
    table.add_row('a b c [red]d', '12')
    assert printed(Fitted(table), 40) == 'name           n\na b c [red]d  12\n'
    assert printed(Fitted(table), 15) == 'name          n\na b c        12\n[red]d         \n'
    assert printed(Fitted(table), 9) == 'a b c\n[red]d\n  n: 12\n'


def test_a_number_keeps_its_unit():
    assert wrapped('it needs 12.08 GB of them', 14) == ['it needs', '12.08 GB of', 'them']


@pytest.mark.parametrize('width', [20, *WIDTHS])
def test_the_bar_of_a_run_cuts_no_number(width):
    bar = progress_bar(Console(file=io.StringIO(), width=width, force_terminal=True), 400_000)
    bar.add_task('compiling', total=400_000, completed=123_456, loss='loss 12.2579', speed='1,234,567 tokens/s')
    said = printed(bar.get_renderable(), width)
    assert len(said.splitlines()) == 1
    assert '123456/400000' in said
    parts = ('loss 12.2579', '1,234,567 tokens/s', '-:--:--', 'compiling', '━' * 9)
    found = [part in said for part in parts]
    assert found == sorted(found, reverse=True), said  # what is needed more is not left out for what is needed less
    assert '…' not in said
    assert not re.sub(r'123456/400000|loss 12.2579|1,234,567 tokens/s|-:--:--|compiling|[━╸╺ \n]', '', said)
    assert width < 120 or all(found)


def test_every_table_of_the_project_is_fitted():
    makers = {
        path.relative_to(ROOT).as_posix()
        for room in ROOMS
        for path in (ROOT / room).rglob('*.py')
        if re.search(
            r'^from rich.table import .*?^.*\bTable\(', path.read_text(encoding='utf-8'), re.DOTALL | re.MULTILINE
        )
    }
    assert makers == {'training/tables.py', 'training/report.py', 'planner/plan_text.py'}, (
        'tested here and by test_plan.py'
    )
