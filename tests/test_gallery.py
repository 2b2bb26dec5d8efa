"""slurm/, manifests/ and hostfiles/ are what a reader sees first: every byte of them is what dslaunch renders.

`pytest --bless` is the only way to write them; then read the diff as if somebody else had sent it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import k8s_schema
import pytest
from click.testing import CliRunner

from launcher import bundle as bundles
from launcher import cli, yamldoc
from launcher.backends import kubernetes, local, slurm
from launcher.backends.slurm import array
from launcher.plan import Plan
from launcher.spec import Document
from launcher.sweep import Chosen

ROOT = Path(__file__).parents[1]
SLURM = sorted((ROOT / "slurm").glob("*/job.yaml"))
MANIFESTS = sorted((ROOT / "manifests").glob("*/job.yaml"))
HOSTFILES = sorted((ROOT / "hostfiles").iterdir())
KINDS = {"slurm": "slurm", "manifests": "kubernetes"}
SHELLCHECK = Path(sys.executable).parent / "shellcheck"


def name(path: Path) -> str:
    return f"{path.parts[-3]}/{path.parts[-2]}"


def site(path: Path) -> str | None:
    """The site file that lies beside a job file which goes to several clusters."""
    beside = path.with_name("site.yaml")
    return str(beside) if beside.is_file() else None


def rendered(path: Path) -> dict[Path, str]:
    """Every file beside a job file, and its hostfile. What travels are copies of launcher/ and is not repeated."""
    if points := cli.swept(str(path), site(path), (), suffixed=path.parts[-3] == "manifests"):
        return swept(path, points)
    document, plan = cli.load(str(path), site(path), ())
    backend = slurm if path.parts[-3] == "slurm" else kubernetes
    bundle = cli.render(backend, document, plan)
    files = {path.parent / file.path: file.text for file in bundle.files if not file.path.startswith("node/")}
    if backend is kubernetes:
        files[path.parent / kubernetes.ENTRY] = without_copies(files[path.parent / kubernetes.ENTRY])
    if backend is slurm and plan.reference_trainer and not plan.spec.resources.gpus_per_node:
        files[path.parent / local.ENTRY] = local.render(plan).text(local.ENTRY)
    if plan.spec.slurm.nodelist or (plan.spec.box and backend is kubernetes):
        more = [] if site(path) is None else ["--site", site(path)]
        hosts = CliRunner().invoke(cli.cli, ["hostfile", str(path), *more])
        assert hosts.exit_code == 0, hosts.output
        files[ROOT / "hostfiles" / f"{path.parts[-2]}.{KINDS[path.parts[-3]]}"] = hosts.stdout
    return files


def swept(path: Path, points: list[Chosen]) -> dict[Path, str]:
    """The array's script, and what its first point has: the others differ in the values swept. On Kubernetes all."""
    if path.parts[-3] == "manifests":
        texts = [
            without_copies(cli.render(kubernetes, one.document, one.plan).text(kubernetes.ENTRY)) for one in points
        ]
        return {path.parent / kubernetes.ENTRY: LEFT_OUT + "".join(t.removeprefix(LEFT_OUT) for t in texts)}
    sweep = cli.read(str(path), None, ()).spec.sweep
    bundle = array.render([point.plan for point in points], parallel=sweep and sweep.parallel)
    shown = [
        file
        for file in bundle.files
        if file.path.startswith("points/0/") or file.path.endswith("/job.json") or "/" not in file.path
    ]
    return {path.parent / file.path: file.text for file in shown}


def jobs(path: Path) -> list[tuple[Document, Plan]]:
    """Each with its plan: one, or the points of a sweep."""
    points = cli.swept(str(path), site(path), (), suffixed=True)
    return [(one.document, one.plan) for one in points] or [cli.load(str(path), site(path), ())]


def without_copies(text: str) -> str:
    """Manifests as a reader wants them: modules that travel, and the digest that follows them, are named alone."""
    documents = k8s_schema.documents(text)
    for document in documents:
        document["metadata"].get("annotations", {}).pop(kubernetes.DIGEST, None)
        for content in (document.get("data", {}), document.get("binaryData", {})):
            for key in content:
                if key.startswith("node.") and key != "node.sh":
                    content[key] = ""
    return LEFT_OUT + yamldoc.dump(documents)


LEFT_OUT = "# As `dslaunch k8s` prints it, less the copies of launcher/ in the ConfigMaps and the digest of it all.\n"


@pytest.fixture(autouse=True)
def no_site_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("DSLAUNCH_SITE", raising=False)
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)


