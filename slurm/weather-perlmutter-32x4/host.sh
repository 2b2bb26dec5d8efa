#!/usr/bin/env bash
# weather-perlmutter-32x4: prepares this node, and runs its arguments in the container.
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
    (set -C; echo "$said" >"${DSLAUNCH_PREFLIGHT_OUT:-$logs}/failed-${DSLAUNCH_NODE:-before-ranks}") 2>/dev/null || true
  fi
  exit "$rc"
}
trap 'failed "$BASH_COMMAND"' ERR EXIT

# --- container
why="there is no shifter"
command -v shifter >/dev/null || exit 69
why=
exec shifter \
  --image=nersc/pytorch:24.08.01 \
  --module=gpu,nccl-plugin "$@"
