"""Options of sbatch and srun as typed fields, and the counts among them as the resources of a node."""

from __future__ import annotations

import re
from posixpath import normpath
from typing import Any

from launcher import facts, shell
from launcher.errors import Path
from launcher.imports import programs
from launcher.imports.draft import Start, digits, size
from launcher.imports.programs import Program
from launcher.imports.variables import Variables
from launcher.shell import Piece, Word

TEXT = {
    "partition": "partition", "account": "account", "qos": "qos", "reservation": "reservation", "wckey": "wckey",
    "constraint": "constraint", "comment": "comment", "time": "time", "time-min": "time_min", "begin": "begin",
    "deadline": "deadline", "dependency": "dependency", "nodelist": "nodelist", "nodefile": "nodefile",
    "exclude": "exclude", "switches": "switches", "network": "network", "tmp": "tmp", "hint": "hint",
    "distribution": "distribution", "cpu-bind": "cpu_bind", "mem-bind": "mem_bind", "gpu-bind": "gpu_bind",
    "accel-bind": "accel_bind", "mpi": "mpi", "mail-user": "mail_user", "mail-type": "mail_type",
}  # fmt: skip
NUMBERS = {
    "nice": "nice", "segment": "segment", "ntasks-per-socket": "ntasks_per_socket", "core-spec": "core_spec",
    "threads-per-core": "threads_per_core",
}  # fmt: skip
SWITCHES = {
    "oversubscribe": "oversubscribe", "overcommit": "overcommit", "contiguous": "contiguous", "spread-job": "spread",
}  # fmt: skip
RUNTIME = {  # left out: what dslaunch does itself
    "output": "a run directory has logs of its own, per rank", "error": "a run directory has logs of its own",
    "open-mode": "dslaunch appends", "chdir": "", "export": "a job file says every variable itself",
    "parsable": "dslaunch reads the answer", "wait": "dslaunch wait", "verbose": "it is for the command line",
    "quiet": "it is for the command line", "hold": "hold the job with scontrol once it is submitted",
    "get-user-env": "a job file describes the environment", "clusters": "submit from the other cluster",
    "ignore-pbs": "there are no such lines", "kill-on-invalid-dep": "dslaunch status says so",
    "no-kill": "resources.spares brings it", "unbuffered": "dslaunch says it", "label": "logs are per rank",
    "jobid": "a step runs in its own job",
    "overlap": "a job has one step at a time", "exact": "a step has the whole job", "input": "ranks read nothing",
    "whole": "a step has the whole job", "wait-for-children": "dslaunch waits",
    "oom-kill-step": "", "disable-status": "", "quit-on-interrupt": "", "pty": "no terminal in a batch job",
    "export-file": "a job file says every variable itself", "resv-ports": "dslaunch finds ports itself",
    "propagate": "limits are checked on the nodes",
}  # fmt: skip
OF_A_STEP = frozenset(  # its share of the job: the same as the job's, or a service's
    """nodes ntasks ntasks-per-node cpus-per-task gpus-per-node gpus-per-task gpus gres mem nodelist exclude exclusive
    relative het-group wait time cpus-per-gpu partition account constraint qos mem-per-gpu mem-per-cpu""".split()
)
COUNTS = {
    **dict.fromkeys(["ntasks", "ntasks-per-node"], "train.launcher, resources"), "nodes": "resources.nodes",
    **dict.fromkeys(["cpus-per-task", "cpus-per-gpu"], "resources.cpus_per_node"),
    **dict.fromkeys(["gpus-per-node", "gpus-per-task", "gpus"], "resources.gpus_per_node"),
    **dict.fromkeys(["mem", "mem-per-gpu", "mem-per-cpu"], "resources.memory"), "job-name": "name",
}  # fmt: skip
FIELDS: dict[str, Path] = {  # of the counts: what there is to say where one is no number
    "nodes": ("resources", "nodes"), "ntasks": ("resources", "nodes"),
    **dict.fromkeys(["ntasks-per-node", "gpus-per-node", "gpus-per-task", "gpus"], ("resources", "gpus_per_node")),
    **dict.fromkeys(["cpus-per-task", "cpus-per-gpu"], ("resources", "cpus_per_node")),
}  # fmt: skip


