"""The sbatch script."""

from __future__ import annotations

from typing import Any

from launcher import bundle as bundles
from launcher import nccl, setting
from launcher.bundle import STOPPED_EARLY, Bundle, File
from launcher.errors import Problem, UserError
from launcher.plan import Plan
from launcher.spec import JobSpec

ENTRY = "job.sbatch"

# sbatch options that dslaunch sets itself; `slurm.sbatch` may not say them again.
OURS = {
    "nodes": "resources.nodes", "ntasks": "resources", "ntasks-per-node": "resources",
    "cpus-per-task": "resources.cpus_per_node",
    "mem": "resources.memory", "gpus-per-node": "resources.gpus_per_node", "gpus": "resources.gpus_per_node",
    "gres": "slurm.gpus_as: gres", "partition": "slurm.partition", "account": "slurm.account", "qos": "slurm.qos",
    "reservation": "slurm.reservation", "constraint": "slurm.constraint", "time": "slurm.time",
    "nodelist": "slurm.nodelist", "exclude": "slurm.exclude", "exclusive": "slurm.exclusive",
    "signal": "slurm.warn_before_end", "requeue": "slurm.requeue", "no-requeue": "slurm.requeue",
    "mail-user": "slurm.mail_user", "mail-type": "slurm.mail_type", "job-name": "name", "output": "the run directory",
    "error": "the run directory", "chdir": "the run directory", "open-mode": "the run directory",
    "export": "env", "export-file": "env", "array": "one job per job file", "wrap": "train.command",
    "parsable": "the command line", "test-only": "--test-only", "wait": "the command line",
}  # fmt: skip


SYNONYMS = {
    "tasks-per-node": "ntasks-per-node", "mem-per-cpu": "mem", "mem-per-gpu": "mem", "gpus-per-task": "gpus-per-node",
    "ntasks-per-gpu": "gpus-per-node", "cpus-per-gpu": "cpus-per-task", "mincpus": "cpus-per-task", "uid": "job-name",
}  # fmt: skip
FORBIDDEN = {
    "clusters": "status and cancel would look for the job on this cluster; submit from the other one",
    "cluster": "status and cancel would look for the job on this cluster; submit from the other one",
    "get-user-env": "it replaces the environment that the job file describes",
    "hold": "hold the job with scontrol once it is submitted",
}


def render(plan: Plan) -> Bundle:
    """The script with everything it needs. Its size does not depend on the number of nodes."""
    spec = plan.spec
    _check(spec)
    rungs = setting.ladder(plan) if spec.checks_nodes else []
    configs = setting.configs(rungs)
    told = setting.make(spec, plan, rungs=rungs) if spec.checks_nodes else None
    script = File(ENTRY, _script(spec, _body(plan, exchanged=bool(configs))))
    others = (File(name, bundles.config_json(config)) for name, config in configs.items())
    helpers = map(bundles.node_file, ("port.py", "lost.py") if told else ("port.py",))
    files = (script, *others, *bundles.common(plan, told, flags=["--shared-logs"]), *helpers)
    return Bundle(files, ENTRY)


def preflight(spec: JobSpec, plan: Plan | None) -> Bundle:
    """A job that checks its nodes and ends. Its `plan`, where there is one, says what has to fit."""
    _check(spec)
    script = File(ENTRY, _script(spec, _head(spec) + LET_GO + _preflight(spec, training=False) + ALONE))
    told = setting.make(spec, plan)
    files = bundles.preflight_files(spec, nccl.variables(spec), told)
    return Bundle((script, *files, *map(bundles.node_file, ("port.py", "lost.py"))), ENTRY)


def _check(spec: JobSpec) -> None:
    problems = []
    for option in spec.slurm.sbatch:
        name = SYNONYMS.get(option) or next((name for name in OURS if name.startswith(option)), None)  # getopt's way
        if name:
            problems.append(
                Problem(f"sbatch option {option} is dslaunch's own", f"use {OURS[name]}", ("slurm", "sbatch", option))
            )
        elif option in FORBIDDEN:
            problems.append(Problem(f"sbatch option {option}: {FORBIDDEN[option]}", "", ("slurm", "sbatch", option)))
    if spec.modules and spec.box:
        message = "modules are loaded where the ranks run, and a container has none of the host's"
        problems.append(Problem(message, "put the software in the image, or leave container out", ("modules",)))
    cpus, per_node = spec.resources.cpus_per_node, spec.per_node
    if spec.train.launcher == "srun" and cpus and cpus % per_node:
        message = f"cpus_per_node {cpus} cannot be shared evenly by {per_node} tasks"
        hint = f"cpus_per_node: {max(per_node, cpus // per_node * per_node)}"
        problems.append(Problem(message, hint, ("resources", "cpus_per_node")))
    if minutes(spec.slurm.time) * 60 <= spec.slurm.warn_before_end + 60:
        problems.append(
            Problem(
                f"warn_before_end {spec.slurm.warn_before_end} s leaves nothing of the time {spec.slurm.time}: Slurm "
                "may send the warning up to 60 s early",
                hint="a longer slurm.time or a shorter slurm.warn_before_end",
                at=("slurm", "time"),
            )
        )
    if problems:
        raise UserError(*problems)


