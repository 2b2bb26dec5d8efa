#!/usr/bin/env bash
# t5-xl-4x8: runs once on every node, with NODE_RANK, MASTER_ADDR and MASTER_PORT set.
# t5-xl: 2,849,757,184 parameters, ZeRO-1, bf16, 4 x 8 ranks,
# batch 512 = 8 x 2 x 32.
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
type conda >/dev/null 2>&1 || exit 69
why="conda cannot set up this shell"
hook=$(conda shell.bash hook)
eval "$hook"
why="conda has no environment "t5
conda activate t5 || true  # its scripts may end with codes that mean nothing
[ -n "${CONDA_PREFIX-}" ] || exit 66
[ "${CONDA_DEFAULT_ENV-}" = t5 ] || [ "$CONDA_PREFIX" -ef t5 ] || exit 66
why=

# --- environment
export NCCL_DEBUG=WARN  # errors are printed and healthy runs stay quiet; INFO writes gigabytes at scale
export TORCH_NCCL_ASYNC_ERROR_HANDLING=3  # a dead peer ends this rank instead of leaving it to hang
export TORCH_FR_BUFFER_SIZE=2000  # flight recorder on: a time-out says which rank never came
export TORCH_NCCL_DUMP_ON_TIMEOUT=1  # the flight recorder is written when a collective times out
export NCCL_IB_HCA=mlx5  # every mlx5 port; list them exactly (=mlx5_0,mlx5_1) where some serve storage

python3 - <<'EOF'  # without this a node with no usable GPU would train on its CPU, or hang the others
import sys, torch
found = torch.cuda.device_count()
if found < 8:
    sys.exit(f"dslaunch: torch sees {found} GPUs on this node and the job was planned for 8")
EOF

# --- training
cd -P -- "$here/submitted-from"
export DSLAUNCH_DS_CONFIG="$here/ds_config.json"  # for scripts that take no flag
export DSLAUNCH_CHECKPOINT_DIR=/scratch/t5-xl
export DSLAUNCH_CHECKPOINT_EVERY=2000
export DSLAUNCH_CHECKPOINT_KEEP=2
export DSLAUNCH_STEPS=500000
export DSLAUNCH_SEQ_LEN=512
exec python3 -u "$here/node/supervise.py" \
  --launcher torchrun --nodes 4 --per-node 8 \
  --hang 300 --first-step 1800 --steps 500000 --stage 1 --model-parallel 1 --vouch \
  --logs "$logs" --shared-logs -- \
  python3 -u -m t5.pretrain --corpus /data/c4 --deepspeed_config "$here/ds_config.json"
