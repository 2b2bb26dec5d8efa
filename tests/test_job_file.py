"""The door: every way a job file can be wrong, and what it may hold and still arrive byte for byte."""

from __future__ import annotations

import os
import random
import re
import shlex
import string
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from launcher import bundle, cli, examples, plan, schema, software, spec, yamldoc
from launcher.backends import slurm
from launcher.errors import UserError

GOOD = "name: demo\nmodel: gpt-demo\n"
SLURM = "name: demo\nmodel: gpt-demo\nslurm: {time: 10}\n"


@dataclass
class Said:
    code: int
    out: str
    err: str


@pytest.fixture
def dslaunch(tmp_path, monkeypatch, capsys):
    """The command line in an empty directory: dslaunch("plan", "job.yaml") -> code, out, err."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("DSLAUNCH_SITE", raising=False)
    monkeypatch.delenv("DSLAUNCH_RUNS", raising=False)

    def say(*argv: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["dslaunch", *argv])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return Said(end.value.code, out, err)

    return say


@pytest.fixture
def refused(dslaunch, tmp_path):
    """Submitting this text is refused with code 2 and nothing is written; what was said."""

    def submit(text: str | bytes) -> str:
        job = tmp_path / "job.yaml"
        job.write_bytes(text if isinstance(text, bytes) else text.encode())
        before = sorted(tmp_path.rglob("*"))
        said = dslaunch("slurm", "job.yaml")
        assert (said.code, said.out) == (2, "")
        assert sorted(tmp_path.rglob("*")) == before
        return said.err

    return submit


def problems(text: str, **more: object) -> list[str]:
    with pytest.raises(UserError) as error:
        spec.load(text, name="job.yaml", **more)
    return [str(problem) for problem in error.value.problems]


def load(text: str, **more: object) -> spec.JobSpec:
    return spec.load(text, name="job.yaml", **more).spec


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: demo\nmodel: [gpt\n", "job.yaml:2:8: not YAML: `[` opens here and nothing closes it"),
        ("name: demo\nmodel: [gpt", "job.yaml:2:8: not YAML: `[` opens here and nothing closes it"),
        ("name: 'demo\n", "job.yaml:1:7: not YAML: `'` opens here and nothing closes it\n  try: `'` where it ends"),
        ('name: "demo\nmodel: x\n', 'job.yaml:1:7: not YAML: `"` opens here and nothing closes it'),
        (
            "name: demo\nmodel: {a: b\ntrain:\n  steps: 3\n",
            "job.yaml:2:8: not YAML: `{` opens here and is not closed before line 3\n"
            "  try: `}`, or a comma, before `train:`",
        ),
        (
            'train:\n  args: [a,\n    "b" "c"]\n',
            "job.yaml:2:9: not YAML: `[` opens here and is not closed before line 3\n"
            '  try: `]`, or a comma, before `"c"]`',
        ),
        ('name: [a, "b" c]\n', "job.yaml:1:15: not YAML: while parsing a flow sequence"),
        ("name: demo\n  model: x\n", "job.yaml:2:8: not YAML: mapping values are not allowed in this context"),
        ("name: demo\nmodel: @x\n", "job.yaml:2:8: not YAML: while scanning for the next token"),
        ("name: a\x07b\n", "job.yaml:1:8: not YAML: U+0007 may not stand in it"),
    ],
)
def test_fault_01_malformed_yaml_is_pointed_at(refused, text, says):
    err = refused(text)
    assert err.startswith(f"error: {says}")
    assert "Traceback" not in err


def test_fault_01_the_broken_line_is_shown(refused):
    assert "try: `model: @x`" in refused("name: demo\nmodel: @x\n")


@pytest.mark.parametrize(
    ("text", "says", "hint"),
    [
        ("resources: {nodse: 2}", "job.yaml:3:13: unknown key `nodse`", "did you mean `nodes`?"),
        ("train:\n  zreo: 3", "job.yaml:4:3: unknown key `zreo`", "did you mean `zero`?"),
        ("train:\n  global-batch: 3", "job.yaml:4:3: unknown key `global-batch`", "did you mean `global_batch`?"),
        ("slurm: {tiem: 10}", "job.yaml:3:9: unknown key `tiem`", "did you mean `time`?"),
        ("Resources: {}", "job.yaml:3:1: unknown key `Resources`", "did you mean `resources`?"),
        ("container: {image: x, zzz: 1}", "job.yaml:3:23: unknown key `zzz`", "known here: image, runtime, mounts"),
        ('"\\e[2Jx": 1', "job.yaml:3:1: unknown key `\\x1b[2Jx`", "known here: name"),
        (
            "slurm: {gpus_as: gre}",
            "job.yaml:3:18: expected gpus-per-node, gres, gpus-per-task, gpus or none, found `gre`",
            "`gres`?",
        ),
        ("resources: {gpu: h10, gpus_per_node: 1}", "no GPU type `h10` in the table", "known here: a100-40gb"),
        ("train: {optimizer: onebit_adam}", "table has no optimizer `onebit_adam`", "`OneBitAdam`?"),
        (
            "train: {deepspeed: {zero_optimisation: {}}}",
            "job.yaml:3:21: DeepSpeed has no key",
            "`zero_optimization`?",
        ),
    ],
)
def test_fault_02_an_unknown_key_is_refused_with_what_was_meant(refused, text, says, hint):
    err = refused(f"{GOOD}{text}\n")
    assert says in err
    assert hint in err


def test_fault_02_everything_wrong_is_said_at_once_and_in_order(refused):
    err = refused(
        "nmae: demo\ntrain:\n  steps: many\n  zero: 4\n  lr: 1\nresources: {nodes: 0}\nslurm: {time: soon}\n"
    )
    places = [line.split()[1] for line in err.splitlines() if line.startswith("error: ")]
    assert places == [f"job.yaml:{at}:" for at in ["1:1", "1:1", "3:10", "4:9", "5:3", "6:20", "7:15"]]


def test_fault_03_a_repeated_key_is_refused_with_both_lines(refused):
    err = refused("name: demo\nmodel: gpt-demo\ntrain:\n  steps: 1\n  zero: 1\n  steps: 2\n")
    assert "job.yaml:6:3: `steps` stands twice: first in line 4" in err


def test_fault_04_an_alias_bomb_is_refused_unexpanded(refused):
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60))]
    err = refused("\n".join(lines))
    assert "job.yaml:1:5: anchor &a0: anchors are not read" in err
    assert "job.yaml:2:10: alias *a0: aliases are not read" in err


def test_fault_05_a_merge_key_bomb_is_refused_unexpanded(refused):
    err = refused("name: demo\nmodel: gpt-demo\ntrain:\n  <<: {steps: 1}\n")
    assert "job.yaml:4:3: merge key <<: not read" in err
    bomb = "a0: &a0 {k: v}\n" + "".join(
        f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9)
    )
    assert "merge key <<: not read" in refused(bomb)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.mkdir(), "is a directory, not a file"),
        (lambda path: os.mkfifo(path), "is a device, pipe or socket, not a file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device, pipe or socket, not a file"),
        (
            lambda path: path.write_bytes(b"#" * (1 << 20) + b"\n"),
            "has 1,048,577 bytes; a job file has 1 MiB at most",
        ),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
        (lambda path: None, "No such file or directory"),
    ],
    ids=["directory", "fifo", "device", "large", "loop", "missing"],
)
def test_fault_06_only_a_small_file_is_read(dslaunch, tmp_path, make, says):
    make(tmp_path / "odd.yaml")
    said = dslaunch("plan", "odd.yaml")
    assert said.code == 2
    assert said.err.startswith("error: odd.yaml: ")
    assert says in said.err


def test_fault_06_a_mebibyte_is_read(dslaunch, tmp_path):
    (tmp_path / "job.yaml").write_text(GOOD + "#" * ((1 << 20) - len(GOOD)))
    assert dslaunch("plan", "job.yaml").code == 0


@pytest.mark.parametrize("levels", [65, 5000])
@pytest.mark.parametrize("style", ["flow", "block"])
def test_fault_07_deep_nesting_is_refused(refused, levels, style):
    levels = levels if style == "flow" else min(levels, 1000)  # blocks grow with the square
    deep = "[" * levels if style == "flow" else "\n".join(" " * i + f"k{i}:" for i in range(levels)) + " x"
    assert "nested more than 64 levels deep" in refused(f"{deep}\n")


def test_fault_08_a_recursive_alias_is_refused(refused):
    err = refused("name: demo\nmodel: gpt-demo\ntrain: &t\n  deepspeed: {x: *t}\n")
    assert "job.yaml:3:8: anchor &t" in err
    assert "job.yaml:4:18: alias *t" in err


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"name: demo\nmodel: caf\xe9\n", "job.yaml:2:11: byte 21 (0xe9) is not UTF-8"),
        (b"\xef\xbb\xbfname: \xff\n", "job.yaml:1:7: byte 9 (0xff) is not UTF-8"),
        ("name: demo\n".encode("utf-16"), "job.yaml:1:1: the file is UTF-16 (byte order mark at byte 0)"),
        ("name: demo\n".encode("utf-16-le"), "job.yaml:1:2: byte 1 is NUL"),
        (b"name: demo\nmodel: \xc3\xa9\x00\n", "job.yaml:2:9: byte 20 is NUL"),
        (b"name: \xed\xa0\x80\n", "job.yaml:1:7: byte 6 (0xed) is not UTF-8"),
    ],
)
def test_fault_09_bytes_that_are_no_text_are_named_by_offset(refused, data, says):
    assert refused(data).startswith(f"error: {says}")


@pytest.mark.parametrize("data", [b"\xef\xbb\xbf" + GOOD.encode(), GOOD.replace("\n", "\r\n").encode()])
def test_fault_10_a_byte_order_mark_and_windows_lines_are_fine(dslaunch, tmp_path, data):
    (tmp_path / "job.yaml").write_bytes(data)
    said = dslaunch("plan", "job.yaml")
    assert (said.code, said.err) == (0, "")


def test_fault_11_a_tab_is_named_with_its_line(refused):
    err = refused("name: demo\nmodel: gpt-demo\ntrain:\n\tsteps: 1\n")
    assert err.startswith("error: job.yaml:4:1: tab at line 4: YAML indents with spaces")


@pytest.mark.parametrize("word", ["NO", "no", "on", "yes", "off", "y", "True", "~x", "null"])
def test_fault_12_norway_stays_text(word):
    text = f"{GOOD}env: {{COUNTRY: '{word}'}}" if word == "null" else f"{GOOD}env: {{COUNTRY: {word}}}"
    assert load(text).env == {"COUNTRY": word}


@pytest.mark.parametrize("word", ["NO", "on", "yes", "off", "'true'", "1"])
def test_fault_12_a_switch_is_true_or_false(refused, word):
    err = refused(f"{SLURM}kubernetes: {{gang: {word}}}\n")
    bare = word.strip("'")
    assert f"job.yaml:4:20: expected true or false, found `{bare}`" in err
    assert "try: write true or false" in err
    assert ("without quotes" in err) == (word != bare)


@pytest.mark.parametrize("number", ["022", "0o22"])
def test_fault_13_an_octal_number_is_refused_with_what_to_write(refused, number):
    err = refused(f"{GOOD}train: {{steps: {number}}}\n")
    assert f"job.yaml:3:16: expected a whole number, found `{number}`" in err
    assert "write 22: a leading zero means octal to some" in err


@pytest.mark.parametrize(
    ("time", "minutes"),
    [("12:30:45", 751), ("22:22", 23), ("4:00:00", 240), ("90", 90), ("1-12", 2160), ("1-00:30", 1470), ("'30'", 30)],
)
def test_fault_14_a_time_is_a_time_and_no_number_in_base_sixty(time, minutes):
    job = load(f"{GOOD}slurm: {{time: {time}}}")
    assert job.slurm.time == time.strip("'")
    assert slurm.minutes(job.slurm.time) == minutes


@pytest.mark.parametrize("time", ["1:60:00", "infinite", "1h", "-5", "1:2:3:4", "12 30", "1e3"])
def test_fault_14_what_is_no_slurm_time_is_refused(refused, time):
    assert f"job.yaml:3:15: `{time}` is not a Slurm time" in refused(f"{GOOD}slurm: {{time: {time}}}\n")


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-4", 1e-4), ("3e-4", 3e-4), ("5E-05", 5e-5), ("1", 1.0), (".5", 0.5), ("1.", 1.0), ("+1e2", 100.0)],
)
def test_fault_15_a_learning_rate_is_a_number(written, value):
    lr = load(f"{GOOD}train: {{optimizer: {{lr: {written}}}}}").train.optimizer.lr
    assert (lr, type(lr)) == (value, float)


@pytest.mark.parametrize(("written", "value"), [("1e9", 10**9), ("5e2", 500), ("8.0", 8), ("+7", 7), ("1000", 1000)])
def test_fault_15_a_whole_number_may_have_an_exponent(written, value):
    steps = load(f"{GOOD}train: {{steps: {written}}}").train.steps
    assert (steps, type(steps)) == (value, int)
    assert type(load(f"{GOOD}train: {{deepspeed: {{x: {written}}}}}").train.deepspeed["x"]) in (int, float)


@pytest.mark.parametrize(
    ("written", "hint"),
    [("'1e-4'", "write 1e-4 without quotes"), ("1_000", "write 1000"), ("1,000", "write 1000"), ("0x10", "write 16")],
)
def test_fault_15_a_number_that_is_none_is_refused_with_what_to_write(refused, written, hint):
    assert hint in refused(f"{GOOD}train:\n  optimizer:\n    lr: {written}\n")


@pytest.mark.parametrize(
    "written", ["1.10", "1_000", "2024-01-02", "0x1F", "1e3", "007", "12:30", "1.", "+5", "true"]
)
def test_fault_16_text_that_looks_like_a_number_stays_as_written(written):
    assert load(f"{GOOD}env: {{V: {written}}}\n").env["V"] == written


def test_fault_16_a_version_keeps_its_zero():
    assert load(f"{GOOD}environment: {{deepspeed: 0.19.10}}").environment.deepspeed == "0.19.10"
    with pytest.raises(UserError, match=r"`0\.10` is not a version of three numbers"):
        load(f"{GOOD}environment: {{deepspeed: 0.10}}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("resources: {nodes: 0}", "job.yaml:3:20: 0 is not between 1 and 100,000"),
        ("resources: {nodes: 1e18}", "is not between 1 and 100,000"),
        ("resources: {nodes: 1e400}", "expected a whole number below 2^63, found `1e400`"),
        (f"resources: {{nodes: {'9' * 5000}}}", "expected a whole number below 2^63"),
        ("resources: {nodes: 2.5}", "expected a whole number, found `2.5`"),
        ("resources: {gpus_per_node: -1}", "job.yaml:3:28: -1 is not between 0 and 64"),
        ("train: {optimizer: {lr: .nan}}", "expected a number, found `.nan`"),
        ("train: {optimizer: {lr: inf}}", "expected a number, found `inf`"),
        ("train: {optimizer: {lr: -.inf}}", "a finite number is needed"),
        ("train: {optimizer: {lr: 1e999}}", "expected a finite number, found `1e999`"),
        ("train: {optimizer: {params: {x: 1e999}}}", "job.yaml:3:33: expected a finite number, found `1e999`"),
        (f"train: {{deepspeed: {{x: [{'9' * 5000}]}}}}", "expected a finite number"),
        ("train: {zero: 4}", "job.yaml:3:15: 4 is not between 0 and 3"),
        ("train: {zero: true}", "expected a whole number or auto, found `true`"),
        ("model: {layers: 2, hidden: 64, heads: 4, kv_heads: 0}", "0 is not between 1 and"),
    ],
)
def test_fault_17_a_number_out_of_range_is_refused_with_the_range(refused, text, says):
    head = "name: demo\nmodel: gpt-demo\n" if not text.startswith("model") else "name: demo\n\n"
    assert says in refused(f"{head}{text}\n")


@given(st.one_of(st.integers(), st.floats(), st.integers(min_value=10**15)))
@settings(max_examples=60, deadline=None)
def test_fault_17_no_number_of_nodes_is_taken_that_cannot_be(nodes):
    written = repr(nodes)
    try:
        taken = load(f"{GOOD}resources: {{nodes: {written}}}").resources.nodes
    except UserError as error:
        (problem,) = error.problems
        assert problem.where == "job.yaml:3:20"
    else:
        assert 1 <= taken <= 100_000
        assert taken == nodes


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GOOD + "---\nname: b\n", "job.yaml:3:1: a second document starts here; a job file is one document"),
        ("", "job.yaml:1:1: the file is empty"),
        ("# nothing\n", "job.yaml:1:1: the file is empty"),
        ("---\n", "job.yaml:2:1: a job file is a section with keys"),
        ("- name: demo\n", "job.yaml:1:1: a job file is a section with keys"),
        ("demo\n", "job.yaml:1:1: a job file is a section with keys"),
        ("? [a]\n: b\n", "job.yaml:1:3: a key must be plain text"),
    ],
)
def test_fault_18_a_job_file_is_one_section(refused, text, says):
    assert says in refused(text)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!str", "!!int", "!mine", "!"])
def test_fault_19_every_tag_is_refused(refused, tag):
    err = refused(f"name: demo\nmodel: gpt-demo\nenv: {{A: {tag} 'touch stolen'}}\n")
    assert "job.yaml:3:10: tag " in err
    assert "tags are not read" in err


NAMES = [
    "a; rm -rf /",
    "$(id)",
    "`id`",
    "a\nb",
    "a'b",
    'a"b',
    "%j",
    "\N{GRINNING FACE}",
    "a" * 300,
    "-a",
    "a-",
    "A",
    "",
]


@pytest.mark.parametrize("name", NAMES)
def test_fault_20_a_name_is_letters_digits_and_dashes(refused, name):
    written = yaml.safe_dump({"name": name, "model": "gpt-demo"}, allow_unicode=True, sort_keys=False)
    err = refused(written)
    assert "job.yaml:1:7: `" in err
    assert "is not 1 to 40 lower-case letters, digits and inner dashes" in err


@given(st.text(max_size=45))
@settings(max_examples=150, deadline=None)
def test_fault_20_a_name_that_is_taken_fits_every_scheduler(name):
    try:
        taken = load("model: gpt-demo", overrides=[f"name={_quoted(name)}"]).name
    except UserError:
        return
    assert taken == name
    assert 1 <= len(name) <= 40
    assert set(name) <= set(string.ascii_lowercase + string.digits + "-")
    assert not name.startswith("-")
    assert not name.endswith("-")


@given(st.from_regex(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?", fullmatch=True, alphabet=string.ascii_lowercase + "0-9"))
@settings(max_examples=30, deadline=None)
def test_fault_20_a_good_name_is_taken_and_pods_have_room(name):
    assert load(f"name: '{name}'\nmodel: gpt-demo").name == name
    assert len(f"{name}-worker-99999") <= 63


def _quoted(text: str) -> str:
    """A YAML scalar of any text, in ASCII."""
    return '"' + "".join(c if c.isalnum() and c.isascii() else f"\\U{ord(c):08x}" for c in text) + '"'


def exports(job: spec.JobSpec) -> str:
    """The export lines of node.sh; a value with newlines goes over several."""
    script = bundle.node_script(plan.make(job))
    return script.split("# --- environment\n")[1].split("\n\n# --- training")[0]


def environment_after(script: str) -> dict[bytes, bytes]:
    """What a program sees that bash starts at the end of the script."""
    done = subprocess.run(
        ["/bin/bash", "-c", f"set -eo pipefail\n{script}\nexec /usr/bin/env -0"],
        env={"PATH": "/nonexistent"},
        capture_output=True,
        check=True,
    )
    assert done.stderr == b""
    return dict(entry.split(b"=", 1) for entry in done.stdout.split(b"\0") if entry)


VALUES = [
    "two words", "it's", 'say "hi"', "$(id)", "`id`", "${HOME}", "a\nb", "\nlead and trail\n", "a,b", "a=b", "\\",
    "\\n", "#not", "", " ", "\t", "*", "~", "-n", "!x", "a;b|c&d<e>f", "\r\n", "\x1b[2J", "caf\xe9",
    "\u2028", "\x7f", "{}", "%s", "'\"'\"'", "$'\\n'", "\N{GRINNING FACE}",
]  # fmt: skip


def test_fault_21_values_reach_the_ranks_byte_for_byte():
    values = {f"V_{i}": value for i, value in enumerate(VALUES)}
    text = GOOD + "env:\n" + "".join(f"  {name}: {_quoted(value)}\n" for name, value in values.items())
    job = load(text)
    assert job.env == values
    seen = environment_after(exports(job))
    assert {name: seen[name.encode()] for name in values} == {name: value.encode() for name, value in values.items()}


HARD = st.text(st.sampled_from(" '\"\\$`(){}!#;&|<>*?~%=,\n\r\t\x0b\x85\u2028\ufeffa-é\U0001f600"), max_size=12)
ANY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


@given(st.lists(st.one_of(HARD, ANY), min_size=1, max_size=40))
@settings(max_examples=25, deadline=None)
def test_fault_21_any_value_reaches_the_ranks_byte_for_byte(values):
    given = {f"V_{i}": value for i, value in enumerate(values)}
    job = load(GOOD, overrides=[f"env.{name}={_quoted(value)}" for name, value in given.items()])
    seen = environment_after(exports(job))
    assert {name: seen[name.encode()] for name in given} == {name: value.encode() for name, value in given.items()}


@pytest.mark.parametrize("key", ["A;B", "A B", "1A", "A-B", "$(id)", "A=B", "", "a\nb", "\xc4"])
def test_fault_22_a_variable_has_a_variables_name(refused, key):
    err = refused(f"{GOOD}env:\n  {_quoted(key)}: x\n")
    assert "job.yaml:4:3: `" in err
    assert "is not a name for a variable: letters, digits, _" in err


@pytest.mark.parametrize(
    "key",
    """LD_PRELOAD BASH_ENV ENV SLURM_JOB_ID SBATCH_EXPORT SRUN_CPUS RANK MASTER_ADDR PS4 IFS BASH_FUNC_x PET_NNODES
    UID SECONDS PWD _ BASH_COMPAT here logs LD_AUDIT""".split(),
)
def test_fault_22_a_variable_that_is_not_the_users_is_refused(refused, key):
    err = refused(f"{GOOD}env:\n  {key}: x\n")
    assert err.startswith(f"error: job.yaml:4:3: {key} cannot be set from a job file: ")


def test_fault_22_names_keep_their_case():
    given = {"http_proxy": "a", "HTTP_PROXY": "b", "Mixed_Case9": "c", "_x": "d"}
    job = load(GOOD + "env:\n" + "".join(f"  {key}: {value}\n" for key, value in given.items()))
    seen = environment_after(exports(job))
    assert {name: seen[name.encode()].decode() for name in given} == given


SPECIAL = sorted(
    {"BASH_VERSINFO", "BASHOPTS", "SHELLOPTS", "PPID", "EUID", "RANDOM", "LINENO", "EPOCHSECONDS", "SHLVL", "OPTIND"}
    | {"HISTCMD", "SRANDOM", "DIRSTACK", "GROUPS", "FUNCNAME", "PIPESTATUS", "BASHPID", "OLDPWD", "EPOCHREALTIME"}
)
ORDINARY = [
    *("TMOUT", "REPLY", "COLUMNS", "TIMEFORMAT", "PROMPT_COMMAND", "HISTFILE", "MAILCHECK", "CDPATH", "GLOBIGNORE"),
    *("LANG", "HOME", "USER", "HOSTNAME", "HOSTTYPE", "OSTYPE", "TERM", "INPUTRC", "POSIXLY_CORRECT", "OPTARG"),
    *("run", "hosts", "rc", "step", "attempt", "init", "check", "name", "path", "EDITOR", "COMP_WORDS", "BASHX"),
]


@pytest.mark.parametrize("key", SPECIAL)
def test_fault_22_a_variable_that_bash_would_change_is_refused(key):
    assert "cannot be set from a job file" in problems(f"{GOOD}env: {{{key}: 7 x}}")[0]


def test_fault_22_every_other_variable_of_bash_keeps_its_value():
    job = load(GOOD + "env:\n" + "".join(f"  {key}: 7 x\n" for key in ORDINARY))
    seen = environment_after(exports(job))
    assert {key: seen.get(key.encode()) for key in ORDINARY} == dict.fromkeys(ORDINARY, b"7 x")


@pytest.mark.parametrize("field", ["script", "workdir"])
@pytest.mark.parametrize("path", ["-rf", "~/x", "a\nb", "a\0b", "$HOME/x", "`id`", "", "a\x7f", "a\tb"])
def test_fault_23_a_path_that_something_would_expand_is_refused(field, path):
    (found,) = problems(f"{GOOD}train: {{{field}: {_quoted(path)}}}")
    column = len(f"train: {{{field}: ") + 1
    assert found.startswith(f"job.yaml:3:{column}: `")
    assert "is not a path: it may not begin with - or ~" in found


PATHS = ["a b.py", "it's.py", 'a"b.py', "a\\b.py", "x;y.py", "caf\xe9.py", "a*b.py", "../up.py", "#a.py", "a{b}.py"]


@pytest.mark.parametrize("path", PATHS)
def test_fault_23_a_path_with_odd_characters_is_one_argument(path):
    job = load(f"{GOOD}train: {{script: {_quoted(path)}, workdir: {_quoted(path)}}}")
    script = bundle.node_script(plan.make(job))
    command = script[script.index("-- \\\n") + 3 :].replace("\\\n", " ").replace('"$here/ds_config.json"', "CONFIG")
    assert shlex.split(command) == ["python3", "-u", path, "--deepspeed_config", "CONFIG"]
    (change,) = [line for line in script.splitlines() if line.startswith('cd -P -- "$here/submitted-from"/')]
    assert shlex.split(change.replace("$here", "H")) == ["cd", "-P", "--", f"H/submitted-from/{path}"]


def test_fault_23_a_job_file_may_have_any_name_that_the_system_allows(dslaunch, tmp_path):
    for name in ["a b.yaml", "it's.yaml", "new\nline.yaml", "-x.yaml", "$(id).yaml"]:
        (tmp_path / name).write_text(GOOD)
        said = dslaunch("plan", "--", name)
        assert (said.code, said.err) == (0, "")
        (tmp_path / name).write_text(GOOD + "x: 1\n")
        said = dslaunch("plan", "--", name)
        assert said.code == 2
        assert "unknown key `x`" in said.err


@pytest.mark.parametrize(("more", "code"), [("", 0), ("x: 1\n", 2)])
def test_fault_23_a_name_that_is_no_utf8_breaks_nothing(tmp_path, more, code):
    path = os.fsencode(tmp_path) + b"/caf\xe9.yaml"
    Path(os.fsdecode(path)).write_text(GOOD + more)
    done = subprocess.run([sys.executable, "-m", "launcher", "config", "deepspeed", path], capture_output=True)
    assert done.returncode == code, done.stderr


def test_fault_23_what_is_not_utf8_is_refused_where_it_would_be_written(dslaunch, tmp_path, monkeypatch):
    monkeypatch.setenv("ODD", os.fsdecode(b"caf\xe9"))
    (tmp_path / "job.yaml").write_text(GOOD + "train: {checkpoint: {dir: {env: ODD}}}\n")
    said = dslaunch("plan", "job.yaml")
    assert said.code == 2
    assert "job.yaml:3:33: the variable ODD is not UTF-8" in said.err
    said = dslaunch("plan", "job.yaml", "--set", os.fsdecode(b"name=caf\xe9"))
    assert said.code == 2
    assert "--set name: the value is not UTF-8" in said.err


def _small() -> bundle.Bundle:
    return bundle.Bundle((bundle.File("node.sh", "x"),), "node.sh")


@pytest.mark.parametrize("there", ["file", "directory", "dangling link", "link out"])
def test_fault_24_a_run_directory_is_always_new(tmp_path, there):
    outside, folder = tmp_path / "outside", tmp_path / "runs" / "run"
    outside.mkdir()
    folder.parent.mkdir()
    if there == "file":
        folder.write_text("")
    elif there == "directory":
        folder.mkdir()
    else:
        folder.symlink_to(outside if there == "link out" else tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"cannot create .*File exists"):
        bundle.write(_small(), folder, submitted_from=tmp_path, secrets={})
    assert list(outside.iterdir()) == []
    assert not (tmp_path / "nowhere").exists()


def test_fault_24_a_file_is_never_written_through_a_link(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="File exists"):
        bundle.write_private(tmp_path / "link", "x")
    assert not (tmp_path / "target").exists()


def test_fault_24_no_name_leaves_the_run_directory(refused):
    assert "is not 1 to 40 lower-case letters" in refused("name: ../up\nmodel: gpt-demo\n")
    err = refused(f"{GOOD}secrets:\n  ../up: {{from_env: X}}\n")
    assert "job.yaml:4:3: `../up` is not a name for a variable" in err


def test_fault_24_a_run_is_for_its_owner_alone(tmp_path):
    folder = tmp_path / "runs" / "run"
    before = os.umask(0)
    try:
        bundle.write(_small(), folder, submitted_from=tmp_path, secrets={"TOKEN": "x"})
    finally:
        os.umask(before)
    modes = {path.relative_to(folder): path.lstat().st_mode & 0o777 for path in folder.rglob("*")}
    assert {oct(mode) for path, mode in modes.items() if path.name != "submitted-from"} == {"0o600", "0o700"}
    assert folder.stat().st_mode & 0o777 == 0o700


def test_fault_25_nothing_expands_by_itself():
    job = load(f"{GOOD}env: {{A: '${{HOME}}', B: $HOME}}\ntrain: {{args: ['${{HOME}}/x', '~']}}", environ=os.environ)
    assert job.env == {"A": "${HOME}", "B": "$HOME"}
    assert job.train.args == ("${HOME}/x", "~")


@pytest.mark.parametrize("at", ["venv", "conda"])
def test_fault_25_a_dollar_in_a_path_is_refused_with_the_way_to_say_it(at):
    (found,) = problems(f"{GOOD}{at}: ${{HOME}}/env", environ={"HOME": "/home/me"})
    assert found.startswith(f"job.yaml:3:{len(at) + 3}: `${{HOME}}/env` is not a path")
    assert "{env: SCRATCH, append: /runs}" in found


@pytest.mark.parametrize(
    ("text", "read", "value"),
    [
        ("train: {checkpoint: {dir: {env: SCRATCH, append: /runs}}}", lambda j: j.train.checkpoint.dir, "/fast/runs"),
        ("venv: {env: SCRATCH}", lambda j: j.venv, "/fast"),
        ("container: {env: IMAGE}", lambda j: j.container, "a/b:1.10"),
        ("resources: {nodes: {env: NODES}}", lambda j: j.resources.nodes, 4),
        ("env: {A: {env: ODD}}", lambda j: j.env["A"], "a'$(id)\n"),
        ("env: {A: {env: VOID}}", lambda j: j.env["A"], "null"),
        ("env: {env: SCRATCH}", lambda j: j.env, {"env": "SCRATCH"}),
        ("train: {args: [{env: NODES, append: 0}]}", lambda j: j.train.args, ("40",)),
        ("kubernetes: {labels: {env: prod}}", lambda j: j.kubernetes.labels, {"env": "prod"}),
        ("kubernetes: {labels: {tier: {env: NODES}}}", lambda j: j.kubernetes.labels, {"tier": "4"}),
        ("train: {optimizer: {env: OPT}}", lambda j: j.train.optimizer, "Adam"),
        ("train: {deepspeed: {aio: {env: NODES}}}", lambda j: j.train.deepspeed, {"aio": 4}),
    ],
)
def test_fault_25_a_variable_is_read_where_the_job_file_says_so(text, read, value):
    environ = {
        "SCRATCH": "/fast",
        "NODES": "4",
        "ODD": "a'$(id)\n",
        "IMAGE": "a/b:1.10",
        "VOID": "null",
        "OPT": "Adam",
    }
    assert read(load(f"{GOOD}{text}", environ=environ)) == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {checkpoint: {dir: {env: GONE}}}", "job.yaml:3:33: the environment has no variable GONE"),
        ("resources: {nodes: {env: WORD}}", "job.yaml:3:20: expected a whole number, found `four`"),
        ("train: {workdir: {env: [A]}}", "env is one name"),
        ("train: {workdir: {env: WORD, or: x}}", "job.yaml:3:18: expected text, found a section with keys"),
        (
            "env: {A: {env: MY_TOKEN}}",
            "job.yaml:3:16: MY_TOKEN looks like a secret, and this value is written to files",
        ),
        ("train: {args: [{env: MY_TOKEN}]}", "MY_TOKEN looks like a secret"),
    ],
)
def test_fault_25_a_variable_that_is_missing_or_wrong_is_refused(text, says):
    assert says in "\n".join(problems(f"{GOOD}{text}", environ={"WORD": "four", "MY_TOKEN": "x"}))


def test_fault_26_a_plan_that_contradicts_itself_lists_every_rule(refused):
    err = refused(
        "name: demo\nmodel: gpt-demo\n"
        "train:\n  global_batch: 100\n  micro_batch: 8\n  zero: 3\n  optimizer: OneBitAdam\n"
        "  parallel: {pipeline: 2}\n  precision: fp16\n"
        "resources: {nodes: 4, gpus_per_node: 8, gpu: h100}\nenvironment: {deepspeed: 0.19.8}\n"
    )
    for says in [
        "job.yaml:10:1: 4 nodes with GPUs, and no network is named",
        "job.yaml:7:3: OneBitAdam is not in DeepSpeed 0.19.8",
        "job.yaml:6:3: OneBitAdam does not run with ZeRO stage 3",
        "job.yaml:7:3: compression would begin at step 100,000",
        "job.yaml:6:3: pipeline parallelism does not run with ZeRO-3",
        "job.yaml:4:3: global_batch 100 is not a multiple of 16 data-parallel ranks x micro_batch 8 = 128",
        "job.yaml:8:3: the reference trainer is data-parallel only",
    ]:
        assert says in err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {parallel: {tensor: 3}}\nresources: {nodes: 2, processes_per_node: 2}", "does not divide 4 ranks"),
        ("train: {script: a.py, command: [b]}", "job.yaml:3:23: script and command are both given"),
        ("train: {command: [a], args: [b]}", "job.yaml:3:23: args belong to script or module"),
        ("train: {command: []}", "job.yaml:3:9: command is an empty list: nothing would run"),
        ("resources: {gpus_per_node: 8, processes_per_node: 4}", "processes_per_node 4 with 8 GPUs"),
        ("resources: {gpu: h100}", "gpu h100 is named but gpus_per_node is 0"),
        ("venv: a\nconda: b", "job.yaml:4:1: venv and conda are both given"),
        ("secrets: {A: {}}", "job.yaml:3:11: secret A has no source"),
        ("secrets: {A: {from_env: B, from_file: c}}", "secret A has two sources"),
        ("secrets: {A: {secret: b}}", "secret A needs both secret and key"),
        ("secrets: {RANK: {from_env: B}}", "RANK cannot be set"),
        ("env: {A: x}\nsecrets: {A: {from_env: B}}", "A stands in env and in secrets"),
    ],
)
def test_fault_26_fields_that_cannot_stand_together_are_refused(refused, text, says):
    assert says in refused(f"{GOOD}{text}\n")


# --- secrets that are none -----------------------------------------------------------------------------------


def made_up(prefix: str, length: int) -> str:
    return prefix + "".join(random.choices(string.ascii_letters + string.digits, k=length))


@pytest.mark.parametrize(
    "key", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "db_password", "TOKEN", "MY_CREDENTIALS"]
)
def test_a_variable_named_like_a_secret_is_refused(refused, key):
    err = refused(f"{GOOD}env: {{{key}: x}}\n")
    assert f"job.yaml:3:7: {key} looks like a secret, and env is written to files" in err
    assert f"secrets: {{{key}: {{from_env: {key}}}}}" in err


@pytest.mark.parametrize("prefix", ["hf_", "sk-", "ghp_", "gho_", "AKIA", "-----BEGIN RSA PRIVATE KEY-----\n"])
def test_a_value_that_looks_like_a_secret_is_refused_and_not_repeated(refused, prefix):
    value = made_up(prefix, 24).upper() if prefix == "AKIA" else made_up(prefix, 24)
    for text in (f"env: {{A: {_quoted(value)}}}", f"train: {{script: a.py, args: [{_quoted('--key=' + value)}]}}"):
        err = refused(f"{GOOD}{text}\n")
        assert "looks like a secret" in err
        assert value[-24:] not in err


@pytest.mark.parametrize("key", ["TOKENIZERS_PARALLELISM", "KEY", "PASSES", "HF_HOME", "TOKENS"])
def test_a_variable_that_is_no_secret_is_taken(key):
    assert load(f"{GOOD}env: {{{key}: x}}").env == {key: "x"}


# --- layers ------------------------------------------------------------------------------------------------


SITE = ("site.yaml", "slurm: {account: lab, partition: gpu}\nresources: {fabric: infiniband}\n")


def test_the_site_lies_under_the_job_file_and_set_lies_over_both():
    document = spec.load(
        "name: demo\nmodel: gpt-demo\nslurm:\n  partition: debug\n",
        name="job.yaml",
        site=SITE,
        overrides=["slurm.time=2:00:00", "train.args=[a, 'b c']", "env.A=x=y", "name=other"],
    )
    job = document.spec
    assert (job.slurm.account, job.slurm.partition, job.slurm.time) == ("lab", "debug", "2:00:00")
    assert (job.name, job.env, job.train.args) == ("other", {"A": "x=y"}, ("a", "b c"))
    assert dict(document.origins()) == {
        ("slurm", "account"): "site.yaml:1:9",
        ("slurm", "partition"): "job.yaml:4:3",
        ("slurm", "time"): "--set slurm.time",
        ("resources", "fabric"): "site.yaml:2:13",
        ("name",): "--set name",
        ("model",): "job.yaml:2:1",
        ("train", "args"): "--set train.args",
        ("env", "A"): "--set env.A",
    }


def test_a_blank_section_leaves_what_the_site_says():
    assert load("name: a\nmodel: gpt-demo\nslurm:\n", site=SITE).slurm.account == "lab"
    assert load("name: a\nmodel: gpt-demo\nslurm: {account: null}\n", site=SITE).slurm.account is None


@pytest.mark.parametrize(
    "text",
    ["train:", "train: {steps: null}", "env:", "train: {optimizer: }", "slurm: {srun: }", "resources: {gpu: ~}"],
)
def test_sections_and_lists_with_nothing_in_them_and_nulls_are_defaults(text):
    assert load(f"{GOOD}{text}") == load(GOOD)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("resources:\n  nodes:\n", "job.yaml:4:3: `nodes` has no value"),
        ("slurm: {partition: }\n", "job.yaml:3:9: `partition` has no value"),
        ("train: {zero: , steps: 3}\n", "job.yaml:3:9: `zero` has no value"),
        ("venv:\n", "job.yaml:3:1: `venv` has no value"),
    ],
)
def test_one_value_that_was_forgotten_is_no_default(refused, text, says):
    err = refused(f"{GOOD}{text}")
    assert err.startswith(f"error: {says}\n  try: leave the line out")


@pytest.mark.parametrize("place", ["/dev/null/x", "/etc/passwd"])
def test_checkpoints_below_a_file_are_refused_where_a_job_is_submitted(refused, dslaunch, place):
    text = f"{GOOD}train:\n  checkpoint:\n    dir: {place}\n"
    said = f"job.yaml:5:5: checkpoints cannot go to {place}: {place.removesuffix('/x')} is no directory"
    assert said in refused(text)
    assert dslaunch("plan", "job.yaml").code == 0
    shown = dslaunch("slurm", "job.yaml", "--dry-run")
    assert (shown.code, said in shown.err) == (0, True)


def test_checkpoints_where_the_user_may_not_write_are_refused_where_a_job_is_submitted(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o555)

    def found(at: str) -> int:
        """How many problems somebody else than root sees."""
        made = plan.make(load(f"{GOOD}train: {{checkpoint: {{dir: {at}}}}}"))
        child = os.fork()
        if not child:
            base = tmp_path
            if os.geteuid() == 0:  # whom nothing stops
                tmp_path.chmod(0o755)
                os.chroot(tmp_path)
                os.setuid(65534)
                base = Path("/")
            os._exit(len(cli._no_place(made, base)))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert found("theirs") == 1
    assert found("theirs/a/b") == 1
    theirs.chmod(0o777)
    assert found("theirs/a/b") == 0
    assert found("/not-here/a") == 0  # the nodes may have it


def test_printable_characters_of_any_language_are_shown(refused):
    err = refused(f'{GOOD}größe: 1\n"a\\u202eb": 2\n')
    assert "unknown key `größe`" in err
    assert "unknown key `a\\u202eb`" in err


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.steps", "--set train.steps: expected a.b=value"),
        ("=3", "--set =3: expected a.b=value"),
        ("a..b=3", "--set a..b=3: expected a.b=value"),
        ("train.step=3", "--set train.step: unknown key `step`"),
        ("train.steps=x", "--set train.steps: expected a whole number, found `x`"),
        ("train.args=[a", "--set train.args:1:1: not YAML: `[` opens here"),
        ("train=3", "--set train: expected a section with keys, found `3`"),
        ("name=", "--set name: expected text, found nothing"),
        ("name= ", "--set name: expected text, found nothing"),
        ("name=!!str a", "--set name:1:1: tag "),
    ],
)
def test_set_is_read_as_strictly_as_the_file(override, says):
    assert problems(GOOD, overrides=[override])[0].startswith(says)


def test_a_problem_in_the_site_file_names_the_site_file(dslaunch, tmp_path):
    (tmp_path / "config" / "dslaunch").mkdir(parents=True)
    (tmp_path / "config" / "dslaunch" / "site.yaml").write_text("slurm: {acount: lab}\n")
    (tmp_path / "job.yaml").write_text(GOOD)
    said = dslaunch("plan", "job.yaml")
    assert said.code == 2
    assert "dslaunch/site.yaml:1:9: unknown key `acount`" in said.err


def test_what_is_missing_is_missing_from_the_job_file():
    assert problems("model: gpt-demo\n", site=SITE) == ["job.yaml:1:1: `name` is missing"]


def test_standard_input_is_read(dslaunch, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(GOOD.encode() + b"x: 1\n")))
    said = dslaunch("plan", "-")
    assert said.code == 2
    assert "<stdin>:3:1: unknown key `x`" in said.err


@pytest.mark.parametrize("command", [["plan"], ["k8s"], ["slurm", "--dry-run"]])
def test_standard_input_is_there_once(dslaunch, monkeypatch, command):
    import io

    text = f"{GOOD}container: registry.example.com/train:1\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    said = dslaunch(*command, "-")
    assert (said.code, bool(said.out)) == (0, True), said.err


# --- the schema --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def editor():
    document = schema.job()
    jsonschema.Draft202012Validator.check_schema(document)
    return jsonschema.Draft202012Validator(document)


ACCEPTED = [
    "train: {steps: 5, zero: auto, optimizer: AdamW}",
    "train: {optimizer: {type: Adam, lr: 0.001, betas: [0.9, 0.95], params: {x: [1, {y: z}]}}}",
    "train: {args: [a, 1, 2.5, true], deepspeed: {zero_optimization: {stage: 1}}}",
    "resources: {nodes: 4, gpus_per_node: 8, gpu: h100, fabric: ib}",
    "resources: {nodes: {env: NODES}}",
    "train: {checkpoint: {dir: {env: SCRATCH, append: /runs}, every: 10}}",
    "env: {A: 1, B: true, C: x, D: {env: NODES}}",
    "venv: {env: SCRATCH}",
    "slurm:",
    "slurm: {time: '1:00:00', sbatch: {nice: 100, contiguous: true, licenses: 'a:1'}, srun: [--mpi=none]}",
    "container: {image: a/b:1, mounts: ['/a:/b']}",
    "container: a/b:1",
    "secrets: {HF_TOKEN: {from_env: HF_TOKEN}}",
    "kubernetes: {labels: {env: prod}, tolerations: [{key: a, effect: NoSchedule}], volumes: [{claim: a, mount: b}]}",
    "environment: {deepspeed: 0.19.10}",
    "modules: [cuda/12.4]",
    "train: {micro_batch: 4, activation_checkpointing: false}",
]
REFUSED = [
    "trian: {}",
    "train: {stpes: 5}",
    "train: {steps: 0}",
    "train: {steps: many}",
    "train: {zero: 4}",
    "train: {zero: automatic}",
    "train: {precision: fp8}",
    "train: {args: a}",
    "train: []",
    "train: {script: [a]}",
    "train: {script: -x}",
    "train: {workdir: {env: A, or: b}}",
    "train: {optimizer: {typo: 1}}",
    "resources: {nodes: 0}",
    "resources: {gpus_per_node: -1}",
    "env: {A B: x}",
    "env: {A: [x]}",
    "env: [A]",
    "slurm: {sbatch: {Nice: 1}}",
    "slurm: {sbatch: {nice: 'a b'}}",
    "slurm: {partition: a b}",
    "container: {mount: []}",
    "secrets: {A: x}",
    "kubernetes: {gang: maybe}",
    "kubernetes: {volumes: [{claim: a}]}",
    "name: A",
    "model: {layers: 2}",
]


@pytest.mark.slow
@pytest.mark.parametrize("text", ACCEPTED)
def test_the_editor_and_the_reader_accept(editor, text):
    load(f"{GOOD}{text}", environ={"NODES": "2", "SCRATCH": "/fast"})
    editor.validate({"name": "demo", "model": "gpt-demo", **yaml.safe_load(text)})


@pytest.mark.parametrize("text", REFUSED)
def test_the_editor_and_the_reader_refuse(editor, text):
    base = {"name": "demo", "model": "gpt-demo"}
    rest = "".join(f"{key}: {value}\n" for key, value in base.items() if not text.startswith(f"{key}:"))
    assert problems(rest + text, environ={"A": "x"})
    assert not editor.is_valid({**base, **yaml.safe_load(text)})


def test_a_config_of_ones_own_beside_dslaunch_s_is_refused_unless_the_flag_is_left_out():
    own = "train: {script: a.py, args: [--deepspeed_config, x.json]}"
    assert "job.yaml:3:30: --deepspeed_config stands in args" in problems(f"{GOOD}{own}")[0]
    assert load(f"{GOOD}{own[:-1]}, config_flag: none}}").train.args == ("--deepspeed_config", "x.json")


# --- dslaunch init -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--nodes", "1"],
        ["--model", "gpt2", "--gpu", "v100", "--gpus-per-node", "4", "--fabric", "ethernet"],
        ["--model", "llama-7b", "--gpu", "h100", "--nodes", "4"],
        ["--model", "llama-3.1-70b", "--gpu", "h200", "--nodes", "8", "--name", "big"],
        ["--model", "gpt2-xl", "--gpu", "a100", "--nodes", "1", "--fabric", "roce"],
    ],
    ids=" ".join,
)
def test_what_init_writes_loads_and_plans(dslaunch, tmp_path, editor, options):
    said = dslaunch("init", *options)
    assert (said.code, said.err) == (0, "")
    (tmp_path / "job.yaml").write_text(said.out)
    said = dslaunch("plan", "job.yaml")
    assert said.code == 0
    expected = ("activation checkpointing is up to your program", "slurm.warn_before_end 180 leaves little")
    assert all(any(says in line for says in expected) for line in said.err.splitlines())
    editor.validate(yamldoc.plain(yamldoc.parse((tmp_path / "job.yaml").read_text(), name="job.yaml")))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model", "lama-7b"], "did you mean `llama-7b`?"),
        (["--gpu", "h100-80g"], "did you mean `h100-80gb`?"),
        (["--gpu", "h100", "--fabric", "infinband"], "did you mean `infiniband`?"),
        (["--gpus-per-node", "4"], "--gpus-per-node without --gpu"),
        (["--name", "my job"], "--name my job: a name is 1 to 40 lower-case letters"),
        (["--example", "nothing-like-it"], "no example `nothing-like-it`\n  try: dslaunch init --example list"),
        (["--example", "llama-70b"], "try: there are slurm/llama-70b-8x8"),
        (["--model", "nothing-like-it"], "no model preset `nothing-like-it`\n  try: dslaunch presets lists them"),
    ],
)
def test_init_refuses_what_no_table_has(dslaunch, options, says):
    said = dslaunch("init", *options)
    assert (said.code, said.out) == (2, "")
    assert says in said.err


def test_presets_are_one_list_at_a_time(dslaunch):
    said = dslaunch("presets", "--gpus", "--fabrics")
    assert (said.code, said.out) == (2, "")
    assert "--gpus and --fabrics are a list each" in said.err


def test_runs_of_a_folder_that_is_not_there_are_no_empty_table(dslaunch, tmp_path):
    said = dslaunch("runs", "--runs", "nope")
    assert (said.code, said.out) == (2, "")
    assert "error: there is no directory nope" in said.err
    assert dslaunch("runs").code == 0  # nothing was submitted from here yet
    (tmp_path / "nope").mkdir()
    assert dslaunch("runs", "--runs", "nope").code == 0


def test_a_tab_between_a_key_and_its_value_is_yaml_s_own(dslaunch):
    assert load("name:\tdemo\nmodel:\tgpt-demo\n").name == "demo"


def test_only_a_job_that_goes_to_slurm_hears_of_slurm_s_warning(dslaunch):
    named = {row.name: row for row in examples.shipped()}
    job = str(named["manifests/falcon-180b-multus-8x8"].path)  # a checkpoint takes minutes
    pods = [dslaunch(command, job) for command in ("plan", "k8s")]
    slurm = dslaunch("slurm", "--dry-run", job, "--set", "container=null")
    assert [said.code for said in (*pods, slurm)] == [0, 0, 0]
    assert ["slurm.warn_before_end" in said.err for said in (*pods, slurm)] == [False, False, True]


@pytest.mark.slow
def test_every_shipped_example_loads_and_plans():
    for row in examples.shipped():
        if row.path.name == "job.yaml":
            site = (str(row.site), row.site.read_text()) if row.site else None
            text = row.path.read_text()
            plan.make(spec.load(text, name=str(row.path), site=site, environ={"SCRATCH": "/fast"}).spec)


def test_a_shipped_job_file_that_needs_a_site_file_comes_with_it(dslaunch):
    named = {row.name: row for row in examples.shipped()}
    for row in named.values():
        if row.site:
            assert dslaunch("init", "--example", f"{row.name}/site.yaml").out == row.site.read_text()
    assert any(row.site for row in named.values())
    assert all(row.says and "\n" not in row.says for row in named.values())


# --- out ---------------------------------------------------------------------------------------------------


@given(
    st.recursive(st.one_of(HARD, ANY, st.integers(), st.booleans()), lambda x: st.lists(x, max_size=3), max_leaves=5)
)
@settings(max_examples=150, deadline=None)
def test_what_is_written_is_read_back_the_same(value):
    """By YAML 1.1, which Kubernetes' tools read, and by our own reader."""
    text = yamldoc.dump([{"key": value}])
    assert yaml.safe_load(text) == {"key": value}
    assert yamldoc.plain(yamldoc.parse(text, name="x")) == {"key": value}


