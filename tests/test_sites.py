"""One job file, several clusters: site files, names for places, where each value came from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import k8s_schema
import pytest
from click.testing import CliRunner

from launcher import cli, origins, sites, spec
from launcher.errors import UserError

JOB = """\
name: demo
model: llama-7b
train:
  script: train.py
  args: [--data, {path: data, append: /c4}]
  checkpoint: {dir: {path: scratch, append: /demo}}
resources: {nodes: 2, gpus_per_node: 8, gpu: h100-80gb}
"""
SLURM = """\
site: {backend: slurm, title: the big machine}
resources: {fabric: infiniband, cpus_per_node: 96}
modules: [cuda/12.4]
venv: /software/venv
slurm: {partition: booster, gpus_as: gres}
paths: {data: /p/data, scratch: /p/scratch}
"""
KUBERNETES = """\
site: {backend: kubernetes}
resources: {fabric: infiniband}
container: registry.example/train:1
train: {workdir: /workspace}
kubernetes:
  namespace: lab
  volumes: [{claim: data, mount: /data}]
paths: {data: /data/sets, scratch: /data/runs}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    folder = tmp_path / "config" / "dslaunch" / "sites"
    folder.mkdir(parents=True)
    (folder / "booster.yaml").write_text(SLURM)
    (folder / "pods.yaml").write_text(KUBERNETES)
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "train.py").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("DSLAUNCH_SITE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ask(*words):
    done = CliRunner().invoke(cli.cli, words, catch_exceptions=True)
    if isinstance(done.exception, UserError):
        return 2, "".join(str(problem) for problem in done.exception.problems)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout


def test_only_the_site_decides_between_slurm_and_kubernetes(here):
    code, script = ask("render", "job.yaml", "--site", "booster")
    assert code == 0
    assert "#SBATCH --partition=booster" in script
    assert "#SBATCH --gres=gpu:8" in script
    code, text = ask("render", "job.yaml", "--site", "pods")
    assert code == 0
    *_, job = k8s_schema.documents(text)
    assert job["metadata"]["namespace"] == "lab"
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]
    assert container["image"] == "registry.example/train:1"


def test_a_path_has_the_name_that_the_site_gives_it(here):
    for site, data, checkpoints in (
        ("booster", "/p/data/c4", "/p/scratch/demo"),
        ("pods", "/data/sets/c4", "/data/runs/demo"),
    ):
        document, plan = cli.load("job.yaml", site, ())
        assert document.spec.train.args[1] == data
        assert plan.checkpoint_dir == checkpoints


def test_a_place_without_a_name_is_refused_where_it_stands(here):
    code, said = ask("plan", "job.yaml")
    assert code == 2
    assert "job.yaml:5:25: no path is called data" in said
    assert "job.yaml:6:28: no path is called scratch" in said


def test_a_backend_that_the_site_is_not_is_refused(here):
    code, said = ask("k8s", "job.yaml", "--site", "booster")
    assert code == 2
    assert "booster.yaml:1:8: the site is slurm, and this is for kubernetes" in said


def test_without_a_site_submit_does_not_guess(here):
    (here / "plain.yaml").write_text("name: demo\nmodel: gpt-demo\n")
    assert ask("submit", "plain.yaml") == (2, "no site says where this job goes")


def test_a_site_is_found_by_name_by_path_and_by_variable(here, monkeypatch):
    folder = here / "config" / "dslaunch"
    assert sites.path("booster", {"XDG_CONFIG_HOME": str(here / "config")}) == str(folder / "sites" / "booster.yaml")
    assert sites.path("./x.yaml", {}) == "./x.yaml"
    assert sites.path(None, {"XDG_CONFIG_HOME": str(here / "config")}) is None
    (folder / "site.yaml").write_text("slurm: {account: usual}\n")
    assert sites.path(None, {"XDG_CONFIG_HOME": str(here / "config")}) == str(folder / "site.yaml")
    monkeypatch.setenv("DSLAUNCH_SITE", "pods")
    assert cli.read("job.yaml", None, ()).spec.site.backend == "kubernetes"
    assert cli.read("job.yaml", "booster", ()).spec.site.backend == "slurm"


def test_an_unknown_site_names_the_nearest(here):
    with pytest.raises(UserError) as caught:
        cli.read("job.yaml", "boster", ())
    assert caught.value.problems[0].hint == "did you mean `booster`?"


def test_every_value_says_where_it_came_from(here):
    document = cli.read("job.yaml", "booster", ("train.zero=3",))
    where = {".".join(map(str, path)): place.rpartition("/")[2] for path, _, place in origins.rows(document)}
    assert where["name"] == "job.yaml:1:1"
    assert where["slurm.partition"] == "booster.yaml:5:9"
    assert where["train.zero"] == "--set train.zero"
    assert where["train.checkpoint.dir"] == "job.yaml:6:16"
    everything = {".".join(map(str, path)): place for path, _, place in origins.rows(document, defaults=True)}
    assert everything["slurm.time"] == "default"
    assert everything["train.gradient_clipping"] == "default"
    assert set(where) < set(everything)


