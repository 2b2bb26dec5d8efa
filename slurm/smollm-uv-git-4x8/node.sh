#!/usr/bin/env bash
# smollm-uv-git-4x8: runs once on every node, with NODE_RANK, MASTER_ADDR and MASTER_PORT set.
# run_train.py: 4 x 8 ranks, of a model that its own configuration names.
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

# --- local disk
value=/scratch
export DSLAUNCH_LOCAL=$value/dslaunch-$UID-${SLURM_JOB_ID:-${here##*/}}
why="$DSLAUNCH_LOCAL is not yours to write"
(umask 077; mkdir -p -- "$DSLAUNCH_LOCAL")
[ ! -L "$DSLAUNCH_LOCAL" ] && [ -O "$DSLAUNCH_LOCAL" ] && [ -w "$DSLAUNCH_LOCAL" ] || exit 73
chmod 700 -- "$DSLAUNCH_LOCAL"
why="anybody can replace what is in $value: it is writable for all, and not sticky"
(( (8#$(stat -Lc %a -- "$value") & 8#1002) != 2 )) || exit 73
why=

# --- Python environment
activate() {  # such scripts use variables that are not set, and end with codes that mean nothing
  why="$1 is not there"
  [ -r "$1" ] || exit 66
  # shellcheck disable=SC1090  # of the environment
  . "$1" || true
  why=
}
why="there is no uv"
command -v uv >/dev/null || exit 69
export UV_PROJECT_ENVIRONMENT=$DSLAUNCH_LOCAL/uv
why="uv sync failed"
flock "$DSLAUNCH_LOCAL/uv.lock" uv sync --frozen --project "$here/code" --extra flash
activate "$DSLAUNCH_LOCAL/uv/bin/activate"

# --- code, as it was when submitted
why="cannot tell which packages are installed from the tree itself"
value=$(python3 - "$here" <<'EOF'  # `pip install -e` leads to the tree as it is then: the snapshot comes first
import importlib.metadata, json, os, sys, urllib.parse
here = sys.argv[1]
with open(os.path.join(here, "snapshot.root"), encoding="utf-8", errors="surrogateescape") as file:
    root = file.read()
found = []
for row in importlib.metadata.distributions():
    told = json.loads(row.read_text("direct_url.json") or "{}")
    place = os.path.realpath(urllib.parse.unquote(urllib.parse.urlsplit(told.get("url", "")).path))
    if told.get("dir_info", {}).get("editable") and os.path.commonpath([root, place]) == root:
        taken = os.path.join(here, "snapshot", os.path.relpath(place, root))
        found += [os.path.normpath(os.path.join(taken, name)) for name in ("src", ".")]
print(":".join(name for name in dict.fromkeys(found) if os.path.isdir(name)))
EOF
)
why=
[ -z "$value" ] || export PYTHONPATH="$value${PYTHONPATH:+:$PYTHONPATH}"

# --- environment
export NCCL_DEBUG=WARN  # errors are printed and healthy runs stay quiet; INFO writes gigabytes at scale
export TORCH_NCCL_ASYNC_ERROR_HANDLING=3  # a dead peer ends this rank instead of leaving it to hang
export TORCH_FR_BUFFER_SIZE=2000  # flight recorder on: a time-out says which rank never came
export TORCH_NCCL_DUMP_ON_TIMEOUT=1  # the flight recorder is written when a collective times out
export NCCL_IB_HCA=mlx5  # every mlx5 port; list them exactly (=mlx5_0,mlx5_1) where some serve storage

# --- trackers
export WANDB_PROJECT=smollm
export WANDB_ENTITY=lab
export WANDB_RUN_GROUP="${here##*/}"
export WANDB_MODE=online

# --- secrets
secret() {  # NAME: its value lies in a file that only you can read, and in no script
  [ -r "$here/secrets/$1" ] || { echo "dslaunch: the secret $1 is missing: $here/secrets/$1" >&2; exit 78; }
  value=$(cat -- "$here/secrets/$1"; printf x)
  export "$1=${value%x}"
  unset value
}
secret WANDB_API_KEY

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
cd -P -- "$here/code"
export DSLAUNCH_CHECKPOINT_DIR=/data/checkpoints/smollm
export DSLAUNCH_CHECKPOINT_EVERY=2000
export DSLAUNCH_CHECKPOINT_KEEP=2
exec python3 -u "$here/node/supervise.py" \
  --launcher torchrun --nodes 4 --per-node 8 \
  --hang 300 --first-step 1800 --steps 0 --model-parallel 1 --vouch \
  --logs "$logs" --shared-logs -- \
  python3 -u run_train.py --config-file examples/smollm3/stage1_8T.yaml
