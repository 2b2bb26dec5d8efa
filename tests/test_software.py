"""What a node does before the ranks: the rendered lines run in a real bash, the programs they call write down how."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from launcher import bundle, plan, software, spec
from launcher.backends import kubernetes, local
from launcher.backends.slurm import script
from launcher.errors import UserError

BASE = (
    "name: demo\nmodel: gpt-demo\ntrain: {script: train.py, steps: 10, micro_batch: 1, checkpoint: {dir: /ck/demo}}\n"
)
SCHEDULER = {"NODE_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1", "SLURM_JOB_ID": "77", "HOME": "/nowhere"}

INITS = [Path(f"/usr/share/{name}/init/bash") for name in ("modules", "lmod/lmod")]

# Says how it was called, and with which environment: the last call of a name is kept.
SAY = """#!/bin/bash
{{ printf '%s\\0' "$@"; }} >"{records}/{name}.argv"
/usr/bin/env -0 >"{records}/{name}.env"
{{ printf '%s ' "$@"; echo; }} >>"{records}/{name}.calls"
{body}
"""


class Node:
    """A run directory, and a machine with no programs but the system's and those a test puts there."""

    def __init__(self, home: Path) -> None:
        self.home, self.run, self.base = home, home / "run", home / "base"
        self.bin, self.records = home / "bin", home / "records"
        for folder in (self.bin, self.records, self.base, home / "local"):
            folder.mkdir()
        self.program("python3")

    def program(self, name: str, body: str = ":") -> None:
        path = self.bin / name
        path.write_text(SAY.format(records=self.records, name=name, body=body))
        path.chmod(0o755)

    def write(self, text: str) -> None:
        made = plan.make(spec.load(BASE + text, name="job.yaml").spec)
        if self.run.exists():
            shutil.rmtree(self.run)
        bundle.write(script.render(made), self.run, submitted_from=self.base, secrets={})

    def start(self, *words: str, **environ: str) -> subprocess.CompletedProcess:
        """What a task of srun does; `python3` stands for supervise.py."""
        env = {"PATH": f"{self.bin}:/usr/bin:/bin", "SLURM_TMPDIR": str(self.home / "local"), **SCHEDULER, **environ}
        command = [*words, "bash", str(self.run / "node.sh")]
        if (self.run / "host.sh").exists():
            command = ["bash", str(self.run / "host.sh"), *command]
        return subprocess.run(command, env=env, cwd=self.run, capture_output=True, text=True, timeout=60)

    def ok(self, text: str, **environ: str) -> None:
        self.write(text)
        done = self.start(**environ)
        assert done.returncode == 0, done.stdout + done.stderr

    def fails(self, text: str, **environ: str) -> str:
        self.write(text)
        done = self.start(**environ)
        assert done.returncode != 0
        assert not (self.records / "python3.argv").exists(), "the ranks were started"
        return (self.run / "logs/failed-before-ranks").read_text().strip()

    def fails_again(self) -> str:
        """A later start of a run that was started."""
        (self.records / "python3.argv").unlink()
        done = self.start()
        assert done.returncode != 0
        assert not (self.records / "python3.argv").exists(), "the ranks were started"
        return (self.run / "logs/failed-before-ranks").read_text().strip()

    def argv(self, name: str) -> list[str]:
        return (self.records / f"{name}.argv").read_text().split("\0")[:-1]

    def env(self, name: str = "python3") -> dict[str, str]:
        rows = (self.records / f"{name}.env").read_text().split("\0")[:-1]
        return dict(row.split("=", 1) for row in rows)

    def calls(self, name: str) -> list[str]:
        return [line.strip() for line in (self.records / f"{name}.calls").read_text().splitlines()]


@pytest.fixture
def node(tmp_path):
    return Node(tmp_path)


def test_files_of_shell_and_directories(node):
    (node.base / "env").mkdir()
    (node.base / "env/a b.env").write_text("A=1\nfalse\nexport B=$A$UNSET\nHERE=$PWD\n")
    text = (
        "source: [env/a b.env]\nenv: {C: {node: B, append: '2'}}\nmkdir: [out, {job: id, prepend: 'o '}]\n"
        "setup: [test -d out]\n"
    )
    node.ok(text)
    told = node.env()
    assert (told["A"], told["B"], told["C"], told["HERE"]) == ("1", "1", "12", str(node.base))
    assert (node.base / "out").is_dir()
    assert (node.base / "o 77").is_dir()
    (node.base / "env/a b.env").unlink()
    (node.records / "python3.argv").unlink()
    assert node.fails(text).endswith("there is no " + str(node.run / "submitted-from/env/a b.env"))


