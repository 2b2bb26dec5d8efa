"""On a real Slurm of four nodes: a server beside the training, in one allocation or as a component, and sweeps."""

from __future__ import annotations

import json
import time

from test_slurm import TINY, job, site  # noqa: F401 - a fixture

# A tiny inference server: it loads, answers /health, and says where it runs.
SERVER = """
import http.server, os, sys, time
print("loading", flush=True)
time.sleep(0.5)
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(("%s for %s" % (os.uname().nodename, os.environ["DSLAUNCH_TRAIN_HOSTS"])).encode())
http.server.ThreadingHTTPServer(("", int(os.environ["DSLAUNCH_PORT_REWARD"])), Answer).serve_forever()
"""
ASK = """
import os, time, urllib.request
time.sleep(float(os.environ.get("WAIT", "0")))
place = (os.environ["DSLAUNCH_HOST_REWARD"], os.environ["DSLAUNCH_PORT_REWARD"])
with urllib.request.urlopen("http://%s:%s/answer" % place, timeout=10) as answer:
    open("answer-" + os.environ["RANK"], "wb").write(answer.read())
"""


def served(name: str, *services: dict, wait: float = 0, **more: object) -> dict:
    asked = job(name, train={"command": ["python3", "-c", ASK], "zero": 0, "steps": 10, "launcher": "srun"}, **more)
    return {**asked, "resources": {"nodes": 2}, "services": services, "env": {"WAIT": str(wait)}}


def reward(*command: str, **more: object) -> dict:
    ready = {"http": "/health", "port": True, "timeout": 60}
    return {"name": "reward", "command": command or ("python3", "-c", SERVER), "ready": ready, **more}


def log(site, run: str, name: str) -> str:  # noqa: F811
    return (site.folder / "dslaunch-runs" / run / "logs" / name).read_text()


def test_ranks_ask_a_server_on_a_node_of_its_own(site, slurm):  # noqa: F811
    beside = {
        "name": "watcher",
        "on": "first",
        "after": ["reward"],
        "essential": False,
        "command": ["bash", "-c", 'echo "sees $DSLAUNCH_HOST_REWARD"; exec sleep 600'],
        "ready": {"log": "sees"},
    }
    run = site.submit(served("beside", reward(), beside))
    found = site.wait(run, seconds=90)
    assert (found["state"], found["code"]) == ("completed", 0), site.log(run)[-3000:]
    assert [(site.folder / f"answer-{rank}").read_text() for rank in (0, 1)] == ["node3 for node1,node2"] * 2
    assert log(site, run, "service-watcher.log") == "sees node3\n"
    assert site.dslaunch("logs", run, "--service", "reward").stdout.startswith("loading\n")
    events = [json.loads(line) for line in log(site, run, "../journal.jsonl").splitlines()]
    ready = [entry["name"] for entry in events if entry["event"] == "service"]
    assert ready == ["reward", "watcher"]
    assert [entry["hosts"] for entry in events if entry["event"] == "attempt"] == [["node1", "node2"]]
    deadline = time.monotonic() + 20
    while "service-" in slurm.run(["squeue", "--noheader", "--steps"]).stdout:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    for node in ("node1", "node3"):  # with the trainer everything has ended
        assert "DSLAUNCH_PORT_REWARD" not in slurm.exec(node, ["ps", "axww"]).stdout


def test_the_reference_trainer_trains_beside_a_server(site):  # noqa: F811
    asked = job("trained", train={"zero": 1, "steps": 6})
    run = site.submit({**asked, "resources": {"nodes": 2}, "services": [reward()]})
    found = site.wait(run)
    assert (found["state"], found["code"]) == ("completed", 0), site.log(run)[-3000:]
    assert len(site.metrics(run)) == 6


def test_a_server_that_never_answers_ends_the_job_before_any_rank_runs(site):  # noqa: F811
    stuck = reward("bash", "-c", "echo still loading; exec sleep 600")
    stuck["ready"]["timeout"] = 3
    run = site.submit(served("never", stuck))
    found = site.wait(run, seconds=60)
    assert (found["state"], found["code"]) == ("failed", 69)
    (line,) = found["failures"]
    assert line.startswith("service reward on node3 was not ready within 3 s: nothing listens on node3:")
    assert line.endswith("(still loading)")
    assert not list(site.folder.glob("answer-*"))
    said = site.dslaunch("diagnose", run)
    assert said.stdout.startswith("service_failed: ")
    assert line in " ".join(said.stdout.split())


def test_a_server_that_is_not_there_is_named_at_once(site):  # noqa: F811
    run = site.submit(served("early", reward("no-such-server", "--port", "1")))
    begun = time.monotonic()
    found = site.wait(run, seconds=60)
    assert time.monotonic() - begun < 30  # and not the 60 s that it has to become ready
    assert (found["state"], found["code"]) == ("failed", 127)
    assert "service reward on node3 ended with exit code 127 before it was ready" in found["failures"][0]
    assert "no-such-server" in found["failures"][0]


