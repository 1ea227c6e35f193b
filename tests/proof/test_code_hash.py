"""What a proof rests on: its hash changes with what code does, and not with what is only written about it."""

import pytest

from weft.proof.code_hash import code_hash

CODE = '''class Config:
    width: int = 1

def double(x):
    """Twice."""
    return 2 * x
'''


@pytest.mark.parametrize(
    ('was', 'is_now', 'alike'),
    [
        ('Twice.', 'Two times.', True),
        ('return 2 * x', 'return (  # so\n        2 * x\n    )', True),
        ('double(x)', 'double(x: int) -> int', True),
        ('double(x)', 'double(x=1)', False),
        ('width: int', 'width: float', False),
        ('2 * x', 'x * 2', False),
    ],
)
def test_it_changes_with_what_code_does(was, is_now, alike, tmp_path):
    file = tmp_path / 'code.py'
    file.write_text(CODE)
    before = code_hash([file])
    file.write_text(CODE.replace(was, is_now))
    assert (code_hash([file]) == before) is alike
