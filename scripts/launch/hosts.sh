#!/bin/bash
# Any machines that reach each other, over ssh: one process a machine, for all of its devices. From the repository's root:
#     HOSTS='gpu-a gpu-b' scripts/launch/hosts.sh configs/demo.yaml mesh.data=16
# The repository, its .venv and runs/ have the same path on each (a shared file system); HOST:PORT of the first is reached by
# all; so is one more port of it, which the system chooses. Without ssh, on one machine that simulates devices:
#     HOSTS='localhost localhost' SSH=local scripts/launch/hosts.sh configs/demo.yaml mesh.data=2
# Ctrl-C, or SIGTERM to any one of the processes, makes all save and stop.
read -ra hosts <<<"${HOSTS:?the names of the machines, as in HOSTS='gpu-a gpu-b'}"
coordinator=${hosts[0]#*@}:${PORT:-9876}

trap '' INT # the terminal sends it to all of them
for process in "${!hosts[@]}"; do
    command=(.venv/bin/python scripts/train.py "$@"
        --coordinator "$coordinator" --processes "${#hosts[@]}" --process "$process")
    if [[ $SSH == local ]]; then
        (trap - INT && exec "${PYTHON:-.venv/bin/python}" "${command[@]:1}") &
    else # -tt: the remote process ends with the connection
        (trap - INT && exec ssh -tt "${hosts[process]}" "cd $(printf %q "$PWD") && exec $(printf '%q ' "${command[@]}")") &
    fi
    first=${first:-$!}
done
wait "$first"
code=$?
wait
exit $code
