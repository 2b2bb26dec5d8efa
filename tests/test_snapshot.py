"""What a run takes along of the code, in real trees and real git."""

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import fake_kube
import k8s_schema
import pytest
import yaml
from test_kubernetes import as_kubectl_applies, lay_out

from launcher import plan, snapshot, software, spec
from launcher.backends import kubernetes
from launcher.errors import UserError
from launcher.run import run

JOB = "name: demo\nmodel: gpt-demo\n"


def tree(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def git(folder, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main"]
    return subprocess.run(["git", "-C", folder, *who, *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def project(tmp_path):
    folder = tree(
        tmp_path / "project",
        {
            "train.py": "first",
            "src/model.py": "model",
            "jobs/job.yaml": JOB,
            ".gitignore": "data/\n*.log\n.venv/\n",
            "data/train.bin": "x" * 1000,
            "a.log": "noise",
            ".venv/pyvenv.cfg": "home = /usr/bin\n",
        },
    )
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "all")
    return folder


def take(base, text, **more):
    return snapshot.take(spec.load(JOB + text, name="job.yaml").spec, base, run, **more)


def copied(taken, folder):
    folder.mkdir()
    snapshot.write(taken, folder)
    return folder


def says(base, text, **more):
    with pytest.raises(UserError) as caught:
        take(base, text, **more)
    return [
        f"{problem.message} | {problem.hint} | {'.'.join(map(str, problem.at))}" for problem in caught.value.problems
    ]


def test_nothing_is_taken_unless_it_is_asked_for(project):
    assert take(project, "") is None


def test_git_takes_what_is_tracked_changed_and_new_with_the_commit_and_the_difference(project, tmp_path):
    (project / "train.py").write_text("second")
    (project / "new.py").write_text("new")
    (project / "src/model.py").unlink()
    taken = take(project / "jobs", "train: {workdir: ..}\ncode: git\n")
    assert [entry.path for entry in taken.entries] == [".gitignore", "jobs/job.yaml", "new.py", "train.py"]
    assert taken.commit == git(project, "rev-parse", "HEAD").strip()
    folder = copied(taken, tmp_path / "run")
    assert (folder / "code").resolve() == folder / "snapshot" / "jobs"
    assert (folder / "code/../train.py").resolve().read_text() == "second"
    patch = (folder / "snapshot.patch").read_text()
    assert "+second" in patch
    assert "-first" in patch
    # the difference is what makes the commit the snapshot
    again = tmp_path / "again"
    git(tmp_path, "clone", "-q", project, again)
    git(again, "apply", folder / "snapshot.patch")
    assert (again / "train.py").read_text() == "second"
    assert not (again / "src/model.py").exists()


def test_what_is_ignored_is_linked_so_that_data_and_checkpoints_stay_where_they_are(project, tmp_path):
    taken = take(project, "code: git\n")
    assert taken.linked == (".venv", "a.log", "checkpoints", "data")
    top = copied(taken, tmp_path / "run") / "snapshot"
    assert (top / "data/train.bin").resolve() == project / "data/train.bin"
    (top / "checkpoints/demo").mkdir()
    assert (project / "checkpoints/demo").is_dir()
    modes = {oct(path.lstat().st_mode & 0o777) for path in top.rglob("*") if not path.is_symlink()}
    assert modes <= {"0o700", "0o600"}


def test_a_copy_takes_what_dslaunchignore_leaves(project, tmp_path):
    tree(project, {".dslaunchignore": "*.bin\n!keep.bin\n/src/\n", "keep.bin": "k", "data/other.txt": "o"})
    taken = take(project, "code: copy\n")
    assert [entry.path for entry in taken.entries] == [
        ".dslaunchignore", ".gitignore", "a.log", "data/other.txt", "jobs/job.yaml", "keep.bin", "train.py",
    ]  # fmt: skip
    assert set(taken.linked) == {".venv", "checkpoints", "data/train.bin", "src"}


def test_a_copy_without_dslaunchignore_obeys_every_gitignore_of_the_tree(project):
    tree(project, {"src/.gitignore": "*.so\n", "src/a.so": "", "b.so": ""})
    names = [entry.path for entry in take(project, "code: copy\n").entries]
    assert "src/a.so" not in names
    assert {"b.so", "src/.gitignore", "src/model.py"} <= set(names)
    assert not {"a.log", "data/train.bin"} & set(names)


def test_a_file_of_its_own_can_name_what_is_left_out(project):
    tree(project, {"jobs/leave": "train.py\n"})
    taken = take(project / "jobs", "train: {workdir: ..}\ncode: {take: git, ignore: leave}\n")
    assert "train.py" in taken.linked
    assert says(project, "code: {take: git, ignore: nowhere}\n") == [
        f"there is no {project}/nowhere |  | code.ignore"
    ]


def test_run_directories_are_no_part_of_it(project):
    tree(project, {"dslaunch-runs/demo-1/job.yaml": "x"})
    for how in ("git", "copy"):
        taken = take(project, f"code: {how}\n", avoid=[project / "dslaunch-runs"])
        assert not [entry for entry in taken.entries if entry.path.startswith("dslaunch-runs")]
        assert "dslaunch-runs" not in taken.linked


def test_a_later_edit_is_another_digest_and_a_file_that_changes_meanwhile_is_not_copied(project, tmp_path):
    before = take(project, "code: git\n")
    assert take(project, "code: git\n").digest == before.digest
    (project / "train.py").write_text("other")
    assert take(project, "code: git\n").digest != before.digest
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"train\.py changed while it was copied"):
        snapshot.write(before, tmp_path / "run")


def test_links_stay_inside_or_lead_to_where_they_led(project, tmp_path):
    (project / "inner.py").symlink_to("src/model.py")
    (project / "whole.py").symlink_to(project / "src/model.py")
    (project / "outer").symlink_to(tmp_path / "outside")
    tree(tmp_path, {"outside/x": "x"})
    for how in ("git", "copy"):
        top = copied(take(project, f"code: {how}\n"), tmp_path / how) / "snapshot"
        assert (top / "inner.py").resolve() == (top / "whole.py").resolve() == top / "src/model.py"
        assert (top / "outer/x").resolve() == tmp_path / "outside/x"


def test_too_much_is_refused_with_the_largest_named(project):
    tree(project, {"big/a.bin": "x" * 3_000_000, "big/b.bin": "x" * 2_000_000, "c.bin": "x" * 1000})
    (said,) = says(project, "code: {take: copy, limit: 4M}\n")
    assert said.startswith("the code has 4.8 MiB, and code.limit is 4M: big/a.bin 2.9 MiB, big/b.bin 1.9 MiB, c.bin")
    assert ".dslaunchignore" in said
    assert take(project, "code: {take: copy, limit: 5M}\n").size > 4 << 20


@pytest.mark.parametrize(
    ("name", "text", "at"),
    [
        ("key.pem", "a\n-----BEGIN " + "OPENSSH PRIVATE KEY-----\n", "key.pem:2"),
        (".env", "A=1\nexport MY_API_KEY=abcdefgh1234\n", ".env:2"),
        ("conf/x.py", "t = 'hf_" + "a1" * 15 + "'\n", "conf/x.py:1"),
    ],
)
def test_a_secret_is_refused_by_file_and_line_and_ignoring_it_helps(project, name, text, at):
    tree(project, {name: text})
    for how in ("git", "copy"):
        (said,) = says(project, f"code: {how}\n")
        assert said.startswith(f"{at} looks like a secret")
    tree(project, {".dslaunchignore": name + "\n"})
    assert name.split("/")[0] in " ".join(take(project, "code: git\n").linked)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        ".netrc",
        "a/.git-credentials",
        ".pypirc",
        "id_rsa",
        "x/id_ed25519",
        "id_ecdsa",
        ".aws/credentials",
        "kubeconfig",
    ],
)
def test_credentials_are_refused_by_their_name_and_ignoring_them_helps(project, name):
    tree(project, {name: "machine example.org login me\n"})
    for how in ("git", "copy"):
        (said,) = says(project, f"code: {how}\n")
        assert said.startswith(f"{name} holds credentials by its name")
        assert ".dslaunchignore" in said
    tree(project, {".dslaunchignore": name + "\n"})
    assert name not in [entry.path for entry in take(project, "code: git\n").entries]


