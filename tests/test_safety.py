"""Whatever text a job file holds, it is data: refused with a reason, or one word of one command, byte for byte."""

from __future__ import annotations

import os
import random
import re
import shlex
import string
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import k8s_schema
import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from launcher import bundle, cli, facts, plan, run, spec, yamldoc
from launcher.backends import kubernetes, local, slurm
from launcher.errors import UserError
from launcher.spec import check

SHELLCHECK = Path(sys.executable).parent / "shellcheck"
BASE = "name: demo\nmodel: gpt-demo\nresources: {nodes: 1}\n"

# What a shell, sbatch, YAML, Python's format or a careless log would take for more than text.
ODD = list("'\"\\$`\n\r\0%{}\x85\u2028\u2029;&|<>-#!*?~()[] \t=,:@/.")
PIECES = [
    *ODD, "$(touch caught)", "`touch caught`", "'; touch caught; '", '"; touch caught; "', "\ntouch caught\n",
    "\n#SBATCH --wrap=id\n", "#SBATCH --wrap=id", "${IFS}", "%j", "{0}", "--", "-rf", "$'\\x41'", "caf\xe9", "a",
]  # fmt: skip
Nasty = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join)
Mixed = st.tuples(st.sampled_from(["", "a", "ab1"]), Nasty, st.sampled_from(["", "z"])).map("".join)


def quoted(text: str) -> str:
    """A YAML scalar of any text, in ASCII."""
    return '"' + "".join(c if c.isalnum() and c.isascii() else f"\\U{ord(c):08x}" for c in text) + '"'


def load(*overrides: str, base: str = BASE) -> spec.JobSpec:
    return spec.load(base, name="job.yaml", overrides=overrides).spec


def accepted(*overrides: str, base: str = BASE) -> bool:
    """Whether the reader and Slurm's renderer take it; a refusal has to have words and a place."""
    try:
        slurm.render(plan.make(load(*overrides, base=base)))
    except UserError as error:
        check_words(error)
        return False
    return True


def check_words(error: UserError) -> None:
    for problem in error.problems:
        assert problem.message
        assert problem.where or problem.at
        assert problem.message.isprintable()  # nothing of it moves a terminal's cursor


UNSHRUNK = [Phase.explicit, Phase.reuse, Phase.generate]  # a dozen processes an example: shrinking takes minutes


# --- a sandbox ----------------------------------------------------------------------------------------------

# Programs that node.sh and job.sbatch may start, and what they are made to do here.
RECORD = (  # one that is killed while it writes has nothing to say
    "exec 3>&2 2>/dev/null; /bin/cat /proc/$$/cmdline >'{records}'/$$.{name}.argv\n"
    "/bin/cat /proc/$$/environ >'{records}'/$$.{name}.env; exec 2>&3 3>&-\n"
)
FAKES = {
    "scontrol": "echo host1",
    "srun": 'while [ "$1" != bash ]; do shift; done; shift; export SLURM_NODEID=0; exec /bin/bash "$@"',
    "python3": 'if [ "${{1##*/}}" = port.py ]; then echo 20000; fi; if [ "$1" = - ]; then /bin/cat >/dev/null; fi\n'
    "/bin/readlink -n /proc/$$/cwd >'{records}'/$$.cwd",
    "conda": """if [ "$1" = shell.bash ]; then
  echo 'conda() {{ command conda "$@"; CONDA_PREFIX=/x CONDA_DEFAULT_ENV=$2; }}'
fi""",
    "module": ":",
}
HARMLESS = ["bash", "mkdir", "dirname", "cat", "rm", "readlink"]
CANARIES = [
    "touch",
    "id",
    "ls",
    "sh",
    "env",
    "curl",
    "nc",
    "reboot",
    "a",
    "ab1",
    "z",
    "wrap",
    "rf",
    "x41",
    "A",
    "IFS",
]


@dataclass
class Sandbox:
    home: Path

    @cached_property
    def path(self) -> Path:
        programs, records = self.home / "bin", self.home / "records"
        programs.mkdir()
        records.mkdir()
        for name in [*FAKES, *HARMLESS, *CANARIES]:
            record = RECORD.format(records=records, name=name)
            body = FAKES[name].format(records=records) if name in FAKES else f'exec /bin/{name} "$@"'
            text = f"#!/bin/bash\n{record}{body if name not in CANARIES else ':'}\n"
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        return programs

    def execute(self, job: spec.JobSpec, *, prepare: object = None) -> dict[str, list[list[str]]]:
        """Run job.sbatch as Slurm would; the argument lists of every program that was started."""
        made = plan.make(job)
        folder, base = self.home / "run", self.home / "base"
        base.mkdir()
        bundle.write(slurm.render(made), folder, submitted_from=base, secrets={})
        for name in ("job.sbatch", "node.sh"):
            subprocess.run(["/bin/bash", "-n", folder / name], check=True)
        workdir = base / job.train.workdir
        workdir.mkdir(parents=True, exist_ok=True)
        if job.venv:
            (base / job.venv / "bin").mkdir(parents=True, exist_ok=True)
            (base / job.venv / "bin" / "activate").write_text("VENV_WAS_HERE=1; export VENV_WAS_HERE\n")
        environ = {"PATH": str(self.path), "SLURM_JOB_NODELIST": "host1", "SLURM_JOB_ID": "7"}
        done = subprocess.run(["/bin/bash", folder / "job.sbatch"], cwd=folder, env=environ, capture_output=True)
        assert (done.returncode, done.stdout + done.stderr) == (0, b""), done.stderr
        calls: dict[str, list[list[str]]] = {}
        for path in sorted((self.home / "records").glob("*.argv")):
            words = path.read_bytes().split(b"\0")[:-1]
            calls.setdefault(path.name.split(".")[1], []).append([os.fsdecode(word) for word in words[2:]])
        assert not set(calls) & set(CANARIES)
        assert not list(self.home.rglob("caught"))
        return calls

    def last(self, what: str) -> bytes:
        """Of the rank's supervisor: its `env` or `cwd`."""
        for path in (self.home / "records").glob("*.python3.argv"):
            if b"/supervise.py\0" in path.read_bytes():
                number = path.name.split(".")[0]
                name = f"{number}.cwd" if what == "cwd" else f"{number}.python3.{what}"
                return (path.parent / name).read_bytes()
        raise AssertionError("no supervisor was started")


