#!/bin/sh
# Trains under PyTorch's torchrun: launch/torchrun.sh CONFIG [options of train]
#
# One machine:      RANKS=4 launch/torchrun.sh configs/cifar10.toml
# Several machines: the same command on each, all with NNODES and RDZV:
#                   RANKS=4 NNODES=2 RDZV=node0:29400 launch/torchrun.sh configs/cifar10.toml --run-dir /shared/runs/cifar10
#
# Environment:
#   RANKS         ranks on this machine (1); as many as GPUs, or CPU ranks
#   NNODES        machines (1)
#   RDZV          HOST:PORT where machines meet: one of them, and a free port there
#   RUN_ID        what tells runs apart that meet at one place (ddpm-dist)
#   MAX_RESTARTS  how often all ranks start again after a failure (0); a training run then goes on from its newest checkpoint
#
# Options are spelt as old versions of torchrun (1.13 was tried) and new ones take them.
#
# torchrun starts again after any exit code, 75 (stopped, state saved) included; it sends SIGTERM to its ranks when it gets one.
set -eu

if [ $# -eq 0 ]; then
    echo "usage: launch/torchrun.sh CONFIG [options of train]" >&2
    exit 2
fi
launch=$(dirname -- "$(readlink -f -- "$0")")
# sbatch runs a copy of this script, elsewhere.
if [ ! -x "$launch/ddpm-dist" ]; then launch=${SLURM_SUBMIT_DIR:-.}/launch; fi
nnodes=${NNODES:-1}
if [ "$nnodes" = 1 ]; then
    set -- --standalone --nnodes 1 --nproc_per_node "${RANKS:-1}" --max_restarts "${MAX_RESTARTS:-0}" \
        --no_python "$launch/ddpm-dist" train "$@"
else
    if [ -z "${RDZV:-}" ]; then
        echo "torchrun.sh: $nnodes machines need RDZV=HOST:PORT, the same on all of them" >&2
        exit 2
    fi
    set -- --nnodes "$nnodes" --rdzv_backend c10d --rdzv_endpoint "$RDZV" --rdzv_id "${RUN_ID:-ddpm-dist}" \
        --nproc_per_node "${RANKS:-1}" --max_restarts "${MAX_RESTARTS:-0}" --no_python "$launch/ddpm-dist" train "$@"
fi
exec torchrun "$@"
