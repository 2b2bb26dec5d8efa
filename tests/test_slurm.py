"""On a real Slurm of four nodes: submit, train, crash, run out of time, resume. Real DeepSpeed on CPU."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from onebit.env import ensure

from launcher.backends import slurm as backend
from launcher.errors import Unreachable, UserError
from launcher.run import Result

HERE = Path(__file__).parent
TINY = {"layers": 2, "hidden": 64, "heads": 2, "vocab": 256}
NASTY = "a,b 'c' \"d\" $(id) `id`\n%j \\ ;=&"


@pytest.fixture
def site(slurm, tmp_path, monkeypatch):
    """A directory to submit from, with the cluster's environment and no user's site file."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in slurm.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("DSLAUNCH_POLL", "1")  # this controller has nobody else to answer
    return Site(tmp_path)


class Site:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def dslaunch(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).parent / "dslaunch"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=self.folder)

    def submit(self, job: dict, *options: str) -> str:
        (self.folder / "job.yaml").write_text(json.dumps(job))
        done = self.dslaunch("slurm", "job.yaml", *options)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def wait(self, run: str, *, seconds: float = 280) -> dict:
        """The status once the job is over."""
        deadline = time.monotonic() + seconds
        while True:
            said = self.dslaunch("status", run, "--json")
            assert said.stdout, said.stderr
            found = json.loads(said.stdout)
            if found["state"] in ("completed", "failed", "cancelled"):
                return found
            assert time.monotonic() < deadline, f"{found}\n{self.log(run)[-3000:]}"
            time.sleep(1)

    def log(self, run: str) -> str:
        return self.dslaunch("logs", run).stdout

    def metrics(self, run: str) -> list[dict]:
        path = self.folder / "dslaunch-runs" / run / "logs" / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def jobs(self) -> str:
        return subprocess.run(["squeue", "--noheader"], capture_output=True, text=True, check=True).stdout


def job(name: str, *, train: dict, **more: object) -> dict:
    return {
        "name": name,
        "model": TINY,
        "train": {"global_batch": 16, "micro_batch": 4, "seq_len": 64, **train},
        "resources": {"nodes": 4},
        "venv": sys.prefix,
        "slurm": {"time": "10"},
        **more,
    }


def test_zero_3_trains_on_four_nodes_and_leaves_a_whole_checkpoint(site):
    run = site.submit(
        job("zero3", train={"zero": 3, "steps": 40, "optimizer": {"lr": 2e-3}, "checkpoint": {"every": 20}})
    )
    found = site.wait(run)
    assert (found["state"], found["code"]) == ("completed", 0), site.log(run)[-3000:]
    losses = [row["loss"] for row in site.metrics(run)]
    assert len(losses) == 40
    assert losses[-1] < 0.7 * losses[0]
    tag = site.folder / "checkpoints" / "zero3" / "step00000040"
    whole = json.loads((tag / "complete.json").read_text())
    assert (whole["step"], whole["world_size"], whole["zero_stage"]) == (40, 4, 3)
    assert len([name for name in whole["files"] if name.endswith("_optim_states.pt")]) == 4
    assert all((tag / name).stat().st_size == size for name, size in whole["files"].items())
    hostfile = (site.folder / "dslaunch-runs" / run / "hostfile").read_text()
    assert hostfile == "".join(f"node{i} slots=1\n" for i in range(1, 5))


def test_a_rank_that_crashes_ends_the_job_within_a_minute_and_is_named(site):
    program = "import os, sys, time\nif os.environ['RANK'] == '2': time.sleep(2); sys.exit(7)\ntime.sleep(300)"
    run = site.submit(job("crash", train={"command": ["python3", "-c", program], "zero": 0, "steps": 10}))
    begun = time.monotonic()
    found = site.wait(run, seconds=90)
    assert time.monotonic() - begun < 75  # 60 s from the crash, with torchrun's start before it
    assert (found["state"], found["code"]) == ("failed", 7)
    assert found["failures"][0] == "rank 2 on node3 ended with exit code 7"
    assert site.dslaunch("status", run).returncode == 1
    assert "rank 2" in site.log(run)


