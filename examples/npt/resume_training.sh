#!/usr/bin/env bash
# Continues an NPT run from one of its checkpoints, with the configuration of the run (docs/design/npt_curriculum.md).
#
#   bash examples/npt/resume_training.sh CHECKPOINT [ADDITIONAL_STEPS=15000] [FLAGS OF pretrain_npt.py ...]
#
# Flags override the configuration of the run: --learning_rate, --batch_size, --curriculum_stages, ... New checkpoints are
# written beside CHECKPOINT. ADDITIONAL_STEPS count from CHECKPOINT, so after an interruption give the newest checkpoint.
# If CHECKPOINT is not the newest, add --save DIRECTORY, or --overwrite-checkpoints to replace the later checkpoints.
# Relative paths of the run's data are relative to the root of this project.
set -euo pipefail
usage="usage: resume_training.sh CHECKPOINT [ADDITIONAL_STEPS] [FLAGS ...]"
checkpoint=$(realpath -m -- "${1:?$usage}")
shift
steps=15000
[[ ${1:-} =~ ^[0-9]+$ ]] && steps=$1 && shift
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
[ -f "$checkpoint/state.json" ] || { echo "error: $checkpoint: not a checkpoint of pretrain_npt.py" >&2; exit 2; }
# The default of NPROC is the number of processes of the run.
stored=$("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["cut"]["world_size"])' "$checkpoint/state.json")
NPROC=${NPROC:-$stored}
[ "$NPROC" -eq 1 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" pretrain_npt.py \
    --resume_from "$checkpoint" --additional-steps "$steps" "$@"
