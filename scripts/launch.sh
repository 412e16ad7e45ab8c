#!/usr/bin/env bash
# A script under torchrun on all ranks of this node, one thread each:
#
#     scripts/launch.sh 4 -m scripts.train --balance bip -o out/bip
#     scripts/launch.sh gpu train.py                  # as many ranks as there are GPUs
#
# torchrun launches and does not restart: a run that has failed goes on from its checkpoint, by the same command.
#
# A model whose ranks come and go (moe.Live) needs a coordinator: --elastic starts one, which ends with these ranks, and
# writes its address into the file; ranks find it in EVENMOE_COORDINATOR. Others join later, from a launcher of their own:
#
#     scripts/launch.sh --elastic out/address 4 serve.py
#     EVENMOE_COORDINATOR=out/address scripts/launch.sh 1 serve.py --join
set -euo pipefail
if [ "${1:-}" = --elastic ]; then
    file=${2:-}
    shift $(($# < 2 ? $# : 2))
fi
if [ $# -lt 2 ]; then
    echo "usage: $0 [--elastic FILE] RANKS (a number, 'gpu' or 'cpu') SCRIPT or -m MODULE [ARGUMENTS]" >&2
    exit 2
fi
ranks=$1
shift
if ! command -v torchrun >/dev/null; then
    echo "$0: torchrun is not on the PATH; after make: source .venv/bin/activate" >&2
    exit 2
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
launch=(torchrun --standalone --nproc-per-node "$ranks" --max-restarts 0 "$@")
if [ -z "${file:-}" ]; then
    exec "${launch[@]}"
fi
exec 3< <(exec python -m moe.cli_elastic serve --file "$file")
coordinator=$!
trap 'kill "$coordinator" 2>/dev/null || true' EXIT
read -r EVENMOE_COORDINATOR <&3 || exit 2
export EVENMOE_COORDINATOR
echo "$0: the coordinator is at $EVENMOE_COORDINATOR; if it ends, start it anew: moe-elastic serve --file $file" >&2
"${launch[@]}" 3<&- &
ranks=$!
trap 'kill "$ranks"' INT TERM
while kill -0 "$ranks" 2>/dev/null; do
    wait "$ranks" && code=0 || code=$?
done
exit "$code"