@pytest.mark.parametrize("site", ["booster", "pods"])
@pytest.mark.parametrize("flags", [(), ("--origin",), ("--defaults",), ("--origin", "--defaults")])
def test_what_config_show_prints_is_the_same_job(here, site, flags):
    code, text = ask("config", "show", "job.yaml", "--site", site, *flags)
    assert code == 0
    assert spec.load(text, name="shown").spec == cli.read("job.yaml", site, ()).spec


def test_origins_as_json(here):
    code, text = ask("config", "show", "job.yaml", "--site", "booster", "--json")
    assert code == 0
    assert {"field": "slurm.partition", "value": "booster"}.items() <= {
        k: v for row in json.loads(text) if row["field"] == "slurm.partition" for k, v in row.items()
    }.items()


def test_sites_lists_them_with_the_broken_ones(here):
    (here / "config" / "dslaunch" / "sites" / "bad.yaml").write_text("slurm: {acount: x}\n")
    code, text = ask("sites")
    assert code == 0
    assert [line.split()[:2] for line in text.splitlines()] == [
        ["bad", "cannot"], ["booster", "slurm"], ["pods", "kubernetes"],
    ]  # fmt: skip
    assert "the big machine" in text


def test_a_site_file_that_names_no_backend_is_named(here):
    uni = here / "config" / "dslaunch" / "sites" / "uni.yaml"
    uni.write_text("slurm: {partition: gpu}\npaths: {data: /d, scratch: /s}\n")
    for command in ("submit", "render"):
        with pytest.raises(UserError) as caught:
            CliRunner().invoke(cli.cli, [command, "job.yaml", "--site", "uni"], catch_exceptions=False)
        (problem,) = caught.value.problems
        assert problem.message == "uni.yaml does not say where its jobs go"
        assert problem.hint.startswith("add site: {backend: slurm}")
        assert problem.where == str(uni)


def test_an_empty_site_file_is_said_to_be_empty(here, monkeypatch):
    (here / "config" / "dslaunch" / "sites" / "void.yaml").write_text(" \n")
    assert ask("plan", "job.yaml", "--site", "void")[0] == 2
    assert "void.yaml is empty" in ask("plan", "job.yaml", "--site", "void")[1]
    monkeypatch.setenv("DSLAUNCH_SITE", "void")
    assert "void.yaml is empty" in ask("plan", "job.yaml")[1]


def test_more_hardware_than_the_site_has_is_noted_with_both_lines(here):
    four = here / "four.yaml"
    four.write_text(SLURM.replace("fabric: infiniband", "fabric: ethernet, gpus_per_node: 4, gpu: a100-40gb"))
    (here / "job.yaml").write_text(JOB.replace("gpu: h100-80gb", "gpu: h100-80gb, fabric: infiniband"))
    expected = [
        "job.yaml:7:38: gpus_per_node 8, and the site has 4 (./four.yaml:2:46)",
        "job.yaml:7:46: gpu h100-80gb, and the site has a100-40gb (./four.yaml:2:54)",
        "job.yaml:7:65: fabric infiniband, and the site has ethernet (./four.yaml:2:21)",
    ]
    document, made = cli.load("job.yaml", "./four.yaml", ())
    assert list(document.notes) == expected
    assert list(made.notes[:3]) == expected
    for command in ("plan", "render"):
        done = CliRunner().invoke(cli.cli, [command, "job.yaml", "--site", "./four.yaml"])
        assert all(f"note: {line}" in done.stderr for line in expected)
    four.write_text(SLURM.replace("fabric: infiniband", "fabric: infiniband, gpus_per_node: 8, gpu: h100"))
    assert cli.read("job.yaml", "./four.yaml", ()).notes == ()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("scontrol"), reason="Slurm's commands are not here")
def test_a_probe_that_fails_writes_nothing(here):
    """A controller that nobody runs: not reached, in one line, and no half of a file."""
    conf = here / "slurm.conf"
    conf.write_text(
        "ClusterName=x\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=1\nAuthType=auth/none\nCredType=cred/none\n"
        "MessageTimeout=2\nNodeName=n1 NodeAddr=127.0.0.1\nPartitionName=p Nodes=n1 Default=YES\n"
    )
    environ = {**os.environ, "SLURM_CONF": str(conf)}
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "probe", "--site", "slurm", "-o", "sites/x.yaml"],
        capture_output=True, text=True, check=False, env=environ,
    )  # fmt: skip
    assert done.returncode == 8, done.stderr
    assert "\\n" not in done.stderr
    assert not (here / "sites").exists()
