#!/usr/bin/env bash
# Goes on with an NPT run from one of its checkpoints, with the configuration that the run had (document 001).
#
#   bash examples/npt/resume_training.sh CHECKPOINT [ADDITIONAL_STEPS=15000] [FLAGS OF pretrain_npt.py ...]
#
# Flags win over the run's configuration: --learning_rate, --batch_size, --curriculum_stages, ... New checkpoints are
# written beside CHECKPOINT. The steps count from it, so give a newer one to go on after an interruption. Where it is not the
# newest, add --save DIRECTORY, or --overwrite-checkpoints to replace those after it.
# The data are where the run found them; paths count from this project's directory.
set -euo pipefail
usage="usage: resume_training.sh CHECKPOINT [ADDITIONAL_STEPS] [FLAGS ...]"
checkpoint=$(realpath -m -- "${1:?$usage}")
shift
steps=15000
[[ ${1:-} =~ ^[0-9]+$ ]] && steps=$1 && shift
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
[ -f "$checkpoint/state.json" ] || { echo "error: $checkpoint: not a checkpoint of pretrain_npt.py" >&2; exit 2; }
# As many processes as the run had, unless NPROC says another number.
stored=$("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["cut"]["world_size"])' "$checkpoint/state.json")
NPROC=${NPROC:-$stored}
[ "$NPROC" -eq 1 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" pretrain_npt.py \
    --resume_from "$checkpoint" --additional-steps "$steps" "$@"
