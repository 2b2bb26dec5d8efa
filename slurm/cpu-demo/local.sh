#!/usr/bin/env bash
# cpu-demo: 2 nodes on this machine, each a process tree of its own. The first failure ends all.
set -uo pipefail
run=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
attempt=0
unset SLURM_RESTART_COUNT  # of a job that this may run in
export MASTER_ADDR=127.0.0.1
MASTER_PORT=$(python3 "$run/node/port.py" "$(basename -- "$run")" 0) || exit 69
export MASTER_PORT
pids=()
for ((node = 0; node < 2; node++)); do
  NODE_RANK=$node bash "$run/node.sh" >>"$run/logs/node-$node.out" 2>&1 &
  pids+=("$!")
done
rc=0
deadline=0
tell() { ((${#pids[@]} == 0)) || kill "-$1" "${pids[@]}" 2>/dev/null; }
trap 'tell USR2' USR2
trap 'tell TERM; deadline=${deadline/#0/$((SECONDS + 30))}' TERM INT
while ((${#pids[@]})); do
  for node in "${!pids[@]}"; do
    kill -0 "${pids[node]}" 2>/dev/null && continue
    wait "${pids[node]}"
    code=$?
    unset "pids[node]"
    ((code == 0)) && continue
    ((rc == 0)) && rc=$code
    ((deadline)) || deadline=$((SECONDS + 30))
    tell TERM  # a dead node would leave the others waiting
  done
  ((deadline && SECONDS > deadline)) && tell KILL
  sleep 0.2
done
if [ "$rc" = 0 ] && [ -e "$run/logs/stopped-$attempt" ]; then
  rc=75  # stopped early, checkpoint saved
elif [ "$rc" != 0 ] && [ -s "$run/logs/first-failure-$attempt" ]; then
  read -r rc <"$run/logs/first-failure-$attempt"  # of the rank that failed first, on whichever node
fi
echo "$rc" >"$run/exit-code"
exit "$rc"
