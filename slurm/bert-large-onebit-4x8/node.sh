#!/usr/bin/env bash
# bert-large-onebit-4x8: runs once on every node, with NODE_RANK, MASTER_ADDR and MASTER_PORT set.
# bert-large: 335,141,888 parameters, ZeRO-0, fp16, 4 x 8 ranks,
# batch 2048 = 64 x 1 x 32.
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
activate() {  # such scripts use variables that are not set, and end with codes that mean nothing
  why="$1 is not there"
  [ -r "$1" ] || exit 66
  # shellcheck disable=SC1090  # of the environment
  . "$1" || true
  why=
}
activate /opt/venvs/deepspeed-0.19.6/bin/activate

# --- environment
export NCCL_DEBUG=WARN  # errors are printed and healthy runs stay quiet; INFO writes gigabytes at scale
export TORCH_NCCL_ASYNC_ERROR_HANDLING=3  # a dead peer ends this rank instead of leaving it to hang
export TORCH_FR_BUFFER_SIZE=2000  # flight recorder on: a time-out says which rank never came
export TORCH_NCCL_DUMP_ON_TIMEOUT=1  # the flight recorder is written when a collective times out
export NCCL_IB_DISABLE=1  # no RDMA here: NCCL does not look for it, and a half-configured port cannot be picked
export NCCL_SOCKET_NTHREADS=4  # one TCP stream does not fill 25 Gbit/s and more
export NCCL_NSOCKS_PERTHREAD=4  # 4 x 4 streams; NCCL allows 64 in all

python3 - 0.19.6 <<'EOF'  # the plan was made for this release: others refuse what it accepts, or accept less
import importlib.metadata, sys
found = importlib.metadata.version("deepspeed")
if found.split("+")[0] != sys.argv[1].split("+")[0]:
    sys.exit(f"dslaunch: the job file says DeepSpeed {sys.argv[1]}, this node has {found}")
EOF

python3 - <<'EOF'  # without this a node with no usable GPU would train on its CPU, or hang the others
import sys, torch
found = torch.cuda.device_count()
if found < 8:
    sys.exit(f"dslaunch: torch sees {found} GPUs on this node and the job was planned for 8")
EOF

# --- training
cd -P -- "$here/submitted-from"
export DSLAUNCH_DS_CONFIG="$here/ds_config.json"  # for scripts that take no flag
export DSLAUNCH_CHECKPOINT_DIR=/scratch/bert-large
export DSLAUNCH_CHECKPOINT_EVERY=5000
export DSLAUNCH_CHECKPOINT_KEEP=2
export DSLAUNCH_STEPS=90000
export DSLAUNCH_SEQ_LEN=128
exec python3 -u "$here/node/supervise.py" \
  --launcher torchrun --nodes 4 --per-node 8 \
  --hang 300 --first-step 1800 --steps 90000 --stage 0 --model-parallel 1 --vouch \
  --logs "$logs" --shared-logs -- \
  python3 -u pretrain.py --deepspeed_config "$here/ds_config.json"