def after(words: list[str], mark: str) -> list[str]:
    return words[words.index(mark) + 1 :]


def directives(text: str) -> dict[str, str]:
    """The #SBATCH lines as sbatch reads them; a repeated one, or one that is not ours, fails."""
    found: dict[str, str] = {}
    for line in text.split("\n"):
        if line.lstrip().startswith("#SBATCH"):
            (word,) = shlex.split(line.removeprefix("#SBATCH "))
            name, _, value = word.removeprefix("--").partition("=")
            assert name not in found
            found[name] = value
    return found


PLAIN = {"nodes", "ntasks-per-node", "job-name", "output", "open-mode", "signal", "requeue", "time"}
FREE = {  # field: how it is written with --set
    "env": "env.V={}",
    "args": "train.args=[--first, {}]",
    "workdir": "train.workdir={}",
    "venv": "venv={}",
    "checkpoint": "train.checkpoint.dir={}",
    "srun": "slurm.srun=[--task-prolog, {}]",
    "setup": "setup=[': {}']",
    "script": "train.script={}",
}
COMMANDS = {
    "script": "train.script={}",
    "module": "train.module={}",
    "command": "train.command=[{0}, x, {0}]",
    "flag": "train.config_flag={}",
}
TIGHT = {
    "modules": "modules=[{}]",
    "conda": "conda={}",
    "partition": "slurm.partition={}",
    "account": "slurm.account={}",
    "qos": "slurm.qos={}",
    "reservation": "slurm.reservation={}",
    "constraint": "slurm.constraint={}",
    "time": "slurm.time={}",
    "nodelist": "slurm.nodelist={}",
    "exclude": "slurm.exclude={}",
    "gpu_type": "slurm.gpu_type={}",
    "mail_user": "slurm.mail_user={}",
    "mail_type": "slurm.mail_type={}",
    "sbatch": "slurm.sbatch.mcs-label={}",
    "image": "container.image={}",
    "mount": "container={{image: a/b, mounts: [{}]}}",
    "memory": "resources.memory={}",
}


def fits_a_file_name(text: str) -> bool:
    return not any(part in ("", ".", "..") for part in text.split("/")) and len(text.encode()) < 200


@pytest.mark.slow
@given(st.fixed_dictionaries({name: Mixed for name in FREE if name not in ("script", "setup")}))
@settings(max_examples=25, deadline=None, phases=UNSHRUNK)
def test_free_text_reaches_the_rank_byte_for_byte_and_runs_nothing(texts):
    taken = {name: text for name, text in texts.items() if accepted(FREE[name].format(quoted(text)))}
    taken = {n: t for n, t in taken.items() if n not in ("workdir", "venv") or fits_a_file_name(t)}
    job = load(*(FREE[name].format(quoted(text)) for name, text in taken.items()))
    with tempfile.TemporaryDirectory() as folder:
        sandbox = Sandbox(Path(folder))
        calls = sandbox.execute(job)
        text = (sandbox.home / "run" / "job.sbatch").read_bytes().decode()
        assert set(directives(text)) == PLAIN
        environ = dict(entry.split(b"=", 1) for entry in sandbox.last("env").split(b"\0") if entry)
        assert environ[b"DSLAUNCH_CHECKPOINT_DIR"].decode() == taken.get("checkpoint", "checkpoints/demo")
        (supervisor,) = [words for words in calls["python3"] if words[0] == "-u"]
        command = after(supervisor, "--")
        assert command[2].endswith("/node/train_gpt.py")
        if "env" in taken:
            assert environ[b"V"].decode() == taken["env"]
        if "args" in taken:
            assert command[-2:] == ["--first", taken["args"]]
        if "srun" in taken:
            assert taken["srun"] in calls["srun"][0][: calls["srun"][0].index("bash")]
        if "venv" in taken:
            assert environ[b"VENV_WAS_HERE"] == b"1"
        where = sandbox.home / "base" / taken.get("workdir", ".")
        assert Path(os.fsdecode(sandbox.last("cwd"))) == where.resolve()


@pytest.mark.slow
@given(st.sampled_from(sorted(COMMANDS)), Mixed)
@settings(max_examples=25, deadline=None, phases=UNSHRUNK)
def test_a_program_of_any_name_is_one_word(field, text):
    more = ["train.command=[x]"] if field == "flag" else []
    overrides = [*more, COMMANDS[field].format(quoted(text))]
    if not accepted(*overrides):
        return
    with tempfile.TemporaryDirectory() as folder:
        sandbox = Sandbox(Path(folder))
        calls = sandbox.execute(load(*overrides))
        (supervisor,) = [words for words in calls["python3"] if words[0] == "-u"]
        config = f"{sandbox.home}/run/ds_config.json"
        assert (
            after(supervisor, "--")
            == {
                "script": ["python3", "-u", text, "--deepspeed_config", config],
                "module": ["python3", "-u", "-m", text, "--deepspeed_config", config],
                "command": [text, "x", text],
                "flag": ["x", text, config],
            }[field]
        )


