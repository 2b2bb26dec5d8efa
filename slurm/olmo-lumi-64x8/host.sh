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

# --- modules
why="no environment modules: none of the usual places has their init script"
if ! type module >/dev/null 2>&1; then  # a batch shell is no login shell
  for init in "${LMOD_PKG:-}/init/bash" "${MODULESHOME:-}/init/bash" \
    /etc/profile.d/{modules,lmod,z00_lmod,zz00_lmod}.sh /usr/share/{lmod/lmod,modules,Modules}/init/bash \
    /opt/cray/pe/lmod/lmod/init/bash /opt/apps/lmod/lmod/init/bash; do
    # shellcheck disable=SC1090  # whichever this site has
    if [ -r "$init" ]; then . "$init" || true; fi
    if type module >/dev/null 2>&1; then break; fi  # a script may be left of a package that is gone
  done
fi
type module >/dev/null 2>&1 || exit 69
why=
modules() {  # COMMAND WORD... NAME; Tcl modules before 5 answer 0 whatever comes of a load
  local before=${LOADEDMODULES-} name=${!#} rc=0
  module "$@" || rc=$?
  if [ "$rc" = 0 ] && [ -n "${LOADEDMODULES+x}" ] && [ "$LOADEDMODULES" = "$before" ]; then
    case :$before: in *":$name:"* | *":$name/"*) ;; *) rc=78 ;; esac
  fi
  [ "$rc" = 0 ] || why="module $* failed; module avail ${name%%/*} shows what this site has"
  return "$rc"
}
module purge
module use /appl/local/training/modules/AI-20241126
modules load singularity-userfilesystems
modules load singularity-CPEbits

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
  --bind "$(mkdir -p -- /scratch/project_465000999/checkpoints/olmo-7b && echo /scratch/project_465000999/checkpoints/olmo-7b):/scratch/project_465000999/checkpoints/olmo-7b" \
  --pwd "$here" \
  /appl/local/containers/sif-images/lumi-pytorch-rocm-6.2.4-python-3.12-pytorch-v2.7.1.sif "$@"
