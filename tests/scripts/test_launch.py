"""Launch files start a run again where a process of it was lost or hung, and only then."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.scripts.runs import ROOT

# In the place of an interpreter, and of srun: writes down what it was called with, and ends with the next code of a list. The
# process whose call ends with HUNG stops instead in the first turn.
STAND_IN = """#!/bin/bash
call="$* ${WEFT_PROCESS:+process $WEFT_PROCESS}"
echo "$call" >> calls
turn=$(grep -cxF -- "$call" calls)
if [[ -n $HUNG && $turn == 1 && $call == *$HUNG* ]]; then echo $$ > hung; kill -STOP $$; fi
exit $(sed -n "${turn}p" codes)
"""
# In the place of ssh: the other machine is this one, where what it runs does not end with the connection.
SSH = """#!/bin/bash
bash -c "${@: -1}" < /dev/null
"""


def launch(folder: Path, file: str, codes: list[int], **variables: str) -> tuple[int, list[str]]:
    """The exit code of a launch file whose processes end with these codes, turn by turn, and their calls."""
    (folder / 'python').write_text(STAND_IN)
    (folder / 'python').chmod(0o755)
    (folder / 'srun').symlink_to('python')
    (folder / 'ssh').write_text(SSH)
    (folder / 'ssh').chmod(0o755)
    (folder / '.venv' / 'bin').mkdir(parents=True)
    (folder / '.venv' / 'bin' / 'python').symlink_to(folder / 'python')
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


HOSTS = {'HOSTS': 'localhost localhost', 'SSH': 'local'}
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


def lives(process: int) -> bool:
    """Whether it can still do anything: one that has ended and was not asked for its code cannot."""
    try:
        return Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize('hung', [0, 1])
@pytest.mark.parametrize(
    ('file', 'variables'), [('gpus.sh', FILES['gpus.sh']), ('hosts.sh', HOSTS), ('hosts.sh', HOSTS | {'SSH': 'ssh'})]
)
def test_a_process_that_hangs_is_killed_before_all_start_again(tmp_path, file, variables, hung):
    """Stopped, process 0 would hold the run's lock. It is killed on the machine where it runs."""
    code, calls = launch(tmp_path, file, [75, 0], GRACE='1', HUNG=f'process {hung}', PORT='65535', **variables)
    assert (code, len(calls)) == (0, 4)
    until = time.monotonic() + 10  # whoever is its parent now may take a while to hear of its end
    while lives(int((tmp_path / 'hung').read_text())):
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize('code', [0, 2])
def test_one_that_hangs_at_the_end_is_killed_and_the_others_code_holds(tmp_path, code):
    assert launch(tmp_path, 'gpus.sh', [code], GRACE='1', HUNG='process 0', **FILES['gpus.sh'])[0] == code
