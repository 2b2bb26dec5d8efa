#!/usr/bin/env bash
# llama-7b-lora-1x4: runs once on every node, with NODE_RANK, MASTER_ADDR and MASTER_PORT set.
# llama-7b: 6,738,415,616 parameters, ZeRO-3, bf16, 1 x 4 ranks,
# batch 64 = 8 x 2 x 4.
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
export TOKENIZERS_PARALLELISM=false  # from the job file

# --- secrets
secret() {  # NAME: its value lies in a file that only you can read, and in no script
  [ -r "$here/secrets/$1" ] || { echo "dslaunch: the secret $1 is missing: $here/secrets/$1" >&2; exit 78; }
  value=$(cat -- "$here/secrets/$1"; printf x)
  export "$1=${value%x}"
  unset value
}
secret HF_TOKEN

python3 - <<'EOF'  # without this a node with no usable GPU would train on its CPU, or hang the others
import sys, torch
found = torch.cuda.device_count()
if found < 4:
    sys.exit(f"dslaunch: torch sees {found} GPUs on this node and the job was planned for 4")
EOF

# --- training
cd -P -- "$here/submitted-from"
export DSLAUNCH_DS_CONFIG="$here/ds_config.json"  # for scripts that take no flag
export DSLAUNCH_CHECKPOINT_DIR=checkpoints/lora
export DSLAUNCH_CHECKPOINT_EVERY=200
export DSLAUNCH_CHECKPOINT_KEEP=2
export DSLAUNCH_STEPS=2000
export DSLAUNCH_SEQ_LEN=512
exec python3 -u "$here/node/supervise.py" \
  --launcher torchrun --nodes 1 --per-node 4 \
  --hang 300 --first-step 1800 --steps 2000 --stage 3 --model-parallel 1 --vouch \
  --logs "$logs" --shared-logs -- \
  python3 -u finetune_lora.py --rank 8 --alpha 16 --targets q_proj,v_proj --deepspeed_config \
  "$here/ds_config.json"
