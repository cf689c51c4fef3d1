#!/usr/bin/env bash
# Starts a script on this host as part of a run on NNODES hosts, with torchrun and a rendezvous.
#
#   NNODES=4 RDZV_ENDPOINT=host0:29400 bash examples/multi_node/launch.sh pretrain_gpt_per_layer.py FLAGS ...
#
# Run the same command on every host. RDZV_ENDPOINT names one of them. Without NNODES the run is on this host only.
#
#   NNODES          number of hosts (default: 1)
#   NPROC_PER_NODE  processes per host (default: the number of its GPUs, or 1)
#   RDZV_ENDPOINT   host:port of the rendezvous; required if NNODES is above 1
#   RDZV_ID         name of the run, if several runs use one rendezvous host (default: per-layer)
#
# --save, --load and the data must be on a file system that all hosts share. On SIGUSR1, SIGTERM and Ctrl-C the training
# processes finish the step, save and exit. The exit code is torchrun's: 0 or 1.
set -euo pipefail
here=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$([ -x "$here/.venv/bin/python" ] && echo "$here/.venv/bin/python" || echo python3)}
nodes=${NNODES:-1}
gpus=$(nvidia-smi -L 2>/dev/null | wc -l || true)
processes=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}

# A dry run needs no process group; WORLD_SIZE sets the number of processes to plan for.
for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then exec "$python" "$@"; fi
done
rendezvous=(--standalone)
if [ "$nodes" -gt 1 ]; then
    : "${RDZV_ENDPOINT:?NNODES=$nodes requires RDZV_ENDPOINT=host:port}"
    rendezvous=(--rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-per-layer}")
fi
[ "$processes" -eq 1 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Lets the allocator's segments grow: less of a GPU's memory is lost to fragmentation.
[ "$gpus" -eq 0 ] || export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# Seconds that torchrun gives the training processes to save when it is stopped.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

"$python" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$processes" "${rendezvous[@]}" "$@" &
agent=$!
# Signals go to the training processes, not to torchrun: USR1 would kill it and leave them running.
# shellcheck disable=SC2329  # the traps call it
pass_on() {
    local children
    read -ra children <<<"$(cat /proc/"$agent"/task/*/children)"
    kill -s "$1" "${children[@]}" || true
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM
trap : INT # the terminal signals torchrun, which forwards it

code=0
while [ -e "/proc/$agent" ]; do # a trapped signal ends `wait` early
    code=0
    wait "$agent" || code=$?
done
exit "$code"
