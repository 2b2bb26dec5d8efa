"""Pods that start again, with node/pod.py as their first process. The operator is simulated, the pods are processes.

What the operator does with `restartPolicy: ExitCode` is what it was seen to do on a cluster: a pod that ends with 128
or more is deleted and created again, that one alone; with 1 to 127 the job has failed and the others are ended.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import k8s_schema
import pytest
from test_kubernetes import lay_out, own_address

from launcher import bundle, plan, spec, yamldoc
from launcher.backends import kubernetes
from launcher.backends.kubernetes.manifests import POD
from launcher.node import journal

NODE = bundle.NODE


class Operator:
    """Creates pods, and again those that end with 128 or more, until the job has failed or its first pod is done."""

    def __init__(self, folder, commands, env, *, quick=True):
        self.folder, self.commands, self.env, self.quick = folder, commands, env, quick
        self.pods, self.made, self.codes = {}, [0] * len(commands), [[] for _ in commands]
        self.ended = ""

    def create(self, node):
        self.made[node] += 1
        end = self.folder / f"termination-{node}"
        end.write_text("")
        env = {**self.env, "RANK": str(node), "NODE_RANK": str(node), "DSLAUNCH_TERMINATION_LOG": str(end),
               "DSLAUNCH_NODE": f"machine-{node}"}  # fmt: skip
        with (self.folder / f"log-{node}").open("ab") as log:
            self.pods[node] = subprocess.Popen(
                self.commands[node],
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=self.folder,
            )

    def delete(self, node, patience=10):
        one = self.pods[node]
        with contextlib.suppress(ProcessLookupError):
            one.terminate()  # the kubelet tells the first process of a pod
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.wait(patience)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.pid, signal.SIGKILL)
        one.wait()

    def reconcile(self):
        for node, one in list(self.pods.items()):
            code = one.poll()
            if code is None:
                continue
            with contextlib.suppress(ProcessLookupError):
                os.killpg(one.pid, signal.SIGKILL)  # a container goes as a whole
            code = 128 - code if code < 0 else code
            self.codes[node].append(code)
            del self.pods[node]
            if code >= 128:
                self.create(node)
            elif code:
                self.ended = f"failed: {code}"
            elif node == 0:
                self.ended = "succeeded"

    def run(self, timeout=120):
        for node in range(len(self.commands)):
            self.create(node)
        until = time.monotonic() + timeout
        try:
            while not self.ended and time.monotonic() < until:
                self.reconcile()
                time.sleep(0.05)
        finally:
            for node in list(self.pods):
                self.delete(node, 3)
        assert self.ended, [(self.folder / f"log-{node}").read_text() for node in range(len(self.commands))]
        return self.ended


def script(tmp_path, text, *, nodes=1, attempts=3):
    """Pods whose node.sh is this text, as an operator has them."""
    here = tmp_path / "node"
    here.mkdir()
    for name in POD:
        source = (NODE / name).read_text()
        for constant, value in (("OWN = 15.0", "OWN = 0.5"), ("HARD = 20.0", "HARD = 2.0"),
                                ("WORDS = 15.0", "WORDS = 2.0"), ("LOOK = 1.0", "LOOK = 0.1"),
                                ("PAUSES = (0.0, 5.0, 15.0)", "PAUSES = (0.0,)")):  # fmt: skip
            source = source.replace(constant, value)
        (here / name).write_text(source)
    (tmp_path / "node.sh").write_text(text)
    command = [sys.executable, "-u", str(here / "pod.py"), "--folder", str(tmp_path / "ckpt" / ".dslaunch" / "demo")]
    command += ["--nodes", str(nodes), "--attempts", str(attempts), "--", "bash", str(tmp_path / "node.sh")]
    (tmp_path / "ckpt").mkdir()
    return Operator(tmp_path, [command] * nodes, dict(os.environ, CKPT=str(tmp_path / "ckpt")))


def entries(tmp_path, *events):
    found, torn = journal.read(tmp_path / "ckpt" / ".dslaunch" / "demo")
    assert torn == []
    return [one for one in found if one["event"] in events]


SAVE = 'save() { mkdir -p "$CKPT/step$1"; echo "{\\"step\\": $1, \\"files\\": {}}" >"$CKPT/step$1/complete.json"; }\n'


@pytest.mark.slow
def test_a_typo_stops_at_once(tmp_path):
    job = script(tmp_path, "echo 'bash: trian: command not found' >&2; exit 127\n")
    assert job.run() == "failed: 127"
    assert job.made == [1]
    (ended,) = entries(tmp_path, "ended")
    assert (ended["attempt"], ended["code"]) == (0, 127)
    assert [one["action"] for one in entries(tmp_path, "decided")] == ["stop"]
    assert (tmp_path / "termination-0").read_text().startswith("attempt 0 ended with 127; the end: ")


@pytest.mark.slow
def test_a_program_that_says_never_again_is_not_started_again(tmp_path):
    job = script(tmp_path, "exit 93\n")
    assert job.run() == "failed: 93"
    assert job.made == [1]


@pytest.mark.slow
def test_three_failures_without_progress_stop(tmp_path):
    """Scenario 74: the operator would start it for ever."""
    job = script(tmp_path, "kill -KILL $$\n", attempts=3)
    assert job.run() == "failed: 9"  # 137, where a pod's end has a code below 128
    assert job.codes == [[144, 144, 144, 9]]
    assert [one["attempt"] for one in entries(tmp_path, "attempt")] == [0, 1, 2, 3]
    assert "recover.attempts is 3" in entries(tmp_path, "decided")[-1]["why"]
    assert (tmp_path / "termination-0").read_text().startswith("attempt 3 ended with 137; the end: ")


@pytest.mark.slow
def test_a_new_checkpoint_is_progress(tmp_path):
    text = SAVE + 'save "$DSLAUNCH_ATTEMPT"; [ "$DSLAUNCH_ATTEMPT" = 6 ] || kill -KILL $$\n'
    job = script(tmp_path, text, attempts=1)
    assert job.run() == "succeeded"
    assert job.made == [7]
    assert entries(tmp_path, "finished")[-1]["code"] == 0


@pytest.mark.slow
def test_a_pod_that_is_killed_whole_is_counted_all_the_same(tmp_path):
    """As by its memory limit: nothing in the pod comes to say a word."""
    job = script(tmp_path, 'kill -KILL "$PPID"; sleep 5\n', attempts=2)
    assert job.run() == "failed: 9"
    assert job.made == [4]  # the fourth sees that three were killed, and starts nothing
    assert [one["code"] for one in entries(tmp_path, "ended")] == [137, 137, 137]


TWO = """
echo "attempt $DSLAUNCH_ATTEMPT on $NODE_RANK"
if [ "$NODE_RANK" = 1 ] && [ "$DSLAUNCH_ATTEMPT" = 0 ]; then sleep 0.5; kill -KILL WHOM; fi
if [ "$DSLAUNCH_ATTEMPT" = 0 ]; then sleep 60; fi
sleep 1
"""


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["$$", "$PPID"], ids=["its ranks", "the pod"])
def test_one_pod_that_fails_takes_the_others_along(tmp_path, whom):
    """The operator creates that one alone again; without the others it would wait for ever."""
    job = script(tmp_path, TWO.replace("WHOM", whom), nodes=2)
    began = time.monotonic()
    assert job.run() == "succeeded"
    assert time.monotonic() - began < 60
    assert job.made == [2, 2]
    assert job.codes[0] == [144, 0]
    assert [one["attempt"] for one in entries(tmp_path, "attempt")] == [0, 1]
    assert entries(tmp_path, "attempt")[1]["hosts"]
    for node in (0, 1):
        assert f"attempt 1 on {node}" in (tmp_path / f"log-{node}").read_text()


@pytest.mark.slow
def test_a_pod_that_is_told_to_go_is_no_failure(tmp_path):
    """Eviction, preemption, drain: SIGTERM comes from outside and costs no attempt."""
    job = script(tmp_path, 'trap "exit 143" TERM; sleep 1000 & wait\n', attempts=1)
    job.create(0)
    for number in range(3):
        until = time.monotonic() + 20
        while len(entries(tmp_path, "attempt")) <= number and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.3)
        job.delete(0)
        job.create(0)
    job.delete(0)
    assert all(one["told"] for one in entries(tmp_path, "ended"))
    assert {one["action"] for one in entries(tmp_path, "decided")} == {"restart"}


def test_a_volume_that_cannot_be_written_starts_nothing(tmp_path):
    job = script(tmp_path, "exit 1\n")
    (tmp_path / "ckpt" / ".dslaunch").write_text("a file")
    assert job.run() == "failed: 69"
    assert "what is not counted is not started" in (tmp_path / "log-0").read_text()


TRAIN = """
import json, os, pathlib, signal, time
folder, rank = pathlib.Path(os.environ["DSLAUNCH_CHECKPOINT_DIR"]), int(os.environ["RANK"])
if rank == 0:
    import torch
