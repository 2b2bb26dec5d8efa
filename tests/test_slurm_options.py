"""Every field of `slurm:` in the script it becomes: exact lines, refusals, and what the real sbatch makes of them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import string
import subprocess
import sys
from pathlib import Path

import pytest
import slurm_cluster
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher import facts, listed, plan, spec
from launcher.backends import slurm
from launcher.backends.slurm import controller, options, queue
from launcher.errors import Unreachable, UserError
from launcher.run import Result
from launcher.runs.submit import Unsent
from launcher.spec.slurm import Slurm

JOB = {
    "name": "demo",
    "model": "gpt-demo",
    "train": {"script": "train.py", "launcher": "srun", "zero": 0, "micro_batch": 1},
    "resources": {
        "nodes": 4, "gpus_per_node": 4, "cpus_per_node": 32, "memory": "256G", "gpu": "h100", "fabric": "ethernet",
    },
    "slurm": {"time": "1:00:00"},
}  # fmt: skip
ONE = {"train": {"launcher": "torchrun"}}  # one task per node


def made(slurm_section: dict, more: dict | None = None) -> plan.Plan:
    job = {key: dict(value) if isinstance(value, dict) else value for key, value in JOB.items()}
    for key, value in {**(more or {}), "slurm": slurm_section}.items():
        job[key] = {**job.get(key, {}), **value} if isinstance(value, dict) else value
    return plan.make(spec.load(yaml.safe_dump(job), name="job.yaml").spec)


def rendered(slurm_section: dict, more: dict | None = None) -> str:
    return slurm.render(made(slurm_section, more)).text("job.sbatch")


def lines(script: str) -> dict[str, str]:
    """The options that sbatch reads: {"time": "1:00:00", "requeue": ""}."""
    words = [shlex.split(line.removeprefix("#SBATCH ")) for line in script.splitlines() if line.startswith("#SBATCH")]
    assert all(len(word) == 1 for word in words)
    pairs = [word[0].removeprefix("--").partition("=") for word in words]
    assert len({name for name, _, _ in pairs}) == len(pairs)
    return {name: value for name, _, value in pairs}


TIMES = (
    "2026-12-01", "2026-12-01T08:00", "2026-12-01T8:00:30", "08:00", "8:00", "8:00pm", "16:00:30", "now", "now+1",
    "now+1hour", "now-1hour", "now+60minutes", "now+1week", "midnight", "noon", "fika", "teatime", "today",
    "tomorrow", "12/01", "1/2", "12/01/27", "12.01", "1201", "120127", "12/01-16:00",
)  # fmt: skip
NO_TIMES = (
    "tomorow", "5pmm", "5pm", "lots", "now+1h", "elevenses", "Tomorrow", "tomorrow+1day", "2026-12", "2027-1-1",
    "24:00", "today+1hour", "uptime", "13/01",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("field", ["begin", "deadline"])
@pytest.mark.parametrize("text", TIMES)
def test_a_time_that_sbatch_reads_is_taken(field, text):
    assert lines(rendered({"time": "1:00:00", field: text}))[field] == text


@pytest.mark.parametrize("field", ["begin", "deadline"])
@pytest.mark.parametrize("text", NO_TIMES)
def test_a_time_that_sbatch_refuses_is_refused(field, text):
    with pytest.raises(UserError, match="is not a time as sbatch takes it"):
        made({field: text})


@pytest.mark.slow
def test_sbatch_reads_the_same_times(slurm):
    """Of what it refuses it says so before it asks the controller."""
    for text, fine in [*((text, True) for text in TIMES), *((text, False) for text in NO_TIMES)]:
        done = subprocess.run(
            ["sbatch", "--test-only", f"--begin={text}", "--wrap=true"], capture_output=True, text=True, check=False,
            env={**os.environ, **slurm.env},
        )  # fmt: skip
        assert ("--begin specification" not in done.stderr) == fine, (text, done.stderr)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"tmp": "lots"}, "is not a Slurm size"),
        ({"tmp": "1.5G"}, "is not a Slurm size"),
        ({"tmp": "5P"}, "is not a Slurm size"),
        ({"licenses": ["7"]}, "a letter comes first"),
    ],
)
def test_sizes_and_licenses_are_slurms(asked, says):
    with pytest.raises(UserError, match=says):
        made(asked)


@pytest.mark.parametrize(
    ("gres", "index", "hint"),
    [
        (["gpu:8"], 0, "gpus_per_node: 8 with slurm.gpus_as: gres"),
        (["nvme:1", "gpu:a100:4"], 1, "gpus_per_node: 4 with"),
        (["gres/gpu:2"], 0, "gpus_per_node: 2 with"),
        (["gpu"], 0, "slurm.gpus_as: gres"),
    ],
)
def test_gpus_are_not_asked_for_twice(gres, index, hint):
    with pytest.raises(UserError) as caught:
        rendered({"gres": gres})
    (problem,) = caught.value.problems
    assert problem.at == ("slurm", "gres", index)
    assert hint in problem.hint
    assert lines(rendered({"gres": ["gpumem:1"]}))["gres"] == "gpumem:1"


def test_minutes_that_look_like_hours_are_said():
    (note,) = [note for note in options.notes(made({"time": "24:00"}).spec, {}) if "slurm.time" in note]
    assert "24:00 is 24 minutes" in note
    assert "24:00:00" in note
    assert not [note for note in options.notes(made({"time": "24:00:00"}).spec, {}) if "slurm.time" in note]


NO_CONF = """\
sbatch: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host
sbatch: error: fetch_config: DNS SRV lookup failed
sbatch: error: _establish_config_source: failed to fetch config
sbatch: fatal: Could not establish a configuration source
"""
NO_CONTROLLER = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)\n"


@pytest.mark.parametrize("words", [NO_CONF, NO_CONTROLLER])
def test_a_slurm_that_is_not_reached_refuses_nothing(words):
    with pytest.raises(Unsent) as caught:
        controller.parse_submitted(Result(1, "", words))
    (problem,) = caught.value.problems
    assert not problem.at
    assert "\n" not in problem.message
    assert "error:" not in problem.message
    told = controller.unreached(Result(1, "", words.replace("sbatch", "scontrol")), "--login")
    assert isinstance(told, Unreachable)
    assert ("--login" in told.problems[0].hint) == (words is NO_CONF)


def steps(script: str) -> tuple[list[str], list[str]]:
    """The words of srun for the preflight and for the ranks."""
    joined = script.replace("\\\n", " ")
    found = re.findall(r"^ +(?:env [-A-Z_u ]+ )?srun (.*?) bash -c ", joined, re.MULTILINE)
    assert len(found) == 2
    check, train = (shlex.split(words) for words in found)
    return check, train


# Field: what is written, and what that adds. A plain text is an option of sbatch, @ stands for a word of the ranks'
# srun, ! for a word of the preflight's, > for text of the script. A leading - says that it is not there.
TABLE = [
    ("partition", {"partition": "a100,h100"}, ["--partition=a100,h100"]),
    ("account", {"account": "proj-42@gpu"}, ["--account=proj-42@gpu"]),
    ("qos", {"qos": "boost_qos_dbg"}, ["--qos=boost_qos_dbg"]),
    ("reservation", {"reservation": "maint.1"}, ["--reservation=maint.1"]),
    ("constraint", {"constraint": "gpu&hbm80g"}, ["--constraint=gpu&hbm80g"]),
    ("licenses", {"licenses": ["scratch", "cfs:2"]}, ["--licenses=scratch,cfs:2"]),
    ("wckey", {"wckey": "llm"}, ["--wckey=llm"]),
    ("comment", {"comment": "fsx"}, ["--comment=fsx", "> --comment=fsx"]),
    ("time", {"time": "1-12"}, ["--time=1-12"]),
    ("time_min", {"time_min": "30"}, ["--time-min=30"]),
    ("begin", {"begin": "now+1hour"}, ["--begin=now+1hour"]),
    ("deadline", {"deadline": "2030-01-01T08:00"}, ["--deadline=2030-01-01T08:00"]),
    ("nice", {"nice": 0}, ["--nice=0"]),
    ("dependency", {"dependency": "afterok:1:2,afterany:3_4"}, ["--dependency=afterok:1:2,afterany:3_4"]),
    ("nodelist", {"nodelist": "gpu[001-003],x7"}, ["--nodelist=gpu[001-003],x7"]),
    ("exclude", {"exclude": "gpu9"}, ["--exclude=gpu9", "> --exclude gpu9"]),
    ("exclusive", {"exclusive": True}, ["--exclusive"]),
    ("exclusive", {"exclusive": "user"}, ["--exclusive=user"]),
    ("exclusive", {"exclusive": "topo"}, ["--exclusive=topo"]),
    ("oversubscribe", {"oversubscribe": True}, ["--oversubscribe"]),
    ("overcommit", {"overcommit": True}, ["--overcommit"]),
    ("contiguous", {"contiguous": True}, ["--contiguous"]),
    ("spread", {"spread": True}, ["--spread-job"]),
    ("switches", {"switches": "1@4:00:00"}, ["--switches=1@4:00:00"]),
    ("segment", {"segment": 2}, ["--segment=2"]),
    ("network", {"network": "job_vni,single_node_vni"}, ["--network=job_vni,single_node_vni"]),
    ("gpus_as", {}, ["--gpus-per-node=4", "-@--gpus-per-node=4", "->unset SLURM_GPUS"]),
    ("gpus_as", {"gpus_as": "gres"}, ["--gres=gpu:4", "---gpus-per-node=4"]),
    ("gpus_as", {"gpus_as": "gpus-per-task"}, ["--gpus-per-task=1", "--ntasks=16", "@--gpus-per-node=4",
                                               "!--gpus-per-node=4", ">unset SLURM_GPUS "]),
    ("gpus_as", {"gpus_as": "gpus"}, ["--gpus=16", "@--gpus-per-node=4", "!--gpus-per-node=4", ">unset SLURM_GPUS "]),
    ("gpus_as", {"gpus_as": "none"}, ["---gpus-per-node=4", "---gres=gpu:4"]),
    ("gpu_type", {"gpu_type": "a100"}, ["--gpus-per-node=a100:4"]),
    ("gpu_type", {"gpu_type": "a100", "gpus_as": "gres"}, ["--gres=gpu:a100:4"]),
    ("gpu_type", {"gpu_type": "a100", "gpus_as": "gpus-per-task"}, ["--gpus-per-task=a100:1"]),
    ("gpu_type", {"gpu_type": "a100", "gpus_as": "gpus"}, ["--gpus=a100:16"]),
    ("gres", {"gres": ["nvme:1", "tmpfs:20g"]}, ["--gres=nvme:1,tmpfs:20g", "--gpus-per-node=4"]),
    ("gres", {"gres": ["nvme:1"], "gpus_as": "gres"}, ["--gres=gpu:4,nvme:1"]),
    ("cpus_as", {}, ["--cpus-per-task=8", ">export SRUN_CPUS_PER_TASK=", "-@--cpus-per-task=8",
                     "!--cpu-bind=none", ">env -u SRUN_CPUS_PER_TASK "]),
    ("cpus_as", {"cpus_as": "cpus-per-gpu"}, ["--cpus-per-gpu=8", "@--cpus-per-task=8", "!--cpus-per-task=32"]),
    ("cpus_as", {"cpus_as": "none"}, ["---cpus-per-task=8", "@--cpus-per-task=8", "!--cpus-per-task=32"]),
    ("memory_as", {}, ["--mem=256G"]),
    ("memory_as", {"memory_as": "mem-per-gpu"}, ["--mem-per-gpu=64G"]),
    ("memory_as", {"memory_as": "mem-per-cpu"}, ["--mem-per-cpu=8G"]),
    ("tmp", {"tmp": "500G"}, ["--tmp=500G"]),
    ("ntasks_per_socket", {"ntasks_per_socket": 2}, ["--ntasks-per-socket=2"]),
    ("hint", {"hint": "nomultithread"}, ["--hint=nomultithread"]),
    ("threads_per_core", {"threads_per_core": 1}, ["--threads-per-core=1"]),
    ("core_spec", {"core_spec": 0}, ["--core-spec=0"]),
    ("distribution", {"distribution": "block:cyclic"}, ["--distribution=block:cyclic"]),
    ("cpu_bind", {"cpu_bind": "cores"}, ["@--cpu-bind=cores"]),
    ("cpu_bind", {"cpu_bind": "v,mask_cpu:0xff,0xff00,0xff0000,0xff000000"},
     ["@--cpu-bind=v,mask_cpu:0xff,0xff00,0xff0000,0xff000000", "!--cpu-bind=none"]),
    ("mem_bind", {"mem_bind": "local"}, ["@--mem-bind=local", "-!--mem-bind=local"]),
    ("gpu_bind", {"gpu_bind": "closest"}, ["@--gpu-bind=closest", "-!--gpu-bind=closest"]),
    ("gpu_bind", {"gpu_bind": "map_gpu:3,2,1,0"}, ["@--gpu-bind=map_gpu:3,2,1,0"]),
    ("gpu_bind", {"gpu_bind": "mask_gpu:0x1*2,0x2*2"}, ["@--gpu-bind=mask_gpu:0x1*2,0x2*2"]),
    ("accel_bind", {"accel_bind": "gn"}, ["@--accel-bind=gn", "-!--accel-bind=gn"]),
    ("mpi", {"mpi": "cray_shasta"}, ["@--mpi=cray_shasta", "!--mpi=cray_shasta"]),
    ("bcast", {"bcast": {"env.tar": "/tmp/e v.tar", "/data/x": "/tmp/x"}},
     ['>sbcast --force --preserve "$run/submitted-from"/env.tar \'/tmp/e v.tar\' || end 69',
      ">sbcast --force --preserve /data/x /tmp/x || end 69"]),
    ("warn_before_end", {"warn_before_end": 300}, ["--signal=B:USR2@300"]),
    ("requeue", {"requeue": True}, ["--requeue", ">--requeue --requeues"]),
    ("requeue", {"requeue": False}, ["--no-requeue", "->--requeues"]),
    ("kill_on_bad_exit", {}, ["@--kill-on-bad-exit=1", "!--kill-on-bad-exit=0"]),
    ("kill_on_bad_exit", {"kill_on_bad_exit": False}, ["@--kill-on-bad-exit=0"]),
    ("wait_all_nodes", {"wait_all_nodes": True}, ["--wait-all-nodes=1"]),
    ("mail_user", {"mail_user": "me@lab.org", "mail_type": "END"}, ["--mail-user=me@lab.org"]),
    ("mail_type", {"mail_type": "END,FAIL,TIME_LIMIT_80"}, ["--mail-type=END,FAIL,TIME_LIMIT_80"]),
    ("address_suffix", {"address_suffix": "i"}, [">MASTER_ADDR=${hosts[0]}i\n", ">COORDINATOR=${hosts[0]}i:$port"]),
    ("sbatch", {"sbatch": {"prefer": "ib", "reboot": True}}, ["--prefer=ib", "--reboot"]),
    ("srun", {"srun": ["--label", "--cpu-freq=high"]}, ["@--label", "@--cpu-freq=high", "!--label"]),
    ("plugin_options", {"plugin_options": ["gpu-power"], "sbatch": {"gpu-power": "300"}}, ["--gpu-power=300"]),
]  # fmt: skip
# What is read before there is a script, or only says what may stand in it.
ELSEWHERE = {"nodefile", "exclude_file", "version", "login", "login_dir"}


def test_every_field_has_a_row():
    assert {name for name, _, _ in TABLE} | ELSEWHERE == {field.name for field in dataclasses.fields(Slurm)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("field", "section", "expected"), TABLE, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(TABLE)]
)
def test_a_field_acts_in_the_script(field, section, expected):
    script = rendered(section)
    directives = [f"--{name}={value}" if value else f"--{name}" for name, value in lines(script).items()]
    check, train = steps(script)
    for one in expected:
        absent, want = one.startswith("-") and not (one.startswith("--") and one[2] != "-"), one
        want = want[1:] if absent else want
        places = {"@": train, "!": check, ">": script}
        found = want[1:].removeprefix(" ") in places[want[0]] if want[0] in places else want in directives
        assert found is not absent, one


def test_a_job_without_tasks_per_rank_asks_for_all_gpus_and_cpus_of_its_one_task():
    script = rendered({"gpus_as": "gpus-per-task"}, ONE)
    found = lines(script)
    assert (found["gpus-per-task"], found["ntasks"], found["ntasks-per-node"], found["cpus-per-task"]) == (
        "4", "4", "1", "32",
    )  # fmt: skip
    assert "env -u" not in script


WHOLE = {"train": {"launcher": "job"}}  # the program starts the ranks of all nodes
REFUSED = [
    ({"sbatch": {"nice": "5"}}, {}, "sbatch option nice is dslaunch's own", "use slurm.nice"),
    ({"sbatch": {"mem-per-gpu": "5"}}, {}, "mem-per-gpu is dslaunch's own", "use resources.memory"),
    ({"sbatch": {"prefr": "x"}}, {}, "sbatch has no option prefr", "did you mean prefer?"),
    ({"sbatch": {"gpus-per-n": "x"}}, {}, "sbatch has no option gpus-per-n", "did you mean gpus-per-node?"),
    ({"sbatch": {"my-plugin": "x"}}, {}, "sbatch has no option my-plugin", "plugin_options: [my-plugin]"),
    ({"sbatch": {"hold": True}}, {}, "sbatch option hold", ""),
    ({"sbatch": {"label": True}}, {}, "sbatch has no option label", ""),
    ({"srun": ["--cpu-bind=none"]}, {}, "srun option cpu-bind is dslaunch's own", "use slurm.cpu_bind"),
    ({"srun": ["-N2"]}, {}, "srun option nodes is dslaunch's own", "use resources.nodes"),
    ({"srun": ["--lable"]}, {}, "srun has no option lable", "did you mean label?"),
    ({"srun": ["--pty"]}, {}, "srun option pty: there is no terminal", ""),
    ({"cpu_bind": "mask_cpu:0xff,0xff00"}, {}, "cpu_bind has 2 entries and a node 4 tasks", "4 entries"),
    ({"cpu_bind": "mask_cpu:0xff,0xff00"}, ONE, "cpu_bind has 2 entries and a node 1 tasks", "launcher: srun"),
    ({"cpu_bind": "core"}, {}, "cpu_bind core is none of srun's", "did you mean cores?"),
    ({"gpu_bind": "single:1"}, ONE, "gpu_bind single:1 leaves one task of a node fewer", "launcher: srun"),
    ({"gpu_bind": "single:x"}, {}, "gpu_bind single takes a number", "single:1"),
    (
        {"gpu_bind": "closest"},
        {"train": {"script": None}},
        "gpu_bind closest shows a rank its own GPU",
        "gpu_bind: none",
    ),
    ({"mem_bind": "map_mem:0,1"}, {}, "mem_bind has 2 entries", ""),
    ({"gpus_as": "none", "gpu_type": "a100"}, {}, "no GPU is asked for", "leave gpu_type out"),
    ({"cpus_as": "cpus-per-gpu"}, {"resources": {"cpus_per_node": None}}, "needs resources.cpus_per_node", ""),
    ({"cpus_as": "cpus-per-gpu"}, {"resources": {"cpus_per_node": 30}}, "cannot be shared evenly by 4 GPUs", "28"),
    ({"memory_as": "mem-per-gpu"}, {"resources": {"memory": "1023M"}}, "cannot be shared evenly by 4 GPUs", "1020M"),
    ({"memory_as": "mem-per-gpu"}, {"resources": {"memory": "0"}}, "memory 0 is all of a node's", "memory_as: mem"),
    ({"memory_as": "mem-per-cpu"}, {"resources": {"memory": None}}, "needs resources.memory", ""),
    ({"segment": 3}, {}, "4 nodes are no whole number of segments of 3", "segment: 2"),
    ({"ntasks_per_socket": 2}, ONE, "ntasks_per_socket with one task per node", "launcher: srun"),
    ({"time_min": "2:00:00"}, {}, "time_min 2:00:00 is more than time 1:00:00", ""),
    ({"time_min": "3"}, {}, "leaves nothing of time_min 3", ""),
    ({"mail_type": "ENDE"}, {}, "mail_type ENDE is none of Slurm's", "did you mean END?"),
    ({"dependency": "aftrok:1"}, {}, "dependency aftrok:1 is none that Slurm knows", "did you mean afterok?"),
    ({"dependency": "afterok"}, {}, "dependency afterok names no job", "afterok:123"),
    ({"comment": "x" * 161}, {}, "comment has 161 characters", "a shorter one"),
    ({"distribution": "cyclic"}, {}, "ranks of a node have to follow one another", "block"),
    ({"distribution": "arbitrary"}, {}, "arbitrary reads a file", ""),
    ({"exclusive": True, "oversubscribe": True}, {}, "exclusive and oversubscribe are both given", "keep exclusive"),
    ({"hint": "nomultithread", "cpu_bind": "cores"}, {}, "hint and cpu_bind are both given", "keep hint"),
    ({"nodelist": "a[1-5]"}, {}, "nodelist names 5 nodes and the job has 4", "resources.nodes: 5"),
    ({"nodelist": "a[1-4]", "exclude": "a[2-3]"}, {}, "a[2-3] is in nodelist and in exclude", ""),
    ({"bcast": {"/tmp/x": "/tmp/x"}}, {}, "copied onto itself", "own disk"),
    ({"bcast": {"x": "y"}}, {}, "y is no absolute path", "/tmp"),
    ({"cpu_bind": "cores"}, WHOLE, "cpu_bind is for the step of the ranks", "the program's own srun"),
    ({"gpu_bind": "closest"}, WHOLE, "gpu_bind is for the step of the ranks", "the program's own srun"),
    ({"srun": ["--label"]}, WHOLE, "slurm.srun is for the step of the ranks", "the program's own srun"),
    ({}, {**WHOLE, "container": "/i/t.sif"}, "what it starts on other nodes does not", "apptainer exec"),
    ({}, {**WHOLE, "stage": [{"source": "a.tar", "to": "data"}]}, "on the first node alone", "slurm.bcast"),
    ({"nodefile": "nodes.txt"}, {}, "nodefile has not been read", ""),
    (
        {"version": "23.11", "segment": 2},
        {},
        "--segment came with Slurm 24.05, and this site has 23.11",
        "leave it out",
    ),
    ({"version": "18.08"}, {}, "--gpus-per-node came with Slurm 19.05, and this site has 18.08", "gpus_as: gres"),
    ({"version": "21.08", "exclusive": "topo"}, {}, "--exclusive=topo came with Slurm 24.05", ""),
    ({"version": "20.11", "gpu_bind": "per_task:1"}, {}, "--gpu-bind=per_task came with Slurm 21.08", ""),
    ({"version": "24.11.1", "cpu_bind": "rank"}, {}, "Slurm 24.11 dropped --cpu-bind=rank", ""),
    ({"version": "22.05", "qos": "a,b"}, {}, "several QOS came with Slurm 24.11", "qos: a"),
    ({"version": "21.08", "sbatch": {"prefer": "ib"}}, {}, "--prefer came with Slurm 22.05", ""),
    ({"version": "20.02", "srun": ["--overlap"]}, {}, "--overlap came with Slurm 20.11", ""),
]


@pytest.mark.slow
@pytest.mark.parametrize(("section", "more", "says", "hint"), REFUSED)
def test_what_slurm_would_refuse_or_ignore_is_refused_with_a_way_out(section, more, says, hint):
    with pytest.raises(UserError) as caught:
        rendered(section, more)
    problem = next(problem for problem in caught.value.problems if says in problem.message)
    assert hint in problem.hint
    assert problem.at


@pytest.mark.parametrize("version", ["21.08", "22.05.8", "23.02", "23.11", "24.05", "24.11", "25.05"])
def test_a_plain_job_is_for_every_slurm(version):
    assert "--cpus-per-task" in rendered({"version": version})


def test_the_table_has_a_reason_for_every_release():
    for row in facts.slurm_options().values():
        assert not (row.since or row.until) or row.source
        assert not (row.field and row.why)
        assert row.of in {"b", "s", "bs", "p"}
        assert row.value in {"", "=", "[=]", "s="}


def test_from_23_02_a_list_may_hold_more_nodes_than_the_job_takes():
    assert lines(rendered({"nodelist": "a[1-9]", "version": "23.02"}))["nodelist"] == "a[1-9]"


def test_shares_of_memory_are_exact():
    assert lines(rendered({"memory_as": "mem-per-gpu"}, {"resources": {"memory": "250G"}}))["mem-per-gpu"] == "64000M"


def test_a_list_of_nodes_may_stand_in_a_file(tmp_path):
    (tmp_path / "bad.txt").write_text("gpu[007-009] gpu12,\n\n# power\ngpu3  # fan\n")
    (tmp_path / "mine.txt").write_text("n1\nn2\n")
    section = "slurm: {nodefile: mine.txt, exclude_file: bad.txt, exclude: gpu4}"
    text = f"name: x\nmodel: gpt-demo\nresources: {{nodes: 2}}\n{section}\n"
    document = listed.read(spec.load(text, name="job.yaml"), base=tmp_path)
    assert (document.spec.slurm.nodelist, document.spec.slurm.exclude) == ("n[1-2]", "gpu[3-4,007-009,12]")
    assert not document.spec.slurm.names_files
    again = spec.yamldoc.read(document.root, spec.JobSpec)  # what is kept with the run
    assert again.slurm == document.spec.slurm
    script = slurm.render(plan.make(document.spec)).text("job.sbatch")
    assert lines(script)["exclude"] == "gpu[3-4,007-009,12]"
    assert "--exclude 'gpu[3-4,007-009,12]'" in script


@pytest.mark.parametrize(
    ("text", "where"),
    [("a\nb[1-\n", "bad.txt:2"), (None, "job.yaml:3:9"), ("", "job.yaml:3:9")],
)
def test_a_file_of_nodes_that_cannot_be_read_is_an_error_with_its_line(tmp_path, text, where):
    if text is not None:
        (tmp_path / "bad.txt").write_text(text)
    document = spec.load("name: x\nmodel: gpt-demo\nslurm: {nodefile: bad.txt}\n", name="job.yaml")
    with pytest.raises(UserError) as caught:
        listed.read(document, base=tmp_path)
    assert [problem.where for problem in caught.value.problems] == [where]


def test_the_run_s_own_dependency_and_token_stand_beside_the_user_s(tmp_path):
    asked = made({"dependency": "afterok:7,singleton", "comment": "my|words,x"}).spec
    assert controller._dependency(asked, "9") == ["--dependency=singleton,afterok:7,afterany:9"]
    words = controller._sbatch(tmp_path / "run-1", asked)
    assert "--comment=my|words,x,dslaunch:run-1" in words
    assert queue.token("my|words,x,dslaunch:run-1") == "dslaunch:run-1"
    assert queue.token("dslaunch:run-1") == "dslaunch:run-1"


def test_the_size_of_a_script_does_not_depend_on_the_nodes():
    asked = {"gpus_as": "gpus", "address_suffix": "i"}
    sizes = {len(rendered(asked, {"resources": {"nodes": nodes}})) for nodes in (3000, 4096)}
    assert len(sizes) == 1


# --- any text that a field takes


def texts(field: str) -> st.SearchStrategy[str]:
    return st.text(alphabet=string.ascii_letters + string.digits + "_.,:@%+/=&|*()[]-", min_size=1, max_size=12)


WORDS = ["partition", "account", "qos", "reservation", "wckey", "begin", "deadline", "network", "tmp", "comment"]


@pytest.mark.slow
@given(st.sampled_from(WORDS), st.text(min_size=1, max_size=8) | texts(""))
@settings(max_examples=60, deadline=None)
def test_no_accepted_text_is_more_than_one_word_of_one_line(field, text):
    try:
        script = rendered({field: text})
    except UserError:
        return
    assert lines(script)[field.replace("_", "-")] == text
    assert lines(script).keys() - {field.replace("_", "-")} == lines(rendered({})).keys()


# --- Slurm itself


@pytest.fixture(scope="module")
def site():
    """A controller whose nodes have sockets, threads, features and disks; no node is there."""
    if reason := slurm_cluster.why_not():
        pytest.skip(reason)
    with slurm_cluster.borrow(
        "dslaunch-options", nodes=8, slurmds=False, gpus=4, cpus=64, memory=512_000, gpu_type="a100",
        extra_node="Sockets=2 CoresPerSocket=16 ThreadsPerCore=2 Feature=ib,hbm80g TmpDisk=1000000",
        extra_conf="Licenses=scratch:10,cfs:10",
    ) as cluster:  # fmt: skip
        create = ["scontrol", "create", "reservation", "ReservationName=maint.1", "StartTime=now", "Duration=600"]
        assert cluster.run([*create, "Users=root", "Nodes=node[5-8]"]).returncode == 0
        yield cluster


# What this Slurm cannot say yes to: jobs, nodes and names that are not there, and options of later releases.
SITE = {
    "partition": {"partition": "main"}, "dependency": {"dependency": "singleton"},
    "constraint": {"constraint": "ib&hbm80g"}, "nodelist": {"nodelist": "node[1-4]"}, "exclude": {"exclude": "node8"},
}  # fmt: skip
NOT_HERE = ["exclusive=topo", "segment", "plugin_options", "gres"]  # of a later Slurm, a plugin, other machines
HERE = [(name, section) for name, section, _ in TABLE if not {name, f"{name}={section.get(name)}"} & set(NOT_HERE)]


@pytest.mark.slow
@pytest.mark.parametrize(("field", "section"), HERE)
def test_the_controller_takes_it(site, tmp_path, field, section):
    section = SITE.get(field, section)
    memory = {"resources": {"memory": "0"}} if section.get("exclusive") else {}
    (tmp_path / "job.sbatch").write_text(rendered(section, memory))
    reply = site.run(["sbatch", "--test-only", str(tmp_path / "job.sbatch")])
    assert reply.returncode == 0, reply.stderr
    assert "to start at" in reply.stderr


SHOWN = {"partition", "account", "qos", "reservation", "wckey", "network", "comment", "constraint", "licenses"}


@pytest.mark.slow
@given(st.sampled_from(sorted(SHOWN)), texts(""))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_sbatch_reads_back_the_very_text(site, tmp_path, field, text):
    try:
        script = rendered({field: [text] if field == "licenses" else text})
    except UserError:
        return
    (tmp_path / "job.sbatch").write_text(script)
    reply = site.run(["sbatch", "--verbose", "--test-only", str(tmp_path / "job.sbatch")])
    shown = dict(
        line.removeprefix("sbatch: ").split(": ", 1) for line in reply.stderr.splitlines() if re.search(r" +: ", line)
    )
    found = {name.strip(): value for name, value in shown.items()}
    assert found.get(field, "") == text, reply.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [{}, {"gpus_as": "gpus-per-task", "cpus_as": "cpus-per-gpu", "bcast": {"a'b": "/x y"}}]
)
def test_bash_and_shellcheck_read_it(tmp_path, script):
    (tmp_path / "job.sbatch").write_text(rendered(script))
    assert subprocess.run(["bash", "-n", tmp_path / "job.sbatch"], check=False).returncode == 0
    done = subprocess.run(["shellcheck", tmp_path / "job.sbatch"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


TORCH = """\
import os