def minutes(time: str) -> int:
    """Slurm's spelling to whole minutes: "90" is 90, "1-12" is 2160, "30:01" is 31."""
    days, dash, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, mins, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, mins, seconds = parts
    else:
        hours, (mins, seconds) = 0, [*parts, 0][:2]
    return (int(days) if dash else 0) * 1440 + hours * 60 + mins + (seconds > 0)


def _tasks(spec: JobSpec) -> int:
    """Slurm tasks on one node: one that starts the ranks, or with `launcher: srun` one for each rank."""
    return spec.per_node if spec.train.launcher == "srun" else 1


def _script(spec: JobSpec, body: str) -> str:
    from submitit.slurm.slurm import _make_sbatch_string  # its executor wants srun on PATH to write text

    slurm, resources = spec.slurm, spec.resources
    tasks = _tasks(spec)
    more: dict[str, Any] = {
        "output": "logs/slurm-%j.out",
        # only the batch shell is warned; it passes the signal on, and can tell the ranks apart from srun
        "signal": f"B:USR2@{slurm.warn_before_end}",
        "requeue" if slurm.requeue else "no-requeue": True,
        "time": slurm.time,
        **slurm.sbatch,
    }
    if slurm.reservation:
        more["reservation"] = slurm.reservation
    if resources.gpus_per_node:
        kind = f"{slurm.gpu_type}:" if slurm.gpu_type else ""
        if slurm.gpus_as == "gres":
            more["gres"] = f"gpu:{kind}{resources.gpus_per_node}"
        else:
            more["gpus-per-node"] = f"{kind}{resources.gpus_per_node}"
    text: str = _make_sbatch_string(
        command=body,
        folder="logs",
        job_name=spec.name,
        partition=slurm.partition,
        account=slurm.account,
        qos=slurm.qos,
        constraint=slurm.constraint,
        nodelist=slurm.nodelist,
        exclude=slurm.exclude,
        exclusive=True if slurm.exclusive else None,
        mail_user=slurm.mail_user,
        mail_type=slurm.mail_type,
        nodes=resources.nodes + resources.spares,
        ntasks_per_node=tasks,
        cpus_per_task=resources.cpus_per_node // tasks if resources.cpus_per_node else None,
        mem=resources.memory,
        setup=['# by hand, from the run directory: sbatch --chdir="$PWD" job.sbatch'],
        stderr_to_stdout=True,
        use_srun=False,
        wckey=None,
        additional_parameters={key: value for key, value in more.items() if value is not False},
    )
    return text


HEAD = """\
set -uo pipefail
run=$PWD  # the run directory: sbatch --chdir
attempt=${{SLURM_RESTART_COUNT:-0}}
rm -f -- "$run/exit-code" "$run/logs/failed-before-ranks"  # an earlier attempt's
{secrets}step=
signalled=0
# time is nearly up: srun hands this to the ranks, which save and stop
trap '{warned}signalled=1; [ -z "$step" ] || kill -USR2 "$step" 2>/dev/null' USR2
# srun would take its own SIGTERM as leave to kill: the steps get it from Slurm
trap 'signalled=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if ((${{#hosts[@]}} < {nodes})); then
  echo "dslaunch: {nodes} nodes train and Slurm names ${{#hosts[@]}}: ${{SLURM_JOB_NODELIST:-none}}" >&2
  exit 78
fi
if [ -n "${{SLURM_CPUS_PER_TASK:-}}" ]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # since Slurm 22.05 srun does not inherit it
fi"""

PATIENCE = 90  # seconds that whoever judges may say nothing, after the time to come up