def test_the_difference_has_nothing_of_what_is_left_out(project):
    tree(project, {"private/a b.txt": "first\n", "private/gone.txt": "gone\n", "[x].txt": "one\n", "x.txt": "one\n"})
    git(project, "add", ".")
    git(project, "commit", "-m", "more")
    tree(project, {"private/a b.txt": "second\n", "[x].txt": "left\n", "x.txt": "two\n", "train.py": "third"})
    (project / "private/gone.txt").unlink()
    git(project, "mv", "src/model.py", "src/renamed.py")
    tree(project, {".dslaunchignore": "private/\n\\[x].txt\n"})
    patch = take(project, "code: git\n").patch.decode()
    assert "+third" in patch
    assert "+two" in patch
    assert "src/renamed.py" in patch
    assert "private" not in patch
    assert "left" not in patch


def test_a_secret_in_a_line_that_was_removed_is_refused(project):
    tree(
        project,
        {
            "conf.py": "key = 'hf_" + "a1" * 15 + "'\nother = 1\n",
            "id_rsa": "anything\n",
            "c/.env": "A_TOKEN=abcdefgh12\n",
        },
    )
    git(project, "add", ".")
    git(project, "commit", "-m", "oops")
    tree(project, {"conf.py": "other = 2\n", "c/.env": "\n"})
    (project / "id_rsa").unlink()
    said = says(project, "code: git\n")
    assert [line.split(" since")[0] for line in said] == [
        f"what changed in {name}" for name in ("c/.env", "conf.py", "id_rsa")
    ]
    assert all("commit the change" in line for line in said)
    tree(project, {".dslaunchignore": "conf.py\n"})
    assert len(says(project, "code: git\n")) == 2
    git(project, "commit", "-a", "-m", "gone")
    assert take(project, "code: git\n").patch == b""


