#!/usr/bin/env bash
# gpt-22b-frontier-128x8: runs once on every node, with NODE_RANK, MASTER_ADDR and MASTER_PORT set.
# pretrain_gpt.py: 128 x 8 ranks, of a model that its own configuration names.
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
modules load PrgEnv-gnu/8.6.0
modules load rocm/6.2.4
modules load craype-accel-amd-gfx90a
modules load rccl-net-plugin/1.0

# --- local disk
value=/mnt/bb/elvis
export DSLAUNCH_LOCAL=$value/dslaunch-$UID-${SLURM_JOB_ID:-${here##*/}}
why="$DSLAUNCH_LOCAL is not yours to write"
(umask 077; mkdir -p -- "$DSLAUNCH_LOCAL")
[ ! -L "$DSLAUNCH_LOCAL" ] && [ -O "$DSLAUNCH_LOCAL" ] && [ -w "$DSLAUNCH_LOCAL" ] || exit 73
chmod 700 -- "$DSLAUNCH_LOCAL"
why="anybody can replace what is in $value: it is writable for all, and not sticky"
(( (8#$(stat -Lc %a -- "$value") & 8#1002) != 2 )) || exit 73
why=
why=$(bash "$here/node/stage.sh" /lustre/orion/stf999/proj-shared/envs/deepspeed-rocm.tar.gz "$DSLAUNCH_LOCAL"/env 1 conda 1)

# --- Python environment
activate() {  # such scripts use variables that are not set, and end with codes that mean nothing
  why="$1 is not there"
  [ -r "$1" ] || exit 66
  # shellcheck disable=SC1090  # of the environment
  . "$1" || true
  why=
}
if [ -r "$DSLAUNCH_LOCAL"/env/bin/activate ]; then  # of conda-pack
  activate "$DSLAUNCH_LOCAL"/env/bin/activate
else
  export CONDA_PREFIX="$DSLAUNCH_LOCAL"/env PATH="$DSLAUNCH_LOCAL"/env/bin:$PATH
  for init in "$CONDA_PREFIX"/etc/conda/activate.d/*.sh; do
    [ ! -e "$init" ] || activate "$init"
  done
fi

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
export MIOPEN_USER_DB_PATH=/tmp/miopen  # from the job file
export MIOPEN_CUSTOM_CACHE_DIR=/tmp/miopen  # from the job file

python3 - <<'EOF'  # without this a node with no usable GPU would hang the others
import sys
try:
    import torch
except ImportError:
    sys.exit()
found = torch.cuda.device_count()
if found < 1:
    sys.exit(f"dslaunch: torch sees {found} GPUs on this node and the job asks for 1")
EOF

# --- training
cd -P -- "$here/submitted-from"
export DSLAUNCH_DS_CONFIG="$here/ds_config.json"  # for scripts that take no flag
export DSLAUNCH_CHECKPOINT_DIR=/lustre/orion/stf999/proj-shared/gpt-22b
export DSLAUNCH_TENSOR_PARALLEL=8
export DSLAUNCH_CHECKPOINT_EVERY=500
export DSLAUNCH_CHECKPOINT_KEEP=2
exec python3 -u "$here/node/supervise.py" \
  --launcher srun --nodes 128 --per-node 8 \
  --hang 300 --first-step 1800 --steps 0 --stage 1 --model-parallel 8 --vouch \
  --logs "$logs" --shared-logs -- \
  python3 -u pretrain_gpt.py --deepspeed --num-layers 48 --hidden-size 6144 --num-attention-heads 64 \
  --tensor-model-parallel-size 8 --micro-batch-size 2 --global-batch-size 1024 --deepspeed_config \
  "$here/ds_config.json"