def test_limits_are_set_where_the_node_allows_it(node):
    (node.base / "told.sh").write_text("ulimit -Sn; ulimit -c\n")
    node.ok("ulimit: {nofile: 64, core: 0}\nsetup: [bash told.sh >told]\n")
    assert (node.base / "told").read_text() == "64\n0\n"
    node.write("ulimit: {nofile: 999999999}\n")  # which no kernel gives
    done = node.start()
    assert "ulimit.nofile: 999999999 is more than this node allows" in done.stderr
    assert done.returncode == 0


# --- modules --------------------------------------------------------------------------------------

# As Tcl modules 3.2 and 4 do it: 0 whatever comes, and a list of what is loaded.
MODULE = """
module() {
  echo "$*" >>"$CALLS"
  case $1 in
    load) case $2 in missing*) echo "ModuleCmd_Load.c: ERROR" >&2 ;; *) LOADEDMODULES=$LOADEDMODULES:$2 ;; esac ;;
    swap) LOADEDMODULES=${LOADEDMODULES/$2/$3} ;;
    purge) LOADEDMODULES= ;;
  esac
  return 0
}
LOADEDMODULES=PrgEnv-cray
"""


@pytest.fixture
def modules(node):
    place = node.home / "modules/init"
    place.mkdir(parents=True)
    (place / "bash").write_text(MODULE)
    return {"MODULESHOME": str(node.home / "modules"), "CALLS": str(node.home / "calls")}


def test_modules_in_their_order(node, modules):
    section = (
        "modules: {purge: false, use: [/appl/a b], unload: [darshan], swap: {PrgEnv-cray: PrgEnv-gnu}, "
        "load: [rocm/6.0, PrgEnv-gnu]}\n"
    )
    node.ok(section, **modules)
    assert Path(modules["CALLS"]).read_text().splitlines() == [
        "use /appl/a b", "unload darshan", "swap PrgEnv-cray PrgEnv-gnu", "load rocm/6.0", "load PrgEnv-gnu",
    ]  # fmt: skip


def test_a_list_of_modules_comes_after_a_purge(node, modules):
    node.ok("modules: [cuda/12.4]\n", **modules)
    assert Path(modules["CALLS"]).read_text().splitlines() == ["purge", "load cuda/12.4"]


def test_a_module_that_is_not_there_ends_it_though_module_answers_0(node, modules):
    said = node.fails("modules: [cuda/12.4, missing/1]\n", **modules)
    assert "module load missing/1 failed; module avail missing shows what this site has" in said


def test_a_machine_without_modules_says_so(node):
    if any(path.exists() for path in INITS):
        pytest.skip("this machine has environment modules")
    assert "no environment modules" in node.fails("modules: [a]\n")


@pytest.mark.slow
@pytest.mark.skipif(not any(path.exists() for path in INITS), reason="apt-get install environment-modules, or lmod")
def test_with_the_environment_modules_of_this_machine(node):
    (node.home / "files/tool").mkdir(parents=True)
    (node.home / "files/tool/1.5").write_text("#%Module\nsetenv TOOL_HOME /opt/tool/1.5\n")
    (node.home / "files/other").write_text("#%Module\nsetenv OTHER yes\n")
    use = f"use: [{node.home}/files]"
    node.ok(f"modules: {{{use}, load: [tool, other]}}\n")
    assert node.env()["TOOL_HOME"] == "/opt/tool/1.5"
    assert node.env()["OTHER"] == "yes"
    (node.records / "python3.argv").unlink()
    assert "module load tool/9 failed" in node.fails(f"modules: {{{use}, load: [tool/9]}}\n")


# --- conda, uv, venv ------------------------------------------------------------------------------

HOOK = """cat <<'EOF'
{function}() {{
  if [ "$2" = nowhere ]; then echo "EnvironmentNameNotFound" >&2; return 1; fi
  echo "$UNBOUND" >/dev/null
  export CONDA_PREFIX=/envs/$2 CONDA_DEFAULT_ENV=$2
  case $2 in /*) CONDA_PREFIX=$2 ;; esac
  false  # as the last test of an activate.d script leaves it
}}
EOF"""


