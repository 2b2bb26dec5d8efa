"""Programs beside the training: one step of the allocation each, which `node/services.py` starts and stops.

Every attempt starts them anew. A server that trained weights were pushed into, or that has a communicator with ranks
that are dead, would answer the next attempt as if it were the last one; to load a model again takes minutes.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

from launcher import bundle as bundles
from launcher import nccl, software
from launcher.bundle import STOPPED_EARLY, File
from launcher.errors import Problem
from launcher.spec import JobSpec, Service

HELPERS = ("services.py",)  # what the batch script needs beside its own

# Nodes of services are the last ones of the allocation, and no host of any attempt. No preflight looks at them.
BEHIND = 'behind=("${{hosts[@]:{first}:{own}}}")  # nodes of services, which nobody checks\n'

SERVE = """
serve() {{  # until all services are ready; their hosts and ports are in the environment then
  services=(python3 "$run/node/services.py")
  which=(--run "$run" --job "$SLURM_JOB_ID" --attempt "$attempt" --train "${{hosts[@]}}")
  which+=(--behind ${{behind[@]+"${{behind[@]}}"}})
  "${{services[@]}}" place "${{which[@]}}" || end {unavailable}
  # shellcheck source=/dev/null
  . "$run/services/environment"
  "${{services[@]}}" run "${{which[@]}}" --script "$$" &
  keeper=$!
  while kill -0 "$keeper" 2>/dev/null && [ -z "$signalled" ]; do
    [ ! -e "$run/services/ready" ] || return 0
    [ ! -e "$run/services/failed" ] || return 1
    sleep 0.2
  done
  return 1
}}
served() {{  # they end with the trainer; one that ended first is why it did
  echo "$rc" >"$run/services/over.$$" && mv -- "$run/services/over.$$" "$run/services/over"
  while kill -0 "$keeper" 2>/dev/null; do wait "$keeper"; done
  if [ -s "$run/services/failed" ] && [ -z "$signalled" ]; then
    read -r rc <"$run/services/failed"
  fi
}}
"""

AROUND = """
  # --- services
  rc={stopped}  # time was up before anything trained
  if serve; then
{train}
  elif [ -z "$signalled" ]; then
    rc={unavailable}
  fi
  served
"""


def components(spec: JobSpec) -> list[Service]:
    """Services with nodes of another kind: the first of them is heterogeneous component 1."""
    return [service for service in spec.services if service.component]


def heterogeneous(spec: JobSpec, text: str) -> str:
    """The script with the lines of its further components, each a `#SBATCH hetjob` and what that one asks for."""
    if not components(spec):
        return text
    from submitit.slurm.slurm import _make_sbatch_string

    lines = text.split("\n")
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH "))
    more = []
    for service in components(spec):
        part = _make_sbatch_string(
            command="", folder="logs", use_srun=False, wckey=None, additional_parameters=_asked(spec, service)
        )
        ours = [line for line in part.split("\n") if line.startswith("#SBATCH --") and not IMPLIED.match(line)]
        more += ["", f"# {service.name}", "#SBATCH hetjob", *ours]
    return "\n".join([*lines[: last + 1], *more, *lines[last + 1 :]])


IMPLIED = re.compile(r"#SBATCH --(job-name|output|error|open-mode|signal)=")  # of the first component alone


def _asked(spec: JobSpec, service: Service) -> dict[str, Any]:
    """What is not said of a component is as the job has it, but for the kind of its nodes."""
    own, slurm = service.component, spec.slurm
    assert own is not None
    gpus = f"{own.gpu_type}:" if own.gpu_type else ""
    gpus = f"{gpus}{service.gpus_per_node}" if service.gpus_per_node and slurm.gpus_as != "none" else ""
    asked = {
        "nodes": service.nodes,
        "ntasks-per-node": service.tasks_per_node,
        "cpus-per-task": service.cpus_per_node // service.tasks_per_node if service.cpus_per_node else None,
        "mem": service.memory,
        "time": slurm.time,
        "partition": own.partition or slurm.partition,
        "account": own.account or slurm.account,
        "qos": own.qos or slurm.qos,
        "constraint": own.constraint,
        "exclusive": own.exclusive or None,
        "gpus-per-node" if slurm.gpus_as == "gpus-per-node" else "gres": (
            gpus if slurm.gpus_as == "gpus-per-node" else f"gpu:{gpus}"
        )
        if gpus
        else None,
    }
    return {name: value for name, value in asked.items() if value is not None}


def behind(spec: JobSpec) -> str:
    """The line that keeps the services' nodes, before the hosts are cut to those that train."""
    if not spec.services:
        return ""
    return BEHIND.format(first=spec.resources.nodes + spec.resources.spares, own=spec.serving)


