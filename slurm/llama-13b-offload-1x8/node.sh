#!/usr/bin/env bash
# llama-13b-offload-1x8: runs once on every node, with NODE_RANK, MASTER_ADDR and MASTER_PORT set.
# llama-13b: 13,015,864,320 parameters, ZeRO-3, bf16, 1 x 8 ranks,
# batch 128 = 1 x 16 x 8.
set -eo pipefail
trap '' USR2  # a warning before the ranks run has nothing to save; supervise.py listens again
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
logs=${DSLAUNCH_LOGS:-"$here/logs"}
mkdir -p -- "$logs"
# shellcheck disable=SC2329  # the trap calls it; ERR alone does not hear of an `activate` that is missing
failed() {
  local rc=$? said
  trap - ERR EXIT
  if [ "$rc" != 0 ]; then
    said="${BASH_SOURCE[0]##*/} on $(hostname) ended with $rc: ${why:-$1}"
    echo "$said" >&2
    (set -C; echo "$said" >"$logs/failed-before-ranks") 2>/dev/null || true
  fi
  exit "$rc"
}
trap 'failed "$BASH_COMMAND"' ERR EXIT

# --- environment
export NCCL_DEBUG=WARN  # errors are printed and healthy runs stay quiet; INFO writes gigabytes at scale
export TORCH_NCCL_ASYNC_ERROR_HANDLING=3  # a dead peer ends this rank instead of leaving it to hang
export TORCH_FR_BUFFER_SIZE=2000  # flight recorder on: a time-out says which rank never came
export TORCH_NCCL_DUMP_ON_TIMEOUT=1  # the flight recorder is written when a collective times out

python3 - <<'EOF'  # without this a node with no usable GPU would train on its CPU, or hang the others
import sys, torch
found = torch.cuda.device_count()
if found < 8:
    sys.exit(f"dslaunch: torch sees {found} GPUs on this node and the job was planned for 8")
EOF

# --- training
cd -P -- "$here/submitted-from"
export DSLAUNCH_DS_CONFIG="$here/ds_config.json"  # for scripts that take no flag
export DSLAUNCH_CHECKPOINT_DIR=/scratch/llama-13b
export DSLAUNCH_CHECKPOINT_EVERY=250
export DSLAUNCH_CHECKPOINT_KEEP=2
export DSLAUNCH_STEPS=5000
export DSLAUNCH_SEQ_LEN=2048
exec python3 -u "$here/node/supervise.py" \
  --launcher torchrun --nodes 1 --per-node 8 \
  --hang 300 --first-step 1800 --steps 5000 --stage 3 --model-parallel 1 --vouch \
  --logs "$logs" --shared-logs -- \
  python3 -u train.py --deepspeed_config "$here/ds_config.json"
