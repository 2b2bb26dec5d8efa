"""Options of Slurm: what a job file's fields become on the lines of the script and in the words of srun.

A step says what it needs itself: the ranks and the agents of the preflight have different tasks on the same nodes,
and what sbatch leaves in the environment fits neither when GPUs or CPUs are counted by task or in all.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from launcher import facts, hostfile
from launcher.bundle import quote
from launcher.errors import Path as At
from launcher.errors import Problem, UserError
from launcher.spec import JobSpec
from launcher.spec.words import mebibytes, seconds

# --- what is asked of sbatch ------------------------------------------------------------------------------------


def tasks(spec: JobSpec) -> int:
    """Slurm tasks on one node: one that starts the ranks; one for each rank where `launcher: srun` starts them, or
    with `launcher: job` the program itself, whose mpirun counts a node's slots by them.
    """
    return spec.per_node if spec.train.launcher in ("srun", "job") else 1


def sbatch(spec: JobSpec) -> dict[str, Any]:
    """Long options of the script, without those of the run itself: {"mem": "500G", "contiguous": True}."""
    slurm, resources = spec.slurm, spec.resources
    everywhere = resources.nodes + resources.spares + spec.serving
    asked = {
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "reservation": slurm.reservation,
        "constraint": slurm.constraint,
        "licenses": ",".join(slurm.licenses),
        "wckey": slurm.wckey,
        "comment": slurm.comment,
        "time": slurm.time,
        "time-min": slurm.time_min,
        "begin": slurm.begin,
        "deadline": slurm.deadline,
        "nice": slurm.nice,
        "dependency": slurm.dependency,
        "nodelist": slurm.nodelist,
        "exclude": slurm.exclude,
        "exclusive": slurm.exclusive,
        "oversubscribe": slurm.oversubscribe,
        "overcommit": slurm.overcommit,
        "contiguous": slurm.contiguous,
        "spread-job": slurm.spread,
        "switches": slurm.switches,
        "segment": slurm.segment,
        "network": slurm.network,
        "tmp": slurm.tmp,
        "ntasks-per-socket": slurm.ntasks_per_socket,
        "hint": slurm.hint,
        "threads-per-core": slurm.threads_per_core,
        "core-spec": slurm.core_spec,
        "distribution": slurm.distribution,
        "wait-all-nodes": 1 if slurm.wait_all_nodes else None,
        "mail-user": slurm.mail_user,
        "mail-type": slurm.mail_type,
        "nodes": everywhere,
        "ntasks-per-node": tasks(spec),
        # only the batch shell is warned; it passes the signal on, and can tell the ranks apart from srun
        "signal": f"B:USR2@{slurm.warn_before_end}",
        "no-kill": bool(resources.spares),  # a node that goes away leaves the others to go on with a spare
        **_gpus(spec, nodes=everywhere),
        **_cpus(spec),
        **_memory(spec),
        **slurm.sbatch,
    }
    return {name: value for name, value in asked.items() if value is not None and value is not False and value != ""}


def _gpus(spec: JobSpec, *, nodes: int) -> dict[str, Any]:
    """8 GPUs of a node: "gpus-per-node": "8", "gres": "gpu:h100:8", "gpus-per-task": "1" with 8 tasks there."""
    slurm, gpus = spec.slurm, spec.resources.gpus_per_node
    kind = f"{slurm.gpu_type}:" if slurm.gpu_type else ""
    more = list(slurm.gres)
    asked: dict[str, Any] = {}
    if gpus and slurm.gpus_as == "gres":
        more.insert(0, f"gpu:{kind}{gpus}")
    elif gpus and slurm.gpus_as == "gpus-per-node":
        asked["gpus-per-node"] = f"{kind}{gpus}"
    elif gpus and slurm.gpus_as == "gpus":
        asked["gpus"] = f"{kind}{gpus * nodes}"
    elif gpus and slurm.gpus_as == "gpus-per-task":
        asked["gpus-per-task"] = f"{kind}{gpus // tasks(spec)}"
        asked["ntasks"] = nodes * tasks(spec)  # without a number of tasks the controller refuses it
    return {**asked, **({"gres": ",".join(more)} if more else {})}


def _cpus(spec: JobSpec) -> dict[str, Any]:
    cpus, gpus = spec.resources.cpus_per_node, spec.resources.gpus_per_node
    if not cpus or spec.slurm.cpus_as == "none":
        return {}
    if spec.slurm.cpus_as == "cpus-per-gpu" and gpus:
        return {"cpus-per-gpu": cpus // gpus}
    return {"cpus-per-task": cpus // tasks(spec)}


def _memory(spec: JobSpec) -> dict[str, Any]:
    memory, by = spec.resources.memory, _shares(spec)
    if not memory:
        return {}
    return {spec.slurm.memory_as: memory if by == 1 else _size(mebibytes(memory) // by)}


def _shares(spec: JobSpec) -> int:
    """Into how many parts a node's memory is divided."""
    parts = {"mem-per-gpu": spec.resources.gpus_per_node, "mem-per-cpu": spec.resources.cpus_per_node}
    return parts.get(spec.slurm.memory_as) or 1