def functions(spec: JobSpec) -> str:
    return SERVE.format(unavailable=UNAVAILABLE) if spec.services else ""


def around(spec: JobSpec, train: str) -> str:
    """The lines of one attempt's training, with the services started before and stopped behind them."""
    if not spec.services:
        return train
    inside = bundles.indent(train.strip("\n") + "\n", "  ").rstrip("\n")
    return AROUND.format(stopped=STOPPED_EARLY, unavailable=UNAVAILABLE, train=inside)


UNAVAILABLE = 69  # EX_UNAVAILABLE


def files(spec: JobSpec) -> list[File]:
    """What is told to services.py; and of each service the step that starts it, and its script on every node."""
    if not spec.services:
        return []
    told = {"suffix": spec.slurm.address_suffix or "", "services": [_row(spec, service) for service in spec.services]}
    found = [File("services/services.json", json.dumps(told, indent=1) + "\n")]
    for service in spec.services:
        there = within(spec, service)
        found.append(File(f"services/{service.name}.srun", _step(spec, service, software.srun_words(there))))
        if software.hosted(there):
            found.append(File(f"host-{service.name}.sh", bundles.host_script(there)))
        found.append(File(f"service-{service.name}.sh", _script(there, service)))
    return [*found, *(bundles.node_file(name) for name in HELPERS)]


def within(spec: JobSpec, service: Service) -> JobSpec:
    """The job as the service sees it: with its own image nothing of the job's software is there."""
    env = {**spec.env, **service.env}
    if service.container is None:
        return replace(spec, env=env, setup=service.setup or spec.setup)
    return replace(
        spec,
        env=env,
        setup=service.setup,
        container=service.container,
        modules=(),
        stage=(),
        venv=None,
        conda=None,
        uv=None,
        source=(),
        mkdir=(),
    )


def contained(spec: JobSpec) -> list[Problem]:
    """What cannot be of containers that services have for themselves."""
    found = []
    known = software.problems(spec, "slurm")
    for number, service in enumerate(spec.services):
        if service.container is not None:
            for problem in software.problems(within(spec, service), "slurm"):
                own = problem.at[:1] == ("container",)
                if own or problem not in known:
                    at = ("services", number, *problem.at) if own else problem.at
                    found.append(Problem(problem.message, problem.hint, at))
    return found


def _row(spec: JobSpec, service: Service) -> dict[str, Any]:
    ready = service.ready
    asked = {"port": ready.port, "http": ready.http, "log": ready.log, "file": ready.file, "timeout": ready.timeout}
    return {
        "name": service.name,
        "on": service.on,
        "nodes": service.nodes,
        "group": components(spec).index(service) + 1 if service.component else 0,
        "port": service.port,
        "after": list(service.after),
        "essential": service.essential,
        "workdir": _workdir(spec),
        "ready": {**asked, "hosts": ready.hosts},
    }


def _workdir(spec: JobSpec) -> str:
    """As seen from the run directory, by whoever looks for a file of the service's."""
    below = "submitted-from" if software.snapshot(spec) in ("", "none") else "code"
    return spec.train.workdir if spec.train.workdir.startswith("/") else f"{below}/{spec.train.workdir}"


