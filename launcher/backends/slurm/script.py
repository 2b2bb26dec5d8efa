"""The sbatch script."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from launcher import bundle as bundles
from launcher import nccl, setting, software
from launcher.backends.slurm import options, services
from launcher.bundle import STOPPED_EARLY, Bundle, File
from launcher.errors import UserError
from launcher.plan import Plan
from launcher.spec import JobSpec

ENTRY = "job.sbatch"
UNAVAILABLE = 69  # EX_UNAVAILABLE: no port, or nobody knows whether another job has this run


def render(plan: Plan) -> Bundle:
    """The script with everything it needs. Its size does not depend on the number of nodes."""
    spec = plan.spec
    _check(spec)
    rungs = setting.ladder(plan) if spec.checks_nodes else []
    configs = setting.configs(rungs)
    told = setting.make(spec, plan, rungs=rungs) if spec.checks_nodes else None
    script = File(ENTRY, _script(spec, _body(plan, exchanged=bool(configs))))
    others = (File(name, bundles.config_json(config)) for name, config in configs.items())
    helpers = map(bundles.node_file, (*bundles.BATCH, *(["lost.py"] if told else [])))
    files = (script, *others, *bundles.common(plan, told, flags=["--shared-logs"]), *helpers)
    files += tuple(services.files(spec))
    if spec.train.launcher == "job":
        files += (File("reach.sh", options.reaching(spec)),)
    return Bundle(files, ENTRY)


def preflight(spec: JobSpec, plan: Plan | None) -> Bundle:
    """A job that checks its nodes and ends. Its `plan`, where there is one, says what has to fit."""
    _check(spec)
    spec = replace(spec, services=())  # nobody looks at the nodes of services
    script = File(ENTRY, _script(spec, _head(spec) + LET_GO + _preflight(spec) + ALONE))
    told = setting.make(spec, plan)
    files = bundles.preflight_files(spec, nccl.variables(spec), told)
    return Bundle((script, *files, *map(bundles.node_file, ("port.py", "lost.py"))), ENTRY)


def _check(spec: JobSpec) -> None:
    problems = [*options.problems(spec), *software.problems(spec, "slurm"), *services.contained(spec)]
    if problems:
        raise UserError(*problems)


def notes(plan: Plan, environ: Mapping[str, str]) -> list[str]:
    """What is left out, and what will surprise."""
    return options.notes(plan.spec, environ)


def _script(spec: JobSpec, body: str) -> str:
    from submitit.slurm.slurm import _make_sbatch_string  # its executor wants srun on PATH to write text

    more: dict[str, Any] = {
        "output": "logs/slurm-%j.out",
        "requeue" if requeues(spec) else "no-requeue": True,
        **options.sbatch(spec),
    }
    text: str = _make_sbatch_string(
        command=body,
        folder="logs",
        job_name=spec.name,
        setup=['# by hand, from the run directory: sbatch --chdir="$PWD" job.sbatch'],
        stderr_to_stdout=True,
        use_srun=False,
        wckey=None,
        additional_parameters=more,
    )
    return services.heterogeneous(spec, text)


HEAD = """\
set -uo pipefail
run=$PWD  # the run directory: sbatch --chdir
step=
interrupted=0
signalled=
warned=
{begin}
told() {{
  interrupted=1 signalled=1
  : >"$run/logs/told-$attempt"
}}
# time is nearly up: srun hands this to the ranks, which save and stop
trap 'told; warned=1; [ -z "$step" ] || kill -USR2 "$step" 2>/dev/null' USR2
# srun would take its own SIGTERM as leave to kill: the steps get it from Slurm
trap 'told; scancel --signal=TERM "$SLURM_JOB_ID"' TERM
end() {{  # the run is over
{forget}  echo "$1" >"$run/exit-code"
  exit "$1"
}}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if ((${{#hosts[@]}} < {nodes})); then
  echo "dslaunch: {nodes} nodes {do} and Slurm names ${{#hosts[@]}}: ${{SLURM_JOB_NODELIST:-none}}" >&2
  end 78
fi
{behind}if [ -n "${{SLURM_CPUS_PER_TASK:-}}" ]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # from Slurm 22.05 to 23.02 srun does not inherit it
fi{more}"""

ONCE = """\
attempt=${SLURM_RESTART_COUNT:-0}
rm -f -- "$run/exit-code" "$run/logs/failed-before-ranks"  # an earlier attempt's"""

# The journal says which attempt comes, and whether another job has this run.
BEGIN = """\
recover=(python3 "$run/node/recover.py" {options})
attempt=$("${{recover[@]}}" begin --restart "${{SLURM_RESTART_COUNT:-0}}")
case $? in
  0) rm -f -- "$run/exit-code" "$run/logs/failed-before-ranks" ;;  # an earlier attempt's
  {duplicate}) exit 0 ;;  # a second copy of a job that lives
  {over})
    echo {unavailable} >"$run/exit-code"
    exit {unavailable}
    ;;
  *) exit {unavailable} ;;
esac"""

PATIENCE = 90  # seconds that whoever judges may say nothing, after the time to come up

PREFLIGHT = """
# --- preflight: {all} nodes are checked in the environment that trains; {nodes} healthy ones are needed
hosts=("${{hosts[@]:0:{all}}}")  # an allocation that one sits in may have more
preflight() {{  # of "${{hosts[@]}}"; its code in rc, the rest in $run/preflight
  mkdir -p -- "$run/preflight"
  # an earlier attempt's
  rm -f -- "$run/preflight/"{{failed-*,beat,code,train,exclude,bandwidth,config,verdict.json,progress.jsonl}}
  port=$(python3 "$run/node/port.py" "$SLURM_JOB_ID" "preflight-$attempt") || end {unavailable}
  DSLAUNCH_PREFLIGHT_TOKEN=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \\n')  # of this job's agents alone
  DSLAUNCH_NODES=$(IFS=,; echo "${{hosts[*]}}")
  DSLAUNCH_COORDINATOR={address}:$port
  DSLAUNCH_PREFLIGHT_OUT=$run/preflight
  export DSLAUNCH_PREFLIGHT_TOKEN DSLAUNCH_NODES DSLAUNCH_COORDINATOR DSLAUNCH_PREFLIGHT_OUT
  # shellcheck disable=SC2016  # every task expands this for itself
  {without}srun {srun} \\
    bash -c 'trap "" USR2; export NODE_RANK=$SLURM_NODEID DSLAUNCH_NODE=$SLURMD_NODENAME; exec {inside}bash "$0"' \\
    "$run/preflight.sh" &
  step=$!
  touch "$run/preflight/beat"
  while kill -0 "$step" 2>/dev/null && [ ! -s "$run/preflight/code" ]; do
    sleep 0.5
    (($(date +%s) - $(stat -c %Y "$run/preflight/beat") < {patience})) || break  # who judges hangs, or never came
  done
  for ((i = 0; i < 20; i++)); do kill -0 "$step" 2>/dev/null || break; sleep 0.5; done
  kill -TERM "$step" 2>/dev/null  # a node that hangs would keep it
  wait "$step"
  step=
  unset DSLAUNCH_PREFLIGHT_TOKEN DSLAUNCH_NODES DSLAUNCH_COORDINATOR DSLAUNCH_PREFLIGHT_OUT
  [ -s "$run/preflight/code" ] || python3 "$run/node/lost.py" "$run/preflight" "${{hosts[@]}}"
  read -r rc <"$run/preflight/code"
  [ "$rc" = 0 ] || [ "$rc" = 10 ] ||
    echo "dslaunch: the preflight ends this job with $rc before any of your code ran: $run/preflight/verdict.json" >&2
}}
"""

# Too few nodes: a second job with the same run directory follows, without the others, where it may.
FIT = """\
fit() {{
  [ -n "$signalled" ] || preflight
  [ -z "$signalled" ] || rc={stopped}  # time was up before anything trained
  next=$("${{recover[@]}}" checked --attempt "$attempt" --code "$rc" --told "$signalled" --warned "$warned")
  [ "$next" = go ] || leave "$next"
  rm -f -- "$run/logs/failed-before-ranks"  # of a node that is left out
  mapfile -t hosts <"$run/preflight/train"
}}
fit
DSLAUNCH_BUS_BANDWIDTH=$(cat -- "$run/preflight/bandwidth")  # GB/s between nodes, as measured just now
export DSLAUNCH_BUS_BANDWIDTH
export DSLAUNCH_PREFLIGHT_STAGES=host  # between two attempts"""

# Without a preflight: what Slurm says, and whether its daemons answer, was asked when the hosts were chosen.
UNFIT = """\
  if [ -n "$signalled" ]; then
    rc={stopped}
    leave "$("${{recover[@]}}" checked --attempt "$attempt" --code "$rc" --told "$signalled" --warned "$warned")"
  fi
"""

# A checkpoint is of one ZeRO stage: a run that has one goes on as it began.
SUITED = """
read -r config <"$run/preflight/config"  # which the planner chose for that bandwidth
[ -e "$run/ds_config.0.json" ] || cp -- "$run/ds_config.json" "$run/ds_config.0.json"
[ -e {latest} ] || cp -- "$run/${{config/#ds_config.json/ds_config.0.json}}" {config}"""

LET_GO = """
trap '[ -z "$step" ] || kill -TERM "$step" 2>/dev/null' TERM INT  # agents have nothing to save"""

ALONE = """\
preflight
end "$rc\""""

LEAVE = """
leave() {  # what recover.py answers
  if [ "$1" = leave ]; then exit "$rc"; fi  # this job, queued again, or another one goes on with the run
  end "$rc"
}"""

LOOP = """
allocation=("${{hosts[@]}}")  # spares too
{check}
while :; do
  # --- attempt: a number of its own for every start, whatever the job
  hosts=("${{hosts[@]:0:{nodes}}}")
  printf '%s slots={per_node}\\n' "${{hosts[@]}}" >"$run/hostfile"
  export DSLAUNCH_ATTEMPT=$attempt MASTER_ADDR={address}
  MASTER_PORT=$(python3 "$run/node/port.py" "$SLURM_JOB_ID" "$attempt") || end {unavailable}  # of this attempt alone
  export MASTER_PORT
  "${{recover[@]}}" attempt --attempt "$attempt" --hosts "${{hosts[@]}}"
{train}
  # --- what comes now
  read -r next pause chosen < <("${{recover[@]}}" after --attempt "$attempt" --code "$rc" --told "$signalled" \\
    --warned "$warned" --hosts "${{hosts[@]}}" --allocation "${{allocation[@]}}")
  [ "$next" = restart ] || leave "$next"
  attempt=$((attempt + 1))
  sleep "$pause"
  # a step on a lost node holds its share until Slurm gives that node up
  unset SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU
  export SLURM_OVERLAP=1 SLURM_MEM_PER_NODE=0
  read -r -a hosts <<<"$chosen"
{again}done"""

TRAIN = """
  # one task fails -> Slurm ends the others, which would wait for the dead; one done early waits for the rest
  # shellcheck disable=SC2016  # every task expands this for itself
  {without}srun {srun} \\
    bash -c 'trap "" USR2; {exports} exec {inside}bash "$0/node.sh"' "$run"{these} &
  step=$!
  "${{recover[@]}}" watch --attempt "$attempt" --script "$$" --step "$step" --hosts "${{hosts[@]}}" &
  watcher=$!
  rc=0
  while :; do
    interrupted=0
    wait "$step"
    rc=$?
    ((interrupted)) || break
  done
  step=
  kill "$watcher" 2>/dev/null
{verdict}"""


# Steps that the program started may outlive it, with GPUs that the next attempt needs.
LEFT = """\
  while read -r id name; do
    case $id:$name in *.batch:* | *.extern:* | *:service-*) ;; *) scancel --quiet "$id" ;; esac
  done < <(squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format='%i %j')
"""


def _body(plan: Plan, *, exchanged: bool) -> str:
    spec, nodes = plan.spec, plan.spec.resources.nodes
    alone = spec.train.launcher == "job"
    words = [
        *(_srun(1, 1) if alone else _srun(nodes, options.tasks(spec))),
        f"--kill-on-bad-exit={int(spec.slurm.kill_on_bad_exit)}",
        "--wait=0",
        "--unbuffered",
        '--nodelist="${hosts[0]}"' if alone else THESE,
        *map(bundles.quote, options.training(spec)),
        *_more(spec),
    ]
    words += ["--het-group=0"] if services.components(spec) else []
    exports = "export NODE_RANK=$SLURM_NODEID;" + (' . "$0/reach.sh" "$0" "$1";' if alone else "")
    if spec.train.launcher == "srun":
        exports += " export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS;"
    everywhere = nodes + spec.resources.spares
    check = f'allocation=("${{allocation[@]:0:{everywhere}}}")  # that one sits in may have more'
    again = UNFIT.format(stopped=STOPPED_EARLY)
    if spec.checks_nodes:
        check = FIT.format(stopped=STOPPED_EARLY)
        if exchanged:
            check += SUITED.format(latest=bundles.checkpoints(plan, "/latest"), config='"$run/ds_config.json"')
        again = "  fit\n"
    train = TRAIN.format(
        inside=software.inside(spec, "$0"),
        without=f"{apart} \\\n    " if alone and (apart := options.without(spec)) else "",
        srun=bundles.wrap(words).replace("\n", "\n  "),
        exports=exports,
        these=' "$(IFS=,; echo "${hosts[*]}")"' if alone else "",
        verdict=(LEFT if alone else "") + bundles.indent(bundles.VERDICT, "  "),
    )
    loop = LOOP.format(
        nodes=nodes,
        address=options.address(spec),
        per_node=spec.per_node,
        check=check,
        train=services.around(spec, train),
        again=again,
        unavailable=UNAVAILABLE,
    )
    checks = _preflight(spec) if spec.checks_nodes else ""
    return _head(spec, plan) + checks + services.functions(spec) + LEAVE + loop


def requeues(spec: JobSpec) -> bool:
    """Whether Slurm may put the job back by itself: after a node failure, or when another job takes the nodes."""
    return spec.slurm.requeue is True or (spec.slurm.requeue == "auto" and spec.recover.attempts > 0)


THESE = '--nodelist="$(IFS=,; echo "${hosts[*]}")"'


def _head(spec: JobSpec, plan: Plan | None = None) -> str:
    keep = '[ -n "$signalled" ] || ' if requeues(spec) else ""  # Slurm may start the job again
    return HEAD.format(
        nodes=spec.resources.nodes + spec.serving,
        do="train or serve" if spec.serving else "train",
        behind=services.behind(spec),
        begin=_begin(spec, plan) if plan else ONCE,
        forget=(f'  {keep}rm -rf -- "$run/secrets"\n' if spec.credentials else "") + software.cleanup(spec),
        more="".join("\n" + line for line in (*filter(None, [options.unset(spec)]), *_copies(spec))),
    )


def _copies(spec: JobSpec) -> list[str]:
    """sbcast sends a file once, and nodes hand it on: not every node reads it from the shared disk."""
    lines = []
    for source, target in spec.slurm.bcast.items():
        place = bundles.quote(source) if source.startswith("/") else '"$run/submitted-from"/' + bundles.quote(source)
        lines.append(f"sbcast --force --preserve {place} {bundles.quote(target)} || end {UNAVAILABLE}")
    return ["# --- files for every node's own disk", *lines] if lines else []


def _begin(spec: JobSpec, plan: Plan) -> str:
    words = [
        '--run "$run"',
        '--job "$SLURM_JOB_ID"',
        f"--nodes {spec.resources.nodes}",
        f"--attempts {spec.recover.attempts}",
        f"--checkpoints {bundles.checkpoints(plan)}",
        *([f"--exclude {bundles.quote(spec.slurm.exclude)}"] if spec.slurm.exclude else []),
        *([f"--comment={bundles.quote(spec.slurm.comment)}"] if spec.slurm.comment else []),
        *([f"--components {len(services.components(spec))}"] if services.components(spec) else []),
        *(["--requeue"] if spec.slurm.requeue is True else []),
        *(["--requeues"] if requeues(spec) else []),
        *([f"--times {spec.preflight.resubmit}"] if spec.checks_nodes and spec.preflight.resubmit else []),
    ]
    return BEGIN.format(
        options=bundles.wrap(words), duplicate=bundles.DUPLICATE, over=bundles.OVER, unavailable=UNAVAILABLE
    )


def _preflight(spec: JobSpec) -> str:
    """Agents on every node, one task each. The first node's judges; a node that dies ends nobody else's."""
    everywhere = spec.resources.nodes + spec.resources.spares
    words = [
        '--nodes="${#hosts[@]}"',
        '--ntasks="${#hosts[@]}"',
        "--ntasks-per-node=1",
        "--export=ALL",
        "--kill-on-bad-exit=0",
        "--wait=0",
        "--no-kill",
        "--unbuffered",
        THESE,
        *map(bundles.quote, options.checking(spec)),
        *_more(spec),
    ]
    return PREFLIGHT.format(
        without=f"{alone} \\\n    " if (alone := options.without(spec)) else "",
        address=options.address(spec),
        inside=software.inside(spec, "${0%/*}"),
        all=everywhere,
        nodes=spec.resources.nodes,
        srun=bundles.wrap(words).replace("\n", "\n  "),
        patience=round(spec.preflight.join_timeout) + PATIENCE,
        unavailable=UNAVAILABLE,
    )


def _srun(nodes: int, tasks: int) -> list[str]:
    return [f"--nodes={nodes}", f"--ntasks={nodes * tasks}", f"--ntasks-per-node={tasks}", "--export=ALL"]


def _more(spec: JobSpec) -> list[str]:
    return [*(bundles.quote(word) for word in spec.slurm.srun), *software.srun_words(spec)]