# Fields of text, each with what has to stand around it; `anywhere` below gives every one of them such a text.
PYXIS, APPTAINER = "container={image: a/b, runtime: pyxis}", "container={image: a.sif, runtime: apptainer}"
SERVED = "services=[{{name: v, command: [x], container: {{image: a/b}}}}]"
AROUND = {
    "workdir": ["train.workdir={}"],
    "checkpoint": ["train.checkpoint.dir={}"],
    "checkpoint-pyxis": [PYXIS, "train.checkpoint.dir={}"],
    "checkpoint-apptainer": [APPTAINER, "train.checkpoint.dir={}"],
    "checkpoint-service": [SERVED, "train.checkpoint.dir={}"],
    "mount-pyxis": ["container={{image: a/b, mounts: [{}]}}"],
    "mount-apptainer": ["container={{image: a.sif, mounts: [{}]}}"],
    "mount-shifter": ["container={{image: a/b, runtime: shifter, mounts: [{}]}}"],
    "mount-service": ["services=[{{name: v, command: [x], container: {{image: a/b, mounts: [{}]}}}}]"],
    "local-disk-pyxis": [PYXIS, "uv={{project: ., sync: true}}", "local_disk={}"],
    "local-disk-apptainer": [APPTAINER, "uv={{project: ., sync: true}}", "local_disk={}"],
    "local-disk": ["stage=[{{source: /x, to: y}}]", "local_disk={}"],
    "local-disk-service": [SERVED, "local_disk={}"],
    "stage-to": ["stage=[{{source: /x, to: {}}}]"],
    "stage-source": ["stage=[{{source: {}, to: x}}]"],
    "stage-venv": ["stage=[{{source: /x, to: {}, activate: venv}}]"],
    "stage-conda": ["stage=[{{source: /x, to: {}, activate: conda}}]"],
    "inside-pyxis": ["container={{image: a/b, workdir: {}}}"],
    "inside-apptainer": ["container={{image: a.sif, workdir: {}}}"],
    "inside-shifter": ["container={{image: a/b, runtime: shifter, workdir: {}}}"],
    "environment": ["container={{environment: {}}}"],
    "image": ["container={{image: {}}}"],
    "sif": ["container={{image: {}, runtime: apptainer}}"],
    "container-name": ["container={{image: a/b, name: {}}}"],
    "container-args": ["container={{image: a/b, args: [{}]}}"],
    "container-args-apptainer": ["container={{image: a.sif, args: [{}]}}"],
    "shifter-modules": ["container={{image: a/b, runtime: shifter, modules: [{}]}}"],
    "host-env": ["container={{image: a.sif, host_env: [{}]}}"],
    "login-dir": ["slurm.login=me@login", "slurm.login_dir={}"],
    "bcast-from": ["slurm.bcast={{{}: /tmp/x}}"],
    "bcast-to": ["slurm.bcast={{/a: {}}}"],
    "uv": ["uv={}"],
    "uv-sync": ["uv={{project: {}, sync: true}}"],
    "uv-extras": ["uv={{project: ., sync: true, extras: [{}]}}"],
    "conda": ["conda={}"],
    "conda-root": ["conda={{env: x, tool: micromamba, root: {}}}"],
    "mamba-root": ["conda={{env: x, tool: mamba, root: {}}}"],
    "venv": ["venv={}"],
    "module-use": ["modules={{use: [{}], load: [a]}}"],
    "module-swap": ["modules={{swap: {{a: {}}}}}"],
    "address-suffix": ["slurm.address_suffix={}"],
    "nodefile": ["slurm.nodefile={}"],
    "comment": ["slurm.comment={}"],
    "exclude": ["slurm.exclude={}"],
    "srun": ["slurm.srun=[--task-prolog, {}]"],
    "cpu-bind": ["slurm.cpu_bind={}"],
    "network": ["slurm.network={}"],
    "distribution": ["train.launcher=job", "train.command=[x]", "slurm.distribution={}"],
    "wandb": ["tracking.wandb={{group: {}}}"],
    "wandb-dir": ["tracking.wandb={{dir: {}}}"],
    "mlflow": ["tracking.mlflow={{uri: {}}}"],
    "comet": ["tracking.comet={{workspace: {}}}"],
    "tensorboard": ["tracking.tensorboard={}"],
    "prefix": ["train.script=x.py", "train.prefix=[{}]"],
    "launcher-args": ["train.launcher_args=[--log-dir, {}]"],
    "env": ["env.V={}"],
    "service-env": ["services=[{{name: v, command: [x], env: {{V: {}}}}}]"],
    "service-command": ["services=[{{name: v, command: [{}]}}]"],
    "service-file": ["services=[{{name: v, command: [x], ready: {{file: {}}}}}]"],
    "version": ["environment.deepspeed={}"],
}

# Every script goes on whatever fails: what a quote left open lets through further down runs as well.
GO_ON = """
set() { :; }; trap() { :; }; sleep() { :; }
exit() { ends=$((${ends:-0} + 1)); [ "$ends" -lt 8 ] || builtin exit 0; }
exec() { case $1 in [0-9]*) ;; *) "$@" ;; esac; }
command_not_found_handle() { :; }
"""