@pytest.mark.parametrize(
    ("section", "tool", "hook"),
    [
        ("conda: mine", "conda", "shell.bash hook"),
        ("conda: {env: mine, tool: micromamba}", "micromamba", "shell hook --shell bash"),
        ("conda: {env: mine, tool: mamba}", "mamba", "shell hook --shell bash"),
    ],
)
def test_a_conda_environment_is_activated_without_conda_init(node, section, tool, hook):
    node.program(tool, HOOK.format(function=tool))
    node.ok(section + "\n")
    assert node.calls(tool) == [hook]
    assert node.env()["CONDA_DEFAULT_ENV"] == "mine"


def test_mamba_before_2_has_the_hook_of_conda(node):
    node.program("mamba", 'echo "no such command" >&2; exit 2')
    node.program("conda", HOOK.format(function="conda"))
    node.ok("conda: {env: mine, tool: mamba}\n")
    assert node.env()["CONDA_DEFAULT_ENV"] == "mine"


def test_conda_by_its_root_and_an_environment_by_its_path(node):
    root = node.home / "miniforge"
    (root / "bin").mkdir(parents=True)
    (node.base / "envs/train").mkdir(parents=True)
    node.program("conda", HOOK.format(function="conda"))
    shutil.move(node.bin / "conda", root / "bin/conda")
    node.ok(f"conda: {{env: envs/train, root: {root}}}\n")
    assert Path(node.env()["CONDA_PREFIX"]).resolve() == node.base / "envs/train"


def test_what_is_missing_of_conda_is_named(node):
    assert node.fails("conda: mine\n").endswith("there is no conda: give conda.root, or load its module")
    node.program("conda", HOOK.format(function="conda"))
    assert node.fails("conda: nowhere\n").endswith("conda has no environment nowhere")


def test_a_venv_and_a_uv_project(node):
    for folder in ("mine/bin", "project/.venv/bin"):
        (node.base / folder).mkdir(parents=True)
        (node.base / folder / "activate").write_text(f'export VENV={folder}; [ -n "$UNBOUND" ]\n')
    node.ok("venv: mine\n")
    assert node.env()["VENV"] == "mine/bin"
    node.ok("uv: project\n")
    assert node.env()["VENV"] == "project/.venv/bin"
    (node.records / "python3.argv").unlink()
    assert node.fails("uv: nowhere\n").endswith("submitted-from/nowhere/.venv/bin/activate is not there")


def test_uv_syncs_once_onto_the_local_disk(node):
    node.program(
        "uv", 'mkdir -p "$UV_PROJECT_ENVIRONMENT/bin"; echo "export UV_WAS=1" >"$UV_PROJECT_ENVIRONMENT/bin/activate"'
    )
    node.ok("uv: {project: ., sync: true, extras: [gpu]}\n")
    assert node.argv("uv") == ["sync", "--frozen", "--project", str(node.run / "submitted-from"), "--extra", "gpu"]
    own = f"{node.home}/local/dslaunch-{os.getuid()}-77"
    assert node.env("uv")["UV_PROJECT_ENVIRONMENT"] == f"{own}/uv"
    assert node.env()["UV_WAS"] == "1"
    assert oct(Path(own).stat().st_mode & 0o777) == "0o700"


# --- copies on the local disk ---------------------------------------------------------------------


@pytest.fixture
def packed(node):
    folder = node.home / "packed"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    with tarfile.open(node.base / "data.tar.gz", "w:gz") as archive:
        archive.add(folder / "a.txt", "deep/a.txt")
    with tarfile.open(node.base / "data.tar", "w") as archive:
        archive.add(folder / "a.txt", "deep/a.txt")
    for tool, name, words in (
        ("zstd", "data.tar.zst", ["zstd", "-q", node.base / "data.tar", "-o", node.base / "data.tar.zst"]),
        (
            "mksquashfs",
            "data.squashfs",
            ["mksquashfs", folder, node.base / "data.squashfs", "-quiet", "-no-progress"],
        ),
    ):
        if shutil.which(tool):
            subprocess.run(words, check=True, capture_output=True)
            assert (node.base / name).exists()
    return node


