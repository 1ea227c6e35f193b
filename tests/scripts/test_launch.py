"""Launch files start a run again where a process of it was lost or hung, and only then."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.scripts.runs import ROOT

# In the place of an interpreter, and of srun: writes down what it was called with, and ends with the next code of a list.
STAND_IN = """#!/bin/bash
echo "${WEFT_PROCESS:-} $*" >> calls
exec 9> lock; flock 9
turn=$(grep -c -- "${WEFT_PROCESS:+^$WEFT_PROCESS }${LAST:-}" calls)
code=$(sed -n "${turn}p" codes)
exit ${code:-0}
"""


def launch(folder: Path, file: str, codes: list[int], **variables: str) -> tuple[int, list[str]]:
    """The exit code of a launch file whose processes end with these codes, turn by turn, and their calls."""
    (folder / 'python').write_text(STAND_IN)
    (folder / 'python').chmod(0o755)
    (folder / 'srun').symlink_to('python')
    (folder / 'codes').write_text(''.join(f'{code}\n' for code in codes))
    environment = os.environ | {'PATH': f'{folder}:{os.environ["PATH"]}', 'PYTHON': str(folder / 'python')} | variables
    done = subprocess.run(
        ['bash', str(ROOT / 'scripts' / 'launch' / file), 'a.yaml', 'mesh.data=2'],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, (folder / 'calls').read_text().splitlines()


HOSTS = {'HOSTS': 'localhost localhost', 'SSH': 'local', 'LAST': '--process 0$'}
FILES = {'hosts.sh': HOSTS, 'gpus.sh': {'GPUS': '2', 'WEFT_PROCESS': ''}, 'slurm.sh': {}}


@pytest.mark.parametrize('file', FILES)
@pytest.mark.parametrize(
    ('codes', 'turns', 'ends'),
    [
        ([75, 137, 0], 3, 0),  # hung, then killed by the system, then done
        ([75, 143], 2, 143),  # stopped
        ([2], 1, 2),  # a mistake would be made again
        ([1], 1, 1),  # a disk would be full again
        ([75] * 5, 3, 75),  # RESTARTS is 2
    ],
)
def test_a_lost_process_starts_all_again(tmp_path, file, codes, turns, ends):
    code, calls = launch(tmp_path, file, codes, RESTARTS='2', **FILES[file])
    assert code == ends
    assert len(calls) == turns * (1 if file == 'slurm.sh' else 2)
    assert all('scripts/train.py a.yaml mesh.data=2' in call for call in calls)
