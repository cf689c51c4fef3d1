#!/usr/bin/env bash
# Equivalence pre-training from a configuration file (docs/design/npt_equivalence.md).
#
#   bash examples/npt/launch_training.sh [small|optimized|FILE.yaml] [FLAGS OF pretrain_npt.py ...]
#
# The default file is examples/npt/config.yaml. A second call continues from the last checkpoint. Flags override the file.
# The files name data and a base model that `make quickstart` and `make npt-toy` make; to use your own, give
# --base-model-name CHECKPOINT --data-path PREFIX.
set -euo pipefail
cd "$(dirname "$0")/../.."

NPROC=${NPROC:-1}                     # processes on this machine, as data-parallel ranks
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
[ "$NPROC" -eq 1 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

config=examples/npt/config.yaml
case ${1:-} in
    small | optimized) config=examples/npt/config_$1.yaml && shift ;;
    *.yaml | *.yml) config=$1 && shift ;;
esac
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" pretrain_npt.py --config "$config" "$@"