def local_disk(node):
    return node.home / f"local/dslaunch-{os.getuid()}-77"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tool"), [("tar", "tar"), ("tar.gz", "gzip"), ("tar.zst", "zstd"), ("squashfs", "unsquashfs")]
)
def test_an_archive_is_unpacked_on_the_node(packed, name, tool):
    if not shutil.which(tool):
        pytest.skip(f"no {tool}")
    packed.ok(f"stage: [{{source: data.{name}, to: data/set}}]\n")
    inner = "a.txt" if name == "squashfs" else "deep/a.txt"
    assert (local_disk(packed) / "data/set" / inner).read_text() == "a"
    assert packed.env()["DSLAUNCH_LOCAL"] == str(local_disk(packed))


def test_a_directory_and_a_file_and_an_archive_that_stays_one(packed):
    (packed.base / "tree/sub").mkdir(parents=True)
    (packed.base / "tree/sub/x").write_text("x")
    rows = "{source: tree, to: t}, {source: tree/sub/x, to: one}, {source: data.tar, to: data.tar, unpack: false}"
    packed.ok(f"local_disk: {packed.home}/local\nstage: [{rows}]\n", SLURM_TMPDIR="/nowhere")
    own = local_disk(packed)
    assert (own / "t/sub/x").read_text() == (own / "one").read_text() == "x"
    assert tarfile.is_tarfile(own / "data.tar")


def test_a_finished_copy_is_kept_and_a_torn_one_or_an_old_one_is_not(packed):
    text = "stage: [{source: data.tar, to: d}]\n"
    packed.ok(text)
    mine = local_disk(packed) / "d/mine"
    mine.write_text("")
    assert packed.start().returncode == 0
    assert mine.exists()  # a restart in the same allocation copies nothing
    (local_disk(packed) / "d.staged").write_text("unfinished\n")
    assert packed.start().returncode == 0
    assert not mine.exists()
    mine.write_text("")
    os.utime(packed.base / "data.tar", (1, 1))
    assert packed.start().returncode == 0
    assert not mine.exists()


@pytest.mark.slow
def test_eight_tasks_of_a_node_copy_once(packed):
    packed.write("stage: [{source: data.tar, to: d}]\n")
    packed.program("tar", 'echo >>"$0.count"; sleep 0.3; exec /usr/bin/tar "$@"')
    env = {"PATH": f"{packed.bin}:/usr/bin:/bin", "SLURM_TMPDIR": str(packed.home / "local"), **SCHEDULER}
    tasks = [subprocess.Popen(["bash", packed.run / "node.sh"], env=env) for _ in range(8)]
    assert [task.wait(timeout=60) for task in tasks] == [0] * 8
    assert (packed.bin / "tar.count").read_text() == "\n"


@pytest.mark.slow
def test_what_cannot_be_copied_is_said(packed):
    (packed.base / "bad.tar").write_text("no archive")
    assert "there is no" in packed.fails("stage: [{source: nowhere, to: d}]\n")
    assert "cannot unpack" in packed.fails("stage: [{source: bad.tar, to: d}]\n")
    taken = packed.home / "taken"
    taken.mkdir()
    assert "is there already" in packed.fails(f"stage: [{{source: data.tar, to: {taken}}}]\n")
    packed.program("df", "echo Avail; echo 3")
    assert "has 3B left" in packed.fails("stage: [{source: data.tar.gz, to: fresh}]\n")


@pytest.fixture
def shared(packed):
    """A /scratch that all can write to."""
    folder = packed.home / "scratch"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


NOBODY = 65534
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to somebody else")


@pytest.mark.slow
@only_root
@pytest.mark.parametrize("kind", ["copy", "lock", "mark"])
def test_what_somebody_else_put_where_a_copy_goes_is_not_trusted(packed, shared, kind):
    text = f"stage: [{{source: data.tar, to: {shared}/data}}]\n"
    packed.ok(text)
    their = {"copy": "data", "lock": "data.lock", "mark": "data.staged"}[kind]
    os.chown(shared / their, NOBODY, NOBODY)
    before = (shared / "data.staged").read_text()
    assert f"{shared}/{their} is there already, and is a link or somebody else's" in packed.fails_again()
    assert (shared / "data.staged").read_text() == before