def test_a_killed_rank_is_never_success(site):
    program = (
        "import os, signal, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
    )
    run = site.submit(
        job(
            "killed",
            train={"command": ["python3", "-c", program], "zero": 0, "steps": 10, "launcher": "srun"},
            recover={"attempts": 0},
        )
    )
    found = site.wait(run, seconds=90)
    assert (found["state"], found["code"]) == ("failed", 137)
    assert found["failures"][0] == "rank 1 on node2 was killed by SIGKILL"


@pytest.mark.parametrize("launcher", ["srun", "deepspeed", "torchrun"])
def test_a_value_with_comma_quotes_dollar_and_newline_arrives_byte_exact_on_every_rank(site, launcher):
    program = (
        "import os; r = os.environ['RANK']; "
        "open(f'seen-{r}', 'wb').write(os.fsencode(os.environ['NASTY'])); "
        "open(f'world-{r}', 'w').write(' '.join(os.environ[n] for n in ('WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')))"
    )
    run = site.submit(
        job(
            "env",
            train={"command": ["python3", "-c", program], "zero": 0, "steps": 10, "launcher": launcher},
            env={"NASTY": NASTY},
        )
    )
    assert site.wait(run)["state"] == "completed", site.log(run)[-3000:]
    for rank in range(4):
        assert (site.folder / f"seen-{rank}").read_bytes() == NASTY.encode()
        world, address, port = (site.folder / f"world-{rank}").read_text().split()
        assert (world, address) == ("4", "node1")
        low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
        assert not low <= int(port) <= high


def test_the_time_limit_saves_a_checkpoint_and_the_next_submission_resumes_there(site):
    """Scenario 71: Slurm warns the batch shell alone, and every rank hears of it."""
    asked = job("limit", train={"zero": 3, "steps": 100_000, "optimizer": {"lr": 2e-3}})
    asked["slurm"] = {"time": "3", "warn_before_end": 75}  # Slurm may warn up to 60 s early
    first = site.submit(asked)
    found = site.wait(first)
    assert (found["state"], found["code"]) == ("failed", 75), site.log(first)[-3000:]
    assert "checkpoint saved" in found["detail"]
    saved = found["progress"]["step"]
    assert (site.folder / "checkpoints" / "limit" / f"step{saved:08d}" / "complete.json").is_file()
    second = site.submit(asked, "--set", f"train.steps={saved + 5}")
    found = site.wait(second)
    assert (found["state"], found["code"]) == ("completed", 0), site.log(second)[-3000:]
    assert f"resumed at step {saved}" in site.log(second)
    assert [row["step"] for row in site.metrics(second)] == list(range(saved + 1, saved + 6))


def test_one_bit_adam_trains_past_its_freeze_step_on_four_nodes(site, request):
    venv = ensure(request.config.rootpath / ".cache")
    steps, freeze = 60, 20
    asked = job(
        "onebit",
        train={
            "zero": 0,
            "steps": steps,
            "gradient_clipping": 0,
            "optimizer": {"type": "OneBitAdam", "lr": 1e-3, "freeze_step": freeze},
        },
        environment={"deepspeed": "0.19.6"},
        env={"PYTHONPATH": str(HERE / "onebit")},
    )
    asked["venv"] = str(venv)
    run = site.submit(asked)
    found = site.wait(run)
    log = site.log(run)
    assert (found["state"], found["code"]) == ("completed", 0), log[-3000:]
    assert "deepspeed 0.19.6" in log
    losses = [row["loss"] for row in site.metrics(run)]
    assert len(losses) == steps
    mean = [sum(losses[end - 5 : end]) / 5 for end in (5, freeze, steps)]  # batches differ: five at a time
    assert mean[2] < mean[1] - 0.2 < mean[0] - 0.4
    assert "engine all-reduce off" in log
    assert "replicas agree" in log


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"zero": 3}, "OneBitAdam does not run with ZeRO stage 3"),
        ({"version": "0.19.8"}, "OneBitAdam is not in DeepSpeed 0.19.8"),
    ],
)
def test_one_bit_adam_where_it_cannot_run_is_refused_before_anything_is_submitted(site, change, says):
    asked = job(
        "onebit",
        train={"zero": change.get("zero", 0), "steps": 30, "optimizer": {"type": "OneBitAdam", "freeze_step": 10}},
        environment={"deepspeed": change.get("version", "0.19.6")},
    )
    before = site.jobs()
    (site.folder / "job.yaml").write_text(json.dumps(asked))
    done = site.dslaunch("slurm", "job.yaml")
    assert done.returncode == 2
    assert says in done.stderr
    assert "job.yaml:1:" in done.stderr
    assert site.jobs() == before
    assert not (site.folder / "dslaunch-runs").exists()


