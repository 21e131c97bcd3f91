#!/bin/sh
# Trains under Open MPI's or MPICH's mpirun, whichever is found: launch/mpirun.sh CONFIG [options of train]
#
# One machine:      RANKS=4 launch/mpirun.sh configs/cifar10.toml
# Several machines: RANKS=8 HOSTFILE=hosts MASTER_ADDR=node0 launch/mpirun.sh configs/cifar10.toml --run-dir /shared/runs/cifar10
#
# Environment:
#   RANKS        ranks in all (2)
#   HOSTFILE     hosts, one a line, with their numbers of ranks: `node0 slots=4` for Open MPI, `node0:4` for MPICH. The checkout, the data
#                and the run directory are at the same place on all of them
#   MASTER_ADDR  with HOSTFILE: the host of rank 0, the first one, as the others reach it
#   MASTER_PORT  a free port there; without it, one that follows from the job's number (MPICH with HOSTFILE outside Slurm has none: set it)
#   MPIRUN       which mpirun (mpirun)
#
# MPI starts the ranks and nothing else: they meet and add up over sockets of their own.
set -eu

if [ $# -eq 0 ]; then
    echo "usage: launch/mpirun.sh CONFIG [options of train]" >&2
    exit 2
fi
launch=$(dirname -- "$(readlink -f -- "$0")")
# sbatch runs a copy of this script, elsewhere.
if [ ! -x "$launch/ddpm-dist" ]; then launch=${SLURM_SUBMIT_DIR:-.}/launch; fi
mpirun=${MPIRUN:-mpirun}
if [ -n "${HOSTFILE:-}" ] && [ -z "${MASTER_ADDR:-}" ]; then
    echo "mpirun.sh: with HOSTFILE, MASTER_ADDR must name the first host" >&2
    exit 2
fi
set -- "$launch/ddpm-dist" train "$@"
case $("$mpirun" --version 2>&1) in
*"Open MPI"* | *OpenRTE* | *PRRTE*)
    # Ranks have threads of their own: Open MPI would tie each to one core.
    for name in MASTER_PORT MASTER_ADDR DDPM_DIST_BIN; do
        if eval "[ -n \"\${$name:-}\" ]"; then set -- -x "$name" "$@"; fi
    done
    if [ "$(id -u)" = 0 ]; then set -- --allow-run-as-root "$@"; fi
    set -- -n "${RANKS:-2}" --bind-to none ${HOSTFILE:+--hostfile "$HOSTFILE"} "$@"
    if [ -z "${HOSTFILE:-}" ]; then set -- --oversubscribe "$@"; fi
    ;;
*) # MPICH and its relatives; they hand the environment on
    set -- -n "${RANKS:-2}" -bind-to none ${HOSTFILE:+-f "$HOSTFILE"} "$@"
    ;;
esac
exec "$mpirun" "$@"
