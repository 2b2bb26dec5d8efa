#!/usr/bin/env bash
# openrlhf-ray-1x8: runs once on every node, with NODE_RANK, MASTER_ADDR and MASTER_PORT set.
# ray job submit --address=http://$DSLAUNCH_HOST_RAY:8265 -- python3 -m openrlhf.cli.train_ppo_ray --actor_num_nodes=2 --actor_num_gpus_per_node=8 --vllm_num_engines=8 --vllm_tensor_parallel_size=2 --pretrain=OpenRLHF/Llama-3-8b-sft-mixture --save_path=/lustre/rlhf/llama3-8b --zero_stage=3 --bf16: 1 x 8 ranks, of a model that its own configuration names.
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
export NCCL_DEBUG=WARN  # errors are printed and healthy runs stay quiet; INFO writes gigabytes at scale
export TORCH_NCCL_ASYNC_ERROR_HANDLING=3  # a dead peer ends this rank instead of leaving it to hang
export TORCH_FR_BUFFER_SIZE=2000  # flight recorder on: a time-out says which rank never came
export TORCH_NCCL_DUMP_ON_TIMEOUT=1  # the flight recorder is written when a collective times out

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
export DSLAUNCH_CHECKPOINT_DIR=/lustre/rlhf/llama3-8b
export DSLAUNCH_CHECKPOINT_EVERY=0
export DSLAUNCH_CHECKPOINT_KEEP=2
exec python3 -u "$here/node/supervise.py" \
  --launcher node --nodes 1 --per-node 8 \
  --hang 300 --first-step 1800 --steps 0 --model-parallel 1 --vouch \
  --logs "$logs" --shared-logs -- \
  ray job submit --address=http://"$DSLAUNCH_HOST_RAY":8265 -- python3 -m openrlhf.cli.train_ppo_ray \
  --actor_num_nodes=2 --actor_num_gpus_per_node=8 --vllm_num_engines=8 --vllm_tensor_parallel_size=2 \
  --pretrain=OpenRLHF/Llama-3-8b-sft-mixture --save_path=/lustre/rlhf/llama3-8b --zero_stage=3 --bf16
