"""Services: what is refused, where they run, when they are ready, and what is decided when one ends."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import launcher
from launcher import plan, spec
from launcher.backends import kubernetes, local, slurm
from launcher.errors import UserError

SHELLCHECK = Path(sys.executable).parent / "shellcheck"
NODE = Path(launcher.__file__).parent / "node"
sys.path.insert(0, str(NODE))
import recover  # noqa: E402
import services  # noqa: E402

JOB = {
    "name": "rl",
    "model": {"layers": 2, "hidden": 64, "heads": 2, "vocab": 256},
    "train": {"command": ["python3", "train.py"]},
    "resources": {"nodes": 2},
}
GPUS = {"nodes": 2, "gpus_per_node": 8, "gpu": "h100-80gb", "fabric": "infiniband", "cpus_per_node": 96}


def made(*rows: dict, **more: object) -> plan.Plan:
    text = json.dumps({**JOB, "services": rows, **more})
    return plan.make(spec.load(text, name="job.yaml").spec)


def service(name: str = "reward", **more: object) -> dict:
    return {"name": name, "command": ["python3", "serve.py"], **more}


def step(text: str) -> str:
    """The srun of a service, on one line."""
    return text[text.index("exec srun") :].replace("\\\n  ", "")


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([service(), service()], "two services are called reward"),
        ([service(after=["judge"])], "after names no other service: judge"),
        ([service("a", after=["b"]), service("b", after=["a"])], "a after b after a: none of them would start"),
        ([service(on="first", nodes=2)], "nodes 2 are of its own"),
        ([service(on="all", component={"partition": "cpu"})], "a component has nodes of its own"),
        ([service(on="first", memory="4G")], "it shares their memory"),
        ([service(command=[])], "nothing would run"),
        ([service(env={"RANK": "1"})], "RANK cannot be set"),
        ([service(env={"HF_TOKEN": "x"})], "HF_TOKEN looks like a secret"),
        ([service(command=["serve", "--key=hf_" + "a" * 24])], "this looks like a secret"),
        ([service(cpus_per_node=7, tasks_per_node=2)], "cannot be shared evenly by 2 tasks"),
        ([service(gpus_per_node=4)], "gpus_per_node of the service is more than resources.gpus_per_node"),
        ([service("a", port=80), service("b", port=80, on="first")], "port 80 is a's too"),
    ],
)
def test_services_that_cannot_stand_together_are_refused(rows, says):
    with pytest.raises(UserError) as caught:
        made(*rows)
    assert says in str(caught.value)
    assert "job.yaml:1:" in str(caught.value)


def test_memory_beyond_what_every_node_has_needs_a_component():
    resources = {"nodes": 2, "memory": "64G"}
    made(service(memory="65536M"), resources=resources)
    with pytest.raises(UserError, match=r"more than resources\.memory"):
        made(service(memory="65G"), resources=resources)


@pytest.mark.parametrize("backend", [local, kubernetes])
def test_other_backends_refuse_services(backend):
    with pytest.raises(UserError, match="services"):
        backend.render(made(service(), **({"container": "a/b:1"} if backend is kubernetes else {})))


def test_the_allocation_has_nodes_for_training_spares_and_services():
    bundle = slurm.render(made(service(nodes=3), service("log", on="first"), resources={"nodes": 2, "spares": 1}))
    script = bundle.text("job.sbatch")
    assert "#SBATCH --nodes=6\n" in script
    assert 'behind=("${hosts[@]:3:3}")' in script
    assert 'hosts=("${hosts[@]:0:3}")' in script  # what the preflight looks at


def test_a_job_without_services_has_nothing_of_them():
    bundle = slurm.render(made())
    assert "serve" not in bundle.text("job.sbatch")
    assert not [file.path for file in bundle.files if "service" in file.path]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "has", "without"),
    [
        ({}, ["--nodes=1", "--gres=gpu:8", "--cpus-per-task=96"], ["--overlap"]),
        ({"tasks_per_node": 4}, ["--ntasks=4", "--cpus-per-task=24"], []),
        ({"on": "first"}, [], ["--cpus-per-task"]),
        ({"component": {"partition": "l40"}}, [], ["--cpus-per-task"]),
        ({"gpus_per_node": 0}, ["--gres=none"], ["--overlap"]),
        ({"on": "first"}, ["--nodes=1", "--overlap", "--mem=0", "--gres=none"], []),
        ({"on": "all", "gpus_per_node": 8}, ["--nodes=2", "--overlap", "--gres=gpu:8"], ["--gres=none"]),
        (
            {"nodes": 2, "tasks_per_node": 4, "cpus_per_node": 32},
            ["--ntasks=8", "--cpus-per-task=8", "reward-$SLURM_PROCID.log"],
            [],
        ),
    ],
)
def test_a_step_asks_for_what_is_its_own(row, has, without):
    words = step(slurm.render(made(service(**row), resources=GPUS)).text("services/reward.srun"))
    assert [one for one in has if one not in words] == []
    assert [one for one in without if one in words] == []


def test_a_service_with_its_own_image_has_nothing_of_the_jobs_software():
    more = {"venv": "/opt/train", "setup": ["ulimit -c 0"]}
    theirs = made(service(container="vllm/vllm-openai:v0.9"), service("plain"), **more)
    bundle = slurm.render(theirs)
    assert "--container-image=vllm/vllm-openai:v0.9" in bundle.text("services/reward.srun")
    assert "/opt/train" not in bundle.text("service-reward.sh")
    assert "ulimit" not in bundle.text("service-reward.sh")
    assert "/opt/train" in bundle.text("service-plain.sh")
    assert "ulimit" in bundle.text("service-plain.sh")
    assert "container" not in step(bundle.text("services/plain.srun"))


def test_a_service_sees_its_variables_and_arguments_byte_for_byte(tmp_path):
    nasty = "a,b 'c' \"d\" $(id) `id`\n%j \\ ;=&"
    program = "import os, sys; open('seen', 'w').write(os.environ['NASTY'] + '|' + sys.argv[1])"
    row = service(command=["python3", "-c", program, nasty], env={"NASTY": nasty})
    (tmp_path / "service-reward.sh").write_text(slurm.render(made(row)).text("service-reward.sh"))
    (tmp_path / "submitted-from").mkdir()
    (tmp_path / "services").mkdir()
    subprocess.run(["bash", str(tmp_path / "service-reward.sh")], check=True)
    assert (tmp_path / "submitted-from" / "seen").read_text() == f"{nasty}|{nasty}"


def test_scripts_of_services_pass_bash_and_shellcheck(tmp_path):
    bundle = slurm.render(made(service(nodes=2, tasks_per_node=2), service("log", on="all", component=None)))
    for name in ("job.sbatch", "services/reward.srun", "service-reward.sh"):
        path = tmp_path / Path(name).name
        path.write_text(bundle.text(name))
        subprocess.run(["bash", "-n", str(path)], check=True)
        subprocess.run([SHELLCHECK, str(path)], check=True)


# --- on the batch host ------------------------------------------------------------------------------


def rows(*named: dict) -> list[dict]:
    return [{"on": "own", "nodes": 1, "port": None, "after": [], **row} for row in named]


def test_nodes_are_dealt_out_in_order_and_ports_are_never_the_same():
    asked = rows({"name": "a", "nodes": 2}, {"name": "b"}, {"name": "c", "on": "all"}, {"name": "d", "group": 1})
    found = services.places(asked, train=["n1", "n2"], behind=["n3", "n4", "n5"], seed="7:0", groups={1: ["x1"]})
    assert [place.hosts for place in found] == [["n3", "n4"], ["n5"], ["n1", "n2"], ["x1"]]
    assert len({place.port for place in found}) == 4
    again = services.places(asked, train=["n1", "n2"], behind=["n3", "n4", "n5"], seed="7:1", groups={1: ["x1"]})
    assert {place.port for place in again}.isdisjoint({place.port for place in found})


def test_all_see_each_other_by_the_fast_network():
    placed = [services.Place("ray-head", ["n3", "n4"], 6379)]
    assert services.environment(placed, train=["n1", "n2"], suffix="i") == {
        "DSLAUNCH_TRAIN_HOSTS": "n1i,n2i",
        "DSLAUNCH_HOST_RAY_HEAD": "n3i",
        "DSLAUNCH_HOSTS_RAY_HEAD": "n3i,n4i",
        "DSLAUNCH_PORT_RAY_HEAD": "6379",
    }


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 503)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def one(folder: Path, ready: dict, *, port: int = 1, hosts: tuple[str, ...] = ("127.0.0.1",)) -> services.Service:
    (folder / "services").mkdir(exist_ok=True)
    (folder / "logs").mkdir(exist_ok=True)
    (folder / "services" / "reward.step").write_text("7.0\n")
    row = {"name": "reward", "on": "own", "workdir": ".", "ready": ready}
    return services.Service(row, services.Place("reward", list(hosts), port), str(folder), "")


@pytest.mark.slow
def test_a_service_is_ready_when_everything_that_is_asked_holds(tmp_path, server):
    port = server.server_address[1]
    found = one(tmp_path, {"port": True, "http": "/health", "log": "up", "file": "there"}, port=port)
    assert not found.answers()
    assert found.missing == "its output does not say `up`"
    (tmp_path / "logs" / "service-reward.log").write_text("it is up\n")
    assert not found.answers()
    assert found.missing == "there is not there"
    (tmp_path / "there").touch()
    assert found.answers()


@pytest.mark.slow
def test_what_is_missing_is_said(tmp_path, server):
    port = server.server_address[1]
    loading = one(tmp_path, {"http": "/other"}, port=port)
    assert not loading.answers()
    assert loading.missing == f"http://127.0.0.1:{port}/other: answers 503"
    closed = one(tmp_path, {"port": 1})
    assert not closed.answers()
    assert closed.missing == "nothing listens on 127.0.0.1:1"
    begun = one(tmp_path, {})
    assert begun.answers()
    (tmp_path / "services" / "reward.step").unlink()
    assert not begun.answers()
    assert begun.missing == "no task of it has started"


def test_with_all_hosts_every_one_has_to_answer(tmp_path, server):
    port, hosts = server.server_address[1], ("127.0.0.1", "127.0.0.2")  # it listens on the first alone
    assert one(tmp_path, {"port": True}, port=port, hosts=hosts).answers()
    assert not one(tmp_path, {"port": True, "hosts": "all"}, port=port, hosts=hosts).answers()


def test_output_is_searched_once_whatever_pieces_it_comes_in(tmp_path, monkeypatch):
    monkeypatch.setattr(services, "PIECE", 7)
    read = []
    real = services.holds
    monkeypatch.setattr(services, "holds", lambda file, text, start: read.append(start) or real(file, text, start))
    found, log = one(tmp_path, {"log": "is ready"}), tmp_path / "logs" / "service-reward.log"
    log.write_text("x" * 1000 + "is re")
    assert not found.answers()
    assert not found.answers()
    log.write_text("x" * 1000 + "is ready")
    assert found.answers()
    assert found.answers()
    assert read == [0, 998, 998, 998]
    log.write_text("begun anew")
    assert not found.answers()
    log.write_text("begun anew, is ready")
    assert found.answers()


def test_what_an_earlier_attempt_wrote_says_nothing(tmp_path):
    found = one(tmp_path, {"log": "up", "file": "there"})
    log = tmp_path / "logs" / "service-reward.log"
    log.write_text("up\n")
    (tmp_path / "there").touch()
    found.sizes, found.started = {str(log): 3}, (tmp_path / "there").stat().st_mtime + 5
    assert not found.answers()
    log.write_text("up\nup\n")
    assert not found.answers()
    assert found.missing == "there is not there"


@pytest.mark.parametrize(("code", "kind"), [(9, "stop"), (69, "stop"), (137, "restart"), (139, "restart")])
def test_how_a_service_ended_is_judged_as_a_ranks_end_is(code, kind):
    dead = {"service": "reward", "code": code, "why": "service reward ended", "hosts": ["n3"]}
    verdict = recover.of_service(recover.Verdict(1, cause="net_connect_refused", node="n1"), dead)
    action = recover.decide([], verdict, recover.Resources(nodes=2, attempts=3, hosts=("n1", "n2")))
    assert (verdict.code, action.kind) == (code, kind)
    assert action.why.startswith("service reward ended")
    assert action.exclude == ()


# --- heterogeneous components -----------------------------------------------------------------------


def test_a_component_asks_for_its_own_nodes():
    row = service(
        nodes=2, gpus_per_node=4, cpus_per_node=8, memory="16G", component={"partition": "l40", "gpu_type": "l40s"}
    )
    bundle = slurm.render(made(row, service("log"), slurm={"partition": "h100", "account": "me"}, resources=GPUS))
    first, second = bundle.text("job.sbatch").split("#SBATCH hetjob\n")
    assert "#SBATCH --nodes=3\n" in first  # two that train, and log's own
    lines = [line.removeprefix("#SBATCH ") for line in second.split("\n") if line.startswith("#SBATCH")]
    assert lines == [
        "--account=me", "--cpus-per-task=8", "--gpus-per-node=l40s:4", "--mem=16G", "--nodes=2",
        "--ntasks-per-node=1", "--partition=l40", "--time=1:00:00",
    ]  # fmt: skip
    assert "--het-group=1" in step(bundle.text("services/reward.srun"))
    assert "--het-group=0" in step(bundle.text("services/log.srun"))
    assert "--het-group=0" in second
    told = json.loads(bundle.text("services/services.json"))
    assert [one["group"] for one in told["services"]] == [1, 0]


def test_components_have_names_of_their_own_or_they_would_wait_for_each_other(tmp_path):
    from launcher.run import Result

    seen = []

    def run(argv, **_):
        seen.append(argv)
        return Result(0, "7\n", "")

    folder = tmp_path / "rl-20260101-000000-00000000"
    folder.mkdir()
    (folder / "submitted-from").symlink_to(tmp_path)
    slurm.submit(folder, made(service(component={"partition": "cpu"})).spec, run)
    (argv,) = seen
    assert argv[-3:] == [":", f"--job-name={folder.name}.1", str(folder / "job.sbatch")]
    assert "--dependency=singleton" in argv
