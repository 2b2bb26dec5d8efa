#!/usr/bin/env bash
# weather-perlmutter-32x4: runs once on every node, with NODE_RANK, MASTER_ADDR and MASTER_PORT set.
# train.py: 32 x 4 ranks, of a model that its own configuration names.
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
export NCCL_NET='AWS Libfabric'  # the plugin aws-ofi-nccl or an error: without it NCCL is on TCP
export NCCL_SOCKET_IFNAME=hsn  # bootstrap over the Slingshot interfaces
export NCCL_CROSS_NIC=1  # every NIC reaches every other
export NCCL_NET_GDR_LEVEL=PHB  # GPU and NIC meet in the host bridge
export FI_CXI_DISABLE_HOST_REGISTER=1  # CUDA deadlocks when libfabric registers host memory beneath it
export FI_MR_CACHE_MONITOR=userfaultfd  # the default monitor deadlocks with Python's allocator
export FI_CXI_DEFAULT_CQ_SIZE=131072  # the completion queue overflows at scale with the default
export HDF5_USE_FILE_LOCKING=FALSE  # from the job file

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
export DSLAUNCH_CHECKPOINT_DIR=/pscratch/sd/e/elvis/weather
export DSLAUNCH_CHECKPOINT_EVERY=0
export DSLAUNCH_CHECKPOINT_KEEP=2
exec python3 -u "$here/node/supervise.py" \
  --launcher srun --nodes 32 --per-node 4 \
  --hang 300 --first-step 1800 --steps 0 --model-parallel 1 --vouch \
  --logs "$logs" --shared-logs -- \
  python3 -u train.py --yaml_config=config/vit.yaml --config=mp --amp_mode=bf16
