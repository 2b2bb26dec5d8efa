"""What the pods of a group run, read as if it were a script: command, arguments and the operator's variables."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from posixpath import basename, normpath, relpath
from typing import Any

from launcher import launchlint, shell
from launcher.backends.kubernetes import kinds
from launcher.errors import Path, Problem, UserError
from launcher.imports import Kind, Note, pods, programs, sbatch
from launcher.imports.draft import MASK, shell_text, short
from launcher.imports.groups import REFUSED, Group
from launcher.imports.objects import HOLE, metadata_of, spec_of
from launcher.imports.pods import Object, Pod, takes, whole
from launcher.imports.programs import said
from launcher.plan.launchers import TOLD
from launcher.shell import Command, Word
from launcher.spec.check import NOT_YOURS, looks_secret
from launcher.spec.words import Variable

SHELLS = ("bash", "sh", "dash", "ash", "zsh")
AT_RUN_TIME = {  # what operators tell a pod, and its name here
    **dict.fromkeys(["RANK", "NODE_RANK", "PET_NODE_RANK", "VC_TASK_INDEX", "VK_TASK_INDEX", "JOB_COMPLETION_INDEX",
                     "OMPI_COMM_WORLD_RANK", "GROUP_RANK", "POD_INDEX", "LWS_WORKER_INDEX"], "${NODE_RANK}"),
    **dict.fromkeys(["MASTER_ADDR", "PET_MASTER_ADDR", "VC_MASTER_HOSTS", "HEAD_NODE", "LWS_LEADER_ADDRESS"],
                    "${MASTER_ADDR}"),
    **dict.fromkeys(["MASTER_PORT", "PET_MASTER_PORT"], "${MASTER_PORT}"),
    "HOSTNAME": "${HOSTNAME}",
}  # fmt: skip
MPI_VALUES = {  # options of mpirun, and how many words follow
    **dict.fromkeys(["np", "n", "c", "N", "npernode", "ppn", "hostfile", "machinefile", "f", "H", "host", "hosts",
                     "map-by", "bind-to", "rank-by", "x", "wdir", "wd", "prefix", "output-filename", "timeout",
                     "bootstrap", "iface", "genvlist", "launcher", "plm_rsh_args", "tune", "am"], 1),
    **dict.fromkeys(["mca", "gmca", "genv", "env"], 2),
}  # fmt: skip
PREPARES = frozenset(
    """mkdir cp mv ln tar unzip wget curl aws gsutil gcloud azcopy rclone rsync huggingface-cli hf git touch chmod
    chown sysctl mount""".split()
)
NUMBERED = re.compile(  # hostname | ... of trainer-0: the number at its end
    r"\|\s*(awk\s+-F\s*['\"]?-['\"]?\s+'\{\s*print \$NF\s*\}'|rev\b.*\|\s*rev|grep -oE? '\[0-9\]([*+]|\\\+)\$'"
    r"|sed\s+(-E\s+)?['\"]s/\^?\.\*-//['\"])\s*\)$"
)
ITS_OWN = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "HOSTNAME", "PS1", "DSLAUNCH",
           "SRUN_CPUS_PER_TASK", "LOCAL_RANK", "CUDA_LAUNCH_BLOCKING")  # fmt: skip
# Volcano's list of hosts, behind commas: how many they are, and the first of them.
OF_HOSTS = r"\$\(\s*echo\s+[\"']?\$\{?V[CK]_\w+_HOSTS\}?[\"']?\s*\|\s*"
COMMA = r"\s*['\"]?,['\"]?\s+"
HOW_MANY = re.compile(OF_HOSTS + rf"awk\s+-F{COMMA}['\"]\{{\s*print NF\s*\}}['\"]\s*\)")
THE_FIRST = re.compile(
    OF_HOSTS + rf"(awk\s+-F{COMMA}['\"]\{{\s*print \$1;?\s*\}}['\"]|cut\s+-d{COMMA}-f\s*1)\s*\)"
    r"|\$\{V[CK]_\w+_HOSTS%%,\*\}"
)
# What stands in a directory: `pip install -e .`, `-r requirements.txt`, `git clone`, `make`.
RELATIVE = re.compile(
    r"^(git|make|cmake|tar|unzip|wget|curl)\b|(^|\s)\.{1,2}(/|\s|$|\[)|\s-r\s*(?![/$\s])|(^|\s)[\w-]+/[\w./-]+\.(py|sh|txt)\b"
)
SSH = re.compile(r"\bsshd?\b|\.ssh\b|hostfile")
HEARTBEATS = re.compile(r"ft_|fault_tol|ignore_missing_fault")
HYPERPOD = re.compile(r"--(server[-_](host|port)|(pre|post)[-_]train[-_]script|inprocess[-_]restart)\b.*=")
REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)")


class Entrypoint(sbatch.Import):
    mpi = False
    reaches = False  # pods have neither srun nor ssh to each other
    opaque = False  # a program whose command says nothing of ranks: it may read any variable

    def __init__(self, group: Group, beside: Sequence[Object], name: str, environ: Mapping[str, str]) -> None:
        super().__init__(shell.read("", name), environ)
        self.group, self.beside = group, beside
        self.called = _called(group.document, name)
        self.fields = {"name": self.called}
        self.at_run_time: dict[str, str] = dict(AT_RUN_TIME)
        self.clone = ""
        self.kept_in: dict[str, str] = {}  # lines of setup, and the directory in which they stood
        self.told: dict[str, str] = {}  # variables of the program that starts ranks: as a shell has them
        metadata = metadata_of(group.document)
        names = sorted({str(metadata["name"]) if metadata.get("name") else self.called, self.called})
        self.names = tuple(names)
        one = "|".join(map(re.escape, names))
        domain = r"(?:\.[A-Za-z0-9.-]*[A-Za-z0-9])?"
        self.pods = re.compile(rf"(?<![\w.-])(?:{one})(?:-[a-z][a-z0-9]*)*(?:-0)?-([0-9]+){domain}(?![\w-])")
        files = {
            str(metadata_of(one).get("name")): {
                key: pods._text(text) for key, text in (one.get("data") or {}).items()
            }
            for one in beside
            if one["kind"] == "ConfigMap"
        }
        self.needs.nodes = self.count(group.nodes, ("resources", "nodes"), "the number of pods")
        labels = {key: pods._text(value) for key, value in (metadata_of(group.document).get("labels") or {}).items()}
        self.pod = Pod(
            self, group.template, nodes=self.needs.nodes, own=labels, files=files, kind=group.kind,
            container=kinds.KINDS[group.kind].container, called=self.names,
            runtime=" ".join(str(group.options[key]) for key in ("runtime", "runtime_kind") if key in group.options),
        )  # fmt: skip

    def drop(self, path: Path) -> None:
        at: Any = self.fields
        for key in path[:-1]:
            at = at.get(key, {})
        at.pop(path[-1], None)

    def note(self, kind: Kind, message: str, line: int = 0) -> None:
        if not any(one.kind == kind and one.message == MASK.sub("***", message) for one in self.notes):
            self.notes.append(Note(kind, MASK.sub("***", message)))

    def count(self, value: Any, path: Path, what: str) -> int:
        number = whole(1 if value is None else value)
        if number is None:
            self.fill(path, f"{what} is {value} there, which only filling in the template tells")
        return number or 1

    @property
    def elastic(self) -> Object | None:
        return self.group.elastic

    # -- its text

    def text(self) -> str:
        """The pod's variables and its command, as a script."""
        group, pod = self.group, self.pod
        options = self.fields.get("kubernetes", {})
        told = {**options.get("env_fields", {}), **options.get("env_keys", {}), **self.fields.get("secrets", {})}
        self.at_run_time |= {name: f"${{{name}}}" for name in told}
        known = {*pod.exports, *told, *AT_RUN_TIME, *group.known}
        from_maps = bool(options.get("env_from") or options.get("secret_env_from"))
        lines = [f"{name}={shlex.quote(value)}" for name, value in group.known.items()]
        for path, content in pod.paths.items():
            if path.endswith((".json", ".yaml", ".yml")) and "END_OF_FILE" not in content:
                lines.append(f"cat > {shlex.quote(path)} <<'END_OF_FILE'\n{content.rstrip()}\nEND_OF_FILE")
        for name, value in pod.exports.items():
            earlier = set(REFERENCE.findall(value)) if from_maps else pod.earlier.get(name, set())
            lines.append(f"export {name}={_quoted(self.first(value, name), {*earlier, *group.known})}")
        words = list(group.command) or [*(pod.box.get("command") or ()), *(pod.box.get("args") or ())]
        words = [self.first(pods._text(word)) for word in words]
        if not words:
            return "\n".join(lines)
        body = self.body(words, known)
        if body is not None:
            body = self.without_hosts(body)
        words = [HOLE.sub(lambda hole: self.environ.get(hole[1], hole[0]), word) for word in words]
        if body is not None:
            return "\n".join([*lines, body])
        if basename(words[0]) == "tini" or words[0] in ("dumb-init",):
            words = [word for word in words[1:] if word not in ("--", "-g", "-s")]
        return "\n".join([*lines, " ".join(_quoted(word, known) for word in words)])

    def without_hosts(self, text: str) -> str:
        """A script that asks Volcano's list how many nodes there are, and which is the first, with the answers."""
        for pattern, answer in ((HOW_MANY, str(self.needs.nodes or 1)), (THE_FIRST, "${MASTER_ADDR}")):
            for match in pattern.finditer(text):
                self.note("carried", f"{match[0]}: of Volcano's list of hosts -> {answer.strip('${}')}")
            text = pattern.sub(lambda _, answer=answer: answer, text)  # type: ignore[misc]
        return text

    def hosts(self, text: str, name: str = "") -> Iterator[re.Match[str]]:
        """The manifest's pods in a text: a-worker-0, a-0.svc and a-0:29500; a run that is called a-1 is none."""
        meant = re.search(r"(?i)addr|host|master|endpoint|head|server|rdzv", name)
        for match in self.pods.finditer(text):
            plain = match[0] in {f"{one}-{match[1]}" for one in self.names}
            if not plain or meant or text[match.end() :].startswith(":"):
                yield match

    def first(self, text: str, name: str = "") -> str:
        """A text with ${MASTER_ADDR} for the first pod, as the manifest's operator called it."""
        parts, at = [], 0
        for match in self.hosts(text, name):
            if int(match[1]) == 0:
                self.note("carried", f"{match[0]} -> MASTER_ADDR, as pods are called otherwise now")
                parts += [text[at : match.start()], "${MASTER_ADDR}"]
                at = match.end()
        return "".join([*parts, text[at:]])

    def stale(self, text: str, name: str) -> str:
        """Which pod or Service that is no more a variable names."""
        if match := next(self.hosts(text, name), None):
            return f"pod {match[0]}"
        for one in self.beside:
            name = str(metadata_of(one).get("name"))
            own = spec_of(one).get("clusterIP") == "None" if one["kind"] == "Service" else False
            if own and re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])|\.{re.escape(name)}(?![\w-])", text):
                return f"Service {name}"
        return ""

    def body(self, words: Sequence[str], known: set[str]) -> str | None:
        """The script that a shell gets: behind -c, or in a ConfigMap beside the job."""
        if basename(words[0]) not in SHELLS:
            place = normpath(words[0])
            return self.pod.paths.get(place) if len(words) == 1 else None
        at = 1
        while at < len(words) and words[at].startswith("-"):
            flag = words[at]
            if "c" in flag[1:] and not flag.startswith("--"):
                at += 1
                while at < len(words) and words[at].startswith("-"):
                    at += 2 if words[at] == "-o" else 1
                if at >= len(words):
                    return None
                given = [_quoted(word, known) for word in words[at + 2 :]]
                return _with_arguments(_own_references(words[at], known), given)
            at += 2 if flag.endswith("o") else 1
        if at < len(words) and (content := self.pod.paths.get(normpath(words[at]))) is not None:
            self.note("carried", f"{words[at]}: read in the ConfigMap beside the job")
            return _with_arguments(content, [_quoted(word, known) for word in words[at + 1 :]])
        return None

    # -- its commands

    def environment(self, command: Command, start: Any) -> bool:
        words = [said(word) for word in command.argv]
        if basename(words[0]) == "ray":
            why, hint = REFUSED["RayJob"]
            raise UserError(Problem(f"{short(command.text)}: {why}", hint, where=self.script.name))
        if words[:2] == ["git", "clone"]:
            self.left()
            if self.cloned(command.argv[2:]):
                return True
        if words[:2] == ["git", "checkout"] and self.clone and len(words) > 2:
            self.put(("code", "ref"), words[-1])
            return True
        if words[0] == "cd" and len(words) > 1 and self.clone and not self.started:
            place = normpath(words[1])
            if place == self.clone or place.startswith(f"{self.clone}/") or not place.startswith("/"):
                below = place.removeprefix(self.clone).lstrip("/")
                earlier = self.fields.get("train", {}).get("workdir", "")
                self.put(("train", "workdir"), normpath(f"{'' if place.startswith(self.clone) else earlier}/{below}")
                         .lstrip("/") or ".", what=f"cd {place}")  # fmt: skip
                return True
        if basename(words[0]) in ("apt-get", "apt", "yum", "dnf", "apk", "microdnf", "ldconfig"):
            self.keep(command)
            if not self.started and self.group.kind != "trainjob":
                self.put(("kubernetes", "security", "root"), True)
                self.note("carried", f"{words[0]} is the root user's -> kubernetes.security.root")
            return True
        alone = not (command.redirects or command.pipeline or command.heredoc or command.inside or self.started)
        if basename(words[0]) in PREPARES and alone and not SSH.search(command.text):
            self.keep(command)  # a pod is new each time: what it prepares, it prepares again
            return True
        return super().environment(command, start)

    def written(self, command: Command) -> bool:
        """Not the files of ConfigMaps, which stand in its text for their readers alone."""
        targets = [normpath(said(one.target)) for one in command.redirects if one.target is not None]
        return not set(targets) & {normpath(path) for path in self.pod.paths} and super().written(command)

    def left(self) -> None:
        """A clone that the script has left again was a dependency's: it becomes a line of setup."""
        place = str(self.fields.get("train", {}).get("workdir", "."))
        if not self.clone or not place.startswith(".."):
            return
        code = self.fields.pop("code")
        ref = f" -b {shlex.quote(code['ref'])}" if code.get("ref") else ""
        line = f"git clone --recurse-submodules{ref} {shlex.quote(code['clone'])} {shlex.quote(self.clone)}"
        there = shlex.quote(self.clone)
        self.setup[:] = [f"(cd {there} && {one})" if one in self.kept_in else one for one in self.setup]
        self.setup.insert(0, line)
        self.note("kept", f"git clone {code['clone']}: the script leaves it again -> setup")
        self.notes = [one for one in self.notes if "-> code.clone: an init container" not in one.message]
        self.fields.get("train", {}).pop("workdir", None)
        self.clone = ""
        self.kept_in.clear()

    def cloned(self, words: Sequence[Word]) -> bool:
        plain, ref, at = [], "", 0
        while at < len(words):
            text = said(words[at])
            if text in ("-b", "--branch") and at + 1 < len(words):
                ref, at = said(words[at + 1]), at + 1
            elif text in ("--depth", "-c", "-j", "--config"):
                at += 1
            elif not text.startswith("-"):
                plain.append(text)
            at += 1
        if not plain or not plain[0].startswith("https://") or "@" in plain[0] or "$" in plain[0] or self.clone:
            return False
        self.clone = normpath(plain[1]) if len(plain) > 1 else basename(plain[0].rstrip("/")).removesuffix(".git")
        self.fields.get("train", {}).pop("workdir", None)
        self.put(("code", "clone"), plain[0])
        if ref:
            self.put(("code", "ref"), ref)
        text = " ".join(said(word) for word in words)
        self.note("carried", f"git clone {text} -> code.clone: an init container does it, workdir begins there")
        return True

    def peel(self, command: Command, around: Any) -> Any:
        argv = command.argv
        while len(argv) > 1 and said(argv[0]) in ("exec", "nohup"):
            argv = argv[1:]
        if argv and basename(said(argv[0])) == "ft_launcher":  # torchrun that looks at heartbeats
            argv = (programs.made("torchrun", argv[0]), *self.without_heartbeats(argv[1:]))
            command = replace(command, argv=argv)
        if argv and basename(said(argv[0])) == "hyperpodrun":  # torchrun, with options for Amazon's agent
            rest = [word for word in argv[1:] if not HYPERPOD.match(said(word))]
            command = replace(command, argv=(programs.made("torchrun", argv[0]), *rest))
            gone = [said(word) for word in argv[1:] if HYPERPOD.match(said(word))]
            self.note("carried", "hyperpodrun -> torchrun" + (f", without {' '.join(gone)}" if gone else ""))
        elif argv and basename(said(argv[0])) in ("mpirun", "mpiexec", "orterun"):
            command = replace(command, argv=self.without_mpi(argv))
        return super().peel(command, around)

    def without_heartbeats(self, words: Sequence[Word]) -> Iterator[Word]:
        """ft_launcher's options without what its agent is told: dslaunch looks at the steps."""
        rest = list(words)
        gone = []
        while rest and said(rest[0]).startswith("-"):
            option = rest.pop(0)
            name, equals, _ = said(option).lstrip("-").replace("-", "_").partition("=")
            takes_one = name in launchlint.TORCHRUN or HEARTBEATS.match(name)
            value = [rest.pop(0)] if takes_one and not equals and rest else []
            if HEARTBEATS.match(name):
                gone.append(" ".join(said(word) for word in (option, *value)))
            else:
                yield from (option, *value)
        if gone:
            self.note("left out", f"{', '.join(gone)}: recover.hang looks at the steps themselves")
        self.note("carried", "ft_launcher -> torchrun")
        yield from rest

    def without_mpi(self, argv: Sequence[Word]) -> tuple[Word, ...]:
        """mpirun -np 16 -x A=1 python train.py is torchrun train.py, with A among the variables."""
        rest, gone = list(argv[1:]), list[str]()
        while rest and said(rest[0]).startswith("-"):
            option = rest.pop(0)
            name = said(option).lstrip("-").partition("=")[0]
            follow = 0 if "=" in said(option) else MPI_VALUES.get(name, 0)
            values, rest = rest[:follow], rest[follow:]
            assigned = name in ("genv", "env") or (name == "x" and "=" in said(values[0] if values else option))
            gone += [] if assigned else [said(word) for word in (option, *values)]
            if name in ("x", "genv", "env") and values:
                key, equals, _ = said(values[0]).partition("=")
                if name == "x" and equals and takes(Variable, key):
                    self.variable(key, shell.cut(values[0], len(key) + 1), 0)
                elif name != "x" and len(values) == 2:
                    self.variable(key, values[1], 0)
        found = programs.read(rest)
        shelled = rest and basename(said(rest[0])) in SHELLS
        if not rest or (found is None and not shelled):
            what = said(rest[0]) if rest else "nothing"
            message = f"mpirun starts {what}, whose processes ask MPI who they are; ranks here are told by variables"
            raise UserError(Problem(message, "an MPIJob stays an MPIJob; or a Python program with torch.distributed",
                                    where=self.script.name))  # fmt: skip
        self.note("carried", "mpirun -> train.launcher: torchrun starts a rank for each GPU; what asked MPI or OMPI_ "
                  "variables for its rank has RANK, LOCAL_RANK and WORLD_SIZE")  # fmt: skip
        if gone:
            self.note("left out", f"{' '.join(gone)}: mpirun's own, and dslaunch starts the ranks")
        self.mpi = True
        return tuple(rest)

    def refuse_mpi(self, name: str, command: Command) -> None:
        hint = "the program's own line with torchrun or deepspeed; RANK, LOCAL_RANK and WORLD_SIZE are set"
        message = f"{name} starts these ranks, and dslaunch cannot watch what another launcher starts on other nodes"
        raise UserError(Problem(message, hint, where=self.script.name))

    def service(self, start: Any) -> None:
        text = short(" ".join(said(word) for word in start.argv))
        self.note("left out", f"{text}: a program beside the training is a Deployment of its own on Kubernetes")

    def keep(self, command: Command) -> None:
        before = len(self.setup)
        self.keep_line(command)
        place = self.fields.get("train", {}).get("workdir", "." if self.clone else None)
        for line in self.setup[before:]:
            if isinstance(place, str) and RELATIVE.search(line):
                self.kept_in[line] = place

    def in_their_places(self) -> None:
        """Lines of setup run where the program does; one that stood elsewhere goes there for itself."""
        now = self.fields.get("train", {}).get("workdir", ".")
        for at, line in enumerate(self.setup):
            place = self.kept_in.get(line)
            if place is None or not isinstance(now, str) or normpath(place) == normpath(now):
                continue
            if place.startswith("/") is not now.startswith("/"):
                continue
            there = shlex.quote(relpath(place, now) if not place.startswith("/") else place)
            lasting = line.startswith(("source ", ". ", "export "))
            self.setup[at] = f"cd {there} && {line} && cd - >/dev/null" if lasting else f"(cd {there} && {line})"

    def sourced(self, command: Command, word: Word) -> None:
        """`source` is done in the program's directory; a file that lies elsewhere stays a line."""
        if (word.value or "/").startswith("/"):
            super().sourced(command, word)
        else:
            self.keep(command)

    def keep_line(self, command: Command) -> None:
        """`source` in a condition is done where its file is; everything else in one is left out."""
        inside = [word for word in command.inside if word in ("for", "while", "case", "if")]
        name = said(command.argv[0])
        sources = name in ("source", ".") and len(command.argv) == 2
        if set(inside) == {"if"} and sources and not self.started:
            word = command.argv[1]
            file = f'"{shell_text(word)}"' if word.value is None else shlex.quote(word.value)
            line = f"if [ -e {file} ]; then source {file}; fi"
            if line not in self.setup:
                self.setup.append(line)
                self.note("kept", f"{short(command.text)} -> setup: its condition is that the file is there")
            return
        super().keep(command)

    def trainer(self) -> Any:
        found = super().trainer()
        self.in_their_places()
        self.opaque = found is not None and programs.read(found.argv) is None
        if self.opaque and self.group.document["kind"] == "PyTorchJob" and not self.elastic:
            self.told["RANK"] = '"${NODE_RANK}"'
            if size := self.group.known.get("WORLD_SIZE"):
                self.told["WORLD_SIZE"] = size
            listed = " and ".join(self.told)
            self.note("carried", f"{listed}: of the operator, which means pods by them -> train.command")
        return found

    def program(self, start: Any) -> None:
        if self.elastic and programs.read(start.argv):
            for name, word in start.own:
                self.variable(name, word, 0)
            self.put(("train", "launcher"), "node")
            self.put(("train", "config_flag"), "none")
            self.put(("train", "command"), self.command(replace(start, own=())))
            return
        found = programs.read(start.argv)
        if found and found.launcher == "job":
            message = f"{short(' '.join(map(said, start.argv)))} starts the ranks of all nodes over ssh or by srun"
            hint = "an MPIJob stays an MPIJob: pods of a job file have neither; on Slurm train.launcher: job takes it"
            raise UserError(Problem(message, hint, where=self.script.name))
        if self.mpi and found and found.launcher == "python" and found.target and found.kind != "command":
            near = start.argv[0]
            module = (programs.made("-m", near),) if found.kind == "module" else ()
            argv = (programs.made("torchrun", near), *module, found.target, *found.arguments)
            start = replace(start, argv=argv)
        super().program(start)
        train = self.fields["train"]
        if self.told and "command" in train:
            self.fields["train"]["command"] = _with_variables(train["command"], self.told)
        if self.clone and isinstance(train.get("script"), str):
            train["script"] = train["script"].removeprefix(f"{self.clone}/")

    # -- its variables

    def variable(self, name: str, word: Word, line: int) -> None:
        text = said(word)
        if looks_secret(name, text) and name not in self.fields.get("secrets", {}) and takes(Variable, name):
            if not text:
                return
            self.put(("secrets", name), {"secret": f"{self.called}-secrets", "key": name})
            create = f"kubectl create secret generic {self.called}-secrets --from-literal={name}=..."
            self.fill(("secrets", name), f"its value stood in the manifest and is not carried: {create}")
            return
        if self.opaque and self.handed_on(name, word):
            return
        if any(piece.name in self.at_run_time for piece in word.pieces) and name not in programs.RENDEZVOUS:
            whole_ = self.run_time(word, None)
            if self.opaque:
                self.told[name] = whole_
                self.note("carried", f"{name}: known in the pod alone -> train.command")
            else:
                self.setup_line(f"export {name}={whole_}", line, name)
            return
        if word.value is not None and (what := self.stale(word.value, name)) and name not in programs.RENDEZVOUS:
            self.fill(("env", name), f"it names {what}, and pods are called otherwise now")
        super().variable(name, word, line)

    def handed_on(self, name: str, word: Word) -> bool:
        """What dslaunch says itself, and the script that starts the ranks asks for by another name."""
        if name not in programs.RENDEZVOUS or name in ITS_OWN or name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
            return False
        if name in TOLD:
            return False
        if name in NOT_YOURS:  # of ranks: a program that starts them gets it in its line
            self.told[name] = self.run_time(word, None)
            self.note("carried", f"{name} -> train.command: the program that starts the ranks reads it")
        elif word.value is not None and not self.stale(word.value, name):
            self.env[name] = (word.value, 0)
        elif any(piece.name in self.at_run_time for piece in word.pieces):
            self.told[name] = self.run_time(word, None)
            self.note("carried", f"{name}: known in the pod alone -> train.command")
        elif word.value is not None:
            self.env[name] = (word.value, 0)
            self.fill(("env", name), f"it names {self.stale(word.value, name)}, and pods are called otherwise now")
        else:
            return False
        return True

    def plain(self, word: Word) -> Any:
        for piece in word.pieces:
            if re.fullmatch(r"V[CK]_\w+_HOSTS", piece.name):
                self.fill(("train",), f"{piece.name} is Volcano's list of hosts: MASTER_ADDR is the first")
                self.at_run_time[piece.name] = "${MASTER_ADDR}"
        if any(piece.name in self.at_run_time for piece in word.pieces):
            return None
        return super().plain(word)

    def expression(self, piece: Any, *, port: bool) -> str:
        if piece.meaning == "this-node" and "|" in piece.text:
            if NUMBERED.search(piece.text):
                self.note("carried", f"{piece.text}: which pod it is -> NODE_RANK")
                return "${NODE_RANK}"
            return str(piece.text)
        known = self.at_run_time.get(piece.name)
        return known if known else super().expression(piece, port=port)