@given(
    st.one_of(HARD, ANY, st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans(), st.none())
)
@settings(max_examples=150, deadline=None)
@example("@home")
@example("%j")
@example("\U0001f600")
@example("--")
@example("a: b")
def test_what_is_written_on_one_line_is_read_back_the_same(value):
    text = f"key: {yamldoc.flow([value, {'a b': value}])}"
    assert yamldoc.plain(yamldoc.parse(text, name="x")) == {"key": [value, {"a b": value}]}
    if isinstance(value, str):  # where the reader's field says that it is text
        key = yamldoc.parse(f"key: {yamldoc.flow([value], typed=True)}", name="x").entries["key"]
        assert key.items[0].raw == value


@pytest.mark.parametrize(
    ("value", "any_reader", "typed"),
    [
        ("2:00:00", '"2:00:00"', "2:00:00"),
        ("1e-5", '"1e-5"', "1e-5"),
        ("--lr", '"--lr"', "--lr"),
        ("off", '"off"', '"off"'),
        ("a b", '"a b"', '"a b"'),
        ('say "a"', "'say \"a\"'", "'say \"a\"'"),
        (yamldoc.Untyped("8"), '"8"', '"8"'),
        ({"on": [1, "1", None], "a b": {}}, '{on: [1, "1", null], "a b": {}}', '{on: [1, 1, null], "a b": {}}'),
    ],
)
def test_a_word_is_quoted_where_a_reader_could_take_it_for_something_else(value, any_reader, typed):
    assert (yamldoc.flow(value), yamldoc.flow(value, typed=True)) == (any_reader, typed)


