#!/usr/bin/env bash
# axolotl-a3mega-8x8: checks this node before anything trains, with NODE_RANK and DSLAUNCH_COORDINATOR set.
set -eo pipefail
trap '' USR2  # a warning before the ranks run has nothing to save; supervise.py listens again
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
logs=${DSLAUNCH_LOGS:-"$here/logs"}
out=${DSLAUNCH_PREFLIGHT_OUT:-"$logs/preflight"}
mkdir -p -- "$logs" "$out"
# shellcheck disable=SC2329  # the trap calls it; ERR alone does not hear of an `activate` that is missing
failed() {
  local rc=$? said
  trap - ERR EXIT
  if [ "$rc" != 0 ]; then
    said="${BASH_SOURCE[0]##*/} on $(hostname) ended with $rc: ${why:-$1}"
    echo "$said" >&2
    (set -C; echo "$said" >"$out/failed-${DSLAUNCH_NODE:-$(hostname)}") 2>/dev/null || true
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

# --- preflight
cd -P -- "$here/submitted-from"
start='import runpy, sys; sys.path[0] = sys.argv.pop(1); runpy.run_module('"'"'launcher.'"'"' + sys.argv.pop(1), run_name='"'"'__main__'"'"', alter_sys=True)'
code=$here/node/code
[ -d "$code" ] || code=$code.zip  # in a pod
trap - ERR EXIT
if [ "$NODE_RANK" = 0 ]; then
  python3 -c "$start" "$code" preflight.coordinator --setting "$here/preflight.json" --out "$out" \
    --port "${DSLAUNCH_COORDINATOR##*:}" --names "${DSLAUNCH_NODES:-}" &
fi
rc=0
python3 -c "$start" "$code" preflight.agent --setting "$here/preflight.json" --connect "$DSLAUNCH_COORDINATOR" \
  --name "${DSLAUNCH_NODE:-$(hostname)}" --index "$NODE_RANK" --logs "$logs/preflight" || rc=$?
wait
[ "$rc" != 10 ] || rc=0  # ready, without a node that is not needed
exit "$rc"