@pytest.mark.parametrize("name", ["data", "data.lock", "data.staged"])
def test_a_link_where_a_copy_goes_is_not_followed(packed, shared, name):
    precious = packed.home / "precious"
    precious.write_text("kept")
    (shared / name).symlink_to(precious)
    assert "is a link" in packed.fails(f"stage: [{{source: data.tar, to: {shared}/data}}]\n")
    assert precious.read_text() == "kept"


def test_a_second_start_finds_its_own_copy_and_the_lock_s_content_stays(packed, shared):
    (shared / "data.lock").write_text("mine")
    packed.ok(f"stage: [{{source: data.tar, to: {shared}/data}}]\n")
    (shared / "data/mine").write_text("")
    assert packed.start().returncode == 0
    assert (shared / "data/mine").exists()
    assert (shared / "data.lock").read_text() == "mine"


def test_a_directory_that_all_can_rename_things_in_is_refused(packed, shared):
    shared.chmod(0o777)
    assert "not sticky" in packed.fails(f"stage: [{{source: data.tar, to: {shared}/data}}]\n")
    assert "not sticky" in packed.fails(f"local_disk: {shared}\nstage: [{{source: data.tar, to: d}}]\n")


def test_the_local_directory_is_no_link_and_nobody_else_s(packed, shared):
    text = f"local_disk: {shared}\nstage: [{{source: data.tar, to: d}}]\n"
    own = shared / f"dslaunch-{os.getuid()}-77"
    (packed.home / "mine").mkdir()
    own.symlink_to(packed.home / "mine")
    assert "is not yours to write" in packed.fails(text)
    assert list((packed.home / "mine").iterdir()) == []
    own.unlink()
    own.mkdir(mode=0o777)
    own.chmod(0o777)
    packed.ok(text)
    assert own.stat().st_mode & 0o777 == 0o700
    if os.geteuid() == 0:
        os.chown(own, NOBODY, NOBODY)
        assert "is not yours to write" in packed.fails_again()


@pytest.mark.slow
def test_a_virtual_environment_works_where_it_was_copied_to(node):
    made = node.home / "made"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", made], check=True)
    (made / "bin/tool").write_text(f"#!{made}/bin/python\nimport sys; print(sys.prefix)\n")
    (made / "bin/tool").chmod(0o755)
    with tarfile.open(node.base / "env.tar.gz", "w:gz") as archive:
        archive.add(made, "made")
    shutil.rmtree(made)
    setup = ['tool >"$logs/said"', f"PATH={node.bin}:$PATH"]
    node.ok(f"stage: [{{source: env.tar.gz, to: env, activate: venv}}]\nsetup: {json.dumps(setup)}\n")
    own = str(local_disk(node) / "env")
    assert (node.run / "logs/said").read_text().strip() == own
    assert node.env().get("VIRTUAL_ENV", own) == own
    shutil.rmtree(local_disk(node))
    with tarfile.open(node.base / "env.tar.gz", "w:gz") as archive:
        archive.add(node.home / "local", "bin")
    (node.records / "python3.argv").unlink(missing_ok=True)
    assert "no virtual environment" in node.fails("stage: [{source: env.tar.gz, to: env, activate: venv}]\n")


def test_what_conda_pack_packed_is_unpacked_and_activated(node):
    folder = node.home / "packed/bin"
    folder.mkdir(parents=True)
    (folder / "activate").write_text('export CONDA_PREFIX=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)\n')
    (folder / "conda-unpack").write_text('import pathlib; pathlib.Path(__file__).with_name("unpacked").touch()\n')
    (folder / "python").write_text(
        f'#!/bin/bash\ncase $1 in -c) dirname "$(dirname "$0")" ;; *) exec {sys.executable} "$@" ;; esac\n'
    )
    (folder / "python").chmod(0o755)
    with tarfile.open(node.base / "env.tar.gz", "w:gz") as archive:
        archive.add(folder, "bin")
    node.ok("stage: [{source: env.tar.gz, to: env, activate: conda}]\n")
    assert node.env()["CONDA_PREFIX"] == str(local_disk(node) / "env")
    assert (local_disk(node) / "env/bin/unpacked").exists()


# --- containers -----------------------------------------------------------------------------------


def srun(text: str) -> list[str]:
    return software.srun_words(spec.load(BASE + text, name="job.yaml").spec)