def _size(mebibytes: float) -> str:
    """65536 is "64G", 64000 is "64000M"."""
    return f"{mebibytes / 1024:.0f}G" if mebibytes % 1024 == 0 else f"{mebibytes:.0f}M"


def minutes(time: str) -> int:
    """Slurm's spelling to whole minutes: "90" is 90, "1-12" is 2160, "30:01" is 31."""
    return -(-(seconds(time) or 0) // 60)


# --- what is asked of srun --------------------------------------------------------------------------------------

# sbatch tells srun in these what the job asked for in all or for each task. A step of fewer tasks or nodes is refused
# for them ("Invalid generic resource (gres) specification"), so that each says --gpus-per-node instead.
UNSET = ("SLURM_GPUS", "SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_CPUS_PER_GPU")


def unset(spec: JobSpec) -> str:
    """The line that keeps the counts of the job from its steps, where they would not fit."""
    slurm = spec.slurm
    counted = spec.resources.gpus_per_node and slurm.gpus_as in ("gpus", "gpus-per-task")
    if not counted and slurm.cpus_as != "cpus-per-gpu":
        return ""
    return f"unset {' '.join(UNSET)}  # of the whole job, or of a task: each step below says its own"


def training(spec: JobSpec) -> list[str]:
    """Words of the step that trains, not quoted."""
    slurm = spec.slurm
    if spec.train.launcher == "job":
        words = [word for word in checking(spec) if not word.startswith("--mpi=")]
        return [*words, "--mpi=none"]  # what starts MPI's ranks is none of them
    binds = {"cpu-bind": slurm.cpu_bind, "mem-bind": slurm.mem_bind, "gpu-bind": slurm.gpu_bind}
    words = [*_share(spec, per_node=tasks(spec)), *(f"--{name}={value}" for name, value in binds.items() if value)]
    words += [f"--accel-bind={slurm.accel_bind}"] if slurm.accel_bind else []
    words += [f"--mpi={slurm.mpi}"] if slurm.mpi else []
    return words


def checking(spec: JobSpec) -> list[str]:
    """Words of a step of one task per node, which uses all of it: the preflight. A binding by task is not its own."""
    slurm = spec.slurm
    words = _share(spec, per_node=1)
    if without(spec):
        words.append("--cpu-bind=none")
    elif slurm.cpu_bind and not _listed(slurm.cpu_bind):
        words.append(f"--cpu-bind={slurm.cpu_bind}")
    words += [f"--mpi={slurm.mpi}"] if slurm.mpi else []
    return words


# What srun tells a task of its own step. To the program of `launcher: job`, sruns of its own are steps of the job.
OF_THE_STEP = (
    "SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_MEM_PER_CPU", "SLURM_MEM_PER_GPU",
    "SLURM_CPU_BIND_TYPE", "SLURM_CPU_BIND_LIST", "SLURM_CPU_BIND_VERBOSE", "SLURM_PROCID", "SLURM_LOCALID",
    "SLURM_NODEID", "SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_NODES",
    "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_GPUS", "SLURM_MPI_TYPE", "SLURM_DISTRIBUTION",
    "SLURM_JOB_NAME",
)  # fmt: skip


def reaching(spec: JobSpec) -> str:
    """What the one task of `launcher: job` reads first: its hostfile, and Slurm's variables as in a batch script.

    A step within shares the CPUs, GPUs and memory that this one holds; Slurm 22.05 gives it memory only where it asks
    for all (0). Nodes are those that train: a job has spares, too, and nodes of services.
    """
    nodes, per_node = spec.resources.nodes, spec.per_node
    told = {
        "DSLAUNCH_HOSTFILE": '"$run/hostfile"',
        "DLTS_HOSTFILE": '"$run/hostfile"  # as GPT-NeoX asks for it',
        "SLURM_OVERLAP": "1",
        "SLURM_MEM_PER_NODE": "0",
        "SLURM_CPU_BIND": "none",
        "SLURM_NNODES": f"{nodes}",
        "SLURM_JOB_NUM_NODES": f"{nodes}",
        "SLURM_NTASKS": f"{nodes * per_node}",
        "SLURM_NPROCS": f"{nodes * per_node}",
        "SLURM_NTASKS_PER_NODE": f"{per_node}",
        "SLURM_TASKS_PER_NODE": f"'{per_node}(x{nodes})'" if nodes > 1 else f"{per_node}",
        "SLURM_JOB_NODELIST": '"$2"',
        "SLURM_NODELIST": '"$2"',
        "SLURM_MPI_TYPE": quote(spec.slurm.mpi or ""),
        "SLURM_DISTRIBUTION": quote(spec.slurm.distribution or ""),
    }
    lines = [
        f"# {spec.name}: sruns of the program are steps of the job, and start the ranks of all nodes.",
        "# shellcheck shell=bash",
        "run=$1",
        *(f"unset {' '.join(OF_THE_STEP[at : at + 5])}" for at in range(0, len(OF_THE_STEP), 5)),
        *(f"export {name}={value}" for name, value in told.items() if value not in ("", "''")),
    ]
    return "\n".join(lines) + "\n"


def without(spec: JobSpec) -> str:
    """Stands before the srun of a step of one task per node, where the job's tasks are several.

    Told all CPUs of a node, srun of 22.05 warns that the step may never run, as a task of the job has fewer; told
    nothing, a step may use all of them.
    """
    if tasks(spec) == 1 or not spec.resources.cpus_per_node or spec.slurm.cpus_as != "cpus-per-task":
        return ""
    return "env -u SRUN_CPUS_PER_TASK -u SLURM_CPUS_PER_TASK -u SLURM_TRES_PER_TASK"


def _share(spec: JobSpec, *, per_node: int) -> list[str]:
    """GPUs and CPUs of each task, where srun would not get them right from what sbatch leaves in the environment."""
    slurm, resources = spec.slurm, spec.resources
    words = []
    if resources.gpus_per_node and slurm.gpus_as in ("gpus", "gpus-per-task"):
        words.append(f"--gpus-per-node={resources.gpus_per_node}")
    if resources.cpus_per_node and slurm.cpus_as != "cpus-per-task":  # else SRUN_CPUS_PER_TASK says it
        words.append(f"--cpus-per-task={resources.cpus_per_node // per_node}")
    return words


def address(spec: JobSpec) -> str:
    """The first node as the others reach it, in the script: `${hosts[0]}i` where i names the fast network."""
    return "${hosts[0]}" + (spec.slurm.address_suffix or "")


# --- bindings ---------------------------------------------------------------------------------------------------

CPU_BINDS = ("none", "rank", "rank_ldom", "sockets", "cores", "threads", "ldoms", "boards")
CPU_LISTS = ("map_cpu", "mask_cpu", "map_ldom", "mask_ldom")
MEM_BINDS = ("none", "local", "prefer", "rank", "sort", "nosort")
MEM_LISTS = ("map_mem", "mask_mem")
GPU_BINDS = ("none", "closest")
GPU_LISTS = ("map_gpu", "mask_gpu")
GPU_COUNTS = ("single", "per_task")
LOUD = ("q", "quiet", "v", "verbose")


def _binding(text: str) -> tuple[str, list[str]]:
    """ "verbose,mask_cpu:0xff,0xff00" is ("mask_cpu", ["0xff", "0xff00"])."""
    while (head := text.split(",", 1))[0] in LOUD and len(head) == 2:
        text = head[1]
    kind, colon, rest = text.partition(":")
    return kind, rest.split(",") if colon else []


def _listed(text: str) -> bool:
    return bool(_binding(text)[1])


def _entries(items: list[str]) -> int:
    """ "0*4", "1*4" are eight."""
    return sum(int(count) if (count := item.partition("*")[2]).isdigit() else 1 for item in items)


def one_gpu_each(spec: JobSpec) -> bool:
    """Whether every rank may see fewer GPUs than its node has: its own alone, as device 0."""
    return tasks(spec) > 1 and spec.slurm.binds_gpus


def _bindings(spec: JobSpec) -> Iterator[Problem]:
    slurm, per_node = spec.slurm, tasks(spec)
    kinds = {
        "cpu_bind": (CPU_BINDS, CPU_LISTS, ()),
        "mem_bind": (MEM_BINDS, MEM_LISTS, ()),
        "gpu_bind": (GPU_BINDS, GPU_LISTS, GPU_COUNTS),
    }
    for name, (plain, lists, counts) in kinds.items():
        text = getattr(slurm, name)
        if not text:
            continue
        at = ("slurm", name)
        kind, items = _binding(text)
        known = (*plain, *lists, *counts, *LOUD)
        if kind not in known or (kind in plain and items) or (kind in (*lists, *counts) and not all(items or [""])):
            yield Problem(f"{name} {text} is none of srun's", meant(kind, known) or f"one of {', '.join(known)}", at)
        elif kind in counts and not (len(items) == 1 and re.fullmatch(r"[1-9][0-9]*", items[0])):
            yield Problem(f"{name} {kind} takes a number", f"{name}: {kind}:1", at)
        elif kind in lists and (entries := _entries(items)) != per_node:
            hint = f"{per_node} entries, one for each task of a node"
            if per_node == 1:
                hint = "train.launcher: srun starts one task for each rank; else one entry, for all of a node's"
            yield Problem(f"{name} has {entries} entries and a node {per_node} tasks", hint, at)
        elif name == "gpu_bind" and per_node == 1 and spec.per_node > 1 and kind in (*counts, "map_gpu"):
            message = (
                f"gpu_bind {text} leaves one task of a node fewer than its GPUs, and all ranks of it start there"
            )
            yield Problem(message, "train.launcher: srun starts one task for each rank", at)
    if one_gpu_each(spec) and not (spec.train.script or spec.train.module or spec.train.command):
        message = (
            f"gpu_bind {slurm.gpu_bind} shows a rank its own GPU alone, and dslaunch's trainer takes the GPU of "
        )
        yield Problem(f"{message}its LOCAL_RANK", "leave gpu_bind out, or gpu_bind: none", ("slurm", "gpu_bind"))


def _reaching(spec: JobSpec) -> Iterator[Problem]:
    """Fields of the step that starts the ranks, where that is the program's own."""
    if spec.train.launcher != "job":
        return
    for name in ("cpu_bind", "mem_bind", "gpu_bind", "accel_bind"):
        if getattr(spec.slurm, name):
            message = f"{name} is for the step of the ranks, and with launcher job your program starts that"
            yield Problem(message, "say it in the program's own srun or mpirun", ("slurm", name))
    if spec.box:
        message = "launcher job: the program runs in the container, and what it starts on other nodes does not"
        hint = "leave it out, and let the command enter it: mpirun ... apptainer exec IMAGE ..."
        yield Problem(message, hint, ("container",))
    if spec.stage and spec.resources.nodes > 1:
        message = "launcher job: stage would unpack on the first node alone"
        yield Problem(message, "slurm.bcast brings files to every node", ("stage",))
    if spec.slurm.srun:
        message = "slurm.srun is for the step of the ranks, and with launcher job your program starts that"
        yield Problem(message, "say it in the program's own srun", ("slurm", "srun"))


# --- what cannot be ---------------------------------------------------------------------------------------------

MAIL_TYPES = (
    "NONE", "BEGIN", "END", "FAIL", "REQUEUE", "ALL", "INVALID_DEPEND", "STAGE_OUT", "TIME_LIMIT", "TIME_LIMIT_90",
    "TIME_LIMIT_80", "TIME_LIMIT_50", "ARRAY_TASKS",
)  # fmt: skip
DEPENDENCIES = ("after", "afterany", "afterburstbuffer", "aftercorr", "afternotok", "afterok", "singleton")
TOGETHER = (  # fields that cannot be given both, and why
    ("exclusive", "oversubscribe", "one keeps other jobs off the nodes, the other lets them in"),
    ("contiguous", "spread", "one wants nodes side by side, the other far apart"),
    ("hint", "cpu_bind", "srun takes one of the two"),
    ("hint", "threads_per_core", "hint decides how many threads of a core are used"),
    ("hint", "ntasks_per_socket", "srun takes one of the two"),
    ("nodelist", "nodefile", "both name the nodes"),
)
MOST_COMMENT = 160  # squeue shows 256, and the run's token stands behind it


def problems(spec: JobSpec) -> list[Problem]:
    """Everything in the job file that Slurm would refuse, or that would do nothing."""
    checks = (_passed_on, _unequal, _bindings, _reaching, _words, _nodes, _places, _versions)
    return [problem for check in checks for problem in check(spec)]


def _unequal(spec: JobSpec) -> Iterator[Problem]:
    """Shares of a node that have to come out even."""
    slurm, resources, per_node = spec.slurm, spec.resources, tasks(spec)
    cpus, gpus, memory = resources.cpus_per_node, resources.gpus_per_node, resources.memory
    at: At = ("slurm", "gpus_as")
    if slurm.gpu_type and slurm.gpus_as == "none":
        yield Problem("gpu_type is named and gpus_as is none: no GPU is asked for", "leave gpu_type out", at)
    for index, one in enumerate(slurm.gres):
        if re.match(r"(gres[/:])?gpu([:=]|\Z)", one):
            count = re.search(r"[1-9][0-9]*\Z", one)
            hint = (
                f"resources.gpus_per_node: {count[0] if count else 8} with slurm.gpus_as: gres, and gres without it"
            )
            message = (
                f"gres {one} asks for GPUs, which resources.gpus_per_node does: twice, or with no rank to use them"
            )
            yield Problem(message, hint, ("slurm", "gres", index))
    at = ("slurm", "cpus_as")
    if slurm.cpus_as == "cpus-per-gpu" and not (cpus and gpus):
        missing = "resources.gpus_per_node" if cpus else "resources.cpus_per_node"
        yield Problem(f"cpus_as cpus-per-gpu needs {missing}", f"give {missing}", at)
    elif slurm.cpus_as == "cpus-per-gpu" and cpus and cpus % gpus:
        message = f"cpus_per_node {cpus} cannot be shared evenly by {gpus} GPUs"
        yield Problem(message, f"cpus_per_node: {max(gpus, cpus // gpus * gpus)}", ("resources", "cpus_per_node"))
    if cpus and cpus % per_node:
        message = f"cpus_per_node {cpus} cannot be shared evenly by {per_node} tasks"
        hint = f"cpus_per_node: {max(per_node, cpus // per_node * per_node)}"
        yield Problem(message, hint, ("resources", "cpus_per_node"))
    if slurm.memory_as != "mem":
        parts, what = _shares(spec), slurm.memory_as.removeprefix("mem-per-").upper()
        divided = {"GPU": gpus, "CPU": cpus}[what]
        at = ("slurm", "memory_as")
        if not memory or not divided:
            field = "memory" if not memory else "gpus_per_node" if what == "GPU" else "cpus_per_node"
            yield Problem(f"memory_as {slurm.memory_as} needs resources.{field}", f"give resources.{field}", at)
        elif memory == "0":
            message = "memory 0 is all of a node's, which only memory_as: mem can say"
            yield Problem(message, "memory_as: mem", at)
        elif mebibytes(memory) % parts:
            nearest = max(1, int(mebibytes(memory)) // parts) * parts
            message = f"memory {memory} of a node cannot be shared evenly by {parts} {what}s"
            yield Problem(message, f"memory: {_size(nearest)}", ("resources", "memory"))
    nodes = resources.nodes + resources.spares + spec.serving
    if slurm.segment and nodes % slurm.segment:
        nearest = next(size for size in range(min(slurm.segment, nodes), 0, -1) if nodes % size == 0)
        more = " of the job, spares and services too," if nodes != resources.nodes else ""
        message = f"{nodes} nodes{more} are no whole number of segments of {slurm.segment}"
        yield Problem(message, f"segment: {nearest}", ("slurm", "segment"))
    at = ("slurm", "ntasks_per_socket")
    if slurm.ntasks_per_socket and per_node == 1:
        message = "ntasks_per_socket with one task per node says nothing"
        yield Problem(message, "train.launcher: srun starts one task for each rank", at)


def _words(spec: JobSpec) -> Iterator[Problem]:
    """Texts that Slurm reads by rules of its own."""
    slurm = spec.slurm
    if minutes(slurm.time) * 60 <= slurm.warn_before_end + 60:
        yield Problem(
            f"warn_before_end {slurm.warn_before_end} s leaves nothing of the time {slurm.time}: Slurm may send the "
            "warning up to 60 s early",
            hint="a longer slurm.time or a shorter slurm.warn_before_end",
            at=("slurm", "time"),
        )
    if slurm.time_min and minutes(slurm.time_min) > minutes(slurm.time):
        message = f"time_min {slurm.time_min} is more than time {slurm.time}"
        yield Problem(message, "the shorter of both is time_min", ("slurm", "time_min"))
    elif slurm.time_min and minutes(slurm.time_min) * 60 <= slurm.warn_before_end + 60:
        message = f"warn_before_end {slurm.warn_before_end} s leaves nothing of time_min {slurm.time_min}"
        yield Problem(message, "a longer time_min or a shorter warn_before_end", ("slurm", "time_min"))
    for one in (slurm.mail_type or "").split(","):
        if one and one.upper() not in MAIL_TYPES:
            hint = meant(one.upper(), MAIL_TYPES) or f"one of {', '.join(MAIL_TYPES)}"
            yield Problem(f"mail_type {one} is none of Slurm's", hint, ("slurm", "mail_type"))
    at: At = ("slurm", "dependency")
    for one in (slurm.dependency or "").split(","):
        kind, colon, jobs = one.partition(":")
        if slurm.dependency and kind not in DEPENDENCIES:
            hint = meant(kind, DEPENDENCIES) or "afterok:123"
            yield Problem(f"dependency {one} is none that Slurm knows", hint, at)
        elif kind != "singleton" and slurm.dependency:
            if not re.fullmatch(r"[0-9]+(_[0-9]+)?(\+[0-9]+)?(:[0-9]+(_[0-9]+)?(\+[0-9]+)?)*", jobs):
                yield Problem(f"dependency {one} names no job", f"{kind}:123", at)
        elif colon:
            yield Problem("a singleton takes no job", "singleton", at)
    if slurm.comment and len(slurm.comment) > MOST_COMMENT:
        message = (
            f"comment has {len(slurm.comment)} characters, and {MOST_COMMENT} leave room for the run's own token"
        )
        yield Problem(message, "a shorter one", ("slurm", "comment"))
    node = (slurm.distribution or "*").split(":")[0].split(",")[0].split("=")[0]
    at = ("slurm", "distribution")
    if node == "arbitrary":
        yield Problem("distribution arbitrary reads a file that the job has not", "slurm.nodelist, or block", at)
    elif node not in ("block", "cyclic", "plane", "*"):
        hint = meant(node, ("block", "cyclic", "plane")) or "block:cyclic"
        yield Problem(f"distribution {slurm.distribution} is none of Slurm's", hint, at)
    elif node in ("cyclic", "plane") and tasks(spec) > 1:
        message = f"distribution {slurm.distribution} deals ranks out over nodes, and ranks of a node have to follow"
        yield Problem(f"{message} one another", "block, and behind a colon how a node's own are laid out", at)
    for first, second, why in TOGETHER:
        if getattr(slurm, first) and getattr(slurm, second):
            yield Problem(f"{first} and {second} are both given: {why}", f"keep {first}", ("slurm", second))


def _nodes(spec: JobSpec) -> Iterator[Problem]:
    """Lists of nodes that no allocation fits."""
    slurm, resources = spec.slurm, spec.resources
    at: At = ("slurm", "nodelist")
    if not slurm.nodelist or "/" in slurm.nodelist or "/" in (slurm.exclude or ""):  # a file, which sbatch reads
        return
    try:
        named = hostfile.expand(slurm.nodelist)
        never = set(hostfile.expand(slurm.exclude)) if slurm.exclude else set()
    except UserError as error:
        yield from (Problem(p.message, p.hint, at) for p in error.problems)
        return
    most = resources.nodes + resources.spares + spec.serving
    if len(named) > most and _release(slurm.version or "0.0") < (23, 2):  # CHANGELOG/slurm-23.02.md
        message = f"nodelist names {len(named)} nodes and the job has {most}, which Slurm refuses before 23.02"
        yield Problem(message, f"resources.nodes: {len(named)}, or slurm.version where it is newer", at)
    if both := [name for name in named if name in never]:
        yield Problem(f"{hostfile.fold(both)} is in nodelist and in exclude", "take it out of one", at)


def _places(spec: JobSpec) -> Iterator[Problem]:
    slurm = spec.slurm
    for name in ("nodefile", "exclude_file"):
        if getattr(slurm, name):  # `listed` has taken their place where they were read
            message = f"{name} has not been read"
            yield Problem(message, f"slurm.{name.replace('file', 'list')}, or dslaunch slurm FILE", ("slurm", name))
    for source, target in slurm.bcast.items():
        at = ("slurm", "bcast", source)
        if not target.startswith("/"):
            yield Problem(f"bcast: {target} is no absolute path on a node", "a place such as /tmp/x.tar", at)
        elif target == source:
            message = f"bcast: {source} is copied onto itself, by every node at once where they share it"
            yield Problem(message, "a place on each node's own disk", at)


def _passed_on(spec: JobSpec) -> Iterator[Problem]:
    """`slurm.sbatch` and `slurm.srun`, which are for what no field says."""
    for option in spec.slurm.sbatch:
        yield from _passed("sbatch", option, ("slurm", "sbatch", option), spec)
    for number, option in enumerate(spec.slurm.plugin_options):
        if names := _slurms(option):
            message = f"{option} is {names[0]} to Slurm itself"
            hint = "leave it out: plugin_options is for what plugins bring"
            yield Problem(message, hint, ("slurm", "plugin_options", number))
    valued = ""  # the option that takes the next word
    for index, word in enumerate(spec.slurm.srun):
        at = ("slurm", "srun", index)
        if valued:
            valued = ""
        elif not word.startswith("-") or word in ("-", "--"):
            message = f"{word} is no option: srun would start it instead of the ranks"
            yield Problem(message, "--option=value; what runs before the ranks is train.prefix", at)
        else:
            for name in [word[2:]] if word.startswith("--") else _letters(word):
                yield from _passed("srun", name.partition("=")[0], at, spec)
            valued = word if _waits(word) else ""
    if valued:
        yield Problem(f"{valued} has no value", f"{valued}=VALUE", ("slurm", "srun", len(spec.slurm.srun) - 1))


def _slurms(option: str) -> list[str]:
    """Options that Slurm takes it for, beginnings included: outpu is output. A plugin's that it knows of is none."""
    table = facts.slurm_options()
    if option in table and not (table[option].field or table[option].why):
        return []
    return [name for name, row in table.items() if name.startswith(option) and set(row.of) & {"b", "s"}]


def _letters(word: str) -> list[str]:
    """The long names in "-lN2": label and nodes, which takes the rest; a letter that is none stays one: "-?"."""
    names: list[str] = []
    known = facts.letters_of("s")
    for letter in word[1:]:
        names.append(known.get(letter, f"-{letter}"))
        if letter not in known or facts.options_of("s")[known[letter]].value:
            break
    return names


def _waits(word: str) -> bool:
    """Whether the next word is its value: of --task-prolog, not of --task-prolog=x, nor of --label."""
    table = facts.options_of("s")
    names = [word[2:]] if word.startswith("--") else _letters(word)
    if not word.startswith("--") and len(names) < len(word) - 1:
        return False  # -N2
    name = names[-1]
    return name in table and table[name].value in ("=", "s=")


def _passed(program: str, option: str, at: At, spec: JobSpec) -> Iterator[Problem]:
    if option in spec.slurm.plugin_options and not _slurms(option):
        return
    table = facts.options_of({"sbatch": "b", "srun": "s"}[program])
    if option not in table:
        whole = next((name for name in table if option and name.startswith(option)), None)  # getopt's way
        hint = f"did you mean {whole}?" if whole else meant(option, tuple(table))
        plugin = f"slurm.plugin_options: [{option}] where a plugin of this site brings it"
        yield Problem(f"{program} has no option {option}", "; or ".join(filter(None, [hint, plugin])), at)
    elif field := table[option].field:
        yield Problem(f"{program} option {option} is dslaunch's own", f"use {field}", at)
    elif why := table[option].why:
        yield Problem(f"{program} option {option}: {why}", "", at)


# --- releases ---------------------------------------------------------------------------------------------------

MANY_QOS = "24.11"  # CHANGELOG/slurm-24.11.md
FIELDS = {  # where an option comes from, when it is not from the field of its own name
    "gpus-per-node": ("slurm", "gpus_as"), "gpus": ("slurm", "gpus_as"), "gpus-per-task": ("slurm", "gpus_as"),
    "cpus-per-gpu": ("slurm", "cpus_as"), "mem-per-gpu": ("slurm", "memory_as"), "spread-job": ("slurm", "spread"),
}  # fmt: skip
INSTEAD = {
    "gpus-per-node": "slurm.gpus_as: gres", "gpus": "slurm.gpus_as: gres", "gpus-per-task": "slurm.gpus_as: gres",
    "cpus-per-gpu": "slurm.cpus_as: cpus-per-task", "mem-per-gpu": "slurm.memory_as: mem",
}  # fmt: skip


def _versions(spec: JobSpec) -> Iterator[Problem]:
    """Options that this site's Slurm does not have yet, or has no more."""
    version = spec.slurm.version
    if not version:
        return
    for name, value, at in _used(spec):
        table = facts.slurm_options()
        for row in filter(None, (table.get(name), table.get(f"{name}={value}"))):
            what = f"--{row.name}"
            instead = INSTEAD.get(name, "")
            if row.since and _release(version) < _release(row.since):
                hint = instead or f"leave it out, or slurm.version: '{row.since}' where that is not true any more"
                yield Problem(f"{what} came with Slurm {row.since}, and this site has {version}", hint, at)
            elif row.until and _release(version) >= _release(row.until):
                yield Problem(f"Slurm {row.until} dropped {what}, and this site has {version}", "leave it out", at)
    if spec.slurm.qos and "," in spec.slurm.qos and _release(version) < _release(MANY_QOS):
        message = f"several QOS came with Slurm {MANY_QOS}, and this site has {version}"
        yield Problem(message, f"qos: {spec.slurm.qos.split(',')[0]}", ("slurm", "qos"))


def _used(spec: JobSpec) -> Iterator[tuple[str, str, At]]:
    """Options, the kind of their value and the place of their field: "exclusive", "topo", ("slurm", "exclusive")."""
    for name, value in sbatch(spec).items():
        passed: At = ("slurm", "sbatch", name)
        at = passed if name in spec.slurm.sbatch else FIELDS.get(name, ("slurm", name.replace("-", "_")))
        yield name, str(value), at
    for word in training(spec):
        name, _, value = word.removeprefix("--").partition("=")
        yield name, _binding(value)[0], FIELDS.get(name, ("slurm", name.replace("-", "_")))
    for index, word in enumerate(spec.slurm.srun):
        name, _, value = word.removeprefix("--").partition("=")
        yield name, value, ("slurm", "srun", index)


def _release(version: str) -> tuple[int, ...]:
    """ "23.02.7" is (23, 2)."""
    return tuple(int(part) for part in version.split(".")[:2])


def meant(word: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return f"did you mean {close[0]}?" if close else ""


# --- what will surprise -----------------------------------------------------------------------------------------


def notes(spec: JobSpec, environ: Mapping[str, str]) -> list[str]:
    """What is left out, and what will surprise."""
    slurm, resources = spec.slurm, spec.resources
    found = [
        f"{name}={environ[name]} in this shell does not reach the job: say it in the job file (slurm.{option})"
        for name in sorted(environ)
        if name.startswith("SBATCH_") and (option := name.removeprefix("SBATCH_").lower())
    ]
    if resources.gpus_per_node and not resources.cpus_per_node:
        found.append(f"resources.cpus_per_node is not given: many sites then give one core to {spec.per_node} ranks")
    if slurm.gpus_as == "gpus" and resources.gpus_per_node and resources.nodes > 1:
        found.append(
            "gpus_as: gpus asks for GPUs in all: "
            f"where a node has more than {resources.gpus_per_node}, Slurm may hand them out unevenly"
        )
    if slurm.cpus_as == "none" and resources.cpus_per_node and not slurm.exclusive and slurm.gpus_as != "none":
        found.append(
            "cpus_as: none is for partitions that give whole nodes: elsewhere srun finds fewer CPUs than said"
        )
    if one_gpu_each(spec):
        found.append(
            f"gpu_bind {slurm.gpu_bind}: a rank sees its own GPU alone, as device 0, while LOCAL_RANK counts to "
            f"{spec.per_node - 1}; GPUs of a node reach each other slower where they cannot see one another"
        )
    if re.fullmatch(r"[0-9]+:[0-9]+", slurm.time):
        length = f"{slurm.time.split(':')[0]} minutes"
        found.append(
            f"slurm.time {slurm.time} is {length}, as Slurm reads MM:SS; as hours it would be {slurm.time}:00"
        )
    if slurm.mail_user and not slurm.mail_type:
        found.append("slurm.mail_user without mail_type: Slurm sends no mail")
    return found