@pytest.mark.parametrize(
    ("name", "text"), [(".env", "API_KEY=\nA_TOKEN=x\n"), ("a.md", "hf_short and PRIVATE KEY\n")]
)
def test_what_only_looks_a_little_like_one_is_taken(project, name, text):
    tree(project, {name: text})
    assert name in [entry.path for entry in take(project, "code: git\n").entries]


def test_no_git_tree_no_common_tree_and_checkpoints_elsewhere_are_refused(tmp_path, project):
    plain = tree(tmp_path / "plain", {"train.py": ""})
    (said,) = says(plain, "code: git\n")
    assert "is no git tree" in said
    assert said.endswith("| code: copy | code")
    (said,) = says(plain, "train: {workdir: ../project}\ncode: git\n")
    assert f"the job file is in {plain}, and the code in {project}" in said
    (said,) = says(plain, "train: {checkpoint: {dir: ../there}}\ncode: copy\n")
    assert f"checkpoints would go to {tmp_path}/there" in said


def test_an_executable_stays_one(project, tmp_path):
    tree(project, {"run.sh": "#!/bin/sh\necho ran\n"})
    (project / "run.sh").chmod(0o755)
    top = copied(take(project, "code: git\n"), tmp_path / "run") / "snapshot"
    assert subprocess.run([top / "run.sh"], capture_output=True, text=True).stdout == "ran\n"


def test_a_package_installed_from_the_tree_is_imported_from_the_snapshot(project, tmp_path):
    """As `pip install -e` leaves it: a path to the tree, and a note of where it came from."""
    site = tmp_path / "site"
    note = json.dumps({"url": f"file://{project}", "dir_info": {"editable": True}})
    tree(site, {"p-1.dist-info/direct_url.json": note, "p-1.dist-info/METADATA": "Name: p\nVersion: 1\n"})
    taken = take(project, "code: git\n")
    run = copied(taken, tmp_path / "run")
    (project / "src/model.py").write_text("print('edited')")
    script = f'here={run}\n{software.EDITABLE}\npython3 -c "import model; print(model.__file__)"\n'
    (run / "snapshot/src/model.py").write_text("")
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{site}:{project}/src"}
    done = subprocess.run(["bash", "-e", "-c", script], env=environ, capture_output=True, text=True)
    assert done.stdout.strip() == f"{run}/snapshot/src/model.py", done.stderr


# --- where no link leads back to the tree -------------------------------------------------------


def test_elsewhere_nothing_leads_back_and_checkpoints_lead_to_where_the_run_was_submitted(project, tmp_path):
    taken = take(project / "jobs", "code: git\n", elsewhere=True)
    there = tree(tmp_path / "there", {"checkpoints/demo/step-1": ""})
    folder = copied(taken, tmp_path / "run")
    (folder / "submitted-from").symlink_to(there)
    links = [path for path in (folder / "snapshot").rglob("*") if path.is_symlink()]
    assert [path.relative_to(folder / "snapshot").as_posix() for path in links] == ["jobs/checkpoints/demo"]
    assert (links[0] / "step-1").resolve() == there / "checkpoints/demo/step-1"
    assert not (project / "jobs/checkpoints").exists()
    assert any("left out, and not there when the job runs: .venv, a.log, data" in note for note in taken.notes())


