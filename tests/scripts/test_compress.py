"""scripts/compress.py as a user calls it, and what goes on with the runs that it makes."""

import pytest

from tests.scripts.runs import finish, workplace


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with the run `runs/tiny`, a mixture of experts."""
    folder = workplace(tmp_path_factory.mktemp('compress'))
    finish(folder, 'train', 'tiny.yaml', 'training.steps=6')
    return folder


def test_a_run_in_factors_trains_resumes_elsewhere_and_decodes(folder):
    """Logits are equal at each hand-over: compressed and opened elsewhere, after training and on the other mesh."""