class Options(Variables):
    loop_nodes: int | None = None  # the training is started once for each of them, in a loop; 0: of all

    def directive(self, option: str, value: str | None, line: int, text: str) -> None:
        value = value or ""
        if "$" in value:
            self.note("left out", f"{text}: sbatch expands no variables in its lines", line)
            return
        if not self.option(option, value, line, text):
            row = facts.slurm_options().get(option)
            if row and (row.why or row.field):
                self.note("left out", f"{text}: {row.why or f'{row.field} says it'}", line)
            elif row and "b" in row.of:
                self.put(("slurm", "sbatch", option), value or True)
                self.note("kept", f"{text} -> slurm.sbatch", line)
            elif shell.near(option):
                self.misspelt(option, text, line)
            elif re.fullmatch(r"[a-z][a-z-]*", option):
                self.put(("slurm", "sbatch", option), value or True)
                self.plugin(option)
                self.note("kept", f"{text} -> slurm.sbatch, as an option that a plugin of the site brings", line)
            else:
                self.note("left out", f"{text}: not an option of sbatch", line)

    def misspelt(self, option: str, text: str, line: int) -> None:
        self.fill(("slurm",), f"{text}: Slurm has no --{option}; did you mean --{shell.near(option)}?", line)
        self.fields.setdefault("slurm", {})

    def plugin(self, option: str) -> None:
        """An option that Slurm itself does not have."""
        names = self.fields.setdefault("slurm", {}).setdefault("plugin_options", [])
        if option not in names:
            names.append(option)

    def option(self, option: str, value: str, line: int, text: str) -> bool:
        """One option of sbatch or srun as fields; False where none takes it."""
        if option in FIELDS and not _counted(option, value):
            self.fill(FIELDS[option], f"{text}: {f'`{value}` is no count' if value else 'it has no value'}", line)
            return True
        if option in COUNTS:
            self.note("carried", f"{text} -> {COUNTS[option]}", line)
        elif option == "gres":
            self.note("carried", f"{text} -> resources.gpus_per_node, slurm.gres", line)
        needs, number = self.needs, digits(value)
        if option == "job-name":
            pass
        elif option == "comment":
            self.put(("slurm", "comment"), re.sub(r"[^A-Za-z0-9_.,:@%+/=&|*()\[\]-]+", "_", value), line, text)
        elif option in ("cpu-bind", "mem-bind", "gpu-bind"):
            loud = ("v", "verbose", "q", "quiet")
            value = ",".join(word for word in value.split(",") if word not in loud)
            value = re.sub(r"^([a-z_]+)=", r"\1:", value)  # Slurm takes both; a job file has mask_cpu:
            if value:
                self.put(("slurm", TEXT[option]), value, line, text)
            if value and option == "cpu-bind" and self.fields["slurm"].pop("hint", None):
                self.note("left out", "--hint: srun takes --cpu-bind instead of it", line)
        elif option in TEXT:
            if value:
                self.put(("slurm", TEXT[option]), value, line, text)
            else:
                self.note("left out", f"{text}: it has no value", line)
        elif option in NUMBERS and re.fullmatch(r"-?[0-9]+", value or "100"):
            self.put(("slurm", NUMBERS[option]), int(value or "100"), line, text)
        elif option in SWITCHES:
            self.put(("slurm", SWITCHES[option]), True, line, text)
        elif option == "exclusive":
            self.put(("slurm", "exclusive"), value if value in ("user", "mcs", "topo") else True, line, text)
        elif option == "licenses":
            self.put(("slurm", "licenses"), value.split(","), line, text)
        elif option == "nodes":
            first, _, last = value.partition("-")
            needs.nodes = digits(last or first)
            if last:
                self.note("carried", f"{text}: {last} nodes; a job file has one number", line)
        elif option == "ntasks":
            needs.tasks = number
        elif option == "ntasks-per-node":
            needs.tasks_per_node = number
        elif option == "ntasks-per-gpu":
            needs.gpus_as = "gpus-per-task"
        elif option == "cpus-per-task":
            needs.cpus_per_task = number
        elif option == "cpus-per-gpu":
            needs.cpus_per_gpu = number
        elif option in ("gpus-per-node", "gpus-per-task", "gpus"):
            kind, _, count = value.rpartition(":")
            setattr(needs, option.replace("-", "_"), digits(count))
            needs.gpus_as, needs.gpu_type = option, kind or needs.gpu_type
        elif option == "gres":
            self.gres(value, line, text)
        elif option == "mem":
            needs.memory = value
        elif option == "mem-per-gpu":
            needs.memory_per_gpu = value
        elif option == "mem-per-cpu":
            needs.memory_per_cpu = value
        elif option in ("requeue", "no-requeue"):
            self.put(("slurm", "requeue"), option == "requeue", line, text)
        elif option == "signal":
            seconds = re.search(r"@([0-9]+)", value)
            before = int(seconds[1]) if seconds else 60
            self.put(("slurm", "warn_before_end"), before, line, text)
        elif option == "wait-all-nodes":
            self.put(("slurm", "wait_all_nodes"), value != "0", line, text)
        elif option == "kill-on-bad-exit":
            if value == "0":
                self.put(("slurm", "kill_on_bad_exit"), False, line, text)
            else:
                self.note("left out", f"{text}: dslaunch says it", line)
        elif option == "array":
            self.sweep(value, line, text)
        elif option == "chdir":
            self.workdir(Word(value, (Piece(value),), line, 1), line, text)
        elif option == "mincpus" and number:
            self.put(("resources", "cpus_per_node"), number, line, text)
        elif option in ("image", "module", "volume", "environment", "uenv") or "container-" in option:
            return self.box_option(option, value, line, text)
        elif option in RUNTIME:
            if option == "export" and value not in ("ALL", "NONE", "NIL", ""):
                self.listed(Word(value, (Piece(value),), line, 1), line)
            if option not in ("chdir", "job-name"):
                self.note("left out", f"{text}: {RUNTIME[option] or 'dslaunch has its own'}", line)
        else:
            return False
        return True

    def gres(self, value: str, line: int, text: str) -> None:
        others = []
        for item in value.split(","):
            match = re.fullmatch(
                r"(gres[:/])?gpu(?::([A-Za-z0-9_.-]*[A-Za-z_.-][A-Za-z0-9_.-]*))?(?::([0-9]+))?", item
            )
            if match:
                self.needs.gpus_per_node = int(match[3] or 1)
                self.needs.gpus_as, self.needs.gpu_type = "gres", match[2] or self.needs.gpu_type
            elif item and item != "none":
                others.append(item)
        if others:
            self.put(("slurm", "gres"), others, line, text)

    def sweep(self, value: str, line: int, text: str) -> None:
        numbers, _, parallel = value.partition("%")
        if "SLURM_ARRAY_TASK_ID" not in self.script.text:
            why = "no line uses its index: slurm.requeue and recover go on with a run" if parallel == "1" else (
                "no line uses its index: dslaunch submit as often as you want it")  # fmt: skip
            self.note("left out", f"{text}: {why}", line)
            return
        for part in numbers.split(","):
            match = re.fullmatch(r"([0-9]+)(?:-([0-9]+)(?::([0-9]+))?)?", part)
            if match:
                last = int(match[2] or match[1])
                self.array += list(range(int(match[1]), last + 1, int(match[3] or 1)))[:1000]
        if parallel.isdigit():
            self.put(("sweep", "parallel"), int(parallel))
        self.note("carried", f"{text} -> sweep", line)

    def box_option(self, option: str, value: str, line: int, text: str) -> bool:
        """Options of pyxis, shifter and CSCS' container engine."""
        where: dict[str, tuple[str, Any]] = {
            "container-image": ("image", value), "image": ("image", value.removeprefix("docker:")),
            "container-workdir": ("workdir", value), "container-name": ("name", value),
            "container-writable": ("writable", True), "container-readonly": ("writable", False),
            "container-mount-home": ("mount_home", True), "no-container-mount-home": ("mount_home", False),
            "container-remap-root": ("remap_root", True), "no-container-remap-root": ("remap_root", False),
            "container-entrypoint": ("entrypoint", True), "no-container-entrypoint": ("entrypoint", False),
            "container-mounts": ("mounts", value.split(",")), "volume": ("mounts", value.split(";")),
            "container-env": ("host_env", value.split(",")), "module": ("modules", value.split(",")),
            "environment": ("environment", value),
        }  # fmt: skip
        if option not in where:
            return False
        key, made = where[option]
        if key == "name" and ":" in str(made):
            made = str(made).partition(":")[0]
        self.put(("container", key), made, line, text)
        if option in ("image", "volume", "module"):
            self.put(("container", "runtime"), "shifter")
        return True

    def workdir(self, word: Word, line: int, text: str, *, inside: str | None = None) -> None:
        """`inside`: a container's own directory, which `cd` starts from there."""
        value = self.path(word, ("train", "workdir"), line)
        before = self.fields.get("train", {}).get("workdir", inside)
        if isinstance(value, str) and value not in (".", "-", "", "~") and not value.startswith(("/", "~")):
            if isinstance(before, str):  # one cd after another
                value = normpath(f"{before}/{value}")
            elif before is not None and not value.startswith(".."):
                value = {**before, "append": f"{before.get('append', '')}/{value}"}
        if value in (".", "..", "-", "", "~"):
            if value == "." and word.pieces and word.pieces[0].meaning == "submit-dir":
                self.fields.get("train", {}).pop("workdir", None)
            self.note("left out", f"{text}: a job begins in the job file's directory", line)
            return
        if word.value is None or word.value.startswith("/"):
            self.places.append((line, word.pieces))
        self.put(("train", "workdir"), value, line, text)

    def step_options(self, start: Start) -> None:
        for one in start.options:
            text = f"srun {one.word.partial}"
            if one.value is not None and one.value.partial not in one.word.partial:
                text += f" {one.value.partial}"
            if one.name in OF_A_STEP:
                self.note("carried", f"{text}: the step has what the job has", one.word.line)
                continue
            if one.name.startswith("container") and one.value is not None:
                key = "container-mounts"
                if one.name == key:
                    self.put(("container", "mounts"), self.mounts(one.value, one.word.line), one.word.line, text)
                elif one.name in ("container-image", "container-workdir", "container-name"):
                    name = one.name.removeprefix("container-")
                    value = self.path(one.value, ("container", name), one.word.line)
                    self.put(("container", name), value, one.word.line, text)
                elif one.value.value is None:
                    self.note("left out", f"{text}: only a running job knows its value", one.word.line)
                else:
                    self.option(one.name, one.value.value, one.word.line, text)
                continue
            if one.name == "environment" and one.value is not None:
                self.put(
                    ("container", "environment"), self.path(one.value, ("container", "environment"), one.word.line)
                )
                self.put(("container", "runtime"), "edf")
                continue
            if one.name == "export" and one.value is not None:
                self.listed(one.value, one.word.line)
                self.note("carried", f"{text}: its variables are the job's", one.word.line)
                continue
            if one.value is not None and one.value.value is None:
                self.note("left out", f"{text}: only a running job knows its value", one.word.line)
                continue
            value = one.value.value if one.value and one.value.value else ""
            if not self.option(one.name, value, one.word.line, text):
                if shell.near(one.name):
                    self.misspelt(one.name, text, one.word.line)
                    continue
                self.fields.setdefault("slurm", {}).setdefault("srun", []).append(
                    f"--{one.name}={value}" if value else f"--{one.name}"
                )
                if one.name not in facts.options_of("s"):
                    self.plugin(one.name)
                self.note("kept", f"{text} -> slurm.srun", one.word.line)

    # -- numbers

    def tasks_per_node(self, start: Start | None) -> int | None:
        needs = self.needs
        if start and start.stepped:
            if start.number("ntasks-per-node"):
                return start.number("ntasks-per-node")
            total, nodes = start.number("ntasks"), start.number("nodes") or needs.nodes
            if total and nodes and total % nodes == 0:
                return total // nodes
        if needs.tasks_per_node:
            return needs.tasks_per_node
        if needs.tasks and needs.nodes and needs.tasks % needs.nodes == 0:
            return needs.tasks // needs.nodes
        return None

    def gpus(self, start: Start | None, found: Program | None) -> int | None:
        needs = self.needs
        if needs.gpus_per_node is not None:
            return needs.gpus_per_node
        nodes = needs.nodes or 1
        if needs.gpus:
            return needs.gpus // nodes or 1
        tasks = self.tasks_per_node(start)
        if needs.gpus_per_task:
            return needs.gpus_per_task * (tasks or 1)
        if start:
            given = start.option("gpus-per-node") or start.option("gres") or ""
            match = re.search(r"([0-9]+)$", given)
            if match:
                return int(match[1])
            if start.number("gpus-per-task") and tasks:
                return (start.number("gpus-per-task") or 1) * tasks
            if start.number("gpus"):
                return (start.number("gpus") or 1) // nodes or 1
        if found and found.per_node:
            return found.per_node
        if slots := re.search(r"\bslots=([0-9]+)", self.script.text):  # of the hostfile that it writes
            return int(slots[1])
        if found and found.processes and found.processes % nodes == 0:
            return found.processes // nodes
        return None

    def resources(self, start: Start | None) -> None:
        needs = self.needs
        found = programs.read(start.argv) if start else None
        tasks = self.tasks_per_node(start)
        if self.fabric:
            self.put(("resources", "fabric"), self.fabric)
            self.note("carried", f"{self.fabric_why} -> resources.fabric: {self.fabric}")
        if needs.nodes is None and self.loop_nodes:
            needs.nodes = self.loop_nodes
        if needs.nodes is None and self.loop_nodes is None and start and start.number("nodes"):
            needs.nodes = start.number("nodes")
        nodes = needs.nodes
        if nodes is None and needs.tasks and (found is None or found.launcher != "python"):
            nodes = needs.tasks if not needs.tasks_per_node else max(needs.tasks // needs.tasks_per_node, 1)
        nodes = nodes or 1
        gpus = self.gpus(start, found)
        listed = start.number("nodes") if start and self.services and self.loop_nodes is None else None
        listed = listed or self.loop_nodes
        own = [row for row in self.services if row.get("on", "own") == "own" and "component" not in row]
        apart = sum(row.get("nodes", 1) for row in own)
        self.put(("resources", "nodes"), max(listed or nodes - apart, 1))
        cpu = bool(re.search(r"(?i)(--?device[= ]cpu|\bgloo\b|DS_ACCELERATOR=cpu)", self.script.text))
        if gpus is None and not cpu:
            whole = tasks if (found and found.launcher == "python" and tasks and tasks > 1) else None
            gpus = whole or 0
            self.put(("resources", "gpus_per_node"), gpus or 1)
            if whole:
                self.note("carried", f"{whole} tasks on a node -> resources.gpus_per_node: one for each")
            else:
                self.fill(("resources", "gpus_per_node"), "the script does not say how many GPUs a node has")
            if not any((needs.gpus_per_node, needs.gpus, needs.gpus_per_task)):
                self.put(("slurm", "gpus_as"), "none")
        else:
            self.put(("resources", "gpus_per_node"), gpus or 0)
            asked = needs.gpus_as or next((name for name in ("gpus-per-node", "gres", "gpus-per-task", "gpus")
                                           if start and start.option(name)), "none" if gpus else "")  # fmt: skip
            if asked and asked != "gpus-per-node":
                self.put(("slurm", "gpus_as"), asked)
        if cpu and not gpus and tasks and tasks > 1:
            self.put(("resources", "processes_per_node"), tasks)
        if needs.gpu_type:
            self.put(("slurm", "gpu_type"), needs.gpu_type)
        self.cpus(start, tasks or 1, gpus or 0)
        self.memory(gpus or 0)

    def cpus(self, start: Start | None, tasks: int, gpus: int) -> None:
        needs = self.needs
        per_task = needs.cpus_per_task or (start.number("cpus-per-task") if start else None)
        if per_task:
            self.put(("resources", "cpus_per_node"), per_task * (needs.tasks_per_node or tasks))
        elif needs.cpus_per_gpu and gpus:
            self.put(("resources", "cpus_per_node"), needs.cpus_per_gpu * gpus)
            self.put(("slurm", "cpus_as"), "cpus-per-gpu")

    def memory(self, gpus: int) -> None:
        needs = self.needs
        if needs.memory:
            self.put(("resources", "memory"), size(needs.memory))
        elif needs.memory_per_gpu and gpus:
            self.put(("resources", "memory"), _times(needs.memory_per_gpu, gpus))
            self.put(("slurm", "memory_as"), "mem-per-gpu")
        elif needs.memory_per_cpu and self.fields.get("resources", {}).get("cpus_per_node"):
            cpus = self.fields["resources"]["cpus_per_node"]
            self.put(("resources", "memory"), _times(needs.memory_per_cpu, cpus))
            self.put(("slurm", "memory_as"), "mem-per-cpu")


def _counted(option: str, value: str) -> bool:
    """4, and 2-8 nodes, a100:4 GPUs."""
    if option == "nodes":
        return all(digits(part) for part in value.split("-", 1))
    return digits(value.rpartition(":")[2] if "gpus" in option else value) is not None


def _times(text: str, count: int) -> str:
    match = re.fullmatch(r"([0-9]+)([KMGTkmgt]?)[bB]?", text)
    return f"{int(match[1]) * count}{match[2].upper()}" if match else text