def runs_something(job: spec.JobSpec, home: Path) -> bool:
    """Whether any script of the job starts `touch`, which none has a reason to."""
    rendered = slurm.render(plan.make(job))
    folder, base, programs = home / "run", home / "base", home / "bin"
    base.mkdir()
    bundle.write(rendered, folder, submitted_from=base, secrets={})
    (home / "go-on").write_text(GO_ON)
    programs.mkdir()
    for name in HARMLESS:
        (programs / name).symlink_to(f"/bin/{name}")
    started = 'while [ "$1" != bash ]; do shift; done\nexec "$@"'
    bodies = dict.fromkeys(("srun", "apptainer", "singularity", "shifter"), started)
    bodies |= {
        "scontrol": "echo host1",
        "python3": "case $1 in *port.py) echo 20000 ;; esac",
        "touch": ': >"$HOME/ran"',
    }
    for name, body in bodies.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    environ = {
        "PATH": str(programs), "SLURM_JOB_NODELIST": "host1", "SLURM_JOB_ID": "7", "NODE_RANK": "0",
        "HOME": str(home), "BASH_ENV": str(home / "go-on"), "TMPDIR": str(home),
    }  # fmt: skip
    shells = [file.path for file in rendered.files if file.text.startswith(("#!/bin/bash", "#!/usr/bin/env bash"))]
    for name in shells:
        words = (
            ["/bin/bash", folder / name, folder, "host1"] if name.endswith(".srun") else ["/bin/bash", folder / name]
        )
        words += ["bash", "-c", ":"] if Path(name).name.startswith("host") else []
        if not name.startswith("node/"):
            subprocess.run(words, cwd=folder, env=environ, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
    return (home / "ran").exists()


BREAKS = [
    "$(touch caught)",
    "`touch caught`",
    "'; touch caught; '",
    '"; touch caught; "',
    "\ntouch caught\n",
    ";touch caught;",
]
BREAKS += [
    ";touch;",
    "&touch&x",
    "|touch|x",
    "(touch)",
    "".join(BREAKS),
    *(text.replace(" ", "${IFS}") for text in BREAKS),
]
Breaking = st.tuples(
    st.sampled_from(["", "a", "/tmp/x", "/x y", "b/"]), st.sampled_from(BREAKS), st.sampled_from(["", "z", "'", '"'])
)


def with_text(field: str, text: str) -> list[str]:
    """The last override holds it."""
    *before, last = AROUND[field]
    return [
        *(line.format() for line in before if "{{" in line),
        *(line for line in before if "{{" not in line),
        last.format(quoted(text)),
    ]


@pytest.mark.slow
@given(st.sampled_from(sorted(AROUND)), Breaking)
@settings(max_examples=60, deadline=None, phases=UNSHRUNK)
def test_no_text_of_any_field_is_ever_a_command(field, parts):
    overrides = with_text(field, "".join(parts))
    if accepted(*overrides):
        with tempfile.TemporaryDirectory() as folder:
            assert not runs_something(load(*overrides), Path(folder)), (field, parts)


@pytest.mark.parametrize("field", sorted(AROUND))
def test_every_field_of_that_search_is_read(field):
    texts = ["ab1", "/ab1", "a@x:1", "0.19.6", "AB", "none", "block"]
    assert any(accepted(*with_text(field, text)) for text in texts) or field in ("login-dir", "nodefile")


@pytest.mark.slow
@pytest.mark.parametrize("where", [
    ["setup=['touch caught']"], ["setup=['false; false', 'touch caught']"],
    ["services=[{name: v, command: [x], setup: ['touch caught']}]"],
])  # fmt: skip
def test_what_does_run_is_seen(where, tmp_path):
    assert runs_something(load(*where), tmp_path)


def test_a_mount_that_a_caller_forgot_to_check_would_be_seen(tmp_path):
    """The text that once was a command: the reader refuses it, and what was rendered of it ran."""
    text = '/tmp/x";touch caught;"'
    for line in ("local_disk={}", "container={{image: a/b, mounts: [{}]}}"):
        assert not accepted(line.format(quoted(text)))
    job = load(PYXIS, "uv={project: ., sync: true}")
    assert runs_something(replace(job, local_disk=text), tmp_path)


GOOD = {
    "modules": "cuda/12.4", "conda": "my env", "partition": "a,b", "account": "lab", "qos": "high",
    "reservation": "r", "constraint": "[a|b]&c*2", "time": "1-00:30", "nodelist": "gpu[007]",
    "exclude": "gpu9", "gpu_type": "h100",
    "mail_user": "me@example.org", "mail_type": "END,FAIL", "sbatch": "a&b|c(d)*[e]", "image": "a/b:1@x",
    "mount": "/data:/data:ro", "memory": "500G",
}  # fmt: skip


@pytest.mark.parametrize("field", TIGHT)
def test_a_field_without_safe_quoting_is_limited_to_what_needs_none(field):
    def taken(text: str) -> bool:
        return accepted(TIGHT[field].format(quoted(text)))

    assert taken(GOOD[field])
    for character in "\n\r\0$`\x1b\t\x85\x9b\u2028\u2029":
        for text in (f"{GOOD[field]}{character}x", f"{character}{GOOD[field]}", f"{GOOD[field]}{character}"):
            assert not taken(text), text
    for text in ("-x", "--wrap=id", "") if field != "sbatch" else ("",):
        assert not taken(text), text
    if field not in ("conda", "mount"):  # quoted, each in its way
        for character in "'\"\\;<>{} ":
            assert not taken(f"{GOOD[field]}{character}"), character


@pytest.mark.slow
@given(st.sampled_from(sorted(set(TIGHT) - {"modules", "conda", "image", "mount"})), Mixed, st.booleans())
@settings(max_examples=150, deadline=None)
def test_no_text_adds_a_directive(field, text, longer):
    overrides = [TIGHT[field].format(quoted(GOOD[field] + text if longer else text))]
    if not accepted(*overrides):
        return
    script = slurm.render(plan.make(load(*overrides))).text("job.sbatch")
    assert len(set(directives(script)) - PLAIN) <= 1


def test_every_directive_arrives_as_it_was_written():
    names = sorted(set(TIGHT) - {"modules", "conda", "image", "mount", "gpu_type"})
    job = load(*(TIGHT[name].format(quoted(GOOD[name])) for name in names))
    found = directives(slurm.render(plan.make(job)).text("job.sbatch"))
    expected = {
        "partition": GOOD["partition"], "account": "lab", "qos": "high", "reservation": "r", "mem": "500G",
        "constraint": GOOD["constraint"], "time": "1-00:30", "nodelist": GOOD["nodelist"], "exclude": "gpu9",
        "mail-user": GOOD["mail_user"], "mail-type": "END,FAIL", "mcs-label": GOOD["sbatch"],
    }  # fmt: skip
    assert {name: value for name, value in found.items() if name not in PLAIN - {"time"}} == expected


OWN = sorted(name for name, row in facts.slurm_options().items() if row.field and "b" in row.of)


@pytest.mark.parametrize("option", OWN)
def test_an_option_that_dslaunch_sets_cannot_be_said_again(option):
    with pytest.raises(UserError, match=f"sbatch option {option} is dslaunch's own"):
        slurm.render(plan.make(load(f"slurm.sbatch.{option}=1")))


@pytest.mark.parametrize("key", ["Nice", "a b", "a=b", "-x", "a\nb", "n$", "x;y", "", "x\u2028"])
def test_an_option_is_a_word(key):
    assert not accepted(base=f"{BASE}slurm: {{sbatch: {{{quoted(key)}: 1}}}}\n")


def test_modules_and_conda_arrive_as_words(tmp_path):
    calls = Sandbox(tmp_path).execute(load("modules=[gcc/13, cuda/12.4+x]", "conda=my env;touch caught"))
    assert calls["module"] == [["purge"], ["load", "gcc/13"], ["load", "cuda/12.4+x"]]
    assert sorted(calls["conda"]) == [["activate", "my env;touch caught"], ["shell.bash", "hook"]]


def test_a_container_arrives_as_words(tmp_path):
    calls = Sandbox(tmp_path).execute(load("container={image: a/b:1, mounts: ['/d;x:/e&(f)']}"))
    words = calls["srun"][0]
    assert "--container-image=a/b:1" in words
    folder, base = tmp_path / "run", tmp_path / "base"
    assert f"--container-mounts={folder}:{folder},{base}:{base},/d;x:/e&(f)" in words


@pytest.mark.slow
@given(Nasty)
@settings(max_examples=60, deadline=None)
def test_setup_is_a_line_of_the_node_script_and_of_no_other(text):
    line = f": setup-begins {text}"
    if not accepted(f"setup=[{quoted(line)}]"):
        return
    made = plan.make(load(f"setup=[{quoted(line)}]"))
    for rendered in (slurm.render(made), local.render(made)):
        for file in rendered.files:
            if file.path == "node.sh":
                assert file.text.split("\n").count(line) == 1
            elif file.path != bundle.ASKED:  # the job itself, which nothing runs
                assert "setup-begins" not in file.text
    assert set(directives(slurm.render(made).text("job.sbatch"))) == PLAIN


@pytest.mark.parametrize("line", ["a\nb", "a\r#SBATCH -p x", "a\0b", ""])
def test_setup_is_one_line_an_item(line):
    assert not accepted(f"setup=[{quoted(line)}]")


# --- pods -------------------------------------------------------------------------------------------------

PODS = {
    "namespace": ("kubernetes.namespace={}", lambda j: j["metadata"]["namespace"]),
    "queue": ("kubernetes.queue={}", lambda j: j["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]),
    "priority": ("kubernetes.priority_class={}", lambda j: pod(j)["priorityClassName"]),
    "account": ("kubernetes.service_account={}", lambda j: pod(j)["serviceAccountName"]),
    "pull": ("kubernetes.image_pull_secrets=[{}]", lambda j: pod(j)["imagePullSecrets"][0]["name"]),
    "label": ("kubernetes.labels.a={}", lambda j: j["metadata"]["labels"]["a"]),
    "annotation": ("kubernetes.annotations.a={}", lambda j: j["metadata"]["annotations"]["a"]),
    "selector": ("kubernetes.node_selector.a={}", lambda j: pod(j)["nodeSelector"]["a"]),
    "toleration": ("kubernetes.tolerations=[{{key: a, value: {}}}]", lambda j: pod(j)["tolerations"][0]["value"]),
    "shm": ("kubernetes.shm={}", lambda j: pod(j)["volumes"][1]["emptyDir"]["sizeLimit"]),
    "claim": (
        "kubernetes.volumes=[{{claim: {}, mount: /d}}]",
        lambda j: pod(j)["volumes"][2]["persistentVolumeClaim"]["claimName"],
    ),
    "mount": ("kubernetes.volumes=[{{claim: c, mount: {}}}]", lambda j: container(j)["volumeMounts"][2]["mountPath"]),
    "image": ("container={}", lambda j: container(j)["image"]),
    "gpu": ("kubernetes.gpu_resource={}", lambda j: None),
}
POD_BASE = f"{BASE}container: a/b:1\n"


def pod(job: dict) -> dict:
    return job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]


def container(job: dict) -> dict:
    return pod(job)["containers"][0]


LOOKS_LIKE_MORE = ["yes", "no", "null", "1e3", "022", "12:30", "0x1f", "true", "1.10", "2024-01-01", "y", "on", "1_0"]


@pytest.mark.slow
@given(st.sampled_from(sorted(PODS)), st.one_of(Mixed, st.sampled_from(LOOKS_LIKE_MORE), Mixed.map("/".__add__)))
@settings(max_examples=150, deadline=None)
def test_a_manifest_holds_every_text_as_it_was_written(field, text):
    override, where = PODS[field]
    try:
        rendered = kubernetes.render(plan.make(load(override.format(quoted(text)), base=POD_BASE)))
    except UserError as error:
        check_words(error)
        return
    documents = list(yaml.load_all(rendered.text(rendered.entry), Loader=k8s_schema.LOADER))
    assert [document["kind"] for document in documents] == ["ConfigMap", "ConfigMap", "PyTorchJob"]
    assert where(documents[-1]) in (None, text)


@pytest.mark.slow
@given(st.fixed_dictionaries(dict.fromkeys(("env", "args", "checkpoint"), Mixed)))
@settings(max_examples=40, deadline=None, phases=UNSHRUNK)
def test_the_scripts_in_a_config_map_are_those_that_were_rendered(texts):
    overrides = [FREE[name].format(quoted(text)) for name, text in texts.items()]
    taken = [override for override in overrides if accepted(override, base=POD_BASE)]
    made = plan.make(load(*taken, base=POD_BASE))
    rendered = kubernetes.render(made)
    config_map, *_ = yaml.load_all(rendered.text(rendered.entry), Loader=k8s_schema.LOADER)
    assert config_map == kubernetes.manifests(made)[0]
    subprocess.run(["/bin/bash", "-n"], input=config_map["data"]["node.sh"].encode(), check=True)
    text = yamldoc.dump([config_map])
    assert text == yamldoc.dump([yaml.load(text, Loader=k8s_schema.LOADER)])


# --- secrets ----------------------------------------------------------------------------------------------


def test_a_secret_lies_in_its_own_file_and_nowhere_else(tmp_path, monkeypatch, capsys):
    names = [f"KEY_{i}" for i in range(20)]
    values = {name: "".join(random.choices(string.ascii_letters, k=32)) for name in names}
    lines = []
    for i, name in enumerate(names):
        if i % 2:
            path = tmp_path / f"{name}.txt"
            path.write_text(values[name] + "\n")
            path.chmod(0o600)
            lines.append(f"  {name}: {{from_file: {name}.txt}}\n")
        else:
            monkeypatch.setenv(f"FROM_{name}", values[name])
            lines.append(f"  {name}: {{from_env: FROM_{name}}}\n")
    (tmp_path / "job.yaml").write_text(BASE + "secrets:\n" + "".join(lines))
    started: list[list[str]] = []

    def fake(argv: list[str], **_: object) -> run.Result:
        started.append(list(argv))
        return run.Result(0, "12\n", "")

    monkeypatch.setattr(run, "run", fake)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("DSLAUNCH_SITE", raising=False)
    others = (["slurm", "--dry-run"], ["plan", "--json"], ["env"], ["config", "deepspeed"], ["plan"])
    for command in (["slurm"], *others):
        monkeypatch.setattr(
            sys, "argv", ["dslaunch", *command, "job.yaml", *(["--runs", "runs"] * (command == ["slurm"]))]
        )
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0
    out, err = capsys.readouterr()
    (folder,) = (tmp_path / "runs").iterdir()
    seen = out + err + repr(started)
    for path in folder.rglob("*"):
        if path.is_file() and path.parent.name != "secrets" and "submitted-from" not in path.parts:
            seen += path.read_text()
    assert "sbatch" in seen
    assert "journal" in " ".join(path.name for path in folder.iterdir())
    for name, value in values.items():
        assert name in seen  # the name may be known
        assert value not in seen
        kept = folder / "secrets" / name
        assert kept.read_text() == value
        assert kept.stat().st_mode & 0o777 == 0o600


def test_a_secret_reaches_the_rank_byte_for_byte(tmp_path):
    value = "two words 'and' \"quotes\" $(touch caught)\nand a line\n"
    job = load("secrets={KEY: {from_env: X}}")
    sandbox = Sandbox(tmp_path)
    folder = tmp_path / "run"
    (tmp_path / "base").mkdir()
    bundle.write(slurm.render(plan.make(job)), folder, submitted_from=tmp_path / "base", secrets={"KEY": value})
    environ = {"PATH": str(sandbox.path), "NODE_RANK": "0"}
    done = subprocess.run(["/bin/bash", folder / "node.sh"], env=environ, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert f"KEY={value}".encode() in sandbox.last("env").split(b"\0")
    assert not any(value.encode() in path.read_bytes() for path in (tmp_path / "records").glob("*.argv"))


KEYS = [  # put together here, so that nobody's scanner takes one for real
    "hf" + "_" + "a1" * 12, "sk" + "-" + "a1" * 12, "gh" + "p_" + "a1" * 12, "github" + "_pat_" + "a1" * 12,
    "gl" + "pat-" + "a1" * 12, "xo" + "xb-" + "12-ab" * 4, "nv" + "api-" + "a1" * 12, "AK" + "IA" + "A1" * 8,
    "aws_secret" + "_access_key = " + "a1" * 20, "https://user:" + "pw12@host/x", "redis://:" + "pw12@host",
]  # fmt: skip
TEXTS = {
    "comment": "slurm.comment={}", "sbatch": "slurm.sbatch.mcs-label={}", "box": "container={{image: a, args: [{}]}}",
    "setup": "setup=[{}]", "launcher": "train.launcher_args=[--log-dir, {}]", "prefix": "train.prefix=[{}]",
    "wandb": "tracking.wandb.project={}", "mlflow": "tracking.mlflow.uri={}", "note": "kubernetes.annotations.a={}",
    "patch": "kubernetes.patch={{spec: {{a: [{}]}}}}", "pod": "kubernetes.pod_patch={{spec: {{a: {}}}}}",
    "config": "train.deepspeed={{wandb: {{team: {}}}}}", "env": "env.V={}", "args": "train.args=[{}]",
    "service": "services=[{{name: v, command: [x], setup: [{}]}}]",
    "of-service": "services=[{{name: v, command: [{}]}}]",
    "service-env": "services=[{{name: v, command: [x], env: {{V: {}}}}}]",
}  # fmt: skip


@pytest.mark.parametrize("field", sorted(TEXTS))
def test_a_secret_in_plain_text_is_refused_wherever_it_stands_and_not_repeated(field):
    for key in [KEYS[0], f"--key={KEYS[3]}"] if field not in ("comment", "sbatch") else [KEYS[0]]:
        with pytest.raises(UserError) as caught:
            load(TEXTS[field].format(quoted(key)))
        said = [str(problem) for problem in caught.value.problems]
        assert any("looks like a secret" in line for line in said), said
        assert not any(key in line for line in said)


@pytest.mark.parametrize("key", KEYS)
def test_what_a_secret_looks_like(key):
    for text in (key, f"export X={key}", f'{{"x": "{key}"}}'):
        assert spec.SECRET_VALUE.regex.fullmatch(text), text


NO_SECRETS = [
    "/data/task-fine-tuning-of-llama-models", "disk-usage-monitoring-of-nodes", "https://host:8080/a@b",
    "git@github.com:a/b", "ssh://git@host:22/a", "https://$USER:$PASS@host", "http://<user>:<password>@host",
    "hf_hub_download_of_a_model_name", "tcp://10.0.0.1:29500", "aws_secret_access_key=$KEY", "xoxo", "file:///a:b@c",
]  # fmt: skip


@pytest.mark.parametrize("text", NO_SECRETS)
def test_what_is_no_secret_is_taken(text):
    load(f"train.args=[{quoted(text)}]")


@pytest.mark.parametrize("name", ["MY_PAT", "DB_PASS", "PASS", "MYSQL_PWD", "DBPWD", "KEY_PASSPHRASE", "X_TOKEN"])
def test_a_name_of_a_secret(name):
    with pytest.raises(UserError, match=f"{name} looks like a secret"):
        load(f"env.{name}=x")


@pytest.mark.parametrize(
    "line",
    ["TOKENIZER=x", "TOKENIZERS_PARALLELISM=false", "HF_HOME=/x", "PATHS=x", "BYPASS=1", "COMPAT=1", "SPAT=1",
     "INIT_PWD=/a/b", "PASSES=2"],
)  # fmt: skip
def test_a_name_of_no_secret(line):
    load(f"env.{line}")


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("WANDB_API_KEY", "x", True),
        ("WANDB_API_KEY", "", True),
        ("X", "hf_" + "a" * 20, True),
        ("INIT_PWD", "/a/b", False),
        ("MYSQL_PWD", "a/b", True),
        ("TOKEN_DIR", "/a", False),
        ("X", "hf_home", False),
    ],
)
def test_a_variable_looks_like_a_secret_by_its_name_or_its_value(name, value, secret):
    assert check.looks_secret(name, value) is secret


def test_pwd_is_a_directory():
    assert not any(spec.SECRET_NAME.regex.fullmatch(name) for name in ("PWD", "OLDPWD"))


# --- marks of our own -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["\ue000DSLAUNCH_JOB_ID\ue001", "\ue000NOPE\ue001", "a\ue000", "\ue001"])
def test_what_stands_for_a_variable_in_our_own_texts_is_refused_in_a_job_file(text):
    says = r"U\+E00[01] may not stand in"
    for line in (f"env: {{A: {quoted(text)}}}\n", f"env: {{A: '{text}'}}\n", f"env: {{{quoted(text)}: a}}\n"):
        with pytest.raises(UserError, match=says):
            spec.load(BASE + line, name="job.yaml")
    with pytest.raises(UserError, match=says):
        load(f"train.args=[{quoted(text)}]")
    with pytest.raises(UserError, match=says):
        spec.load(BASE + "env: {A: {env: X}}\n", name="job.yaml", environ={"X": text})
    with pytest.raises(UserError, match=says):
        spec.load(BASE, name="job.yaml", site=("site.yaml", f"env: {{A: {quoted(text)}}}\n"))


# --- options ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["output", "chdir", "wrap", "export", "outpu", "wra", "job-name"])
def test_a_plugin_brings_no_option_that_slurm_has(option):
    with pytest.raises(UserError, match="to Slurm itself"):
        slurm.render(plan.make(load(f"slurm.plugin_options=[{option}]")))
    with pytest.raises(UserError, match=f"option {option}"):
        slurm.render(plan.make(load(f"slurm.plugin_options=[{option}]", f"slurm.sbatch={{{option}: x}}")))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["/bin/sh"], "/bin/sh is no option"), (["--label", "sh"], "sh is no option"),
        (["-l", "sh"], "sh is no option"),
        (["--task-prolog=a", "sh"], "sh is no option"), (["--label", "--", "sh"], "-- is no option"),
        (["-"], "- is no option"), (["--task-prolog"], "--task-prolog has no value"), (["-lD/tmp"], "chdir"),
        (["-lDx"], "chdir"), (["-?"], "no option -?"), (["--task-prolog", "a", "sh"], "sh is no option"),
        (["--kill-on-bad-exit", "sh"], "sh is no option"),
    ],
)  # fmt: skip
def test_a_word_of_srun_that_is_no_option_would_be_its_program(words, says):
    with pytest.raises(UserError, match=re.escape(says)):
        slurm.render(plan.make(load(f"slurm.srun=[{', '.join(map(quoted, words))}]")))


