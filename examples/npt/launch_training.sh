#!/usr/bin/env bash
# Equivalence pre-training from a configuration file, document 002's.
#
#   bash examples/npt/launch_training.sh [small|optimized|FILE.yaml] [FLAGS OF pretrain_npt.py ...]
#
# Without a name examples/npt/config.yaml. A second call goes on from the last checkpoint. Flags win over the file. The base model and the data that these files name are
# made by `make quickstart` and `make npt`; other ones: --base-model-name CHECKPOINT --data-path PREFIX.
set -euo pipefail
cd "$(dirname "$0")/../.."

NPROC=${NPROC:-1}                     # processes on this machine; they share the batch
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
[ "$NPROC" -eq 1 ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

config=examples/npt/config.yaml
case ${1:-} in
    small | optimized) config=examples/npt/config_$1.yaml && shift ;;
    *.yaml | *.yml) config=$1 && shift ;;
esac
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" pretrain_npt.py --config "$config" "$@"
