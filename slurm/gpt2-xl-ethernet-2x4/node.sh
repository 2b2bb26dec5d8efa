#!/usr/bin/env bash
# gpt2-xl-ethernet-2x4: runs once on every node, with NODE_RANK, MASTER_ADDR and MASTER_PORT set.
# gpt2-xl: 1,638,022,400 parameters, ZeRO-1, bf16, 2 x 4 ranks,
# batch 256 = 8 x 4 x 8.
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
export NCCL_IB_DISABLE=1  # no RDMA here: NCCL does not look for it, and a half-configured port cannot be picked
export NCCL_SOCKET_NTHREADS=4  # one TCP stream does not fill 25 Gbit/s and more
export NCCL_NSOCKS_PERTHREAD=4  # 4 x 4 streams; NCCL allows 64 in all

python3 - <<'EOF'  # without this a node with no usable GPU would train on its CPU, or hang the others
import sys, torch
found = torch.cuda.device_count()
if found < 4:
    sys.exit(f"dslaunch: torch sees {found} GPUs on this node and the job was planned for 4")
EOF

# --- training
cd -P -- "$here/submitted-from"
export DSLAUNCH_DS_CONFIG="$here/ds_config.json"  # for scripts that take no flag
export DSLAUNCH_CHECKPOINT_DIR=checkpoints/gpt2-xl-ethernet-2x4
exec python3 -u "$here/node/supervise.py" \
  --launcher torchrun --nodes 2 --per-node 4 \
  --hang 300 --first-step 1800 --steps 50000 --stage 1 --model-parallel 1 \
  --logs "$logs" --shared-logs -- \
  python3 -u "$here/node/train_gpt.py" --deepspeed_config "$here/ds_config.json" --steps 50000 \
  --seq-len 1024 --layers 48 --hidden 1600 --heads 25 --vocab 50257 --checkpoint-dir \
  checkpoints/gpt2-xl-ethernet-2x4 --checkpoint-every 1000 --checkpoint-keep 2
