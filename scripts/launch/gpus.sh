#!/bin/bash
# Several GPUs of one machine. One process drives them all, and that is enough:
#     .venv/bin/python scripts/train.py configs/demo.yaml mesh.data=8
# One process a GPU instead (to keep hosts' work apart, or to try what many machines will do):
#     GPUS=8 scripts/launch/gpus.sh configs/demo.yaml mesh.data=8
# The mesh' axes multiply to GPUS. Ctrl-C, or SIGTERM to any one of the processes, makes all save and stop.
# Where a process is lost or hangs, all end with 75, and are started again from the last checkpoint, RESTARTS times at most (10);
# one that hangs for good is killed GRACE seconds (60) after the first has ended.
export WEFT_COORDINATOR=${WEFT_COORDINATOR:-localhost:9876} WEFT_PROCESSES=${GPUS:-8}
source "$(dirname "${BASH_SOURCE[0]}")/together.sh"

stopped=
trap 'stopped=1; kill -TERM $(jobs -p)' TERM
trap stopped=1 INT # the terminal sends it to all of them
for ((turn = 0; turn <= ${RESTARTS:-10}; turn++)); do
    pids=()
    for ((gpu = 0; gpu < WEFT_PROCESSES; gpu++)); do
        (
            trap - INT TERM
            CUDA_VISIBLE_DEVICES=$gpu WEFT_PROCESS=$gpu exec "${PYTHON:-.venv/bin/python}" scripts/train.py "$@"
        ) &
        pids+=($!)
    done
    end_together
    # A process that the system has killed has the code of that signal: the others say 75, and so does process 0 unless it was it.
    if [[ -n $stopped || ($code != 75 && $code != 137 && $code != 139) ]]; then break; fi
    echo "started again: code $code" >&2
done
exit $code