def test_a_wrong_deepspeed_on_the_nodes_ends_the_job_before_training(site):
    asked = job("version", train={"zero": 0, "steps": 30}, environment={"deepspeed": "0.18.9"})
    run = site.submit(asked)
    found = site.wait(run, seconds=60)
    assert found["state"] == "failed"
    assert "the job file says DeepSpeed 0.18.9, this node has" in site.log(run)


def test_a_requeued_attempt_still_has_its_secrets_and_they_go_at_the_end(site, monkeypatch):
    secret = os.urandom(12).hex()
    monkeypatch.setenv("MINE", secret)
    program = (
        "import hashlib, os, sys, time\n"
        "print(hashlib.sha256(os.environ['API_TOKEN'].encode()).hexdigest(), flush=True)\n"
        "time.sleep(0 if int(os.environ.get('SLURM_RESTART_COUNT', 0)) else 300)"
    )
    asked = job("again", train={"command": ["python3", "-c", program], "zero": 0, "steps": 10, "launcher": "srun"})
    asked["slurm"] = {"time": "10", "requeue": True}
    asked["secrets"] = {"API_TOKEN": {"from_env": "MINE"}}
    run = site.submit(asked)
    folder = site.folder / "dslaunch-runs" / run
    deadline = time.monotonic() + 60
    while not list(folder.glob("logs/rank-*.log")) and time.monotonic() < deadline:
        time.sleep(0.5)
    time.sleep(2)
    number = json.loads(site.dslaunch("status", run, "--json").stdout)["job"]
    subprocess.run(["scontrol", "requeue", number], check=True)
    assert site.wait(run, seconds=120)["code"] == 0, site.log(run)[-3000:]
    hashed = hashlib.sha256(secret.encode()).hexdigest()
    assert (folder / "logs" / "rank-00002.log").read_text().count(hashed) == 2
    assert not (folder / "secrets").exists()
    shown = subprocess.run(["scontrol", "show", "job", "-dd", number], capture_output=True, text=True).stdout
    assert secret not in shown


