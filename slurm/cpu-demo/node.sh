#!/usr/bin/env bash
# cpu-demo: runs once on every node, with NODE_RANK, MASTER_ADDR and MASTER_PORT set.
# gpt-demo: 875,264 parameters, ZeRO-3, fp32, 2 x 2 ranks,
# batch 16 = 4 x 1 x 4.
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
export DS_ACCELERATOR=cpu  # gpus_per_node is 0: train on CPU, with gloo

# --- training
cd -P -- "$here/submitted-from"
export DSLAUNCH_DS_CONFIG="$here/ds_config.json"  # for scripts that take no flag
export DSLAUNCH_CHECKPOINT_DIR=checkpoints/cpu-demo
exec python3 -u "$here/node/supervise.py" \
  --launcher torchrun --nodes 2 --per-node 2 \
  --hang 300 --first-step 1800 --steps 200 --stage 3 --model-parallel 1 \
  --logs "$logs" --shared-logs -- \
  python3 -u "$here/node/train_gpt.py" --deepspeed_config "$here/ds_config.json" --steps 200 --seq-len \
  128 --layers 4 --hidden 128 --heads 4 --vocab 256 --checkpoint-dir checkpoints/cpu-demo \
  --checkpoint-every 100 --checkpoint-keep 2
