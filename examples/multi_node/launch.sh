#!/usr/bin/env bash
# Starts a script on this host as part of a run on NNODES hosts, with torchrun and a rendezvous.
#
#   NNODES=4 RDZV_ENDPOINT=host0:29400 bash examples/multi_node/launch.sh [TORCHRUN'S OPTIONS] pretrain_npt.py FLAGS ...
#
# Run the same command on every host. RDZV_ENDPOINT is a name or an address of one of them, of any interface that all can
# reach. Without NNODES the run is on this host only.
#
#   NNODES             number of hosts (default: 1)
#   NPROC_PER_NODE     processes per host (default: the number of its GPUs, or 1)
#   RDZV_ENDPOINT      host:port of the rendezvous; required if NNODES is above 1
#   RDZV_ID            name of the run, if several runs use one rendezvous host (default: per-layer)
#   RDZV_WAIT          seconds to wait until the endpoint answers (default: 30)
#   RDZV_JOIN_TIMEOUT  seconds to wait until all hosts have joined (default: 600)
#
# A variable that is not set is taken from torchrun's (PET_NNODES, PET_NPROC_PER_NODE, PET_RDZV_ENDPOINT, PET_RDZV_ID, ...) or,
# in a step of Slurm (srun --ntasks-per-node=1), from the step's hosts. The launcher finds the interface that leads to the
# endpoint and sets GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to it, unless they are set.
#
# --save, --load and the data must be on a file system that all hosts share. On SIGUSR1, SIGTERM and Ctrl-C the training
# processes finish the step, save and exit. The exit code is 0, 1 (as torchrun's), or 2 for an error in these variables.
set -euo pipefail
here=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$([ -x "$here/.venv/bin/python" ] && echo "$here/.venv/bin/python" || echo python3)}

# A dry run needs no process group; WORLD_SIZE sets the number of processes to plan for.
for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then exec "$python" "$@"; fi
done
# Lets the segments of the GPU's allocator grow: less memory is lost to fragmentation.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# Seconds that torchrun gives the training processes to save when it is stopped.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} "$python" -m megatron_ext.platform.hosts.launch "$@" &
agent=$!
# Signals go to the training processes, not to the launcher: USR1 would kill it and leave them running.
# shellcheck disable=SC2329  # the traps call it
pass_on() {
    local children
    read -ra children <<<"$(cat /proc/"$agent"/task/*/children)"
    if [ ${#children[@]} -gt 0 ]; then
        kill -s "$1" "${children[@]}" || true
    else
        kill -s TERM "$agent" || true # it still waits for other hosts
    fi
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM
trap : INT # the terminal signals the launcher, which forwards it

code=0
while [ -e "/proc/$agent" ]; do # a trapped signal ends `wait` early
    code=0
    wait "$agent" || code=$?
done
exit "$code"