@pytest.mark.parametrize("words", [["--task-prolog", "a b"], ["--task-prolog=a"], ["-l", "--label"], ["--site-x=1"]])
def test_options_of_srun_are_taken(words):
    assert accepted("slurm.plugin_options=[site-x]", f"slurm.srun=[{', '.join(map(quoted, words))}]")


# --- copies on a node's disk ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("places", "says"),
    [
        (["../../x"], "leads out"), (["a/../../x"], "leads out"), (["."], "there already"), (["./"], "there already"),
        (["/"], "there already"), (["a", "a"], "one place"), (["a", "./a/"], "one place"),
        (["a", "a/b"], "one holds"),
        (["a/b", "a"], "one holds"), (["/x", "/x//y"], "one holds"),
    ],
)  # fmt: skip
def test_a_copy_has_a_place_of_its_own(places, says):
    rows = ", ".join(f"{{source: /s, to: {quoted(place)}}}" for place in places)
    with pytest.raises(UserError, match=says) as caught:
        load(f"stage=[{rows}]")
    assert caught.value.problems[0].at == ("stage", len(places) - 1, "to")
    assert accepted("stage=[{source: /s, to: a}, {source: /s, to: ab}, {source: /s, to: /x/../y}]")


def test_a_copy_is_not_what_uv_makes():
    with pytest.raises(UserError, match=r"uv\.sync"):
        load("stage=[{source: /s, to: uv/x}]", "uv={project: ., sync: true}")