def test_pyxis_has_a_word_for_each_field():
    words = srun(
        "container: {image: nvcr.io/nvidia/pytorch:24.10-py3, mounts: ['/data:/data:ro,rbind', /lustre], "
        "workdir: /w, host_env: [A, B], writable: true, remap_root: false, mount_home: true, entrypoint: false, "
        "name: keep, args: [--container-save=/x.sqsh]}\n"
    )
    assert words[0] == "--container-image='nvcr.io#nvidia/pytorch:24.10-py3'"
    origin = '$(readlink -f -- "$run/submitted-from")'
    assert words[1] == (
        f'--container-mounts="$run:$run,{origin}:{origin},/data:/data:ro+rbind,/lustre:/lustre,'
        '$(mkdir -p -- /ck/demo && echo /ck/demo):/ck/demo"'
    )
    assert words[2:] == [
        "--container-workdir=/w", "--container-env=A,B", "--container-name=keep", "--no-container-remap-root",
        "--container-mount-home", "--no-container-entrypoint", "--container-writable", "--container-save=/x.sqsh",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("ubuntu", "ubuntu"),
        ("org/image:1", "org/image:1"),
        ("localhost:5000/a", "localhost:5000#a"),
        ("nvcr.io#nvidia/a", "nvcr.io#nvidia/a"),
        ("docker://nvcr.io#nvidia/a", "docker://nvcr.io#nvidia/a"),
        ("/shared/a.sqsh", "/shared/a.sqsh"),
        ("images/a.sqsh", '"$run/submitted-from"/images/a.sqsh'),
    ],
)
def test_an_image_as_pyxis_reads_it(image, said):
    assert (
        srun(f"container: {{image: '{image}', runtime: pyxis}}\n")[0].replace("'", "") == f"--container-image={said}"
    )


@pytest.mark.parametrize(
    ("image", "pulled"),
    [
        ("a", True),
        ("org/image:1", True),
        ("localhost:5000/a_b/c--d:V1.2_x", True),
        ("Registry.Example/a/b", True),
        ("123456789012.dkr.ecr.us-east-1.amazonaws.com/llama:2.8-efa", True),
        (f"ghcr.io/a/b:1@sha256:{'0a' * 32}", True),
        ("Org/Image:1", False),
        ("ghcr.io/org/My-Image", False),
        ("a:1:2", False),
        ("a/b@sha256:12", False),
        ("a//b", False),
        ("a/b/", False),
        ("a:", False),
        ("a___b", False),
        (f"a:{'1' * 129}", False),
        ("docker://a/b", False),
        ("nvcr.io#nvidia/a", False),
        ("images/a.sqsh", False),
    ],
)
def test_an_image_that_no_kubelet_would_pull_is_refused(image, pulled):
    """InvalidImageName would come once the pod is on a node, and stay."""
    job = spec.load(f"{BASE}container: '{image}'\n", name="job.yaml").spec
    found = [problem for problem in software.problems(job, "kubernetes") if problem.at[0] == "container"]
    assert [problem.message for problem in found] == (
        [] if pulled else [f"pods pull images from a registry, and {image} is none"]
    )
    assert not [problem for problem in software.problems(job, "slurm") if "pods" in problem.message]


def test_checkpoints_below_a_mount_are_found_on_the_host():
    job = spec.load(
        BASE.replace("/ck/demo", "/data/ck") + "container: {image: a, mounts: ['/lustre/me:/data']}\n", name="j"
    ).spec
    assert not [word for word in software.srun_words(job) if "mkdir" in word]
    assert bundle.checkpoints(plan.make(job)) == "/lustre/me/ck"


def test_edf_is_an_option_of_srun():
    assert srun("container: {environment: ngc, writable: true}\n") == ["--environment=ngc", "--container-writable"]
    assert srun("container: {environment: env/a.toml}\n") == ['--environment="$run/submitted-from"/env/a.toml']


ENTER = 'while [ "$1" != bash ]; do shift; done; exec "$@"'