STEP = """\
#!/usr/bin/env bash
# {name}: one step of the job. services.py gives the run directory, and the nodes.
run=$1
# what the job asked for on the nodes that train
unset SLURM_CPUS_PER_TASK SRUN_CPUS_PER_TASK SLURM_GPUS SLURM_GPUS_PER_NODE SLURM_GPUS_PER_TASK SLURM_NTASKS_PER_GPU
unset SLURM_TRES_PER_TASK SLURM_CPUS_PER_GPU SLURM_CPU_BIND SLURM_MEM_BIND SLURM_GPU_BIND
unset SLURM_DISTRIBUTION SLURM_HINT
# shellcheck disable=SC2016  # every task expands this for itself
exec srun {srun} \\
  bash -c '{inside}' "$run"
"""


def _step(spec: JobSpec, service: Service, more: list[str]) -> str:
    nodes = {"own": service.nodes, "first": 1, "all": spec.resources.nodes}[service.on]
    tasks = nodes * service.tasks_per_node
    words = [
        f"--nodes={nodes}",
        f"--ntasks={tasks}",
        f"--ntasks-per-node={service.tasks_per_node}",
        '--nodelist="$2"',
        "--export=ALL",
        "--kill-on-bad-exit=1",
        "--wait=0",
        "--unbuffered",
        f"--job-name=service-{service.name}",
    ]
    if components(spec):
        words.append(f"--het-group={components(spec).index(service) + 1 if service.component else 0}")
    if service.on != "own":
        words += ["--overlap", "--mem=0"]
    elif service.memory:
        words.append(f"--mem={service.memory}")
    cpus = service.cpus_per_node
    if cpus is None and service.on == "own" and not service.component:
        cpus = spec.resources.cpus_per_node  # srun's own word is one, and sites that bind keep a server to it
    if cpus:
        words.append(f"--cpus-per-task={max(1, cpus // service.tasks_per_node)}")
    gpus = service.gpus_per_node
    there = spec.resources.gpus_per_node
    gpus = gpus if gpus is not None else (there if service.on == "own" and not service.component else 0)
    if gpus and spec.slurm.gpus_as != "none":
        words.append(f"--gres=gpu:{gpus}")
    elif not gpus and there and not service.component:
        words.append("--gres=none")
    log = f"service-{service.name}" + ("-$SLURM_PROCID" if tasks > 1 else "")
    # its step is found again by what squeue calls it: an array's task, or the component, has the number
    array = "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}"
    job = f"$SLURM_JOB_ID_HET_GROUP_{components(spec).index(service) + 1}" if service.component else array
    inside = (
        f'trap "" USR2; umask 077; job={job}; job=${{job:-$SLURM_JOB_ID}}; '
        f'[ "$SLURM_PROCID" != 0 ] || echo "$job.$SLURM_STEP_ID" >"$0/services/{service.name}.step"; '
        f"exec {software.inside(within(spec, service), '$0', f'host-{service.name}.sh')}"
        f'bash "$0/service-{service.name}.sh" >>"$0/logs/{log}.log" 2>&1'
    )
    srun = bundles.wrap([*words, *more])
    return STEP.format(name=service.name, srun=srun, inside=inside)


def _script(there: JobSpec, service: Service) -> str:
    lines = [
        "#!/usr/bin/env bash",
        f"# {service.name}: runs beside {there.name}, with DSLAUNCH_HOST_NAME, DSLAUNCH_HOSTS_NAME and",
        "# DSLAUNCH_PORT_NAME of every service, and DSLAUNCH_TRAIN_HOSTS and MASTER_ADDR of those that train.",
        *bundles.prelude(
            there, nccl.variables(there), submitted_from=True, failed=f"$here/services/{service.name}.failed"
        ),
        "",
        "# --- service",
        f"cd -P -- {software.workdir(there)}",
        f"exec {bundles.wrap(map(bundles.quote, service.command))}",
    ]
    return "\n".join(lines) + "\n"