# --- shellcheck -------------------------------------------------------------------------------------------

GPUS = "resources: {nodes: 4, gpus_per_node: 8, gpu: h100, fabric: ib, cpus_per_node: 64, memory: 500G"
SPREAD = {
    "cpu": BASE,
    "gpu": f"name: demo\nmodel: gpt2\n{GPUS}}}\n",
    "spares": f"name: demo\nmodel: gpt2\n{GPUS}, spares: 1}}\nslurm: {{requeue: true, gpus_as: gres, time: '600'}}\n",
    "srun": f'name: demo\nmodel: gpt2\n{GPUS}}}\ntrain: {{launcher: srun, script: a b.py, args: [--x, "it\'s"]}}\n',
    "deepspeed": "name: demo\nmodel: gpt-demo\ntrain: {launcher: deepspeed, module: a.b, workdir: ../x y}\n",
    "all": (
        f"name: demo\nmodel: gpt2\n{GPUS}}}\ntrain: {{command: [./a, '*'], config_flag: --ds, workdir: /w d}}\n"
        'modules: [cuda/12.4]\nvenv: my venv\nsecrets: {A: {from_env: B}}\nenv: {A_B: "x y\'s $z"}\n'
        "environment: {deepspeed: 0.19.6}\nslurm: {srun: [--label, --task-prolog, 'a b']}\nsetup: [export X=1]\n"
    ),
    "container": f"name: demo\nmodel: gpt2\n{GPUS}}}\ncontainer: {{image: a/b:1, mounts: ['/d:/d']}}\nconda: x\n",
}


