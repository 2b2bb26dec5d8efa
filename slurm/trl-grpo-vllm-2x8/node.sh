#!/usr/bin/env bash
# trl-grpo-vllm-2x8: runs once on every node, with NODE_RANK, MASTER_ADDR and MASTER_PORT set.
# src/open_r1/grpo.py: 2 x 8 ranks, of a model that its own configuration names.
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
module purge
modules load cuda/12.4

# --- Python environment
activate() {  # such scripts use variables that are not set, and end with codes that mean nothing
  why="$1 is not there"
  [ -r "$1" ] || exit 66
  # shellcheck disable=SC1090  # of the environment
  . "$1" || true
  why=
}
activate "$here/submitted-from"/openr1/bin/activate

# --- environment
# where the EFA installer puts libfabric and NCCL's plugin; without the plugin NCCL is silently on TCP
for lib in /opt/amazon/efa/lib{64,} /opt/amazon/ofi-nccl/lib{64,/x86_64-linux-gnu,} /opt/aws-ofi-nccl/lib; do
  if [ -d "$lib" ]; then LD_LIBRARY_PATH=$lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}; fi
done
export LD_LIBRARY_PATH
export NCCL_DEBUG=WARN  # errors are printed and healthy runs stay quiet; INFO writes gigabytes at scale
export TORCH_NCCL_ASYNC_ERROR_HANDLING=3  # a dead peer ends this rank instead of leaving it to hang
export TORCH_FR_BUFFER_SIZE=2000  # flight recorder on: a time-out says which rank never came
export TORCH_NCCL_DUMP_ON_TIMEOUT=1  # the flight recorder is written when a collective times out
export NCCL_SOCKET_IFNAME='^lo,docker,veth'  # bootstrap over the host's own interface whatever its name is

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
export DSLAUNCH_CHECKPOINT_DIR=/fsx/open-r1/qwen-7b-grpo
export DSLAUNCH_CHECKPOINT_EVERY=0
export DSLAUNCH_CHECKPOINT_KEEP=2
exec python3 -u "$here/node/supervise.py" \
  --launcher accelerate --nodes 2 --per-node 8 \
  --launcher-arg=--config_file --launcher-arg=recipes/accelerate_configs/zero3.yaml \
  --hang 300 --first-step 1800 --steps 0 --model-parallel 1 --vouch \
  --logs "$logs" --shared-logs -- \
  python3 -u src/open_r1/grpo.py --config=recipes/Qwen2.5-7B/grpo/config.yaml --vllm_mode=server \
  --vllm_server_host="$DSLAUNCH_HOST_VLLM" --vllm_server_port="$DSLAUNCH_PORT_VLLM"
