#!/usr/bin/env bash
# cpu-demo: 2 nodes on this machine, each a process tree of its own. The first failure ends an attempt.
set -uo pipefail
run=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
unset SLURM_RESTART_COUNT  # of a job that this may run in
recover=(python3 "$run/node/recover.py" --run "$run" --job "$$:" --nodes 2 --attempts 3 \
  --checkpoints "$run/submitted-from"/./checkpoints/cpu-demo)
attempt=$("${recover[@]}" begin)  # the journal says which one comes, and whether another process has this run
case $? in
  0) rm -f -- "$run/exit-code" ;;
  100) exit 0 ;;
  *) exit 69 ;;
esac
signalled=
deadline=0
pids=()
tell() { ((${#pids[@]} == 0)) || kill "-$1" "${pids[@]}" 2>/dev/null; }
trap 'signalled=1; tell USR2' USR2
trap 'signalled=1; tell TERM; deadline=${deadline/#0/$((SECONDS + 30))}' TERM INT
end() {  # the run is over
  echo "$1" >"$run/exit-code"
  exit "$1"
}
while :; do
  export DSLAUNCH_ATTEMPT=$attempt MASTER_ADDR=127.0.0.1
  MASTER_PORT=$(python3 "$run/node/port.py" "$(basename -- "$run")" "$attempt") || end 69  # of this attempt alone
  export MASTER_PORT
  "${recover[@]}" attempt --attempt "$attempt" --hosts "$HOSTNAME"
  rc=0
  [ -n "$signalled" ] || deadline=0
  for ((node = 0; node < 2; node++)); do
    NODE_RANK=$node bash "$run/node.sh" >>"$run/logs/job.out" 2>&1 &
    pids+=("$!")
  done
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

  read -r next pause < <("${recover[@]}" after --attempt "$attempt" --code "$rc" --told "$signalled" \
    --hosts "$HOSTNAME")
  [ "$next" = restart ] || end "$rc"
  sleep "$pause"
  [ -z "$signalled" ] || end 75
  attempt=$((attempt + 1))
done
