#!/usr/bin/env bash
# axolotl-a3mega-8x8: runs once on every node, with NODE_RANK, MASTER_ADDR and MASTER_PORT set.
# axolotl.cli.train: 8 x 8 ranks, of a model that its own configuration names.
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
# Google's own settings, checked by its plugin: a value of ours beside them ends the job
NCCL_LIB_DIR=/var/lib/tcpxo/lib64
if [ ! -r "$NCCL_LIB_DIR/nccl-env-profile.sh" ]; then NCCL_LIB_DIR=/usr/local/nvidia/lib64; fi
test -r "$NCCL_LIB_DIR/nccl-env-profile.sh"
export NCCL_LIB_DIR LD_LIBRARY_PATH=$NCCL_LIB_DIR${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
. "$NCCL_LIB_DIR/nccl-env-profile.sh" || true
# interfaces of a VM; the profile has those of GKE
if [ -e /sys/class/net/enp0s12 ]; then
  export NCCL_SOCKET_IFNAME=enp0s12 NCCL_FASTRAK_CTRL_DEV=enp0s12
  export NCCL_FASTRAK_IFNAME=enp6s0,enp7s0,enp13s0,enp14s0,enp134s0,enp135s0,enp141s0,enp142s0
fi
export NCCL_DEBUG=WARN  # errors are printed and healthy runs stay quiet; INFO writes gigabytes at scale
export TORCH_NCCL_ASYNC_ERROR_HANDLING=3  # a dead peer ends this rank instead of leaving it to hang
export TORCH_FR_BUFFER_SIZE=2000  # flight recorder on: a time-out says which rank never came
export TORCH_NCCL_DUMP_ON_TIMEOUT=1  # the flight recorder is written when a collective times out
export NCCL_FASTRAK_LLCM_DEVICE_DIRECTORY=/dev/aperture_devices  # where the driver of the NICs maps their windows

# --- secrets
secret() {  # NAME: its value lies in a file that only you can read, and in no script
  [ -r "$here/secrets/$1" ] || { echo "dslaunch: the secret $1 is missing: $here/secrets/$1" >&2; exit 78; }
  value=$(cat -- "$here/secrets/$1"; printf x)
  export "$1=${value%x}"
  unset value
}
secret HF_TOKEN

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
cd -P -- "$here/submitted-from"
export DSLAUNCH_CHECKPOINT_DIR=/home/shared/checkpoints/axolotl-8b
export DSLAUNCH_CHECKPOINT_EVERY=0
export DSLAUNCH_CHECKPOINT_KEEP=2
exec python3 -u "$here/node/supervise.py" \
  --launcher accelerate --nodes 8 --per-node 8 \
  --launcher-arg=--mixed_precision --launcher-arg=bf16 \
  --hang 300 --first-step 1800 --steps 0 --model-parallel 1 --vouch \
  --logs "$logs" --shared-logs -- \
  python3 -u -m axolotl.cli.train configs/llama-3.1-8b-sft.yaml
