"""The commands of a script, in order: what starts a program, and what prepares it (modules, environments, copies)."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from posixpath import basename
from typing import Any

from launcher import facts, shell
from launcher.errors import Problem, UserError
from launcher.imports import programs
from launcher.imports.draft import Start, flat, shell_text, short, without_end
from launcher.imports.options import Options
from launcher.imports.programs import said
from launcher.shell import Command, Word
from launcher.software import ULIMITS
from launcher.spec.check import SECRET_VALUE

HOSTS = re.compile(r"(host|machine)_?(file|list)|\.ssh/|authorized_keys")  # what mpirun and ssh read
AFTER = "it runs after the training: a job of its own, or slurm.dependency of the next"
MODULE_VERBS = "load purge reset use unload swap list restore save avail spider switch".split()


class Steps(Options):
    reaches = True  # what runs on the first node may start the ranks of all: train.launcher: job

    def commands(self, commands: Iterable[Command], start: Start | None = None) -> None:
        """`start` is what stands around them: srun with its options, a container."""
        for command in commands:
            if "substitution" in command.inside or not command.argv:
                continue
            if "never" in command.inside:
                self.note("left out", f"{flat(command.text)}: its condition does not hold here", command.line)
                continue
            if self.environment(command, start):
                continue
            found = self.peel(command, start)
            if found is None:
                continue
            self.starts.append(found)
            known = programs.read(found.argv)
            if (found.stepped or (known and known.launcher != "python")) and not programs.serves(found.argv):
                self.started = not programs.PREPARES.search(" ".join(said(word) for word in found.argv[:4]))

    def peel(self, command: Command, around: Start | None) -> Start | None:
        """What a command starts, behind srun, containers, numactl and the like; None when it was dealt with."""
        now = around or Start((), command.line)
        now = replace(
            now,
            argv=command.argv,
            line=command.line,
            background=command.background or now.background,
            inside=(*now.inside, *command.inside),
            own=(*now.own, *((one.name, one.value) for one in command.assignments if one.value)),
        )
        while now.argv:
            name = basename(said(now.argv[0]))
            if name == "srun":
                options, rest = shell.options(now.argv[1:])
                while len(rest) > 1 and _holds_options(rest):
                    self.note("left out", f"srun {rest[0].text}: no line says what it holds", command.line)
                    more, rest = shell.options(rest[1:])
                    options += more
                now = replace(now, argv=rest, options=(*now.options, *options), stepped=True)
            elif name == "env":
                behind = list(now.argv[1:])
                own = list(now.own)
                while behind and re.fullmatch(r"-[a-z0-9]|--?|--[a-z-]+(=.*)?", behind[0].partial):
                    flag = behind.pop(0).partial
                    dropped = f"env {flag}"
                    if flag in ("-u", "--unset", "-C", "--chdir", "-S", "--split-string") and behind:
                        dropped += f" {said(behind.pop(0))}"
                    self.note("left out", f"{dropped}: a job file says what a program gets", command.line)
                while behind and (match := re.match(r"([A-Za-z_]\w*)=", behind[0].partial)):
                    own.append((match[1], shell.cut(behind.pop(0), len(match[0]))))
                now = replace(now, argv=tuple(behind), own=tuple(own))
            elif name in programs.WRAPPERS and len(now.argv) > 1:
                rest = programs.unwrapped(name, now.argv[1:])
                head = now.argv[: len(now.argv) - len(rest)]
                if name == "numactl" and all(word.value is not None for word in head):
                    now = replace(now, prefix=(*now.prefix, *head))
                elif name not in ("exec", "time", "nohup", "stdbuf", "command"):
                    dropped = " ".join(said(word) for word in now.argv[: len(now.argv) - len(rest)])
                    self.note("left out", f"{dropped}: {programs.WRAPPERS[name]}", command.line)
                now = replace(now, argv=rest)
            elif name in ("apptainer", "singularity", "shifter") and len(now.argv) > 1:
                box, rest = self.boxed(name, now.argv[1:], command.line)
                if not rest or box is None:
                    return None
                now = replace(now, argv=rest, box={**now.box, **box})
            elif name == "uv" and len(now.argv) > 2 and said(now.argv[1]) == "run":
                rest = programs.unwrapped("uv", now.argv[2:])
                self.put(("uv",), {"project": "."}, command.line, "uv run")
                if rest and said(rest[0]).endswith(".py"):
                    rest = (programs.made("python", rest[0]), *rest)
                now = replace(now, argv=rest)
            elif name in ("conda", "mamba", "micromamba") and len(now.argv) > 2 and said(now.argv[1]) == "run":
                now = self.conda_run(name, now, command.line)
            else:
                break
        if not now.argv:
            return None
        name = basename(said(now.argv[0]))
        nested = command.script
        opens = name in ("bash", "sh", "zsh", "dash", "eval")
        opens = opens or said(now.argv[0]).removeprefix("./") in self.script.files
        if name == "eval":
            self.comment_in(now)
        if opens and nested is not None and nested.commands:
            self.commands(nested.commands, now)
            return None
        if name in programs.MPI and (name in programs.ELSEWHERE or not self.reaches or now.box):
            self.refuse_mpi(name, command)
        if now.stepped and programs.changes(now.argv) and not programs.read(now.argv):
            bare = replace(command, argv=now.argv)
            if basename(said(now.argv[0])) == "mkdir":
                self.made_here(bare)
            elif not self.staged(bare):
                self.keep(bare)
            return None
        if now.stepped or programs.read(now.argv) or programs.looks_like_work(now.argv):
            if programs.informs(now.argv, nested):
                self.note("left out", f"{short(command.text)}: it prints, and the preflight looks closer", now.line)
                return None
            return now
        self.note("left out", f"{short(command.text)}: it is neither training nor known preparation", command.line)
        return None

    def comment_in(self, start: Start) -> None:
        """eval "$CMD" with `--a 1 # depth --b 2` in it: bash takes the rest of the line for a comment."""
        text = " ".join(word.partial for word in start.argv[1:])
        for found in re.finditer(r"(?:^|\s)#([^\n]*)", text):
            before = text[: found.start()]
            if before.count("'") % 2 == 0 and before.count('"') % 2 == 0:
                message = f"to eval a comment begins at `#{found[1].rstrip()}`: none of it reached the program"
                self.fill(("train",), message, start.line)
                return

    def refuse_mpi(self, name: str, command: Command) -> None:
        hint = (
            "one Slurm task per rank does the same: train.launcher: srun with the program's own line; "
            "RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set for every rank"
        )
        message = f"{name} starts these ranks, and dslaunch cannot watch what another launcher starts on other nodes"
        if name not in programs.ELSEWHERE:
            message = f"{name} inside a container starts ranks on other nodes, where the container is not"
            hint = f"{hint}; or enter the container behind {name}"
        raise UserError(Problem(message, hint, where=f"{self.script.name}:{command.line}:{command.column}"))

    def boxed(self, name: str, argv: Sequence[Word], line: int) -> tuple[dict[str, Any] | None, tuple[Word, ...]]:
        """apptainer exec --nv -B a:b image.sif program ..."""
        words = list(argv)
        box: dict[str, Any] = {"runtime": name}
        if name != "shifter":
            while words and said(words[0]) in ("-q", "--quiet", "-s", "--silent", "-v", "--debug", "-d"):
                words.pop(0)
            if not words or said(words[0]) not in ("exec", "run"):
                self.note(
                    "left out", f"{name} {said(words[0]) if words else ''}: only exec and run start programs", line
                )
                return None, ()
            words.pop(0)
        mounts: list[Any] = []
        args: list[str] = []
        while words and said(words[0]).startswith("-"):
            word = words.pop(0)
            flag, equals, _ = said(word).partition("=")
            takes = flag in programs.BOX_VALUES
            value = shell.cut(word, len(flag) + 1) if equals else (words.pop(0) if takes and words else None)
            if flag in ("-B", "--bind", "--mount", "--volume", "-V") and value:
                mounts += self.mounts(value, line)
            elif flag in ("--pwd", "--cwd", "--workdir") and value:
                box["workdir"] = self.path(value, ("container", "workdir"), line)
            elif flag in ("--nv", "--nvccli", "--rocm"):
                box["gpus"] = "rocm" if flag == "--rocm" else "nv"
            elif flag in ("-e", "--cleanenv"):
                box["clean_env"] = True
            elif flag in ("--no-home",):
                box["mount_home"] = False
            elif flag in ("--writable", "-w"):
                box["writable"] = True
            elif flag == "--env" and value:
                self.listed(value, line)
            elif flag in ("--image", "-i") and value:
                box["image"] = self.path(value, ("container", "image"), line)
            elif flag in ("--module", "-m") and value:
                box["modules"] = said(value).split(",")
            else:
                args.append(flag if value is None else f"{flag}={said(value)}")
        flags = " ".join(said(word) for word in argv[: len(argv) - len(words)])
        self.note("carried", f"{name} {flags} -> container", line)
        if name != "shifter" and words:
            box["image"] = self.path(words.pop(0), ("container", "image"), line)
        if isinstance(box.get("image"), str):
            box["image"] = box["image"].removeprefix("docker:") if name == "shifter" else box["image"]
        if mounts:
            box["mounts"] = mounts
        if args:
            box["args"] = args
        return box, tuple(words)

    # -- what prepares

    def environment(self, command: Command, start: Start | None) -> bool:
        """Modules, activations, cd and everything else that starts no program of interest. True: dealt with."""
        words = [said(word) for word in command.argv]
        name, line = words[0], command.line
        if name == "mkdir":
            self.made_here(command)
        elif name in ("module", "ml"):
            self.module(words[1:] if name == "module" else ["load", *words[1:]], command)
        elif name in ("source", ".") and len(words) > 1:
            self.source(command, command.argv[1])
        elif name in ("conda", "mamba", "micromamba", "pyenv") and words[1:2] in (["activate"], ["deactivate"]):
            if words[1] == "activate" and len(words) > 2:
                self.conda(command.argv[2], name, line)
            else:
                self.note("left out", f"{flat(command.text)}: a batch job begins without an environment", line)
        elif name == "eval" and ("shell.bash" in command.text or "shell hook" in command.text):
            match = re.search(r"(\S+)/bin/(conda|mamba|micromamba)\b", command.text)
            if match:
                self.conda_root = match[1].lstrip("\"'$(") if not re.search(r"[${]", match[1]) else None
                if not self.conda_root:
                    inner = match[1].lstrip("\"'").removeprefix("$(")
                    self.conda_root = self.reference(inner)
            self.note("left out", f"{short(command.text)}: dslaunch activates conda itself", line)
        elif (name == "cd" and not command.inside) or (name in ("cd", "pushd") and start is not None):
            if len(words) > 1 and not self.started:
                box = start.option("container-workdir") if start else None
                self.workdir(command.argv[1], line, short(command.text), inside=box)
            else:
                self.note("left out", f"{flat(command.text)}: {AFTER if self.started else 'it goes nowhere'}", line)
        elif name == "ulimit":
            self.ulimit(command, words)
        elif name == "sbcast":
            self.sbcast(command)
        elif name in ("tar", "cp", "rsync", "unzip") and self.staged(command):
            pass
        elif name == "env" and any("=" not in word and not word.startswith("-") for word in words[1:]):
            return False
        elif (name == "scontrol" and words[1:2] == ["requeue"]) or (
            name == "trap" and "scontrol requeue" in command.text
        ):
            self.put(("slurm", "requeue"), True, line, flat(command.text))
        elif name == "set" and words[1:] in (["-a"], ["+a"], ["-o", "allexport"], ["+o", "allexport"]):
            self.note("left out", f"{flat(command.text)}: what `source` reads is exported", line)
        elif name in ("cat", "tee") and command.heredoc and self.written(command):
            pass
        elif name in programs.QUIET or name.startswith("log"):
            if self.started and name in programs.CHANGES:
                self.note("left out", f"{flat(command.text)}: {AFTER}", line)
            elif name in programs.WHY:
                self.note("left out", f"{flat(command.text)}: {programs.WHY[name]}", line)
            else:
                self.printed.append(command)
        elif name in self.script.functions or name in ("function", "export", "return", "local", "declare"):
            pass
        elif name in ("uv", "pip", "pip3", "poetry", "pixi") and words[1:2] != ["run"]:
            if name == "uv" and words[1:2] == ["sync"]:
                extras = [said(word) for flag, word in pairwise(command.argv) if said(flag) == "--extra"]
                section = {"project": ".", "sync": True, **({"extras": extras} if extras else {})}
                self.put(("uv",), section, line, flat(command.text))
            else:
                self.keep(command)
        elif (start is not None and not programs.read(command.argv) and programs.prepares(words, command)) or (
            start is None and programs.prepares(words, command)
        ):
            self.keep(command)
        else:
            return False
        return True

    def ulimit(self, command: Command, words: Sequence[str]) -> None:
        found = re.fullmatch(r"-[HS]*([clnsu])[HS]*", words[1]) if len(words) == 3 else None
        value = words[2] if len(words) == 3 else ""
        if found is None or not re.fullmatch(r"[0-9]{1,18}|unlimited", value):
            if len(words) < 3:  # it prints
                self.printed.append(command)
            else:
                self.keep(command)
        elif not self.kept_out(command):
            name = next(name for name, flag in ULIMITS.items() if flag == found[1])
            what: Any = value if value == "unlimited" else int(value)
            self.put(("ulimit", name), what, command.line, flat(command.text))

    def made_here(self, command: Command) -> None:
        """mkdir; on a local disk `stage` makes what it needs."""
        if set(command.inside) != {"if"} and self.kept_out(command):
            return
        for word in command.argv[1:]:
            if said(word).startswith("-"):
                continue
            self.directories.append((word, command.line))
        self.note("carried", f"{flat(command.text)} -> mkdir", command.line)

    def mkdir(self) -> None:
        """The directories that the script makes, once it is known what `stage` makes."""
        found: list[Any] = []
        for word, line in self.directories:
            local = any(piece.meaning == "local-disk" for piece in word.pieces)
            if local and self.fields.get("stage"):
                self.note("left out", f"mkdir {said(word)}: stage makes the directories that it needs", line)
                continue
            word = self.asked(("mkdir",), word, line)
            value = self.plain(word)
            if value is None:
                self.setup.append(f"mkdir -p {_shell_word(word)}")
                self.note("kept", f"mkdir {said(word)} -> setup: its name is made where it runs", line)
            elif value not in (*found, "", "."):
                found.append(value)
        if found:
            self.fields["mkdir"] = found

    def written(self, command: Command) -> bool:
        """`cat > conf.yaml <<EOF`: the file that a program reads, as one line of setup."""
        heredoc, tee = command.heredoc, said(command.argv[0]) == "tee"
        into = [one for one in command.redirects if one.operator in (">", ">>")]
        targets = [one for one in command.argv[1:] if not said(one).startswith("-")] if tee else [
            one.target for one in into if one.target is not None]  # fmt: skip
        if heredoc is None or len(targets) != 1 or said(targets[0]).startswith("/dev/") or HOSTS.search(command.text):
            return False
        if self.kept_out(command):
            return True
        lines = heredoc.text.removesuffix("\n").split("\n")
        if any(SECRET_VALUE.regex.fullmatch(word) for line in lines for word in re.split(r"[\s'\"=:]+", line)):
            self.note("left out", f"{said(targets[0])}: what is written into it holds a secret", command.line)
            return True
        live = [not heredoc.quoted and "$" in one for one in lines]
        words = [
            '"' + one.replace('"', '\\"') + '"' if known else shlex.quote(one)
            for one, known in zip(lines, live, strict=True)
        ]
        place, sign = _shell_word(targets[0]), ">>" if tee and "-a" in map(said, command.argv) else ">"
        sign = into[0].operator if into and not tee else sign
        self.files_made[said(targets[0]).removeprefix("./")] = f"printf '%s\\n' {' '.join(words)} {sign} {place}"
        self.setup.append(self.files_made[said(targets[0]).removeprefix("./")])
        self.note("kept", f"cat > {said(targets[0])}, a file that the script writes -> setup", command.line)
        names = re.findall(r"(?<!\\)\$\{?([A-Za-z_]\w*)", "" if heredoc.quoted else heredoc.text)
        for name in dict.fromkeys(names):
            if any(one.name == name and not one.exported for one in self.script.assignments):
                what = f"{said(targets[0])} has ${{{name}}}, which only the script knows: write what it holds"
                self.fill(("setup",), what, command.line)
        return True

    def unwritten(self, place: str) -> None:
        """A file that has become fields."""
        line = self.files_made.pop(place.removeprefix("./"), None)
        if line in self.setup:
            self.setup.remove(str(line))
            self.notes = [one for one in self.notes if not one.message.startswith(f"cat > {place}, a file")]

    def kept_out(self, command: Command) -> bool:
        """Whether a line of preparation stands where it cannot be carried over from."""
        if self.started or any(word in ("for", "while", "case", "if") for word in command.inside):
            why = AFTER if self.started else "it stands in a condition or a loop"
            self.note("left out", f"{flat(command.text)}: {why}", command.line)
            return True
        return False

    def keep(self, command: Command) -> None:
        """A line of setup, as it was written where nothing in it was resolved."""
        if self.kept_out(command):
            return
        if any(SECRET_VALUE.regex.fullmatch(word.partial) for word in command.argv):
            why = "it holds a secret; secrets: {NAME: {from_env: NAME}} hands one over"
            self.note("left out", f"{short(command.text)}: {why}", command.line)
            return
        words = [f"{one.name}={_shell_word(one.value)}" for one in command.assignments if one.value is not None]
        for word in command.argv:
            text = word.value
            home = text is not None and text.startswith("~/") and word.quoting == "none"
            words.append(_shell_word(word) if text is None else text if home else shlex.quote(text))
        line = " ".join(words)
        if command.after == "||":
            line += " || true"
        if line not in self.setup:
            self.setup.append(line)
            self.note("kept", f"{flat(command.text)} -> setup", command.line)

    def module(self, words: Sequence[str], command: Command) -> None:
        words = [word for word in words if word not in ("-q", "--quiet", "-s", "--silent", "--force", "-f", "--auto")]
        verb = words[0] if words else ""
        rest = list(words[1:])
        if verb == "load" and rest[:1] and rest[0] in MODULE_VERBS:  # ml purge
            verb, rest = rest[0], rest[1:]
        if any("$" in word for word in rest) and verb != "use":
            self.keep(command)
        elif verb in ("load", "add", "try-load", "use", "swap", "switch", "sw") and set(command.inside) & {
            "if",
            "case",
        }:
            message = f"{flat(command.text)} stands in a condition of the script: say it here where it holds"
            self.fill(("modules",), message, command.line)
        elif verb in ("load", "add", "try-load"):
            for one in rest:
                if one.startswith("-"):
                    self.modules["unload"].append(one[1:])
                elif one not in self.modules["load"]:
                    self.modules["load"].append(one)
            self.note("carried", f"module load {' '.join(rest)} -> modules", command.line)
        elif verb in ("purge", "reset"):
            self.modules["purge"] = True
            self.note("carried", f"{flat(command.text)} -> modules.purge", command.line)
        elif verb == "use":
            words_behind = [word for word in command.argv if said(word) in rest]
            paths = [self.path(word, ("modules", "use"), command.line) for word in words_behind
                     if not said(word).startswith("-")]  # fmt: skip
            self.modules["use"] += paths
            self.note("carried", "module use -> modules.use", command.line)
        elif verb in ("unload", "rm", "del"):
            self.modules["unload"] += rest
        elif verb in ("swap", "switch", "sw") and len(rest) == 2:
            self.modules["swap"][rest[0]] = rest[1]
        elif verb in ("swap", "switch", "sw") and len(rest) == 1:
            self.modules["load"].append(rest[0])
        elif verb in ("list", "avail", "show", "spider", "whatis", ""):
            self.printed.append(command)
        else:
            self.keep(command)

    def source(self, command: Command, word: Word) -> None:
        text = said(word)
        line = command.line
        if basename(text) == "activate" and "/bin/" in text and len(command.argv) == 2:
            trimmed = without_end(word, "/bin/activate")
            if any(piece.meaning == "local-disk" for piece in word.pieces):
                self.keep(command)
                return
            self.put(("venv",), self.path(trimmed, ("venv",), line), line, f"source {text}")
        elif basename(text) == "activate" and len(command.argv) > 2:
            if "/bin/" in text and not self.conda_root:
                self.conda_root = self.path(without_end(word, "/bin/activate"), ("conda", "root"), line)
            self.conda(command.argv[2], "conda", line)
        elif text.endswith(("/etc/profile.d/conda.sh", "/etc/profile.d/mamba.sh")):
            if "$(" in text:
                self.conda_root = None
            else:
                end = "/etc/profile.d/" + basename(text)
                self.conda_root = self.path(without_end(word, end), ("conda", "root"), line)
            self.note("left out", f"{short(command.text)}: dslaunch activates conda itself", line)
        elif re.search(
            r"(/etc/profile(\.d/(modules|lmod|z00_lmod)\.sh)?|bashrc|lmod/init/bash|modules/init/bash)$", text
        ):
            self.note("left out", f"{short(command.text)}: dslaunch finds the module command itself", line)
        elif self.fabric and any(f"/{basename(text)}" in row["line"] for row in facts.fabric(self.fabric).setup):
            self.note("carried", f"{flat(command.text)}: resources.fabric: {self.fabric} reads it itself", line)
        elif "BASH_SOURCE" in word.text or "BASH_SOURCE" in text or re.search(r"\$\{?0\b|dirname", text):
            message = "it lies beside the script; source: [NAME] reads one beside the job file"
            self.note("left out", f"{short(command.text)}: {message}", line)
        elif set(command.inside) & {"if", "case", "for", "while"} or self.started:
            self.keep(command)
        else:
            self.sourced(command, word)

    def sourced(self, command: Command, word: Word) -> None:
        """A file of shell; with values before it or words behind it, it stays a line."""
        plain = len(command.argv) == 2 and not command.assignments
        value: Any = self.path(word, ("source",), command.line, tidy=False, soft=True) if plain else None
        if value is None or value == ".":
            self.keep(command)
        elif value not in self.fields.setdefault("source", []):
            self.fields["source"].append(value)
            self.note("carried", f"{flat(command.text)} -> source", command.line)

    def conda_run(self, name: str, now: Start, line: int) -> Start:
        rest = list(now.argv[2:])
        while rest and said(rest[0]).startswith("-"):
            flag = said(rest.pop(0))
            if flag in ("-n", "--name", "-p", "--prefix") and rest:
                self.conda(rest.pop(0), name, line)
        return replace(now, argv=tuple(rest))

    def conda(self, word: Word, tool: str, line: int) -> None:
        section: dict[str, Any] = {"env": self.path(word, ("conda",), line)}
        if tool != "conda":
            section["tool"] = tool
        if self.conda_root:
            section["root"] = self.conda_root
        if self.fields.get("venv"):
            del self.fields["venv"]
        self.put(("conda",), section["env"] if len(section) == 1 else section, line, f"{tool} activate")

    def software(self) -> None:
        modules = {key: value for key, value in self.modules.items() if value}
        if set(modules) == {"purge", "load"}:
            self.fields["modules"] = modules["load"]
        elif set(modules) - {"purge"}:
            self.fields["modules"] = {"purge": self.modules["purge"], **modules}
        if "sync" in self.fields.get("uv", {}) and self.fields.pop("venv", None):
            self.note("left out", "the environment that uv makes: uv.sync activates its own on each node")
        given = [key for key in ("venv", "conda", "uv") if key in self.fields]
        for key in given[1:]:
            value = self.fields.pop(key)
            if key == "conda":
                env = value["env"] if isinstance(value, dict) and "env" in value and len(value) > 1 else value
                if isinstance(env, str):
                    self.setup.append('eval "$(conda shell.bash hook)"')
                    self.setup.append(f"conda activate {shlex.quote(env)}")
            self.note(
                "kept" if key == "conda" else "left out",
                f"{key} beside {given[0]}: a job file activates one of them",
                0,
            )
        box = self.fields.get("container")
        place = self.fields.get("train", {}).get("workdir")
        if box and isinstance(place, str) and place.startswith("/") and box.get("workdir"):
            del box["workdir"]  # `cd` went on from there
        if box is not None and not box.get("image") and not box.get("environment"):
            del self.fields["container"]
            self.note("left out", f"container settings without an image: {', '.join(box)}")
        elif box is not None and set(box) == {"image"}:
            self.fields["container"] = box["image"]
        self.mkdir()
        if self.setup:
            self.fields["setup"] = self.setup

    # -- copies on local disks

    def sbcast(self, command: Command) -> None:
        words = [word for word in command.argv[1:] if not said(word).startswith("-")]
        if len(words) == 2:
            self.stage(words[0], words[1], command, unpack=False)

    def staged(self, command: Command) -> bool:
        """tar -xf a.tar -C $SLURM_TMPDIR, cp or rsync to a local disk."""
        if self.started:
            return False
        words = list(command.argv[1:])
        local = [word for word in words if any(piece.meaning == "local-disk" for piece in word.pieces)]
        if not local:
            return False
        if command.name == "tar":
            archive = next((word for word in words if re.search(r"\.(tar|tgz|tar\.\w+|tzst)$", said(word))), None)
            if archive is None:
                return False
            self.stage(archive, local[-1], command, unpack=True)
            return True
        plain = [word for word in words if not said(word).startswith("-")]
        if len(plain) < 2 or plain[-1] is not local[-1]:
            return False
        for source in plain[:-1]:
            self.stage(source, plain[-1], command, unpack=False)
        return True

    def local(self, behind: str) -> str:
        """$TMPDIR as it is there: /data/x of an archive unpacked into it is below the archive's own directory."""
        copied = any(row["to"] != self.unpacked and f"{behind}/".startswith(f"/{row['to']}/")
                     for row in self.fields.get("stage", []))  # fmt: skip
        return "${DSLAUNCH_LOCAL}" + (f"/{self.unpacked}" if self.unpacked and not copied else "")

    def stage(self, source: Word, to: Word, command: Command, *, unpack: bool) -> None:
        pieces = [piece for piece in to.pieces if piece.meaning != "local-disk"]
        place = "".join(piece.shown for piece in pieces)
        below = len(pieces) != len(to.pieces)
        place = place.lstrip("/") if below else place
        if unpack and below and not place.strip("/"):  # a copy has a directory of its own
            self.unpacked = re.sub(r"\.(tar(\.\w+)?|tgz|tzst)$", "", basename(said(source)))
            self.note("carried", f"what {self.unpacked} holds is in $DSLAUNCH_LOCAL/{self.unpacked}", command.line)
        if not place or place.endswith("/"):
            name = re.sub(r"\.(tar(\.\w+)?|tgz|tzst)$", "", basename(said(source).rstrip("/"))) if unpack else ""
            place += (name if unpack and place else "") or basename(said(source).rstrip("/"))
            if unpack:
                place = re.sub(r"\.(tar(\.\w+)?|tgz|tzst)$", "", place)
        earlier = self.fields.get("stage", [])
        whole = "".join("" if piece.meaning == "local-disk" else piece.text for piece in source.pieces).lstrip("/")
        local = any(piece.meaning == "local-disk" for piece in source.pieces)
        copied = next((one for one in earlier if local and one["to"] == whole), None)
        if copied is not None and unpack:  # sbcast a.tar /mnt/bb/..., then tar -xf of it
            copied.pop("unpack", None)
            copied["to"] = re.sub(r"\.(tar(\.\w+)?|tgz|tzst)$", "", place)
            self.note("carried", f"{flat(command.text)} -> stage.unpack", command.line)
            return
        row: dict[str, Any] = {"source": self.path(source, ("stage",), command.line), "to": place}
        if not unpack and re.search(r"\.(tar|tgz|tar\.\w+|squashfs|sqsh)$", said(source)):
            row["unpack"] = False
        self.fields.setdefault("stage", []).append(row)
        self.note("carried", f"{short(command.text)} -> stage", command.line)


def _holds_options(rest: Sequence[Word]) -> bool:
    """srun $SRUN_ARGS python: a variable alone that nothing sets, before what is a program or an option."""
    first = rest[0]
    alone = len(first.pieces) == 1 and first.pieces[0].name.isidentifier() and not first.pieces[0].meaning
    if not alone or first.quoting != "none":
        return False
    options = re.search(r"(?i)(args|opts|options|flags|resume|extra|pinning|bind|params)", first.pieces[0].name)
    return bool(options) or programs.read(shell.options(rest[1:])[1]) is not None


def _shell_word(word: Word) -> str:
    return f'"{shell_text(word)}"' if not re.fullmatch(r"[\w./${}=:,+-]+", shell_text(word)) else shell_text(word)
