"""What holds in every test of families."""

from unittest import mock

import pytest

from weft.model import stack


@pytest.fixture(autouse=True)
def loops():
    """Layers in loops, as on accelerators: they compile quickly."""
    with mock.patch.object(stack, 'UNROLLED', {}):
        yield