def test_a_file_that_claims_to_be_empty_and_is_not_is_not_cut_short(tmp_path, monkeypatch):
    path = tmp_path / "job.yaml"
    path.write_bytes(b"#" * (1 << 21))
    real = os.fstat
    monkeypatch.setattr(yamldoc.os, "fstat", lambda number: os.stat_result((*real(number)[:6], 0, *real(number)[7:])))
    with pytest.raises(UserError, match="larger than 1 MiB"):
        yamldoc.read_bytes(str(path))


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("slurm: {nodes: 2}", "it is resources.nodes"),
        ("slurm: {mem: 5G}", "it is resources.memory"),
        ("slurm: {gpus: 8}", "it is resources.gpus_per_node"),
        ("slurm: {ntasks_per_node: 8}", "train.launcher: srun"),
        ("slurm: {ntasks-per-node: 8}", "train.launcher: srun"),
        ("partition: gpu", "it is slurm.partition"),
        ("account: a", "it is slurm.account"),
        ("time: 10", "it is slurm.time"),
        ("sbatch: {power: high}", "it is slurm.sbatch"),
        ("slurm: {tolerations: []}", "it is kubernetes.tolerations"),
        ("kubernetes: {priority: high}", "it is priority_class"),
        ("kubernetes: {resources: {}}", "resources.gpus_per_node"),
        ("kubernetes: {volumes: [{pvc: a, mount: /a}]}", "it is claim"),
        ("kubernetes: {network: {host: true}}", "it is host_network"),
        ("services: [{name: a, command: [x], gpus: 1}]", "it is gpus_per_node"),
        ("resources: {partition: gpu}", "it is slurm.partition"),  # the same key elsewhere
        ("train: {spares: 1}", "it is resources.spares"),
    ],
)
def test_a_key_in_the_wrong_section_is_told_its_own(refused, text, hint):
    assert hint in refused(f"{GOOD}{text}\n")