attempt, resume = os.environ["DSLAUNCH_ATTEMPT"], os.environ.get("DSLAUNCH_RESUME", "")
done = json.loads((pathlib.Path(resume) / "complete.json").read_text())["step"] if resume else 0
print(f"from step {done}, attempt {attempt}", flush=True)
for step in range(done + 1, 7):
    if rank == 3 and step == 4 and attempt == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / f"at-{attempt}-{step}-{rank}").touch()  # what a collective is: nobody goes on alone
    while not all((folder / f"at-{attempt}-{step}-{one}").exists() for one in range(4)):
        time.sleep(0.02)
    if rank == 0:
        tag = folder / f"step{step:08d}"
        tag.mkdir()
        names = [f"zero_pp_rank_{one}_mp_rank_00_optim_states.pt" for one in range(4)]
        names.append("mp_rank_00_model_states.pt")
        for name in names:
            torch.save({"dp_world_size": 4, "ds_config": {"zero_optimization": {"stage": 1}}}, tag / name)
        told = {"tag": tag.name, "step": step, "world_size": 4, "zero_stage": 1, "deepspeed": "0.19.8"}
        told |= {"model_parallel": 1, "files": {name: (tag / name).stat().st_size for name in names}, "sha256": {}}
        (tag / "complete.json").write_text(json.dumps(told))
