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

# srun tells each task where it stands, and JAX reads it: nothing else is to be set. A process that is lost ends all.
exec srun --kill-on-bad-exit=1 .venv/bin/python scripts/train.py "$@"
