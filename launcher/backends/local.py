"""This machine: the same bundle, one process tree per "node", gloo when there is no GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher import bundle as bundles
from launcher import nccl, runs, setting, software
from launcher.backends import State, Status
from launcher.bundle import Bundle, File
from launcher.errors import Problem, UserError
from launcher.plan import Plan
from launcher.run import Run, spawn
from launcher.spec import JobSpec

ENTRY = "local.sh"
GRACE = 40.0  # seconds for ranks to save; local.sh itself kills after 30

SCRIPT = """\
#!/usr/bin/env bash
# {name}: {nodes} nodes on this machine, each a process tree of its own. The first failure ends an attempt.
set -uo pipefail
run=$(cd -- "$(dirname -- "${{BASH_SOURCE[0]}}")" && pwd)
unset SLURM_RESTART_COUNT  # of a job that this may run in
recover=(python3 "$run/node/recover.py" --run "$run" --job "$$:" --nodes {nodes} --attempts {attempts} \\
  --checkpoints {checkpoints})
attempt=$("${{recover[@]}}" begin)  # the journal says which one comes, and whether another process has this run
case $? in
  0) rm -f -- "$run/exit-code" ;;
  {duplicate}) exit 0 ;;
  *) exit 69 ;;
esac
signalled=
deadline=0
pids=()
tell() {{ ((${{#pids[@]}} == 0)) || kill "-$1" "${{pids[@]}}" 2>/dev/null; }}
trap 'signalled=1; tell USR2' USR2
trap 'signalled=1; tell TERM; deadline=${{deadline/#0/$((SECONDS + 30))}}' TERM INT
end() {{  # the run is over
{forget}  echo "$1" >"$run/exit-code"
  exit "$1"
}}
while :; do
  export DSLAUNCH_ATTEMPT=$attempt MASTER_ADDR=127.0.0.1
  MASTER_PORT=$(python3 "$run/node/port.py" "$(basename -- "$run")" "$attempt") || end 69  # of this attempt alone
  export MASTER_PORT
  "${{recover[@]}}" attempt --attempt "$attempt" --hosts "$HOSTNAME"
  rc=0
  [ -n "$signalled" ] || deadline=0
  for ((node = 0; node < {nodes}; node++)); do
{gpus}    NODE_RANK=$node bash "$run/node.sh" >>"$run/logs/job.out" 2>&1 &
    pids+=("$!")
  done
  while ((${{#pids[@]}})); do
    for node in "${{!pids[@]}}"; do
      kill -0 "${{pids[node]}}" 2>/dev/null && continue
      wait "${{pids[node]}}"
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
{verdict}
  read -r next pause < <("${{recover[@]}}" after --attempt "$attempt" --code "$rc" --told "$signalled" \\
    --hosts "$HOSTNAME")
  [ "$next" = restart ] || end "$rc"
  sleep "$pause"
  [ -z "$signalled" ] || end {stopped}
  attempt=$((attempt + 1))
done
"""

# Two "nodes" on one machine may not use the same GPUs: NCCL refuses a device that comes twice.
SLICE = """\
    CUDA_VISIBLE_DEVICES=$(seq -s, $((node * {per_node})) $((node * {per_node} + {per_node} - 1)))
    export CUDA_VISIBLE_DEVICES
"""


def render(plan: Plan) -> Bundle:
    spec = plan.spec
    problems = []
    if spec.train.launcher == "srun":
        problems.append(Problem("launcher srun needs Slurm", "torchrun or deepspeed", ("train", "launcher")))
    if spec.train.launcher == "job":
        message = "launcher job needs Slurm: one machine has no other nodes to reach"
        problems.append(Problem(message, "launcher: node runs your command on every node", ("train", "launcher")))
    if spec.resources.spares:
        problems.append(Problem("one machine has no spare nodes", "spares: 0", ("resources", "spares")))
    problems += software.problems(spec, "local")
    if spec.services:
        message = "services have nodes or steps of an allocation, and this is one machine"
        problems.append(Problem(message, "start them by hand, or run on Slurm", ("services",)))
    if spec.box:
        problems.append(Problem("a local run uses no container", "leave it out, or run on Slurm", ("container",)))
    if problems:
        raise UserError(*problems)
    script = SCRIPT.format(
        name=spec.name,
        nodes=spec.resources.nodes,
        stopped=bundles.STOPPED_EARLY,
        attempts=spec.recover.attempts,
        checkpoints=bundles.checkpoints(plan),
        duplicate=bundles.DUPLICATE,
        verdict=bundles.indent(bundles.VERDICT, "  "),
        forget='  rm -rf -- "$run/secrets"\n' if spec.credentials else "",
        gpus=SLICE.format(per_node=spec.per_node)
        if spec.resources.gpus_per_node and spec.resources.nodes > 1
        else "",
    )
    common = bundles.common(plan, None, flags=["--same-host", "--shared-logs"])
    helpers = map(bundles.node_file, bundles.BATCH)
    return Bundle((File(ENTRY, script), *common, *helpers), ENTRY)


PREFLIGHT = """\
#!/usr/bin/env bash
# {name}: checks {nodes} nodes that are all this machine, each with an agent of its own.
set -uo pipefail
run=$(cd -- "$(dirname -- "${{BASH_SOURCE[0]}}")" && pwd)
mkdir -p -- "$run/preflight"
port=$(python3 "$run/node/port.py" "$(basename -- "$run")" preflight) || exit 69
DSLAUNCH_PREFLIGHT_TOKEN=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \\n')  # of this job's agents alone
DSLAUNCH_NODES={names}
DSLAUNCH_COORDINATOR=127.0.0.1:$port
DSLAUNCH_PREFLIGHT_OUT=$run/preflight
export DSLAUNCH_PREFLIGHT_TOKEN DSLAUNCH_NODES DSLAUNCH_COORDINATOR DSLAUNCH_PREFLIGHT_OUT
pids=()
for ((node = 0; node < {nodes}; node++)); do
{gpus}  NODE_RANK=$node DSLAUNCH_NODE=local$node setsid bash "$run/preflight.sh" >>"$run/logs/job.out" 2>&1 &
  pids+=("$!")
done
tell() {{ kill "-$1" -- "${{pids[@]/#/-}}" 2>/dev/null; }}  # each is a process group
trap 'tell TERM' TERM INT
alive() {{ kill -0 "${{pids[@]}}" 2>/dev/null; }}
while alive && [ ! -s "$run/preflight/code" ]; do sleep 0.2; done
for ((i = 0; i < 50; i++)); do alive || break; sleep 0.2; done
tell KILL
rc=30
[ ! -s "$run/preflight/code" ] || read -r rc <"$run/preflight/code"
echo "$rc" >"$run/exit-code"
exit "$rc"
"""


def preflight(spec: JobSpec, plan: Plan | None) -> Bundle:
    """Agents of as many nodes as asked for, all on this machine."""
    nodes = spec.resources.nodes
    if spec.resources.spares:
        raise UserError(Problem("one machine has no spare nodes", "spares: 0", ("resources", "spares")))
    script = PREFLIGHT.format(
        name=spec.name,
        nodes=nodes,
        names=",".join(f"local{node}" for node in range(nodes)),
        gpus=SLICE.format(per_node=spec.per_node) if spec.resources.gpus_per_node and nodes > 1 else "",
    )
    told = setting.make(spec, plan)
    files = bundles.preflight_files(spec, nccl.variables(spec), told)
    return Bundle((File(ENTRY, script), *files, bundles.node_file("port.py")), ENTRY)


def submit(folder: Path, spec: JobSpec, run: Run, *, entry: str = ENTRY) -> str:
    """ "PID:START", so that a pid used again by somebody else is not taken for ours."""
    env = dict(os.environ)
    if importlib.util.find_spec("torch"):  # .venv/bin/dslaunch without an activated venv trains with that venv
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', os.defpath)}"
    log = str(folder / "logs" / "local.out")
    pid = spawn(["bash", "-c", CLAIM, str(folder / entry), str(folder / PID)], log=log, cwd=str(folder), env=env)
    return f"{pid}:{_started(pid) or ''}"


PID = "pid"  # "PID:START", of the process tree that this run directory has
SETTLE = 2.0  # seconds from a spawn to its claim, on a busy machine
# The process says itself who it is, before it does anything: a dslaunch that was killed right after the spawn has not
# written it down. A link is made once, so a run directory never has two.
CLAIM = """\
stat=$(<"/proc/$$/stat")
read -r -a fields <<<"${stat##*) }"
(umask 077; echo "$$:${fields[19]}" >"$1.$$")
ln -- "$1.$$" "$1" || exit 73
rm -f -- "$1.$$"
exec bash "$0"
"""


def look_up(folder: Path, run: Run) -> list[tuple[str, bool]]:
    """The process tree of this run, whether it is still there or not."""
    try:
        job = (folder / PID).read_text().strip()
    except OSError:
        return []
    return [(job, True)] if job else []


def _started(pid: int) -> str | None:
    """Clock ticks since boot at which the process began; None when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _pid(record: runs.Record) -> int | None:
    pid, _, started = record.job.partition(":")
    return int(pid) if pid.isdigit() and started and _started(int(pid)) == started else None


def state(record: runs.Record, run: Run) -> Status:
    code = runs.exit_code(record)
    if code is None and _pid(record):
        return Status(State.RUNNING, "running")
    code = runs.exit_code(record)  # it may have ended between the two looks
    if code is None:
        return Status(State.FAILED, "the job's processes are gone and left no exit code: killed, or a reboot")
    if code == 0:
        return Status(State.COMPLETED, "completed", 0)
    if (record.folder / "cancelled").exists():
        return Status(State.CANCELLED, "cancelled", code)
    stopped = (
        "stopped early, checkpoint saved: run again to go on"
        if code == bundles.STOPPED_EARLY
        else f"exit code {code}"
    )
    return Status(State.FAILED, stopped, code)


def events(record: runs.Record, run: Run) -> Iterator[dict[str, Any]]:
    yield from runs.events(record, lambda: state(record, run))


def verdict(record: runs.Record, run: Run) -> dict[str, Any] | None:
    return runs.verdict(record)


OUTPUT = "logs/job.out"  # of all nodes, as lines came


def drain(nodes: Mapping[str, str], run: Run) -> list[str]:
    return [f"{node} is this machine: nothing to drain" for node in nodes]


def cancel(record: runs.Record, run: Run) -> None:
    """SIGTERM, so that ranks save; SIGKILL to the whole session when they do not end."""
    pid = _pid(record)
    if pid is None:
        raise UserError(Problem(f"{record.id} is not running"))
    (record.folder / "cancelled").touch(mode=0o600)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while _pid(record) and time.monotonic() < deadline:
        time.sleep(0.1)
    if _pid(record):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