def test_places_that_hints_name_exist():
    from launcher.spec import advice

    known = {place for _, place in advice._fields(spec.JobSpec, "")}
    named = [place for rows in advice.PLACES.values() for place in rows.values()]
    assert [place for place in named if re.fullmatch(r"[a-z]+\.[a-z_]+", place) and place not in known] == []


@pytest.mark.parametrize(
    ("text", "hint", "mended"),
    [
        ("kubernetes: {gang: volcano}", "{by: volcano}", "kubernetes: {gang: {by: volcano}}"),
        ("kubernetes: {network: efa}", "{profile: efa}", "kubernetes: {network: {profile: efa}}"),
        ("modules: cuda/12.4", "[cuda/12.4]", "modules: [cuda/12.4]"),
        ("setup: ulimit -l", "[ulimit -l]", "setup: [ulimit -l]"),
        ("setup: 'a: b'", "['a: b']", "setup: ['a: b']"),
        ("train:\n  command: python x.py --a 'b/c:d'", "[python, x.py, --a, 'b/c:d']",
         "train: {command: [python, x.py, --a, 'b/c:d']}"),
        ("train: {args: --lr 3}", "[--lr, '3']", "train: {script: x.py, args: [--lr, '3']}"),
        ("services: {ray: {command: [x]}}", "- {name: ray, ...}", "services: [{name: ray, command: [x]}]"),
        ("services: {name: ray, command: [x]}", "- name: ...", "services: [{name: ray, command: [x]}]"),
        ("kubernetes: {volumes: {claim: c, mount: /c}}", "- claim: ...",
         "kubernetes: {volumes: [{claim: c, mount: /c}]}"),
        ("preflight: false", "{run: false}", "preflight: {run: false}"),
        ("recover: 0", "{attempts: 0}", "recover: {attempts: 0}"),
        ("train: x.py", "{script: x.py}", "train: {script: x.py}"),
        ("slurm: {time: 24h}", "24:00:00", "slurm: {time: '24:00:00'}"),
        ("slurm: {time: 1d12h}", "1-12:00:00", "slurm: {time: 1-12:00:00}"),
        ("slurm: {time: 90 min}", "01:30:00", "slurm: {time: 90}"),
        ("resources: {memory: 4Gi}", "4G", "resources: {memory: 4G}"),
        ("resources: {memory: 1.5T}", "1536G", "resources: {memory: 1536G}"),
        ("resources: {memory: 0.5GiB}", "512M", "resources: {memory: 512M}"),
        ("services: [{name: a, command: [b], memory: 64gb}]", "64G",
         "services: [{name: a, command: [b], memory: 64G}]"),
        ("slurm: {nodelist: [a, b]}", '"a,b"', 'slurm: {nodelist: "a,b"}'),
        ("slurm: {partition: [a, b]}", '"a,b"', 'slurm: {partition: "a,b"}'),
    ],
)  # fmt: skip
def test_a_value_in_the_wrong_form_is_told_the_right_one(refused, text, hint, mended):
    assert f"try: {hint}" in refused(f"{GOOD}{text}\n").replace("a list, each with a dash: ", "")
    spec.load(f"{GOOD}{mended}\n", name="job.yaml")


