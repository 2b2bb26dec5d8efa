#!/usr/bin/env bash
# salamandra-mn5-32x4: runs once on every node, with NODE_RANK, MASTER_ADDR and MASTER_PORT set.
# recipes/full_finetune_distributed.py: 32 x 4 ranks, of a model that its own configuration names.
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
export NCCL_IB_HCA=mlx5  # every mlx5 port; list them exactly (=mlx5_0,mlx5_1) where some serve storage
export HF_HUB_OFFLINE=1  # from the job file
export TRANSFORMERS_OFFLINE=1  # from the job file
export HF_DATASETS_OFFLINE=1  # from the job file
export HF_HOME=/gpfs/projects/ehpc99/hf  # from the job file

# --- trackers
export WANDB_PROJECT=salamandra
export WANDB_RUN_GROUP="${here##*/}"
export WANDB_MODE=offline
export WANDB_DIR=/gpfs/scratch/ehpc99/wandb
mkdir -p -- /gpfs/scratch/ehpc99/wandb  # wandb falls back to /tmp where it is missing

python3 - <<'EOF'  # without this a node with no usable GPU would hang the others
import sys
try:
    import torch
except ImportError:
    sys.exit()
found = torch.cuda.device_count()
if found < 4:
    sys.exit(f"dslaunch: torch sees {found} GPUs on this node and the job asks for 4")
EOF

# --- training
cd -P -- "$here/submitted-from"
export DSLAUNCH_CHECKPOINT_DIR=/gpfs/scratch/ehpc99/salamandra
export DSLAUNCH_CHECKPOINT_EVERY=0
export DSLAUNCH_CHECKPOINT_KEEP=2
exec python3 -u "$here/node/supervise.py" \
  --launcher torchrun --nodes 32 --per-node 4 \
  --hang 300 --first-step 1800 --steps 0 --model-parallel 1 --vouch \
  --logs "$logs" --shared-logs -- \
  python3 -u recipes/full_finetune_distributed.py --config configs/salamandra_7b.yaml
