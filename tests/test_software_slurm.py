"""Modules, a container, local copies and a snapshot of the code, on a real Slurm.

Apptainer is not packaged for the distribution that the tests are made on: what stands for it here runs its
arguments in place, as the nodes have no other file system to enter.
"""

import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from test_slurm import site as site

MODULES = [Path(f"/usr/share/{name}/init/bash") for name in ("modules", "lmod/lmod")]
needs_modules = pytest.mark.skipif(
    not any(path.exists() for path in MODULES), reason="apt-get install environment-modules"
)


def job(name: str, program: str, **more: object) -> dict:
    train = {"command": ["python3", "-c", program], "launcher": "srun", "zero": 0, "steps": 1, "global_batch": 16}
    return {
        "name": name,
        "model": {"layers": 2, "hidden": 64, "heads": 2, "vocab": 256},
        "train": train,
        "resources": {"nodes": 2, "processes_per_node": 2},
        "slurm": {"time": "5"},
        **more,
    }


def printed(site, run: str) -> list[str]:
    """What the ranks said, each in one line."""
    logs = sorted((site.folder / "dslaunch-runs" / run / "logs").glob("rank-*.log"))
    return [line for path in logs for line in path.read_text().splitlines() if line.startswith("said ")]


def module(site, name: str, text: str) -> str:
    path = site.folder / "modulefiles" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#%Module\n{text}\n")
    return str(site.folder / "modulefiles")


@needs_modules
def test_modules_are_loaded_on_every_node_and_one_that_is_missing_is_named(site):
    folder = module(site, "tool/1.5", "setenv TOOL_HOME /opt/tool")
    asked = job("mods", "import os; print('said', os.environ['TOOL_HOME'])")
    asked["modules"] = {"use": [folder], "load": ["tool/1.5"]}
    run = site.submit(asked)
    assert site.wait(run, seconds=90)["code"] == 0, site.log(run)[-3000:]
    assert printed(site, run) == ["said /opt/tool"] * 4
    asked["modules"]["load"] = ["tool/9"]
    run = site.submit(asked)
    found = site.wait(run, seconds=90)
    assert found["state"] == "failed"
    assert "module load tool/9 failed; module avail tool shows what this site has" in json.dumps(found)


@needs_modules
def test_a_container_that_a_module_brings_runs_every_task_inside(site):
    stub = site.folder / "bin/apptainer"
    stub.parent.mkdir()
    stub.write_text(
        "#!/bin/bash\n"
        "for name in $(compgen -e); do\n"
        '  case $name in APPTAINERENV_*) export "IN_${name#APPTAINERENV_}=${!name}" ;; esac\n'
        "done\n"
        'while [ "$1" != bash ]; do [[ $1 != *.sif ]] || export IMAGE=$1; shift; done\n'
        'exec "$@"\n'
    )
    stub.chmod(0o755)
    (site.folder / "image.sif").write_text("image")
    folder = module(site, "apptainer", f"prepend-path PATH {stub.parent}")
    program = "import os; e = os.environ; print('said', e['IMAGE'].split('/')[-1], e['IN_RANK'], e['IN_NODE_RANK'])"
    asked = job("boxed", program, modules={"use": [folder], "load": ["apptainer"]})
    asked["container"] = {"image": "image.sif", "clean_env": True, "mounts": ["/tmp:/tmp"]}
    run = site.submit(asked)
    assert site.wait(run, seconds=90)["code"] == 0, site.log(run)[-3000:]
    assert printed(site, run) == [f"said image.sif {rank} {rank // 2}" for rank in range(4)]


def test_a_copy_lies_on_every_node_while_the_job_runs_and_on_none_afterwards(site, slurm):
    with tarfile.open(site.folder / "data.tar.gz", "w:gz") as archive:
        (site.folder / "x.txt").write_text("x")
        archive.add(site.folder / "x.txt", "deep/x.txt")
    program = (
        "import os, pathlib; p = pathlib.Path(os.environ['DSLAUNCH_LOCAL'], 'set/deep/x.txt');"
        "print('said', p.read_text(), p.stat().st_dev != os.stat('/tmp').st_dev)"
    )
    asked = job("staged", program, local_disk="/dev/shm", stage=[{"source": "data.tar.gz", "to": "set"}])
    run = site.submit(asked)
    assert site.wait(run, seconds=90)["code"] == 0, site.log(run)[-3000:]
    assert printed(site, run) == ["said x True"] * 4
    left = subprocess.run(["srun", "-N4", "bash", "-c", "ls /dev/shm"], capture_output=True, text=True, check=True)
    assert "dslaunch" not in left.stdout


def test_an_edit_while_the_job_queues_changes_nothing_of_it(site):
    def git(*words):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words], check=True, capture_output=True
        )

    (site.folder / "library.py").write_text("WHO = 'committed'\n")
    (site.folder / "train.py").write_text(
        "import os, library; print('said', library.WHO, open('data/d').read(), os.path.abspath('.').split('/')[-1])\n"
    )
    (site.folder / "data").mkdir()
    (site.folder / "data/d").write_text("before")
    (site.folder / ".gitignore").write_text("data\ndslaunch-runs\nconfig\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "all")
    (site.folder / "library.py").write_text("WHO = 'changed'\n")
    blocker = subprocess.run(
        ["sbatch", "--parsable", "-N4", "--exclusive", "--output=/dev/null", "--wrap=sleep 600"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    try:
        asked = job("frozen", "", code="git")
        asked["train"] |= {"command": ["python3", "train.py"]}
        run = site.submit(asked)
        (site.folder / "library.py").write_text("WHO = 'edited later'\n")
        (site.folder / "train.py").write_text("raise SystemExit('edited later')\n")
        (site.folder / "data/d").write_text("after")
        again = site.dslaunch("slurm", "job.yaml")  # which is no longer the same run: its code is another
        assert "trains into" in again.stderr, again.stderr
    finally:
        subprocess.run(["scancel", blocker], check=True)
    assert site.wait(run, seconds=90)["code"] == 0, site.log(run)[-3000:]
    # the code is as it was; data that git ignores is as it is
    assert printed(site, run) == ["said changed after snapshot"] * 4
    folder = site.folder / "dslaunch-runs" / run
    assert "+WHO = 'changed'" in (folder / "snapshot.patch").read_text()
    assert oct(os.stat(folder / "snapshot").st_mode & 0o777) == "0o700"  # noqa: PTH116