def test_apptainer_runs_node_sh_inside_with_what_the_scheduler_said(node, modules):
    node.program("apptainer", ENTER)
    (node.base / "image.sif").write_text("")
    text = (
        "modules: [cuda/12.4]\nresources: {gpus_per_node: 8, gpu: MI250X, fabric: slingshot, nodes: 2}\n"
        "preflight: {run: false}\n"
        "container: {image: image.sif, mounts: ['/s:/d:ro', 'data:/e'], clean_env: true, writable: true, "
        "mount_home: false, host_env: [EXTRA], args: [--fakeroot]}\n"
    )
    ck = node.home / "ck"
    node.write(text.replace("/ck/demo", str(ck)))
    assert 'exec bash "$0/host.sh" bash "$0/node.sh"\'' in (node.run / "job.sbatch").read_text()
    made = spec.load(BASE + text, name="j").spec
    done = node.start(**modules, EXTRA="a,b", OTHER="x")
    assert done.returncode == 0, done.stderr
    run, base = node.run, node.base
    assert node.argv("apptainer") == [
        "exec", "--rocm", "--bind", f"{run}:{run}", "--bind", f"{base}:{base}", "--bind", "/s:/d:ro",
        "--bind", f"{base}/data:/e", "--bind", "/ck/demo:/ck/demo", "--cleanenv", "--writable-tmpfs", "--no-home",
        "--pwd", str(run), "--fakeroot", f"{run}/submitted-from/image.sif", "bash", f"{run}/node.sh",
    ]  # fmt: skip
    inner = node.env("apptainer")
    assert inner["APPTAINERENV_NODE_RANK"] == "0"
    assert inner["APPTAINERENV_SLURM_JOB_ID"] == "77"
    assert inner["APPTAINERENV_EXTRA"] == "a,b"
    assert "APPTAINERENV_OTHER" not in inner
    assert Path(modules["CALLS"]).read_text().splitlines() == ["purge", "load cuda/12.4"]  # once, outside
    assert software.hosted(made)


def test_apptainer_s_images_by_name_and_its_absence(node):
    job = spec.load(BASE + "container: {image: 'nvcr.io/nvidia/a:1', runtime: singularity}\n", name="j").spec
    assert software.image(job, "$here") == "docker://nvcr.io/nvidia/a:1"
    assert "there is no apptainer: a module may bring it" in node.fails("container: image.sif\n")
    node.program("apptainer", ENTER)
    assert "there is no image" in node.fails("container: image.sif\n")


def test_an_image_that_was_copied_to_the_node_runs_from_there(node):
    node.program("apptainer", ENTER)
    (node.base / "image.sif").write_text("sif")
    node.ok("stage: [{source: image.sif, to: image.sif}]\ncontainer: image.sif\n")
    own = local_disk(node)
    assert f"{own}/image.sif" in node.argv("apptainer")
    assert f"{own}:{own}" in node.argv("apptainer")
    assert (own / "image.sif").read_text() == "sif"


def test_shifter(node):
    node.program("shifter", ENTER)
    node.ok(
        "container: {image: 'docker:nersc/pytorch:24.06.01', runtime: shifter, modules: [gpu, nccl-plugin], "
        "mounts: ['/pscratch/a:/data:ro']}\n"
    )
    assert node.argv("shifter") == [
        "--image=docker:nersc/pytorch:24.06.01", "--module=gpu,nccl-plugin", "--volume=/pscratch/a:/data:ro",
        "bash", f"{node.run}/node.sh",
    ]  # fmt: skip


# --- trackers -------------------------------------------------------------------------------------


def test_trackers_are_told_where_and_the_group_is_the_run(node):
    node.ok(
        "tracking:\n  wandb: {project: p q, entity: e, mode: offline, dir: wandb-files}\n"
        "  mlflow: {uri: 'http://m:5000', experiment: x}\n  comet: {project: c, workspace: w}\n  tensorboard: tb\n"
    )
    env, origin = node.env(), str(node.run / "submitted-from")
    assert {name: value for name, value in env.items() if name.split("_")[0] in ("WANDB", "MLFLOW", "COMET")} == {
        "WANDB_PROJECT": "p q", "WANDB_ENTITY": "e", "WANDB_RUN_GROUP": "run", "WANDB_MODE": "offline",
        "WANDB_DIR": f"{origin}/wandb-files", "MLFLOW_TRACKING_URI": "http://m:5000", "MLFLOW_EXPERIMENT_NAME": "x",
        "COMET_PROJECT_NAME": "c", "COMET_WORKSPACE": "w",
    }  # fmt: skip
    assert env["TENSORBOARD_LOGDIR"] == f"{origin}/tb"
    assert (node.base / "wandb-files").is_dir()