@pytest.mark.slow
@pytest.mark.skipif(not SHELLCHECK.exists(), reason="shellcheck is not installed")
def test_shellcheck_finds_nothing_in_what_is_rendered(tmp_path):
    files = []
    for name, text in SPREAD.items():
        made = plan.make(spec.load(text, name="job.yaml").spec)
        bundles = [slurm.render(made)]
        if made.spec.train.launcher != "srun" and not made.spec.box and not made.spec.resources.spares:
            bundles.append(local.render(made))
        for number, rendered in enumerate(bundles):
            for file in rendered.files:
                if file.path.endswith((".sh", ".sbatch")):
                    files.append(tmp_path / f"{name}-{number}-{file.path}")
                    files[-1].write_text(file.text)
        files.append(tmp_path / f"{name}-pod-node.sh")
        files[-1].write_text(bundle.node_script(made, submitted_from=False))
    command = [SHELLCHECK, "--shell=bash", "--severity=warning", "--exclude=SC1090,SC1091", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "srun"])
def test_no_host_key_password_or_banner_can_stop_a_job_that_uses_no_ssh(launcher):
    """Scenario 77: ranks are started by Slurm or this machine, and nothing asks DeepSpeed to find hosts by itself."""
    made = plan.make(spec.load(f"name: a\nmodel: gpt-demo\ntrain: {{launcher: {launcher}}}\n", name="j").spec)
    rendered = slurm.render(made)
    for name in (slurm.ENTRY, "node.sh", "node/supervise.py", "node/rank.py", "node/recover.py"):
        words = re.findall(r"[\w.-]+", rendered.text(name))
        assert not {"ssh", "pdsh", "scp", "--hostfile"} & set(words), name
