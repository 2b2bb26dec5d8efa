#!/usr/bin/env bash
# olmo-lumi-64x8: prepares this node, and runs its arguments in the container.
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
why="there is no singularity: a module may bring it"
command -v singularity >/dev/null || exit 69
why="there is no image "/appl/local/containers/sif-images/lumi-pytorch-rocm-6.2.4-python-3.12-pytorch-v2.7.1.sif
[ -e /appl/local/containers/sif-images/lumi-pytorch-rocm-6.2.4-python-3.12-pytorch-v2.7.1.sif ] || exit 66
why=
for name in $(compgen -e); do  # what the scheduler's side says goes in whatever the image sets
  case $name in
    NODE_RANK|RANK|LOCAL_RANK|WORLD_SIZE|MASTER_ADDR|MASTER_PORT|DSLAUNCH_*|SLURM*|CUDA_VISIBLE_DEVICES|ROCR_VISIBLE_DEVICES|HIP_VISIBLE_DEVICES|GPU_DEVICE_ORDINAL|ZE_AFFINITY_MASK) export "SINGULARITYENV_$name=${!name}" ;;
  esac
done
origin=$(readlink -f -- "$here/submitted-from")
exec singularity exec \
  --bind "$here:$here" \
  --bind "$origin:$origin" \
  --bind "/var/spool/slurmd:/var/spool/slurmd" \
  --bind "/opt/cray:/opt/cray" \
  --bind "/usr/lib64/libcxi.so.1:/usr/lib64/libcxi.so.1" \
  --bind "/scratch/project_465000999:/scratch/project_465000999" \
  --bind "/flash/project_465000999:/flash/project_465000999" \
  --pwd "$here" \
  /appl/local/containers/sif-images/lumi-pytorch-rocm-6.2.4-python-3.12-pytorch-v2.7.1.sif "$@"
