#!/usr/bin/env bash
# Starts a program of this project on this host, as one part of a run over NNODES hosts: torchrun with rendezvous.
#
#   NNODES=4 RDZV_ENDPOINT=host0:29400 bash examples/multi_node/launch.sh pretrain_gpt_per_layer.py FLAGS ...
#
# Run the same command on every host; RDZV_ENDPOINT names one of them. Without NNODES it is a run on this host alone.
#
#   NNODES          hosts of the run (1)
#   NPROC_PER_NODE  processes on each host (the number of its GPUs, or 1)
#   RDZV_ENDPOINT   host:port where they meet; needed with NNODES above 1
#   RDZV_ID         name of the run, where several meet on one host (per-layer)
#
# --save, --load and the data must be on a file system that all hosts share. SIGUSR1 and SIGTERM to this script are
# passed to the training processes, which finish the step, save and leave; so does Ctrl-C. Exit code: torchrun's, 0 or 1.
set -euo pipefail
here=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$([ -x "$here/.venv/bin/python" ] && echo "$here/.venv/bin/python" || echo python3)}
nodes=${NNODES:-1}
gpus=$(nvidia-smi -L 2>/dev/null | wc -l || true)
processes=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 1))}

# A dry run starts no process group; WORLD_SIZE in the environment says how many processes to plan for.
for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then exec "$python" "$@"; fi
done
rendezvous=(--standalone)
if [ "$nodes" -gt 1 ]; then
    : "${RDZV_ENDPOINT:?NNODES=$nodes needs RDZV_ENDPOINT=host:port}"
    rendezvous=(--rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-per-layer}")
fi
[ "$processes" -eq 1 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Seconds that torchrun itself, when it is told to stop, leaves the training processes to save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

"$python" -m torch.distributed.run --nnodes "$nodes" --nproc-per-node "$processes" "${rendezvous[@]}" "$@" &
agent=$!
# To the training processes, not to torchrun: USR1 would end it and leave them behind.
# shellcheck disable=SC2329  # the traps call it
pass_on() {
    local children
    read -ra children <<<"$(cat /proc/"$agent"/task/*/children)"
    kill -s "$1" "${children[@]}" || true
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM
trap : INT # the terminal tells torchrun, which tells them

code=0
while [ -e "/proc/$agent" ]; do # a trapped signal ends wait early
    code=0
    wait "$agent" || code=$?
done
exit "$code"