print("done", flush=True)
"""


def render(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    job = {
        "name": "demo", "model": "gpt-demo", "container": "ghcr.io/example/train:1",
        "resources": {"nodes": 2, "processes_per_node": 2, "cpus_per_node": 1, "memory": "8G"},
        "train": {"global_batch": 16, "seq_len": 128, "steps": 6, "zero": 1, "script": str(tmp_path / "train.py"),
                  "checkpoint": {"dir": str(tmp_path / "ckpt")}},
        "kubernetes": {"volumes": [{"claim": "ckpt", "mount": str(tmp_path)}]},
    }  # fmt: skip
    made = plan.make(spec.load(yamldoc.dump([job]), name="job.yaml").spec)
    return kubernetes.render(made).text(kubernetes.ENTRY)


@pytest.mark.slow
def test_a_rank_that_is_killed_once_goes_on_from_its_checkpoint(tmp_path):
    """Scenario 62 in pods: what is rendered, run as the operator would. Four real ranks under torchrun."""
    address = own_address()
    if not address or address.startswith("127."):
        pytest.skip("this machine has no address but loopback, and a pod's master is elsewhere")
    text, commands = render(tmp_path), []
    job = k8s_schema.documents(text)[-1]
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert {row["restartPolicy"] for row in replicas.values()} == {"ExitCode"}
    assert job["spec"]["runPolicy"]["backoffLimit"] == 2**31 - 1
    for node in range(2):
        command, _ = lay_out(text, tmp_path / f"mount-{node}")
        commands.append(command)
        patient = tmp_path / f"mount-{node}" / "node" / "pod.py"
        patient.write_text(patient.read_text().replace("OWN = 15.0", "OWN = 2.0"))
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "MASTER_ADDR": address,
           "MASTER_PORT": "23456", "WORLD_SIZE": "4", "DSLAUNCH_CACHE": str(tmp_path / "cache")}  # fmt: skip
    operator = Operator(tmp_path, commands, env)
    assert operator.run(300) == "succeeded"
    said = (tmp_path / "log-0").read_text()
    assert "[rank 0] from step 0, attempt 0" in said
    assert "[rank 0] from step 3, attempt 1" in said
    assert [one["code"] for one in entries(tmp_path, "ended")] == [137, 0]
    assert entries(tmp_path, "ended")[0]["checkpoint"] == 3
    assert operator.made == [2, 2]


def test_a_job_without_a_volume_for_checkpoints_ends_at_the_first_failure():
    job = {"name": "demo", "model": "gpt-demo", "container": "a/b:1", "train": {"steps": 6}}
    made = plan.make(spec.load(yamldoc.dump([job]), name="job.yaml").spec)
    found = kubernetes.manifests(made)[-1]
    assert {row["restartPolicy"] for row in found["spec"]["pytorchReplicaSpecs"].values()} == {"Never"}
    assert "backoffLimit" not in found["spec"]["runPolicy"]
    assert "pod.py" not in json.dumps(found)
    assert any("a failure ends the job" in note for note in kubernetes.notes(made))