def test_the_shell_that_submits_changes_nothing_about_the_job(site, monkeypatch):
    for name, value in {
        "SBATCH_TIMELIMIT": "1", "SBATCH_PARTITION": "nowhere", "SBATCH_EXPORT": "NONE",
        "SLURM_MEM_PER_CPU": "100", "SLURM_NTASKS": "7", "SLURM_JOB_ID": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    asked = job("clean", train={"command": ["true"], "zero": 0, "steps": 10, "launcher": "srun"})
    (site.folder / "job.yaml").write_text(json.dumps(asked))
    done = site.dslaunch("slurm", "job.yaml")
    assert done.returncode == 0, done.stderr
    assert "SBATCH_PARTITION=nowhere in this shell does not reach the job" in done.stderr
    assert site.wait(done.stdout.strip(), seconds=60)["state"] == "completed"


def test_a_line_of_setup_that_fails_is_named(site):
    asked = job(
        "setup", train={"command": ["true"], "zero": 0, "steps": 10}, setup=["export A=1", "ls /nowhere/at/all"]
    )
    found = site.wait(site.submit(asked), seconds=60)
    assert found["state"] == "failed"
    assert "ls /nowhere/at/all" in found["failures"][0]


def test_a_warning_before_the_ranks_run_does_not_end_the_job(site):
    asked = job(
        "early",
        train={"command": ["true"], "zero": 0, "steps": 10, "launcher": "srun"},
        setup=["touch began", "sleep 6"],
    )
    run = site.submit(asked)
    deadline = time.monotonic() + 60
    while not (site.folder / "began").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    number = json.loads(site.dslaunch("status", run, "--json").stdout)["job"]
    subprocess.run(["scancel", "--batch", "--signal=USR2", number], check=True)
    assert site.wait(run, seconds=60)["state"] == "completed", site.log(run)[-3000:]


def test_a_refusal_of_slurm_is_shown_in_its_words_at_the_line_to_change(site):
    (site.folder / "job.yaml").write_text("name: x\nmodel: gpt-demo\nslurm:\n  partition: nowhere\n")
    done = site.dslaunch("slurm", "job.yaml")
    assert done.returncode == 2
    assert "job.yaml:4:3: Slurm refuses the job: " in done.stderr
    assert "invalid partition" in done.stderr
    assert not any((site.folder / "dslaunch-runs").iterdir())


def test_cancel_ends_the_job_and_status_says_so(site):
    run = site.submit(job("long", train={"command": ["sleep", "300"], "zero": 0, "steps": 10, "launcher": "srun"}))
    assert site.dslaunch("cancel", run).returncode == 0
    assert site.wait(run, seconds=60)["state"] == "cancelled"


def test_the_controller_says_when_a_job_would_start_without_submitting_it(site):
    before = site.jobs()
    (site.folder / "job.yaml").write_text("name: x\nmodel: gpt-demo\nresources: {nodes: 4}\n")
    done = site.dslaunch("slurm", "job.yaml", "--test-only")
    assert done.returncode == 0
    assert "to start at" in done.stdout
    assert site.jobs() == before


def test_a_slurm_that_does_not_answer_is_not_a_failed_job(site, tmp_path, monkeypatch):
    train = {"zero": 0, "steps": 10, "launcher": "srun"}
    over = site.submit(job("quiet", train={**train, "command": ["true"]}))
    site.wait(over, seconds=60)
    run = site.submit(job("alive", train={**train, "command": ["sleep", "300"]}))
    assert json.loads(site.dslaunch("status", run, "--json").stdout)["state"] in ("pending", "running")
    there = os.environ["SLURM_CONF"]
    conf = Path(there).read_text()
    lines = [line for line in conf.splitlines() if not line.startswith("SlurmctldPort")]
    (tmp_path / "slurm.conf").write_text("\n".join([*lines, "SlurmctldPort=9", ""]))
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    done = site.dslaunch("status", run, "--json")
    assert json.loads(done.stdout)["state"] == "unknown"
    assert json.loads(done.stdout)["last"] in ("pending", "running")
    assert done.returncode == 8
    assert site.dslaunch("status", over).returncode == 0  # a verdict stays one
    (site.folder / "job.yaml").write_text("name: x\nmodel: gpt-demo\n")
    done = site.dslaunch("slurm", "job.yaml")
    assert done.returncode == 8, done.stderr
    assert "Slurm did not answer" in done.stderr
    monkeypatch.setenv("SLURM_CONF", there)
    assert site.dslaunch("cancel", run).returncode == 0
    assert site.wait(run, seconds=60)["state"] == "cancelled"


def test_a_script_for_4096_nodes_is_as_long_as_one_for_four_and_the_controller_takes_it(
    slurm_big, tmp_path, monkeypatch
):
    for name, value in slurm_big.env.items():
        monkeypatch.setenv(name, value)
    site = Site(tmp_path)
    sizes = []
    for nodes in (1, 4, 256, 4096):
        (tmp_path / "job.yaml").write_text(
            f"name: big\nmodel: llama-70b\nresources: {{nodes: {nodes}, gpus_per_node: 8, gpu: h100, "
            "fabric: infiniband}\ntrain: {zero: 3, offload: {optimizer: cpu}, micro_batch: 1}\n"
        )
        done = site.dslaunch("slurm", "job.yaml", "--dry-run")
        assert done.returncode == 0, done.stderr
        sizes.append(len(done.stdout))
    assert sizes[0] < sizes[1]  # one node has nobody to be compared with: no preflight comes first
    assert max(sizes[1:]) - min(sizes[1:]) <= 4 * 10  # only the number itself, in a few places
    done = site.dslaunch("slurm", "job.yaml", "--test-only")
    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stdout


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (Result(0, "12\n", ""), "12"),
        (Result(0, "12;cluster2\n", ""), "12"),  # federated
        (Result(0, "a site's own greeting\n12\n", "sbatch: note: be nice\n"), "12"),
        (Result(0, "Submitted batch job 12\n", ""), Unreachable),
        (Result(0, "", ""), Unreachable),
        (Result(None, "", "sbatch did not answer within 30 s"), Unreachable),
        (
            Result(1, "", "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"),
            Unreachable,
        ),
        (Result(1, "", "sbatch: error: Munge encode failed: Failed to connect"), Unreachable),
        (Result(1, "", "sbatch: error: invalid partition specified: x"), UserError),
        (Result(None, "", "sbatch: command not found"), UserError),
    ],
)
def test_only_a_number_is_a_job_id_and_only_a_refusal_is_final(reply, answer):
    if isinstance(answer, str):
        assert backend.parse_submitted(reply) == answer
    else:
        with pytest.raises(answer) as caught:
            backend.parse_submitted(reply)
        assert isinstance(caught.value, Unreachable) == (answer is Unreachable)