def test_a_server_that_dies_ends_the_training_and_is_named(site):  # noqa: F811
    dies = reward("bash", "-c", f"timeout 4 python3 -c '{SERVER}'; echo out of cache; exit 9")
    run = site.submit(served("dies", dies, wait=120))
    found = site.wait(run, seconds=90)
    assert (found["state"], found["code"]) == ("failed", 9)
    assert found["failures"][0] == (
        "service reward on node3 ended with exit code 9 before the trainer did: out of cache"
    )
    assert found["decision"].startswith("stop: service reward on node3")


def test_a_server_that_is_killed_comes_back_with_the_training(site, slurm):  # noqa: F811
    run = site.submit(served("killed", reward(), wait=5))
    step = site.folder / "dslaunch-runs" / run / "services" / "reward.step"
    ready = step.with_name("ready")
    deadline = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < deadline, site.log(run)
        time.sleep(0.2)
    time.sleep(2)
    slurm.run(["scancel", "--signal=KILL", step.read_text().strip()])
    found = site.wait(run, seconds=120)
    assert (found["state"], found["code"]) == ("completed", 0), site.log(run)[-3000:]
    assert [attempt["code"] for attempt in found["attempts"]] == [137, 0]
    assert "service reward on node3 was killed by signal 9" in found["attempts"][0]["why"]


def test_a_component_of_other_nodes_serves_and_the_job_goes_back_to_the_queue_as_one(site, slurm):  # noqa: F811
    asked = served("het", reward(component={"partition": "short"}), wait=5)
    asked["slurm"] = {"time": "2", "warn_before_end": 30}
    run = site.submit(asked)
    number = slurm.run(["squeue", "--noheader", f"--name={run}", "--format=%i"]).stdout.strip()
    assert number.endswith("+0")
    lead = number.removesuffix("+0")
    ready = site.folder / "dslaunch-runs" / run / "services" / "ready"
    deadline = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < deadline, site.log(run)
        time.sleep(0.2)
    assert slurm.run(["scontrol", "requeue", lead]).returncode == 0
    found = site.wait(run, seconds=150)
    assert (found["state"], found["code"]) == ("completed", 0), site.log(run)[-3000:]
    assert [attempt["number"] for attempt in found["attempts"]] == [0, 1]
    assert (site.folder / "answer-0").read_text().startswith("node3 for node1,node2")


def sweep(name: str, command: str, **more: object) -> dict:
    asked = job(name, train={"command": ["bash", "-c", command], "zero": 0, "steps": 10, "launcher": "srun"})
    over = {"train.seq_len": [32, 64, 128]}
    return {**asked, "resources": {"nodes": 1}, "sweep": {"over": over, **more}}


def test_a_sweep_is_one_array_whose_points_differ(site, slurm):  # noqa: F811
    command = 'echo "$DSLAUNCH_CHECKPOINT_DIR" >"result-$DSLAUNCH_SEQ_LEN"; sleep 3; [ "$DSLAUNCH_SEQ_LEN" != 128 ]'
    run = site.submit(sweep("swept", command, parallel=2))
    most = 0
    while slurm.run(["squeue", "--noheader", f"--name={run}"]).stdout.strip():
        running = ["squeue", "--noheader", "--array", "--states=R", f"--name={run}"]
        most = max(most, len(slurm.run(running).stdout.splitlines()))
        time.sleep(0.3)
    assert most == 2
    found = site.wait(run, seconds=90)
    assert (found["state"], found["code"], found["detail"]) == ("failed", 1, "1 failed, 2 done")
    assert [(point["label"], point["state"]) for point in found["points"]] == [
        ("seq_len=32", "done"), ("seq_len=64", "done"), ("seq_len=128", "failed"),
    ]  # fmt: skip
    for number, length in enumerate((32, 64, 128)):
        assert (site.folder / f"result-{length}").read_text() == f"checkpoints/swept/{number}\n"
    assert site.dslaunch("wait", run).returncode == 1
    assert site.dslaunch("wait", f"{run}.1").returncode == 0
    assert "a sweep of 3 points" in site.dslaunch("logs", run).stderr
    again = site.dslaunch("resume", f"{run}.2", "--set", "train.seq_len=16")
    assert again.returncode == 0, again.stderr
    found = site.wait(again.stdout.strip(), seconds=90)
    assert (found["state"], (site.folder / "result-16").read_text()) == ("completed", "checkpoints/swept/2\n")


def test_one_point_goes_back_to_the_queue_and_cancel_ends_all(site, slurm):  # noqa: F811
    run = site.submit(sweep("back", "sleep 100"))
    folder = site.folder / "dslaunch-runs" / run / "points"
    deadline = time.monotonic() + 60

    def attempts(number: int) -> int:
        lines = (folder / str(number) / "journal.jsonl").read_text().splitlines()
        return sum(json.loads(line)["event"] == "attempt" for line in lines)

    while not all(attempts(number) for number in range(3)):
        assert time.monotonic() < deadline
        time.sleep(0.3)
    array = json.loads(site.dslaunch("status", run, "--json").stdout)["job"]
    assert slurm.run(["scontrol", "requeue", f"{array}_1"]).returncode == 0
    while attempts(1) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.3)
    assert [attempts(number) for number in range(3)] == [1, 2, 1]
    assert site.dslaunch("cancel", run).returncode == 0
    assert site.wait(run, seconds=60)["state"] == "cancelled"
    assert site.dslaunch("wait", f"{run}.0").returncode == 130
