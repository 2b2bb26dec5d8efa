#!/usr/bin/env bash
# megatron-ds-oci-16x8: runs once on every node, with NODE_RANK, MASTER_ADDR and MASTER_PORT set.
# gpt-neox-20b: 20,554,567,680 parameters, ZeRO-1, bf16, 16 x 8 ranks,
# batch 1024 = 4 x 16 x 16.
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

# --- Python environment
why="there is no conda: give conda.root, or load its module"
[ -x /nfs/miniforge3/bin/conda ] || exit 69
why="conda cannot set up this shell"
hook=$(/nfs/miniforge3/bin/conda shell.bash hook)
eval "$hook"
why="conda has no environment "/nfs/envs/megatron-deepspeed
conda activate /nfs/envs/megatron-deepspeed || true  # its scripts may end with codes that mean nothing
[ -n "${CONDA_PREFIX-}" ] || exit 66
[ "${CONDA_DEFAULT_ENV-}" = /nfs/envs/megatron-deepspeed ] || [ "$CONDA_PREFIX" -ef /nfs/envs/megatron-deepspeed ] || exit 66
why=

# --- environment
export NCCL_DEBUG=WARN  # errors are printed and healthy runs stay quiet; INFO writes gigabytes at scale
export TORCH_NCCL_ASYNC_ERROR_HANDLING=3  # a dead peer ends this rank instead of leaving it to hang
export TORCH_FR_BUFFER_SIZE=2000  # flight recorder on: a time-out says which rank never came
export TORCH_NCCL_DUMP_ON_TIMEOUT=1  # the flight recorder is written when a collective times out
export NCCL_IB_HCA='=mlx5_0,mlx5_1,mlx5_3,mlx5_4,mlx5_5,mlx5_6,mlx5_7,mlx5_8,mlx5_9,mlx5_10,mlx5_12,mlx5_13,mlx5_14,mlx5_15,mlx5_16,mlx5_17'  # the RDMA ports of the shape; the others are its front-end network
export NCCL_IB_TC=41  # the lossless queue of this fabric
export NCCL_IB_SL=0  # the service level that goes with it
export NCCL_IB_GID_INDEX=3  # the RoCE v2 address on these shapes
export NCCL_IB_TIMEOUT=22  # two minutes of retries: links of this fabric come back after rerouting
export NCCL_NET_PLUGIN=none  # the HPC-X plugin that images bring is not for this fabric

python3 - <<'EOF'  # without this a node with no usable GPU would train on its CPU, or hang the others
import sys, torch
found = torch.cuda.device_count()
if found < 8:
    sys.exit(f"dslaunch: torch sees {found} GPUs on this node and the job was planned for 8")
EOF

# --- training
cd -P -- "$here/submitted-from"
export DSLAUNCH_DS_CONFIG="$here/ds_config.json"  # for scripts that take no flag
export DSLAUNCH_CHECKPOINT_DIR=/nfs/checkpoints/neox-20b
export DSLAUNCH_TENSOR_PARALLEL=8
export DSLAUNCH_CHECKPOINT_EVERY=500
export DSLAUNCH_CHECKPOINT_KEEP=2
export DSLAUNCH_STEPS=150000
export DSLAUNCH_SEQ_LEN=2048
exec python3 -u "$here/node/supervise.py" \
  --launcher deepspeed --nodes 16 --per-node 8 \
  --hang 300 --first-step 1800 --steps 150000 --stage 1 --model-parallel 8 --vouch \
  --logs "$logs" --shared-logs -- \
  python3 -u pretrain_gpt.py --deepspeed --tensor-model-parallel-size 8 --no-pipeline-parallel \
  --data-path /nfs/pile/pile_text --deepspeed_config "$here/ds_config.json"
