"""The step that trains as the program of the job, and the servers beside it as its services."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from posixpath import basename
from typing import Any

from launcher import shell
from launcher.errors import Path
from launcher.imports import deepspeed, programs
from launcher.imports.draft import Start, digits, flat, inside_quotes, one_of, short, size, without_end
from launcher.imports.options import OF_A_STEP
from launcher.imports.programs import Program, said
from launcher.imports.steps import AFTER, Steps
from launcher.imports.variables import OWN_GPU
from launcher.shell import Piece, Word
from launcher.spec.check import SECRET_NAME, SECRET_VALUE

MEGATRON: dict[str, Path] = {  # degrees of 1 say nothing
    "--tensor-model-parallel-size": ("parallel", "tensor"),
    "--pipeline-model-parallel-size": ("parallel", "pipeline"),
    "--ds-sequence-parallel-size": ("parallel", "sequence"), "--micro-batch-size": ("micro_batch",),
    "--global-batch-size": ("global_batch",), "--seq-length": ("seq_len",), "--train-iters": ("steps",),
}  # fmt: skip


class Training(Steps):
    whole = False  # the program starts the ranks of all nodes itself
    chosen: Start | None = None  # what trains

    def trainer(self) -> Start | None:
        """The one start that trains; servers beside it become services, everything else is named in a note."""
        servers = [one for one in self.starts if programs.serves(one.argv)]
        others = [one for one in self.starts if one not in servers]
        if not others:
            return None
        scored = [(self.score(one), -index, one) for index, one in enumerate(others)]
        best = max(scored, key=lambda row: row[:2])
        chosen = self.chosen = best[2]
        for _, index, one in scored:
            if one is chosen:
                continue
            text = " ".join(said(word) for word in one.argv)
            text += "".join(f" {option.word.text}" for option in one.options)
            if [said(word) for word in one.argv[:3]] == [said(word) for word in chosen.argv[:3]]:
                self.note("left out", f"{text}: the same program again; a job file starts one", one.line)
            elif -index < -best[1]:
                self.note("left out", f"{text}: it prepares; run it before, or as a line of setup", one.line)
            else:
                self.note("left out", f"{text}: {AFTER}", one.line)
        for one in servers:
            self.service(one)
        return chosen

    def score(self, start: Start) -> float:
        found = programs.read(start.argv)
        score = 1.0
        if found and found.launcher not in ("python", "node"):
            score = 4.0
        elif start.stepped:
            score = 3.0 if found or programs.looks_like_work(start.argv) else 2.5
            score -= 2.0 if programs.FETCHES.match(basename(said(start.argv[0]))) else 0.0
        elif found is None:
            score = 0.5
        alone = start.number("ntasks") == 1 or (start.number("nodes") == 1 and not start.number("ntasks"))
        if start.stepped and alone and (self.needs.nodes or 1) > 1 and "for" not in start.inside:
            score -= 2.2
        if programs.PREPARES.search(" ".join(said(word) for word in start.argv[:4])):
            score -= 2.5
        if any(said(word) in ("ray", "submit") for word in start.argv[:1]) and "submit" in map(said, start.argv):
            score += 2
        return score

    # -- beside it

    def service(self, start: Start) -> None:
        name = programs.service_name(start.argv)
        start = replace(start, argv=self.arguments(start.argv))
        taken = [row["name"] for row in self.services]
        while name in taken:
            name = f"{name}-{len(taken) + 1}"
        nodes = start.number("nodes") or start.number("ntasks") or 1
        row: dict[str, Any] = {"name": name, "command": self.command(start)}
        gpus = self.of_a_service(row, start)
        box = self.box(start)
        if box.get("image"):
            row["container"] = box["image"] if set(box) == {"image"} else box
        if nodes != 1:
            row["nodes"] = nodes
        if not start.stepped or (start.option("nodelist") in (None, "") and start.option("nodes") is None):
            row["on"] = "first"
        ports = [said(word) for flag, word in zip(start.argv, start.argv[1:], strict=False) if said(flag) == "--port"]
        ports += [said(word)[7:] for word in start.argv if said(word).startswith("--port=")]
        if ports and ports[0].isdigit():
            row["port"] = int(ports[0])
            row["ready"] = {"port": int(ports[0])}
        group = start.option("het-group") or ""
        if group.isdigit() and 0 < int(group) <= len(self.components):
            self.component(row, self.components[int(group) - 1])
        beside = self.chosen is not None and start.stepped and start.options == self.chosen.options
        if beside and (self.needs.nodes or 1) > 1:
            row["on"] = "all"  # of one line with the training, which every node runs
            row.pop("nodes", None)
        gpus = start.number("gpus") or start.number("gpus-per-node") or gpus
        if gpus is not None and (gpus != self.needs.gpus_per_node or row.get("on", "own") != "own"):
            row["gpus_per_node"] = gpus
        if name.startswith("ray"):
            self.ray(row, start)
        self.services.append(row)
        self.fields.setdefault("services", []).append(row)
        shown = " ".join(said(word) for word in start.argv)
        share = " ".join(one.word.text for one in start.options if one.name in OF_A_STEP)
        self.note("carried", f"{short(shown)} -> services" + (f"; srun {share}" if share else ""), start.line)

    def of_a_service(self, row: dict[str, Any], start: Start) -> int | None:
        """A=1 before a server is its own variable; the devices that it is shown are a number of GPUs."""
        shown = None
        for name, word in start.own:
            value = self.plain(word)
            if name in OWN_GPU and re.fullmatch(r"[0-9]+(,[0-9]+)*", str(value)):
                shown = len(str(value).split(","))
                self.note("carried", f"{name}={value} -> services.gpus_per_node: {shown}", start.line)
            elif value == {"node": "MASTER_ADDR"} and name.endswith("_IP"):
                message = "each node's own address, which Ray and its programs find"
                self.note("left out", f"{name}={flat(word.text)}: {message}", start.line)
            elif value is None or name in OWN_GPU:
                self.note("left out", f"{name}={flat(word.text)}: only a running job knows its value", start.line)
            else:
                row.setdefault("env", {})[name] = value
        return shown

    def box(self, start: Start) -> dict[str, Any]:
        """The container of a step: of apptainer before its program, or of srun's options."""
        job = self.fields.pop("container", None)
        self.fields["container"] = dict(start.box)
        for one in start.options:
            if one.name.startswith("container") and one.value is not None:
                text, path = f"srun {one.word.partial}", ("services",)
                if one.name == "container-mounts":
                    self.put(("container", "mounts"), self.mounts(one.value, start.line), start.line, text)
                elif one.name == "container-image":
                    self.put(("container", "image"), self.path(one.value, path, start.line), start.line, text)
                elif one.value.value is not None:
                    self.box_option(one.name, one.value.value, start.line, text)
        found: dict[str, Any] = self.fields.pop("container")
        if job is not None:
            self.fields["container"] = job
        return found

    def component(self, row: dict[str, Any], group: Mapping[str, str]) -> None:
        """Nodes of another kind, as a component of a heterogeneous job has them."""
        names = ("partition", "account", "qos", "constraint")
        row["component"] = {name: group[name] for name in names if group.get(name)}
        if "exclusive" in group:
            row["component"]["exclusive"] = True
        row.pop("on", None)
        if (digits(group.get("nodes", "")) or 1) != 1:
            row["nodes"] = int(group["nodes"])
        kind, _, count = (group.get("gpus-per-node") or group.get("gres", "")).removeprefix("gpu:").rpartition(":")
        row["gpus_per_node"] = digits(count) or 0
        if kind:
            row["component"]["gpu_type"] = kind
        if digits(group.get("cpus-per-task", "")):
            row["cpus_per_node"] = int(group["cpus-per-task"]) * (digits(group.get("ntasks-per-node", "")) or 1)
        if group.get("mem"):
            row["memory"] = size(group["mem"])

    def ray(self, row: dict[str, Any], start: Start) -> None:
        """`ray start` as services: the head beside the driver, workers on nodes of their own."""
        if row["name"] == "ray-head":
            port = next(
                (said(word).partition("=")[2] for word in start.argv if said(word).startswith("--port")), "6379"
            )
            row["on"], row["port"] = "first", int(port) if port.isdigit() else 6379
            row.pop("nodes", None)
            row["ready"] = {"port": row["port"]}
            gpus = self.gpus(start, None)
            row["command"] = ["bash", "-c", "exec " + programs.ray_head(start.argv, gpus)]
            row["gpus_per_node"] = gpus or 1
            if not gpus:
                at = len(self.services)
                self.fill(("services", at, "gpus_per_node"), "as many as the job has on a node", start.line)
        else:
            row["nodes"] = max((self.needs.nodes or 2) - 1, 1)
            row.pop("on", None)
            row["after"] = ["ray-head"]
            row["command"] = [
                "bash", "-c",
                f'exec {said(start.argv[0])} start --block '
                '--address="${DSLAUNCH_HOST_RAY_HEAD}:${DSLAUNCH_PORT_RAY_HEAD}"',
            ]  # fmt: skip

    # -- its command

    def command(self, start: Start) -> list[Any]:
        """argv where everything is known, else a line of shell that is expanded where it runs."""
        plain = [self.plain(word) for word in start.argv]
        if all(word is not None for word in plain):
            return plain
        line = " ".join(
            self.run_time(word, before) for before, word in zip((None, *start.argv), start.argv, strict=False)
        )
        return ["bash", "-c", f"exec {line}"]

    def arguments(self, words: Iterable[Word]) -> tuple[Word, ...]:
        """$1 and "$@" of a script are sbatch's arguments: the user says them."""
        found: list[Word] = []
        for word in words:
            if [piece.name for piece in word.pieces if piece.name or piece.text] in (["@"], ["*"]):
                self.note("left out", f"{word.text}: whatever sbatch was told behind the script's name", word.line)
                continue
            pieces = []
            if SECRET_VALUE.regex.fullmatch(word.partial):
                found.append(self.secret(word, found[-1] if found else None))
                continue
            for piece in word.pieces:
                if SECRET_NAME.regex.fullmatch(piece.name):
                    self.put(("secrets", piece.name), {"from_env": piece.name})
                if re.fullmatch(r"[0-9@*]", piece.name):
                    self.fill(("train",), f"{piece.text} stands for an argument of the script's", word.line)
                    piece = Piece(f"FILL_IN_ARGUMENT_{piece.name if piece.name.isdigit() else 'ALL'}")
                pieces.append(piece)
            found.append(replace(word, pieces=tuple(pieces)))
        return tuple(found)

    def secret(self, word: Word, before: Word | None) -> Word:
        """A secret in plain text on a command line: a variable that the shell that submits has."""
        flag, equals, _ = word.partial.partition("=")
        said_before = flag if equals else said(before) if before else ""
        name = re.sub(r"\W+", "_", said_before.strip("-")).upper() or "SECRET"
        name = "HF_TOKEN" if "hf_" in word.partial else name if SECRET_NAME.regex.fullmatch(name) else f"{name}_TOKEN"
        self.put(("secrets", name), {"from_env": name})
        self.note(
            "carried", f"a secret in the program's arguments -> secrets.{name}: export it, and renew it", word.line
        )
        head = (Piece(f"{flag}="),) if equals else ()
        return replace(word, pieces=(*head, Piece(f"${name}", name, "secret")))

    def run_time(self, word: Word, before: Word | None) -> str:
        """A word for `bash -c`, with names that mean the same in a job of dslaunch's."""
        if word.value is not None:
            return shlex.quote(word.value)
        parts = []
        hint = (said(before) if before else "") + word.text
        previous = ""
        suffix = self.fields.get("slurm", {}).get("address_suffix", "")
        for at, piece in enumerate(word.pieces):
            if piece.meaning == "local-disk":
                parts.append(self.local("".join(one.text for one in word.pieces[at + 1 :] if not one.name)))
            elif not piece.name:
                # the name of the first node has it by then
                text = piece.text.removeprefix(suffix) if previous == "host" else piece.text
                parts.append(inside_quotes(text))
                hint += piece.text
            elif piece.meaning == "time" and any(one.meaning == "job-id" for one in word.pieces):
                self.expression(piece, port=False)  # run_${SLURM_JOB_ID}_$(date +%F): the id stands there already
                if parts:
                    parts[-1] = parts[-1].rstrip("_-.")
            else:
                parts.append(self.expression(piece, port=bool(re.search(r"(?i)port", hint)) or previous == "host"))
            previous = "host" if piece.meaning == "first-node" else (previous if piece.text == ":" else "")
        text = "".join(parts)
        lone = len(word.pieces) == 1 and not word.meaning and not word.pieces[0].quoted and word.quoting == "none"
        if lone and word.pieces[0].name.isidentifier() and not SECRET_NAME.regex.fullmatch(word.pieces[0].name):
            return text  # it may hold several words
        return f'"{text}"'

    def expression(self, piece: Piece, *, port: bool) -> str:
        meaning = piece.meaning
        if meaning in ("job-id", "random", "time") and port:
            return "${MASTER_PORT}"
        if meaning in ("random", "time"):
            message = f"{piece.text} -> the job's id: one name for every rank and attempt"
            if message not in [note.message for note in self.notes]:
                self.note("carried", message)
        if meaning == "hosts" and self.services:
            name = self.services[0]["name"].upper().replace("-", "_")
            return f"${{DSLAUNCH_HOST_{name}}}"
        simple = {
            "first-node": "${MASTER_ADDR}", "this-address": "${MASTER_ADDR}", "node-rank": "${NODE_RANK}",
            "rank": "${RANK}", "local-rank": "${LOCAL_RANK}", "tasks": "${WORLD_SIZE}", "this-node": "$(hostname)",
            "local-disk": "${DSLAUNCH_LOCAL}", "submit-dir": "${PWD}", "time": "${SLURM_JOB_ID}",
            "random": "${SLURM_JOB_ID}", "array-index": "${ARRAY_INDEX}",
        }  # fmt: skip
        if meaning in ("rank", "local-rank", "tasks") and self.fields["train"].get("launcher") == "node":
            tasks = self.needs.tasks_per_node or 1
            if tasks > 1 or meaning == "local-rank":
                self.fill(("train", "launcher"), f"{piece.shown} counts {tasks} tasks on a node, and node starts one")
        if meaning == "array-index" and "[" in piece.name:
            return "${" + one_of(piece.name.partition("[")[0]) + "}"
        if meaning == "tasks" and self.whole:
            return "${SLURM_NTASKS}"
        if meaning == "job-id":
            return f"${{{piece.name}}}" if piece.name.isidentifier() else "${SLURM_JOB_ID}"
        if meaning in simple:
            return simple[meaning]
        return f"${{{piece.name}}}" if piece.name.isidentifier() else piece.text

    # -- the program

    def program(self, start: Start) -> None:
        start = replace(start, argv=self.arguments(start.argv))
        if not start.argv:
            self.unknown("the program of this step is an argument of the script's", start.line)
            return
        start = self.swept(self.installed(start))
        for name, word in start.own:
            self.variable(name, word, start.line)
        if (start.option("het-group") or "0") != "0":
            message = f"the training runs in component {start.option('het-group')} of a heterogeneous job"
            self.fill(
                ("resources",), f"{message}: say its nodes and GPUs here, and its partition under slurm", start.line
            )
        if len(self.components) > sum("component" in row for row in self.services):
            self.note("left out", "#SBATCH hetjob: a component that runs no service", start.line)
        found = programs.read(start.argv) or Program("node", "command", None, start.argv)
        tasks = self.tasks_per_node(start)
        gpus = self.gpus(start, found)
        launcher: str = found.launcher
        self.whole = launcher == "job"
        if launcher == "python":
            several = start.stepped and (tasks or 0) > 1 and (not gpus or tasks == gpus)
            launcher = (
                "srun" if several or (start.stepped and (self.needs.tasks or 0) > (self.needs.nodes or 1)) else ""
            )
            if not launcher:
                launcher = (
                    "torchrun" if (gpus or 1) == 1 and not start.stepped else "node" if (gpus or 1) > 1 else "srun"
                )
        elif launcher == "node" and start.stepped and gpus and tasks == gpus and gpus > 1:
            launcher = "srun"
        elif launcher == "torchrun" and start.stepped and found.per_node == 1 and (tasks or 1) > 1 and tasks == gpus:
            launcher = "srun"
            self.note("carried", "a torchrun for every rank -> train.launcher: srun", start.line)
        self.ranked = launcher == "srun"
        if launcher != "torchrun":
            self.put(("train", "launcher"), launcher)
        self.note("carried", f"{short(' '.join(said(word) for word in start.argv[:6]))} -> train", start.line)
        dropped = [text for text in found.dropped if text]
        if dropped:
            self.note(
                "left out", f"{' '.join(dropped)}: ranks and their meeting point are dslaunch's part", start.line
            )
        launcher_args: list[Any] = []
        for word in found.options:
            value = self.plain(word)
            if value is None:  # its flag goes with it, or would take the next argument for its value
                flag = launcher_args.pop() if launcher_args and re.match(r"-[^=]*$", str(launcher_args[-1])) else ""
                message = f"{flag} {short(said(word))} is known to the script alone".strip()
                self.fill(("train",), f"launcher_args: {message}", start.line)
            else:
                launcher_args.append(value)
        if launcher_args:
            self.put(("train", "launcher_args"), launcher_args)
        arguments = self.config(found, start)
        self.megatron(arguments, start.line)
        plain = [self.plain(word) for word in arguments]
        target = None if found.target is None else self.plain(found.target)
        per_node = launcher in ("node", "job")
        own = found.launcher == "python" and any(said(word) != "-u" for word in found.head[1:])  # python -W ignore
        program = per_node or (own and found.kind == "script") or found.kind == "command" or target is None
        if program or any(word is None for word in plain):
            words = [*found.head, *([found.target] if found.target else []), *arguments]
            whole = replace(start, argv=tuple(words), own=())
            self.put(("train", "command"), self.command(whole))
        else:
            self.put(("train", found.kind), _tidy_script(target) if found.kind == "script" else target)
            if isinstance(target, dict) and set(target) == {"env"}:
                message = (
                    f"no line of the script says what {target['env']} is: the program, with its arguments behind it"
                )
                self.fill(("train", found.kind), message, start.line)
            if plain:
                self.put(("train", "args"), plain)
        if found.note:
            self.note("carried", found.note, start.line)
        if start.prefix:
            prefix = [said(word) for word in start.prefix]
            preloaded = self.fields["train"].get("prefix", [])  # env LD_PRELOAD=...
            self.put(("train", "prefix"), [*preloaded, *prefix], start.line, " ".join(prefix))
        for key, value in start.box.items():
            self.put(("container", key), value)
        if self.whole and start.options:
            boxes = tuple(
                one for one in start.options if one.name.startswith("container") or one.name == "environment"
            )
            others = " ".join(
                f"{one.word.text} {one.value.text if one.value else ''}" for one in start.options if one not in boxes
            )
            message = f"srun's options {flat(others)}: dslaunch starts the program as the one task of a step"
            self.note("left out", message, start.line)
            start = replace(start, options=boxes)
        self.step_options(start)

    def installed(self, start: Start) -> Start:
        """/envs/x/bin/torchrun is torchrun of the environment /envs/x; torchrun_jsc meets at other names."""
        word = start.argv[0]
        if basename(said(word)) == programs.JSC:
            slurm = self.fields.setdefault("slurm", {})
            slurm.setdefault("address_suffix", "i")
            self.note("carried", f"{said(word)} -> torchrun, with slurm.address_suffix", start.line)
        match = re.search(r"/bin/(torchrun|python[0-9.]*|accelerate|deepspeed)\Z", said(word))
        system = re.match(r"(/usr|/bin|/opt/conda/bin|/usr/local)\b|.*/\.local/bin/", said(word))
        if not match or system or not word.pieces or word.pieces[-1].name:
            return start
        given = self.path(without_end(word, match[0]), ("venv",), start.line)
        active = [self.fields[key] for key in ("venv", "conda", "uv") if key in self.fields]
        name = "python" if match[1].startswith("python") else match[1]
        if not active:
            kind = "conda" if re.search(r"(?i)(conda|mamba|miniforge)[^/]*/(.*/)?envs/", said(word)) else "venv"
            self.put((kind,), given, start.line, said(word))
        elif given not in active:
            if name != "python":  # whose path stays in the command
                self.fill(
                    ("train",), f"{said(word)} is not the {name} of the environment that is activated", start.line
                )
            return start
        return replace(start, argv=(programs.made(name, word), *start.argv[1:]))

    def megatron(self, words: Sequence[Word], line: int) -> None:
        """Degrees and batches that Megatron's own arguments say: a DeepSpeed config is made of the same ones."""
        texts = [text for word in words for text in said(word).split("=", 1)]
        numbers = {flag.replace("_", "-"): int(value) for flag, value in pairwise(texts)
                   if flag.startswith("--") and re.fullmatch(r"[0-9][0-9_]{0,8}", value)}  # fmt: skip
        given = {path: numbers[flag] for flag, path in MEGATRON.items() if flag in numbers}
        if not any(flag in numbers for flag in ("--micro-batch-size", "--tensor-model-parallel-size")):
            return
        inner = numbers.get("--context-parallel-size", 1)
        if inner > 1:  # no field has it, and a batch of less ranks is another one
            self.note("left out", f"--context-parallel-size {inner} is the program's own: train has no batch", line)
            given = {path: value for path, value in given.items() if path[0] in ("seq_len", "steps")}
        for path, value in given.items():
            at = self.fields["train"]
            if path[0] == "parallel" and value == 1:
                continue
            if at.get(path[0]) not in (None, value) and len(path) == 1:
                message = f"the program is told {value}, its DeepSpeed config {at[path[0]]}"
                self.fill(("train", *path), message, line)
                continue
            self.put(("train", *path), value)
        if given:
            self.note("carried", f"what the program is told of its ranks and batches -> train ({len(given)})", line)

    def config(self, found: Program, start: Start) -> tuple[Word, ...]:
        """Arguments without the DeepSpeed config that the script itself writes; it becomes fields."""
        words = list(found.arguments)
        for at, word in enumerate(words):
            flag, equals, inline = said(word).partition("=")
            if flag not in programs.CONFIG_FLAGS:
                continue
            value = inline if equals else (said(words[at + 1]) if at + 1 < len(words) else "")
            heredoc = self.script.files.get(value.removeprefix("./"))
            if not value or value.startswith("-"):
                continue
            if heredoc is not None and self.deepspeed(heredoc.text, heredoc.line):
                self.unwritten(value)
                self.put(("train", "config_flag"), flag)
                return tuple(words[:at] + words[at + (1 if equals else 2) :])
            self.put(("train", "config_flag"), "none")
            self.note("carried", f"{flag} {value}: the program's own config stays (config_flag: none)", start.line)
            return tuple(words)
        self.put(("train", "config_flag"), "none")
        return tuple(words)

    def deepspeed(self, text: str, line: int) -> bool:
        """A DeepSpeed config as fields of train; what has no field stays under train.deepspeed."""
        try:
            config = json.loads(text)
        except ValueError:
            return False
        if not isinstance(config, dict):
            return False
        fields, rest = deepspeed.fields(config)
        for path, value in fields.items():
            self.put(("train", *path), value)
        if rest:
            self.put(("train", "deepspeed"), rest)
        self.note("carried", "the DeepSpeed config in the script -> train", line)
        return True

    # -- of several values

    def swept(self, start: Start) -> Start:
        """An array that picks values by its index, or a loop around the training: the same job for several values."""
        words = [*start.argv, *(option.value for option in start.options if option.value is not None)]
        looped = [piece.name for word in words for piece in word.pieces if piece.meaning == "loop"]
        looped += [name for word in words for name in self.script.loops
                   for piece in word.pieces if re.search(rf"\[\$?\{{?{name}\}}?\]", piece.name)]  # fmt: skip
        for name in dict.fromkeys(looped):
            values = self.script.loops.get(name)
            if self.over_nodes(name, values, start):
                start = self.one_of_the_nodes(name, values, start)
                continue
            if values is None or not any(piece.name == name for word in start.argv for piece in word.pieces):
                continue
            if any(re.search(r"[*?\[]", value) for value in values):
                message = f"for {name} in {' '.join(values)}: one of the files, or a sweep over them"
                self.fill(("train",), message, start.line)
                continue
            self.put(("sweep", "over", f"env.{name}"), list(values))
            self.note("carried", f"for {name} in ... -> sweep: each value is a job of its own", start.line)
            if start.background:
                message = f"the script runs all {name} at once on parts of its nodes: say the nodes of one here"
                self.fill(("resources", "nodes"), message, start.line)
        if not self.array:
            return start
        picked = {
            piece.name.removesuffix("]")
            for word in start.argv
            for piece in word.pieces
            if piece.meaning == "array-index" and "[" in piece.name
        }
        if picked:
            for text in sorted(picked):
                name = text.partition("[")[0]
                if name not in self.indexed:
                    continue
                listed = self.indexed[name]
                places = [_place(text, index) for index in self.array]
                chosen = [listed[at] for at in places if at is not None and -len(listed) <= at < len(listed)]
                if len(chosen) < len(self.array):
                    message = f"${{{text}}} of --array: {len(chosen)} of its {len(self.array)} indices have a value"
                    self.fill(("sweep",), message, start.line)
                self.put(("sweep", "over", f"env.{one_of(name)}"), chosen)
            if len(self.fields.get("sweep", {}).get("over", {})) > 1:
                self.put(("sweep", "how"), "zip")
        else:
            self.put(("sweep", "over", "env.ARRAY_INDEX"), [str(index) for index in self.array])
        return start

    def over_nodes(self, name: str, values: tuple[str, ...] | None, start: Start) -> bool:
        """`for i in 0 1; do srun -w ${nodes[$i]} ... --machine_rank $i & done`: a turn is a node of one job."""
        inside = re.compile(rf"\$\{{?{re.escape(name)}\b")
        chosen = [one.value.text for one in start.options if one.name in ("nodelist", "relative") and one.value]
        texts = [word.text for word in start.argv]
        for flag, value in zip(["", *texts], texts, strict=False):
            whole = value if flag.startswith("-") and not value.startswith("-") else ""
            flag, _, joined = (flag, "", whole) if whole else value.partition("=")
            if flag.lstrip("-").replace("-", "_") in ("machine_rank", "node_rank"):
                chosen.append(joined)
        if any(inside.search(text) for text in chosen):
            return True
        numbers = values is None or values == tuple(str(index) for index in range(len(values)))
        return start.background and numbers

    def one_of_the_nodes(self, name: str, values: tuple[str, ...] | None, start: Start) -> Start:
        number = values is not None and all(value.isdigit() for value in values)
        meaning = "node-rank" if number else "this-node"
        argv = tuple(
            replace(word, pieces=tuple(replace(piece, meaning=meaning) if piece.name == name else piece
                                       for piece in word.pieces))
            for word in start.argv
        )  # fmt: skip
        self.loop_nodes = len(values) if values is not None else 0
        own = {"nodes", "ntasks", "nodelist", "relative"}  # of one turn
        words = dict.fromkeys(one.word.text for one in start.options if one.name in own)
        message = f"for {name} in ... ({' '.join(words)}): a turn is a node -> resources.nodes"
        self.note("carried", message, start.line)
        return replace(start, argv=argv, options=tuple(one for one in start.options if one.name not in own))


def _place(text: str, index: int) -> int | None:
    """FILES[$((SLURM_ARRAY_TASK_ID - 1)) of task 3 is 2."""
    expression = re.sub(r"\$?\{?\bSLURM_ARRAY_TASK_ID\b\}?", str(index), text.partition("[")[2])
    value = shell.calculated(expression.replace("$((", "(").replace("))", ")"))
    return None if value is None else int(value)


def _tidy_script(path: Any) -> Any:
    return path.removeprefix("./") if isinstance(path, str) else path