@pytest.mark.parametrize("path", [*SLURM, *MANIFESTS], ids=name)
def test_the_gallery_is_what_dslaunch_renders_and_nothing_else(path, request):
    files = rendered(path)
    for file, text in files.items():
        if request.config.getoption("--bless"):
            file.parent.mkdir(exist_ok=True, parents=True)
            file.write_text(text)
        assert file.is_file(), f"{file.relative_to(ROOT)} is missing: pytest --bless"
        assert file.read_text() == text, f"{file.relative_to(ROOT)} is not what dslaunch renders"
    given = {path, path.with_name("site.yaml")}
    found = {file for file in path.parent.rglob("*") if file.is_file()}
    hosts = {file for file in HOSTFILES if (file.stem, file.suffix[1:]) == (path.parts[-2], KINDS[path.parts[-3]])}
    assert (found | hosts) - files.keys() - given == set(), "nothing renders these"


def test_whatever_lies_in_the_gallery_belongs_to_a_job():
    folders = {path.parent for path in (*SLURM, *MANIFESTS)}
    assert {*ROOT.glob("slurm/*"), *ROOT.glob("manifests/*")} == folders
    jobs = {f"{folder.name}.{KINDS[folder.parent.name]}" for folder in folders}
    assert {file.name for file in HOSTFILES} <= jobs


@pytest.mark.slow
@pytest.mark.parametrize("path", SLURM, ids=name)
def test_every_script_passes_bash_and_shellcheck(path):
    for file in path.parent.rglob("*"):
        if file.suffix in (".sh", ".sbatch"):
            assert subprocess.run(["bash", "-n", str(file)], capture_output=True).returncode == 0
            checked = subprocess.run(
                [SHELLCHECK, "--exclude=SC1090,SC1091", str(file)], capture_output=True, text=True
            )
            assert checked.returncode == 0, checked.stdout


@pytest.mark.slow
@pytest.mark.parametrize("path", MANIFESTS, ids=name)
def test_every_manifest_is_one_that_a_strict_api_server_takes(path):
    for document, plan in jobs(path):
        text = cli.render(kubernetes, document, plan).text(kubernetes.ENTRY)
        documents = k8s_schema.documents(text)
        *before, job = [document["kind"] for document in documents]
        assert job == kubernetes.kind(plan.spec)
        assert set(before) <= {"ConfigMap", "PodGroup"}
        assert k8s_schema.problems(documents, trainer=plan.spec.kubernetes.trainer) == []
        # `kubectl apply` keeps what it applied in an annotation, and those end at 262,144 bytes
        assert max(len(json.dumps(document)) for document in documents) < 262_144


def test_node_files_in_a_bundle_are_byte_for_byte_the_package_s_own():
    _, plan = cli.load(str(ROOT / "slurm" / "llama-70b-8x8" / "job.yaml"), None, ())
    for file in slurm.render(plan).files:
        if file.path.startswith(f"{bundles.CODE}/launcher/"):
            assert file.text == (bundles.HERE / file.path.removeprefix(f"{bundles.CODE}/launcher/")).read_text()
        elif file.path.startswith("node/"):
            assert file.text == (bundles.NODE / file.path.removeprefix("node/")).read_text()


def test_one_job_file_goes_to_two_clusters_and_only_the_site_changes():
    ours, theirs = ROOT / "slurm" / BOTH / "job.yaml", ROOT / "manifests" / BOTH / "job.yaml"
    assert ours.read_bytes() == theirs.read_bytes()
    for path, entry in ((ours, slurm.ENTRY), (theirs, kubernetes.ENTRY)):
        shown = CliRunner().invoke(cli.cli, ["render", str(path), "--site", site(path)])
        assert shown.exit_code == 0, shown.output
        text = shown.stdout if entry == slurm.ENTRY else without_copies(shown.stdout)
        assert text == path.with_name(entry).read_text()


BOTH = "mistral-two-sites-4x8"


@pytest.mark.slow
def test_every_hostfile_is_accepted_by_deepspeed_s_own_parser():
    from deepspeed.launcher.runner import fetch_hostfile

    for file in (ROOT / "hostfiles").iterdir():
        hosts = fetch_hostfile(str(file))
        lines = file.read_text().splitlines()
        assert [f"{host} slots={slots}" for host, slots in hosts.items()] == lines


def test_the_seeds_llama_70b_as_it_stands_is_refused():
    document = (ROOT / "slurm" / "llama-70b-8x8" / "job.yaml").read_text()
    wrong = document.replace("type: AdamW", "type: OneBitAdam")
    result = CliRunner().invoke(cli.cli, ["plan", "-"], input=wrong)
    problems = [problem.message for problem in result.exception.problems]
    assert any("does not run with ZeRO stage 3" in problem for problem in problems)