PREFLIGHT = """
# --- preflight: {all} nodes are checked in the environment that trains; {nodes} healthy ones are needed
hosts=("${{hosts[@]:0:{all}}}")  # an allocation that one sits in may have more
mkdir -p -- "$run/preflight"
# an earlier attempt's
rm -f -- "$run/preflight/"{{failed-*,beat,code,train,exclude,bandwidth,config,verdict.json,progress.jsonl}}
port=$(python3 "$run/node/port.py" "$SLURM_JOB_ID" "preflight-$attempt") || exit 69
DSLAUNCH_PREFLIGHT_TOKEN=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \\n')  # of this job's agents alone
DSLAUNCH_NODES=$(IFS=,; echo "${{hosts[*]}}")
DSLAUNCH_COORDINATOR=${{hosts[0]}}:$port
DSLAUNCH_PREFLIGHT_OUT=$run/preflight
export DSLAUNCH_PREFLIGHT_TOKEN DSLAUNCH_NODES DSLAUNCH_COORDINATOR DSLAUNCH_PREFLIGHT_OUT
# shellcheck disable=SC2016  # every task expands this for itself
srun {srun} \\
  bash -c 'trap "" USR2; export NODE_RANK=$SLURM_NODEID DSLAUNCH_NODE=$SLURMD_NODENAME; exec bash "$0"' \\
  "$run/preflight.sh" &
step=$!
touch "$run/preflight/beat"
while kill -0 "$step" 2>/dev/null && [ ! -s "$run/preflight/code" ]; do
  sleep 0.5
  (($(date +%s) - $(stat -c %Y "$run/preflight/beat") < {patience})) || break  # whoever judges hangs, or never came
done
for ((i = 0; i < 20; i++)); do kill -0 "$step" 2>/dev/null || break; sleep 0.5; done
kill -TERM "$step" 2>/dev/null  # a node that hangs would keep it
wait "$step"
step=
unset DSLAUNCH_PREFLIGHT_TOKEN DSLAUNCH_NODES DSLAUNCH_COORDINATOR DSLAUNCH_PREFLIGHT_OUT
[ -s "$run/preflight/code" ] || python3 "$run/node/lost.py" "$run/preflight" "${{hosts[@]}}"
read -r rc <"$run/preflight/code"
case $rc in
  0 | 10) ;;
  *)
    echo "dslaunch: the preflight ends this job with $rc before any of your code ran: $run/preflight/verdict.json" >&2
    {resubmit}echo "$rc" >"$run/exit-code"
    exit "$rc"
    ;;
esac
"""

CHOSEN = """\
if ((signalled)); then  # time was up before anything trained
  rc={stopped}
  echo "$rc" >"$run/exit-code"
{requeue}  exit "$rc"
fi
rm -f -- "$run/logs/failed-before-ranks"  # of a node that is left out
mapfile -t hosts <"$run/preflight/train"
DSLAUNCH_BUS_BANDWIDTH=$(cat -- "$run/preflight/bandwidth")  # GB/s between nodes, as measured just now
export DSLAUNCH_BUS_BANDWIDTH"""

# A checkpoint is of one ZeRO stage: a run that has one goes on as it began.
SUITED = """
read -r config <"$run/preflight/config"  # which the planner chose for that bandwidth
[ -e "$run/ds_config.0.json" ] || cp -- "$run/ds_config.json" "$run/ds_config.0.json"
[ -e {latest} ] || cp -- "$run/${{config/#ds_config.json/ds_config.0.json}}" {config}"""

LET_GO = """
trap '[ -z "$step" ] || kill -TERM "$step" 2>/dev/null' TERM INT  # agents have nothing to save"""

ALONE = """\
echo "$rc" >"$run/exit-code"
exit "$rc\""""

# The controller takes no new --exclude for a job that runs: a second one with the same run directory follows.
RESUBMIT = """\
if [ "$rc" = 20 ] && [ -s "$run/preflight/exclude" ] && ((${{DSLAUNCH_RESUBMITTED:-0}} < {times})); then
      export DSLAUNCH_RESUBMITTED=$((${{DSLAUNCH_RESUBMITTED:-0}} + 1))
      DSLAUNCH_EXCLUDED=${{DSLAUNCH_EXCLUDED:+$DSLAUNCH_EXCLUDED,}}{already}$(paste -sd, "$run/preflight/exclude")
      export DSLAUNCH_EXCLUDED
      if next=$(sbatch --parsable --chdir="$run" --comment="dslaunch:${{run##*/}}" \\
        --exclude="$DSLAUNCH_EXCLUDED" "$run/{entry}"); then
        trap - EXIT  # it needs what this one would clear away
        printf '{{"time": %s, "event": "submitted", "job": "%s", "exclude": "%s"}}\\n' \\
          "$(date +%s)" "${{next%%;*}}" "$DSLAUNCH_EXCLUDED" >>"$run/journal.jsonl"
        echo "dslaunch: submitted again as job ${{next%%;*}}, without $DSLAUNCH_EXCLUDED" >&2
        exit "$rc"
      fi
    fi
    """

