#!/usr/bin/env bash
# llama-70b-azure-16x8: runs once on every node, with NODE_RANK, MASTER_ADDR and MASTER_PORT set.
# llama-3.1-70b: 70,553,706,496 parameters, ZeRO-3, bf16, 16 x 8 ranks,
# batch 512 = 1 x 4 x 128.
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
# the VM hides which NIC is near which GPU; a path that is not there would halve the bandwidth silently
if [ -r /opt/microsoft/ndv5-topo.xml ]; then export NCCL_TOPO_FILE=/opt/microsoft/ndv5-topo.xml; fi
export NCCL_DEBUG=WARN  # errors are printed and healthy runs stay quiet; INFO writes gigabytes at scale
export TORCH_NCCL_ASYNC_ERROR_HANDLING=3  # a dead peer ends this rank instead of leaving it to hang
export TORCH_FR_BUFFER_SIZE=2000  # flight recorder on: a time-out says which rank never came
export TORCH_NCCL_DUMP_ON_TIMEOUT=1  # the flight recorder is written when a collective times out
export NCCL_IB_HCA=mlx5_ib  # the eight InfiniBand ports; mlx5_an is the Ethernet of the VM
export NCCL_IB_PCI_RELAXED_ORDERING=1  # in a VM GPUDirect RDMA is half as fast without

python3 - <<'EOF'  # without this a node with no usable GPU would train on its CPU, or hang the others
import sys, torch
found = torch.cuda.device_count()
if found < 8:
    sys.exit(f"dslaunch: torch sees {found} GPUs on this node and the job was planned for 8")
EOF

# --- training
cd -P -- "$here/submitted-from"
export DSLAUNCH_DS_CONFIG="$here/ds_config.json"  # for scripts that take no flag
export DSLAUNCH_CHECKPOINT_DIR=/shared/checkpoints/llama-70b
export DSLAUNCH_CHECKPOINT_EVERY=250
export DSLAUNCH_CHECKPOINT_KEEP=2
export DSLAUNCH_STEPS=10000
export DSLAUNCH_SEQ_LEN=8192
exec python3 -u "$here/node/supervise.py" \
  --launcher torchrun --nodes 16 --per-node 8 \
  --hang 300 --first-step 1800 --steps 10000 --stage 3 --model-parallel 1 --vouch \
  --logs "$logs" --shared-logs -- \
  python3 -u train.py --deepspeed_config "$here/ds_config.json"
