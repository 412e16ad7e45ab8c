#!/usr/bin/env bash
# A script under torchrun on all ranks of this node, one thread each:
#
#     scripts/launch.sh 4 -m scripts.train --balance bip -o out/bip
#     scripts/launch.sh gpu train.py                  # as many ranks as there are GPUs
#
# torchrun launches and does not restart: a run that has failed goes on from its checkpoint, by the same command.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: $0 RANKS (a number, 'gpu' or 'cpu') SCRIPT or -m MODULE [ARGUMENTS]" >&2
    exit 2
fi
ranks=$1
shift
if ! command -v torchrun >/dev/null; then
    echo "$0: torchrun is not on the PATH; after make: source .venv/bin/activate" >&2
    exit 2
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec torchrun --standalone --nproc-per-node "$ranks" --max-restarts 0 "$@"
