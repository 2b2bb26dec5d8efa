#!/usr/bin/env bash
# t5-xl-4x8: checks this node before anything trains, with NODE_RANK and DSLAUNCH_COORDINATOR set.
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
