#!/bin/bash
# Any machines that reach each other, over ssh: one process a machine, for all of its devices. From the repository's root:
#     HOSTS='gpu-a gpu-b' scripts/launch/hosts.sh configs/demo.yaml mesh.data=16
# The repository, its .venv and runs/ have the same path on each (a shared file system); HOST:PORT of the first is reached by
# all; so is one more port of it, which the system chooses. Without ssh, on one machine that simulates devices:
#     HOSTS='localhost localhost' SSH=local scripts/launch/hosts.sh configs/demo.yaml mesh.data=2
# Ctrl-C, or SIGTERM to any one of the processes, makes all save and stop. Where a process is lost or hangs, all end with 75, and
# are started again from the last checkpoint, RESTARTS times at most (10); one that hangs for good is killed GRACE seconds (60)
# after the first has ended; where its machine is gone for good, begin with the others: HOSTS without it, and a mesh of as many
# devices.
read -ra hosts <<<"${HOSTS:?the names of the machines, as in HOSTS='gpu-a gpu-b'}"
coordinator=${hosts[0]#*@}:${PORT:-9876}
source "$(dirname "${BASH_SOURCE[0]}")/together.sh"

kill_there() { # a process that is stopped does not end with its connection
    if [[ $SSH == local ]]; then return; fi
    local options="--coordinator $coordinator --processes ${#hosts[@]} --process $1"
    timeout 20 ssh -o BatchMode=yes -o ConnectTimeout=10 "${hosts[$1]}" "pkill -KILL -f -- $(printf %q "$options\$")" </dev/null
}

stopped=
trap stopped=1 INT # the terminal sends it to all of them
for ((turn = 0; turn <= ${RESTARTS:-10}; turn++)); do
    pids=()
    for process in "${!hosts[@]}"; do
        command=(.venv/bin/python scripts/train.py "$@"
            --coordinator "$coordinator" --processes "${#hosts[@]}" --process "$process")
        if [[ $SSH == local ]]; then
            (trap - INT && exec "${PYTHON:-.venv/bin/python}" "${command[@]:1}") &
        else # -tt: the remote process ends with the connection
            (trap - INT && exec ssh -tt "${hosts[process]}" "cd $(printf %q "$PWD") && exec $(printf '%q ' "${command[@]}")") &
        fi
        pids+=($!)
    done
    end_together
    # 137, 139: the system has killed process 0, and the others have ended with 75; 255: ssh has lost its machine.
    if [[ -n $stopped || ($code != 75 && $code != 137 && $code != 139 && $code != 255) ]]; then break; fi
    echo "started again: code $code" >&2
done
exit $code
