#!/usr/bin/env bash
# megatron-selene-32x8: runs once on every node, with NODE_RANK, MASTER_ADDR and MASTER_PORT set.
# pretrain_gpt.py: 32 x 8 ranks, of a model that its own configuration names.
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
export CUDA_DEVICE_MAX_CONNECTIONS=1  # from the job file

python3 - <<'EOF'  # without this a node with no usable GPU would hang the others
import sys
try:
    import torch
except ImportError:
    sys.exit()
found = torch.cuda.device_count()
if found < 8:
    sys.exit(f"dslaunch: torch sees {found} GPUs on this node and the job asks for 8")
EOF

# --- training
cd -P -- "$here/submitted-from"/Megatron-LM
export DSLAUNCH_CHECKPOINT_DIR=/lustre/fsw/coreai/checkpoints/gpt3
export DSLAUNCH_TENSOR_PARALLEL=8
export DSLAUNCH_PIPELINE_PARALLEL=4
export DSLAUNCH_CHECKPOINT_EVERY=0
export DSLAUNCH_CHECKPOINT_KEEP=2
exec python3 -u "$here/node/supervise.py" \
  --launcher srun --nodes 32 --per-node 8 \
  --hang 300 --first-step 1800 --steps 0 --model-parallel 32 --vouch \
  --logs "$logs" --shared-logs -- \
  python3 -u pretrain_gpt.py --tensor-model-parallel-size=8 --pipeline-model-parallel-size=4 \
  --sequence-parallel --num-layers=96 --hidden-size=12288 --num-attention-heads=96 --micro-batch-size=1 \
  --global-batch-size=1536 --save=/lustre/fsw/coreai/checkpoints/gpt3 \
  --load=/lustre/fsw/coreai/checkpoints/gpt3
