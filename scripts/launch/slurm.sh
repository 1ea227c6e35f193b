#!/bin/bash
# GPUs of several nodes under SLURM: one process a GPU. Edit the lines below, then, from the repository's root:
#     sbatch scripts/launch/slurm.sh configs/demo.yaml mesh.data=16
# The mesh' axes multiply to nodes × GPUs; runs/ must be on a file system that all nodes share. Submit it again to continue:
# scancel (SIGTERM) and the signal below, some minutes before the time is up, make the run save and stop.
#SBATCH --job-name=weft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=weft-%j.log
#SBATCH --requeue

# srun tells each task where it stands, and JAX reads it: nothing else is to be set. A process that is lost or hangs ends all with
# 75, and they are started again from the last checkpoint, RESTARTS times at most (10), on the nodes of this job; where a node is
# gone SLURM ends the job, and has it wait for another (--requeue).
stopped=
trap stopped=1 TERM # scancel sends it to the tasks, too
for ((turn = 0; turn <= ${RESTARTS:-10}; turn++)); do
    # Tasks end each other in order; --wait is for one that cannot.
    srun --kill-on-bad-exit=0 --wait=120 .venv/bin/python scripts/train.py "$@" &
    wait $!
    code=$?
    while kill -0 $! 2>/dev/null; do # the trapped signal ended the wait, not srun
        wait $!
        code=$?
    done
    # srun gives the highest code of its tasks: a killed one's 137 goes before the 75 of the others.
    if [[ -n $stopped || ($code != 75 && $code != 137 && $code != 139) ]]; then break; fi
    echo "started again: code $code" >&2
done
exit $code
