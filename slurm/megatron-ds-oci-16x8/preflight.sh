#!/usr/bin/env bash
# megatron-ds-oci-16x8: checks this node before anything trains, with NODE_RANK and DSLAUNCH_COORDINATOR set.
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