TAIL = """
printf '%s slots={per_node}\\n' "${{hosts[@]:0:{nodes}}}" >"$run/hostfile"
export MASTER_ADDR=${{hosts[0]}}
MASTER_PORT=$(python3 "$run/node/port.py" "$SLURM_JOB_ID" "$attempt") || exit 69  # of this job alone
export MASTER_PORT

# one task fails -> Slurm ends the others, which would wait for the dead; one that is done early waits for the rest
# shellcheck disable=SC2016  # every task expands this for itself
srun {srun} \\
  bash -c 'trap "" USR2; {exports} exec bash "$0/node.sh"' "$run" &
step=$!
rc=0
while :; do
  signalled=0
  wait "$step"
  rc=$?
  ((signalled)) || break
done
{verdict}echo "$rc" >"$run/exit-code"
{end}exit "$rc\""""

# Only a job that Slurm warned has used its time: a program that ends with 75 by itself would go round for ever.
REQUEUE = """\
if [ "$rc" = {stopped} ] && [ -n "${{warned:-}}" ]; then  # out of time, checkpoint saved
  scontrol requeue "$SLURM_JOB_ID" && exit "$rc"
fi
"""


def _body(plan: Plan, *, exchanged: bool) -> str:
    spec, nodes = plan.spec, plan.spec.resources.nodes
    tasks = _tasks(spec)
    text = _head(spec)
    if spec.checks_nodes:
        requeue = '  [ -z "${warned:-}" ] || scontrol requeue "$SLURM_JOB_ID"\n' if spec.slurm.requeue else ""
        text += _preflight(spec, training=True) + CHOSEN.format(stopped=STOPPED_EARLY, requeue=requeue)
        if exchanged:
            text += SUITED.format(latest=_latest(plan), config='"$run/ds_config.json"')
    words = [*_srun(nodes, tasks), "--kill-on-bad-exit=1", "--wait=0", "--unbuffered", *_more(spec)]
    if spec.checks_nodes:
        words.append(THESE)
    exports = "export NODE_RANK=$SLURM_NODEID;"
    if spec.train.launcher == "srun":
        exports += " export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS;"
    end = REQUEUE.format(stopped=STOPPED_EARLY) if spec.slurm.requeue else ""
    if spec.slurm.requeue and spec.secrets:  # the next attempt needs them
        end += '[ "$rc" != 0 ] || rm -rf -- "$run/secrets"\n'
    return text + TAIL.format(
        nodes=nodes,
        per_node=spec.per_node,
        verdict=bundles.VERDICT,
        srun=bundles.wrap(words),
        exports=exports,
        end=end,
    )


def _latest(plan: Plan) -> str:
    """Where DeepSpeed names the newest checkpoint, as a word of the batch script."""
    folder, workdir = plan.checkpoint_dir, plan.spec.train.workdir
    path = f"{folder}/latest" if folder.startswith("/") else f"{workdir}/{folder}/latest"
    return bundles.quote(path) if path.startswith("/") else '"$run/submitted-from"/' + bundles.quote(path)


THESE = '--nodelist="$(IFS=,; echo "${hosts[*]}")"'


def _head(spec: JobSpec) -> str:
    return HEAD.format(
        nodes=spec.resources.nodes,
        secrets=bundles.FORGET if spec.secrets and not spec.slurm.requeue else "",
        warned="warned=1 " if spec.slurm.requeue else "",
    )


def _preflight(spec: JobSpec, *, training: bool) -> str:
    """Agents on every node, one task each. The first node's judges; a node that dies ends nobody else's."""
    everywhere = spec.resources.nodes + spec.resources.spares
    words = [
        *_srun(everywhere, 1),
        "--kill-on-bad-exit=0",
        "--wait=0",
        "--no-kill",
        "--unbuffered",
        THESE,
        *_more(spec),
    ]
    again = ""
    if training and spec.preflight.resubmit:
        already = f"{spec.slurm.exclude}," if spec.slurm.exclude else ""
        again = RESUBMIT.format(times=spec.preflight.resubmit, entry=ENTRY, already=already)
    patience = round(spec.preflight.join_timeout) + PATIENCE
    return PREFLIGHT.format(
        all=everywhere, nodes=spec.resources.nodes, srun=bundles.wrap(words), resubmit=again, patience=patience
    )


def _srun(nodes: int, tasks: int) -> list[str]:
    return [f"--nodes={nodes}", f"--ntasks={nodes * tasks}", f"--ntasks-per-node={tasks}", "--export=ALL"]


def _more(spec: JobSpec) -> list[str]:
    return [*(bundles.quote(word) for word in spec.slurm.srun), *(_pyxis(spec) if spec.box else ())]


def _pyxis(spec: JobSpec) -> list[str]:
    box = spec.box
    assert box is not None
    mounts = ["$run:$run", "$(readlink -f submitted-from):$run/submitted-from", *box.mounts]
    return [f"--container-image={bundles.quote(box.image)}", f'--container-mounts="{",".join(mounts)}"',
            '--container-workdir="$run"']  # fmt: skip