class cuda:
    @staticmethod
    def device_count():
        return len(os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(","))
"""
SAY = (
    "import os; e = os.environ; print('seen', e['RANK'], e['LOCAL_RANK'], e['SLURM_CPUS_PER_TASK'], "
    "e.get('CUDA_VISIBLE_DEVICES'), e['MASTER_ADDR'], open('/dev/shm/copied').read())"
)
ALL = "0,1"


@pytest.mark.parametrize(
    ("section", "gpus"),
    [
        ({"gpus_as": "gres", "memory_as": "mem-per-gpu", "comment": "my|words,x"}, ALL),
        ({"gpus_as": "gpus-per-task", "cpus_as": "cpus-per-gpu", "memory_as": "mem-per-cpu"}, ALL),
        ({"gpus_as": "gpus", "cpus_as": "cpus-per-gpu"}, ALL),
        ({"gpus_as": "gpus-per-task", "gpu_bind": "single:1", "dependency": "singleton"}, "0"),
    ],
)
def test_every_dialect_gives_each_rank_its_share_on_fewer_nodes_than_the_job_has(
    slurm, tmp_path, monkeypatch, section, gpus
):
    """With a spare, which a step of the ranks leaves out; the nodes' GPUs are device files, and torch is told so."""
    monkeypatch.chdir(tmp_path)
    for name, value in {**slurm.env, "XDG_CONFIG_HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "copied").write_text("sent")
    job = {
        "name": "demo", "model": "gpt-demo",
        "train": {"command": ["python3", "-c", SAY], "launcher": "srun", "steps": 10, "zero": 0, "micro_batch": 1},
        "resources": {"nodes": 2, "spares": 1, "gpus_per_node": 2, "cpus_per_node": 8, "memory": "8G", "gpu": "h100",
                      "fabric": "ethernet"},
        "preflight": {"run": False}, "recover": {"attempts": 0}, "env": {"PYTHONPATH": str(tmp_path)},
        "slurm": {"time": "5", "bcast": {"copied": "/dev/shm/copied"}, **section},
    }  # fmt: skip
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    program = str(Path(sys.executable).parent / "dslaunch")
    done = subprocess.run([program, "slurm", "job.yaml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "dslaunch-runs" / done.stdout.strip()
    said = subprocess.run([program, "status", folder.name, "--json"], capture_output=True, text=True, check=False)
    number = json.loads(said.stdout)["job"]  # found by its token, whatever comment stands before it
    slurm.wait(number)
    output = (folder / "logs" / f"slurm-{number}.out").read_text()
    assert (folder / "exit-code").read_text() == "0\n", output
    seen = sorted(
        line for path in folder.glob("logs/rank-*.log") for line in path.read_text().splitlines() if "seen" in line
    )
    assert seen == [f"seen {rank} {rank % 2} 4 {gpus} node1 sent" for rank in range(4)], output
    token = f"dslaunch:{folder.name}"
    assert slurm.job(number)["Comment"] == (f"{section['comment']},{token}" if "comment" in section else token)


def test_a_program_that_starts_the_ranks_of_all_has_the_variables_of_a_batch_script():
    more = {**WHOLE, "resources": {"spares": 2}}
    bundle = slurm.render(made({"mpi": "pmix", "distribution": "block:cyclic"}, more))
    script, told = bundle.text("job.sbatch"), bundle.text("reach.sh").splitlines()
    step = script[script.rindex("srun --nodes=1 --ntasks=1 --ntasks-per-node=1") :]
    assert "--mpi=none" in step[: step.index("bash -c")]
    for line in (
        "export SLURM_NNODES=4",
        "export SLURM_NTASKS=16",
        "export SLURM_TASKS_PER_NODE='4(x4)'",
        "export SLURM_MPI_TYPE=pmix",
        "export SLURM_DISTRIBUTION=block:cyclic",
    ):
        assert line in told
    last = max(number for number, line in enumerate(told) if line.startswith("unset"))
    assert told.index("export SLURM_MPI_TYPE=pmix") > last
    assert "#SBATCH --nodes=6" in script
    assert "#SBATCH --ntasks-per-node=4" in script