@pytest.mark.parametrize(
    ("time", "minutes"),
    [("90", 90), ("30:01", 31), ("12:00:00", 720), ("1-12", 2160), ("2-00:30", 2910), ("1-00:00:30", 1441)],
)
def test_slurm_s_spellings_of_time(time, minutes):
    assert backend.minutes(time) == minutes


WHOLE = """
srun --nodes=4 --ntasks=4 --ntasks-per-node=1 hostname | sort >one-each
srun bash -c 'echo "$SLURM_PROCID $(hostname)"' | sort >one-per-slot
cut -d" " -f1 "$DSLAUNCH_HOSTFILE" >hosts
echo "$(wc -l <"$DLTS_HOSTFILE") $NNODES $NPROC_PER_NODE $MASTER_ADDR ${MASTER_PORT:+port} ${RANK-none}" >told
srun --nodelist=node3 --ntasks=1 --nodes=1 bash -c 'exit "$1"' _ "$1"
"""


@pytest.mark.parametrize("code", [0, 9])
def test_a_program_on_the_first_node_starts_the_ranks_of_all(site, code):
    asked = job("whole", train={"command": ["bash", "-c", WHOLE, "_", str(code)], "zero": 0, "launcher": "job"})
    asked["train"]["global_batch"] = 32
    asked["resources"] = {"nodes": 4, "processes_per_node": 2, "cpus_per_node": 4}
    run = site.submit({**asked, "recover": {"attempts": 0}})
    found = site.wait(run, seconds=90)
    assert (found["state"], found["code"]) == ("completed" if code == 0 else "failed", code), site.log(run)[-3000:]
    nodes = [f"node{number}" for number in range(1, 5)]
    assert (site.folder / "one-each").read_text().split() == nodes == (site.folder / "hosts").read_text().split()
    assert (site.folder / "one-per-slot").read_text().splitlines() == [f"{n} {nodes[n // 2]}" for n in range(8)]
    assert (site.folder / "told").read_text() == "4 4 2 node1 port none\n"
    if code:
        assert found["failures"][0].startswith("rank 0 on node1 ended with exit code 9")


def test_what_a_program_left_on_other_nodes_ends_with_its_attempt(site):
    twice = (
        "squeue -hs -o %j >>seen; echo . >>seen; [ ! -e again ] || exit 0; touch again; "
        "srun --nodes=1 --ntasks=1 --nodelist=node4 sleep 600 & sleep 2; squeue -hs -o %j >>seen; kill -9 $! $$"
    )
    asked = job("left", train={"command": ["bash", "-c", twice], "zero": 0, "launcher": "job"})
    del asked["venv"]  # the next attempt begins at once
    found = site.wait(site.submit({**asked, "recover": {"attempts": 1}}), seconds=90)
    assert (found["state"], found["code"]) == ("completed", 0)
    first, then, last = (site.folder / "seen").read_text().split(".\n")
    assert "sleep" in then
    assert "sleep" not in first + then.rpartition("sleep")[2] + last