def test_elsewhere_a_checkpoint_directory_that_is_a_link_of_the_tree_stays_that_link(project, tmp_path):
    (project / "checkpoints").symlink_to(tmp_path / "scratch")
    taken = take(project, "code: git\n", elsewhere=True)
    assert snapshot.kept(taken) == ""
    assert (copied(taken, tmp_path / "run") / "snapshot/checkpoints").readlink() == tmp_path / "scratch"


def test_a_packed_tree_is_the_same_bytes_whoever_packs_it_and_whenever(project):
    (project / "run.sh").write_text("exit\n")
    (project / "run.sh").chmod(0o755)
    (project / "link").symlink_to("src/model.py")
    before = snapshot.packed(take(project / "jobs", "code: git\n", elsewhere=True))
    for path in (project / "train.py", project / "run.sh"):
        os.utime(path, (1, time.time()))
        path.chmod(path.stat().st_mode & 0o711)
    assert snapshot.packed(take(project / "jobs", "code: git\n", elsewhere=True)) == before
    assert before.job == "jobs"
    with tarfile.open(fileobj=io.BytesIO(before.data)) as archive:
        members = archive.getmembers()
    assert {(member.mtime, member.uid, member.gid, member.uname) for member in members} == {(0, 0, 0, "")}
    assert [(member.name, oct(member.mode)) for member in members if member.isreg()] == [
        (".gitignore", "0o644"), ("jobs/job.yaml", "0o644"), ("run.sh", "0o755"), ("src/model.py", "0o644"),
        ("train.py", "0o644"),
    ]  # fmt: skip
    (project / "train.py").write_text("other")
    assert snapshot.packed(take(project / "jobs", "code: git\n", elsewhere=True)).digest != before.digest


def test_more_than_config_maps_should_hold_is_refused_with_the_largest_named(project):
    (project / "noise.bin").write_bytes(os.urandom(1_300_000))
    tree(project, {"zeros.txt": "0" * 3_000_000})
    with pytest.raises(UserError) as caught:
        snapshot.packed(take(project, "code: git\n", elsewhere=True))
    (problem,) = caught.value.problems
    assert "compressed, and ConfigMaps take 1.0 MiB of it: noise.bin 1.2 MiB, zeros.txt 2.9 KiB" in problem.message
    assert "clone" in problem.hint


POD = """\
name: demo
model: gpt-demo
resources: {nodes: 1, processes_per_node: 1}
container: registry.example/image:1
train: {zero: 0, steps: 10, workdir: .., command: [bash, -c, cat src/model.py; echo; pwd; touch can-write]}
code: git
"""
FLAT = POD.replace("workdir: ..", "workdir: .")


def rendered(base, text=POD):
    loaded = spec.load(text, name="job.yaml").spec
    return kubernetes.render(
        plan.make(loaded), code=snapshot.packed(snapshot.take(loaded, base, run, elsewhere=True))
    )


def environment(tmp_path):
    return {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(tmp_path), "RANK": "0",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "DSLAUNCH_LOGS": str(tmp_path / "logs"),
            "PET_NPROC_PER_NODE": "1", "WORLD_SIZE": "1"}  # fmt: skip