def test_a_value_that_fits_no_short_form_gets_no_such_hint(refused):
    assert "{by:" not in refused(f"{GOOD}kubernetes: {{gang: 7}}\n")
    assert "{attempts:" not in refused(f"{GOOD}recover: often\n")
    assert "try:" not in refused(f"{GOOD}slurm: {{account: [a, 'b c']}}\n")
    assert "try:" not in refused(f"{GOOD}slurm: {{constraint: [a, b]}}\n")  # both, or one of them?
    assert "try:" not in refused(f"{GOOD}resources: {{memory: 12X}}\n")


@pytest.mark.parametrize(
    "text",
    ["resources: {memory: 99999999999999999999G}", "services: [{name: a, command: [b], memory: 1025T}]"],
)
def test_more_memory_than_a_node_can_have_is_refused(refused, text):
    assert "no node has more than 1024T" in refused(f"{GOOD}{text}\n")
    assert load(f"{GOOD}resources: {{memory: 1024T}}\n").resources.memory == "1024T"


def test_a_patch_that_is_no_file_is_refused_where_it_is_named(refused):
    err = refused(f"{GOOD}kubernetes:\n  patch: hello\n")
    assert re.match(r"error: job.yaml:4:3: cannot read \S+/hello: No such file", err)


@pytest.mark.parametrize("address", ["https://tok@example.com/a", "https://u:x@example.com/a", "ssh://u:x@h/a"])
def test_an_address_with_credentials_is_refused_wherever_it_goes(refused, address):
    said = refused(f"{GOOD}code: {{clone: '{address}'}}\n")
    assert "looks like a secret" in said or "a user or token in an address" in said