def _called(document: Object, name: str) -> str:
    metadata = metadata_of(document)
    text = str(metadata.get("name") or metadata.get("generateName") or basename(name).partition(".")[0])
    tame = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40].strip("-") or "imported"
    return f"job-{tame}"[:40].rstrip("-") if tame[0].isdigit() else tame


def _with_variables(command: Sequence[Any], told: Mapping[str, str]) -> list[Any]:
    """["sh", "run.sh"] with NODES: 4 is ["env", "NODES=4", "sh", "run.sh"]; in a line of shell what it expands."""
    rows = [f"{name}={text}" for name, text in told.items()]
    rank = '"${NODE_RANK}"'
    plain = all(text == rank or not re.search(r"[$\"'\\`]", text) for text in told.values())
    if plain and list(command[:2]) != ["bash", "-c"]:
        typed = [{"node": "rank", "prepend": f"{name}="} if text == rank else f"{name}={text}" for name, text in
                 told.items()]  # fmt: skip
        return ["env", *typed, *command]
    if list(command[:2]) == ["bash", "-c"] and len(command) == 3 and isinstance(command[2], str):
        line = command[2].removeprefix("exec ").removeprefix("env ")
        return ["bash", "-c", f"exec env {' '.join(rows)} {line}"]
    words = [_of_environment(word) if isinstance(word, dict) else shlex.quote(str(word)) for word in command]
    return ["bash", "-c", f"exec env {' '.join([*rows, *words])}"]