@pytest.mark.slow
def test_a_pod_runs_the_code_as_it_was_in_a_directory_that_it_can_write_to(project, tmp_path):
    tree(project, {"big.txt": "".join(f"{number * 7919 % 1_000_003}\n" for number in range(90_000))})
    text = rendered(project / "jobs").text(kubernetes.ENTRY)
    (project / "src/model.py").write_text("edited")
    found = k8s_schema.documents(text)
    assert k8s_schema.problems(found) == []
    parts = [one["metadata"]["name"] for one in found if "tree" in one["metadata"]["name"]]
    assert parts == ["demo-tree-0", "demo-tree-1"]
    assert max(map(as_kubectl_applies, found)) < 262_144
    command, _ = lay_out(text, tmp_path / "mount")
    done = subprocess.run(
        command, env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    top = tmp_path / "mount-here" / "snapshot"
    assert f"model\n[rank 0] {top}\n" in done.stdout
    assert (top / "can-write").exists()
    assert (top / "big.txt").read_bytes() == (project / "big.txt").read_bytes()
    assert "implausibly" not in done.stderr


@pytest.mark.parametrize("name", ["a b", "$(HOME)", "it's"])
def test_a_pod_begins_at_the_job_files_place_whatever_its_name(project, tmp_path, name):
    tree(project, {f"{name}/job.yaml": POD})
    text = rendered(project / name, FLAT).text(kubernetes.ENTRY)
    command, _ = lay_out(text, tmp_path / "mount")
    command[-1] = command[-1].rpartition("exec bash")[0].replace("$$(", "$(") + "pwd"
    done = subprocess.run(command, env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path}/mount-here/snapshot/{name}\n", done.stderr


def test_the_digest_of_a_job_is_that_of_its_code_too_and_a_preflight_has_the_code(project):
    def digest():
        *_, job = k8s_schema.documents(rendered(project, FLAT).text(kubernetes.ENTRY))
        return job["metadata"]["annotations"][kubernetes.DIGEST]

    before = digest()
    assert digest() == before
    (project / "train.py").write_text("other")
    assert digest() != before
    loaded = spec.load(FLAT, name="job.yaml").spec
    code = snapshot.packed(snapshot.take(loaded, project, run, elsewhere=True))
    bundle = kubernetes.preflight(loaded, None, code=code)
    names = [one["metadata"]["name"] for one in k8s_schema.documents(bundle.text(bundle.entry))]
    assert "demo-preflight-tree-0" in names


@pytest.mark.slow
def test_manifests_are_printed_with_the_code_of_the_job_files_tree(project):
    (project / "jobs/job.yaml").write_text(POD)
    words = [Path(sys.executable).with_name("dslaunch"), "k8s", project / "jobs/job.yaml"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=project.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout == rendered(project / "jobs").text(kubernetes.ENTRY)
    assert "note: code: 4 files" in done.stderr
    (project / "jobs/job.yaml").write_text(
        POD.replace("command: [bash, -c, cat src/model.py; echo; pwd; touch can-write]", "script: a.log")
    )
    done = subprocess.run(words, capture_output=True, text=True, cwd=project.parent)
    assert done.returncode == 2
    assert "a.log is not in the code that is taken: it is ignored, or not there" in done.stderr


def dslaunch(*words, cwd):
    return subprocess.run(
        [Path(sys.executable).with_name("dslaunch"), *words], capture_output=True, text=True, cwd=cwd, timeout=60
    )


@pytest.mark.slow
def test_printed_manifests_are_the_job_file_again_and_an_edit_of_them_its_patch(project, tmp_path):
    found = k8s_schema.documents(rendered(project / "jobs").text(kubernetes.ENTRY))
    assert kubernetes.tree(found).job == "jobs"
    found[-1]["metadata"]["annotations"]["note"] = "written since"
    (tmp_path / "m.yaml").write_text(yaml.safe_dump_all(found))
    done = dslaunch("import", "m.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "code: git\n" in done.stdout
    assert "written since" in done.stdout
    assert "left out: the code that the manifests carry" in done.stderr


@pytest.mark.slow
def test_pods_of_a_cluster_get_the_code_as_it_was_and_an_edit_is_another_job(project, tmp_path, monkeypatch):
    (project / "jobs/job.yaml").write_text(POD)
    words = ["k8s", "jobs/job.yaml", "--runs", str(tmp_path / "runs"), "--apply"]
    with fake_kube.serving(tmp_path, monkeypatch) as api:
        first = dslaunch(*words, cwd=project)
        assert first.returncode == 0, first.stderr
        held = [value for value in api.objects.values() if "snapshot.tar.gz.0" in value.get("binaryData", {})]
        (run_of_it,) = (tmp_path / "runs").glob("demo-*")
        assert not (run_of_it / "snapshot").exists()
        assert kubernetes.tree([{"kind": "ConfigMap", **held[0]}]).job == "jobs"
        assert dslaunch(*words, cwd=project).stdout == first.stdout  # the same code is the same run
        (project / "src/model.py").write_text("other")
        other = dslaunch(*words, cwd=project)
    assert other.returncode == 2, other.stdout
    assert "demo" in other.stderr