@pytest.mark.parametrize("backend", ["slurm", "local"])
def test_a_clone_is_refused_where_nobody_makes_it(backend):
    made = spec.load(f"{GOOD}code: {{clone: 'https://example.com/a'}}\n", name="job.yaml").spec
    (problem,) = software.problems(made, backend)
    assert problem.at == ("code", "clone")
    assert "`code: git`" in problem.hint


def test_a_home_that_nothing_expands_is_noted(dslaunch):
    notes = plan.literals(spec.load(f"{GOOD}env: {{G: ~/hf, H: a~/b}}\n", name="job.yaml").spec)
    assert len(notes) == 1
    assert "{env: HOME, append: /hf}" in notes[0]


def test_what_two_parts_stumble_over_is_said_once(refused):
    said = refused(
        "name: demo\nmodel: gpt-demo\ntrain: {global_batch: 64, micro_batch: 4}\n"
        "resources: {nodes: 2, gpus_per_node: 8, gpu: h100-80gb, fabric: infinband}\n"
    )
    assert said.count("no fabric `infinband` in the table") == 1


@pytest.mark.parametrize("name", ["a" * 64, "a.b", "A", "-a", "a-"])
def test_a_namespace_is_one_label(name):
    (said,) = problems(f"{GOOD}kubernetes: {{namespace: '{name}'}}\n")
    assert "is not a namespace: up to 63" in said
    spec.load(f"{GOOD}kubernetes: {{namespace: {'a' * 63}}}\n", name="job.yaml")