def test_a_tracker_s_key_is_a_secret_like_any_other(node):
    text = "tracking: {wandb: {project: p, key: {from_env: MINE, secret: keys, key: wandb}}}\n"
    job = spec.load(BASE + text, name="j").spec
    assert bundle.secret_values(job, {"MINE": "abc"}, node.base) == {"WANDB_API_KEY": "abc"}
    with pytest.raises(UserError) as caught:
        bundle.secret_values(job, {}, node.base)
    assert caught.value.problems[0].at == ("tracking", "wandb", "key")
    node.write(text)
    bundle.write_private(node.run / "secrets/WANDB_API_KEY", "abc")
    assert node.start().returncode == 0
    assert node.env()["WANDB_API_KEY"] == "abc"
    assert "abc" not in "".join(p.read_text() for p in node.run.glob("*.s*"))
    pods = kubernetes.render(plan.make(spec.load(BASE + text + "container: a/b:1\n", name="j").spec)).files[0].text
    assert "name: WANDB_API_KEY" in pods


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "text", "at"),
    [
        (script, "modules: [a]\ncontainer: a\n", "modules"),
        (script, "container: {mounts: [/a]}\n", "container"),
        (script, "container: {image: a, clean_env: true}\n", "container.clean_env"),
        (script, "container: {image: a.sif, remap_root: true}\n", "container.remap_root"),
        (script, "container: {image: a, runtime: shifter, writable: true}\n", "container.writable"),
        (script, "container: {image: a, environment: e}\n", "container.image"),
        (script, "container: {image: a, runtime: edf}\n", "container"),
        (script, "container: a\nstage: [{source: a, to: b}]\n", "stage"),
        (script, "venv: a\nstage: [{source: a, to: b, activate: venv}]\n", "venv"),
        (script, "code: git\ntrain: {workdir: /abs}\n", "train.workdir"),
        (script, "code: git\ntrain: {script: /abs/train.py}\n", "train.script"),
        (kubernetes, "container: {image: a, remap_root: true}\n", "container.remap_root"),
        (kubernetes, "container: {environment: ngc}\n", "container"),
        (kubernetes, "container: a.sif\n", "container"),
        (kubernetes, "container: a\nuv: project\n", "uv"),
        (kubernetes, "container: a\nconda: {env: a, root: b}\n", "conda.root"),
        (kubernetes, "container: a\nstage: [{source: a, to: b}]\n", "stage.0.source"),
        (kubernetes, "container: a\ncode: git\n", "code"),
        (local, "stage: [{source: a, to: b, activate: venv}, {source: a, to: c, activate: venv}]\n", "stage"),
    ],
)
def test_what_a_backend_cannot_do_is_refused_at_its_line(backend, text, at):
    base = "name: demo\nmodel: gpt-demo\n" + ("train: {script: t.py}\n" if "train:" not in text else "")
    made = plan.make(spec.load(base + text, name="j").spec)
    with pytest.raises(UserError) as caught:
        backend.render(made)
    assert at in [".".join(map(str, problem.at)) for problem in caught.value.problems], caught.value.problems


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "modules: {use: [/a], swap: {a: b}, load: [c]}\nconda: {env: a, tool: mamba}\n",
        "stage: [{source: a.tar, to: b, activate: conda}]\nuv: null\n",
        "uv: {sync: true}\ncode: git\n",
        "modules: [a]\nstage: [{source: a, to: b}]\ncontainer: {image: a.sif, clean_env: true, host_env: [A]}\n",
        "container: {image: a, runtime: shifter, mounts: [/a]}\n",
        "container: {environment: a.toml}\ntracking: {wandb: {project: a}, tensorboard: tb}\n",
        "source: [a b, {env: HOME}]\nmkdir: [a, {job: id}, {node: HOME}]\nenv: {PATH: {node: PATH, prepend: 'a:'}}\n",
    ],
)
def test_every_script_is_clean(tmp_path, text):
    made = plan.make(spec.load(BASE + text, name="j", environ={"HOME": "/h"}).spec)
    paths = []
    for file in script.render(made).files:
        if file.path.endswith((".sh", ".sbatch")):
            paths.append(tmp_path / Path(file.path).name)
            paths[-1].write_text(file.text)
    done = subprocess.run(["shellcheck", "--severity=style", *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