def _of_environment(word: Mapping[str, str]) -> str:
    return f'"{word.get("prepend", "")}${{{word["env"]}}}{word.get("append", "")}"'


def _quoted(text: str, known: set[str]) -> str:
    """A word of a pod's command for a shell: $(NAME) is Kubernetes' own, ${NAME} a hole that envsubst fills."""
    if "$" not in text:
        return shlex.quote(text)
    parts, at = [], 0
    for match in re.finditer(r"\$\$|\$\(([A-Za-z_]\w*)\)|\$\{([A-Za-z_]\w*)\}|\$([A-Z_][A-Z0-9_]*)", text):
        parts.append(re.sub(r'([\\"$`])', r"\\\1", text[at : match.start()]))
        at = match.end()
        name = match[1] or match[2] or match[3]
        if name and (match[1] is None or name in known):
            parts.append(f"${{{name}}}")
        else:
            parts.append("\\$" if match[0] == "$$" else "\\" + match[0])
    return '"' + "".join(parts) + re.sub(r'([\\"$`])', r"\\\1", text[at:]) + '"'


def _with_arguments(text: str, arguments: Sequence[str]) -> str:
    """A script with what it was told behind its name: "$@" and $1, but not awk's."""
    lines = []
    for line in text.splitlines():
        if "awk" not in line:
            line = re.sub(r"\"\$\{?[@*]\}?\"|\$\{?[@*]\}?", lambda _: " ".join(arguments), line)
            for number, word in enumerate(arguments[:9], 1):
                line = re.sub(rf"\"\$\{{?{number}\}}?\"|\$\{{?{number}\}}?", lambda _, word=word: word, line)  # type: ignore[misc]
        lines.append(line)
    return "\n".join(lines)


def _own_references(text: str, known: set[str]) -> str:
    """A script with $(NAME) of Kubernetes' as the shell's ${NAME}; $(hostname) stays."""

    def put(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        return f"${{{match[1]}}}" if match[1] in known else match[0]

    return REFERENCE.sub(put, text)
