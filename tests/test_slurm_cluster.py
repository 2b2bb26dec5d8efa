"""The cluster that the other tests submit to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import slurm_cluster

pytestmark = pytest.mark.slow


def processes(cluster):
    """Those with its SLURM_CONF; what its daemons start inherits that."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environ = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"SLURM_CONF={cluster.env['SLURM_CONF']}".encode() in environ:
            found.append(int(process.name))
    return found


def traces(cluster):
    """Everything it has outside its folder."""
    namespaces = [Path(f"/proc/{pid}/ns/net").readlink() for pid in processes(cluster)]
    links = [path.name for path in Path("/sys/class/net").glob(f"{cluster.tag}*")]
    groups = [str(path) for path in Path("/sys/fs/cgroup").glob(f"*/{cluster.tag}*")]
    mine = Path("/proc/self/ns/net").readlink()
    return {
        "processes": processes(cluster),
        "namespaces": [each for each in namespaces if each != mine],
        "links": links,
        "groups": groups,
    }


NOTHING = {"processes": [], "namespaces": [], "links": [], "groups": []}


def test_four_nodes_have_names_and_addresses_of_their_own(slurm):
    reply = slurm.run(
        ["srun", "-N4", "sh", "-c", "echo $(hostname) $(ip -4 -o addr show eth0 | tr -s ' ' | cut -d' ' -f4)"]
    )
    assert dict(line.split() for line in reply.stdout.splitlines()) == {
        name: f"{address}/24" for name, address in slurm.nodes().items()
    }


def test_nodes_find_each_other_and_the_login_node_by_name(slurm):
    names = [*slurm.nodes(), os.uname().nodename.partition(".")[0]]
    reply = slurm.exec("node1", ["getent", "hosts", *names])
    assert [line.split()[1] for line in reply.stdout.splitlines()] == names
    assert "127.0.0.1" not in reply.stdout


def test_an_exit_code_of_a_batch_job_is_seen(slurm, tmp_path):
    job = slurm.sbatch([f"--output={tmp_path}/%j.out", "--wrap", "hostname; exit 7"])
    fields = slurm.wait(job)
    assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "7:0")
    assert (tmp_path / f"{job}.out").read_text().strip() == fields["BatchHost"]


def test_jobs_get_the_gpus_they_ask_for_and_no_others(slurm, tmp_path):
    wait = f"until [ -e {tmp_path}/go ]; do sleep 0.1; done"
    show = f"echo cuda=$CUDA_VISIBLE_DEVICES slurm=$SLURM_JOB_GPUS; {wait}"
    ask = ["-c1", "--nodelist=node1", f"--output={tmp_path}/%j.out", "--wrap", show]
    jobs = [slurm.sbatch([*gpus, *ask]) for gpus in (["--gpus-per-node=1"], ["--gpus-per-node=1"], [])]
    for job in jobs:
        slurm.wait(job, states=["RUNNING"])
    (tmp_path / "go").touch()
    for job in jobs:
        slurm.wait(job)
    replies = [(tmp_path / f"{job}.out").read_text().split() for job in jobs]
    assert {reply[1] for reply in replies[:2]} == {"slurm=0", "slurm=1"}
    assert all(reply[0].startswith("cuda=") and reply[0] != "cuda=" for reply in replies[:2])
    assert replies[2] == ["cuda=", "slurm="]


@pytest.mark.parametrize(
    "ask", [["--gpus-per-node=3"], ["-N5"], ["--partition=short", "--time=3"], ["--mem=65000"], ["-c17"]]
)
def test_what_the_cluster_does_not_have_is_refused(slurm, ask):
    assert slurm.run(["sbatch", *ask, "--wrap", "true"]).returncode == 1


def test_a_node_can_crash_and_boot(slurm):
    slurm.crash("node4")
    with pytest.raises(RuntimeError, match="node4 is not running"):
        slurm.exec("node4", ["true"])
    slurm.boot("node4")
    reply = slurm.run(["srun", "--nodelist=node4", "hostname"])
    assert reply.stdout == "node4\n", reply.stderr


def test_a_second_cluster_leaves_nothing_behind_and_the_first_alone(slurm):
    with slurm_cluster.borrow("dslaunch-second", nodes=2, extra_conf="KillWait=7") as second:
        second.sbatch(["-N2", "--output=/dev/null", "--wrap", "srun sleep 600"])
        job = second.sbatch(["-N1", "--output=/dev/null", "--wrap", "setsid sleep 600 & sleep 600"])
        second.wait(job, states=["RUNNING"])
        assert "KillWait                = 7 sec" in second.run(["scontrol", "show", "config"]).stdout
        assert all(traces(second).values())
        with pytest.raises(slurm_cluster.InUseError, match=str(os.getpid())):
            slurm_cluster.Cluster.start(second.folder)
    assert traces(second) == NOTHING
    assert slurm.run(["srun", "-N4", "hostname"]).returncode == 0


@pytest.mark.usefixtures("slurm")
def test_what_a_killed_test_run_left_is_ended_by_the_next():
    start = "print(slurm_cluster.borrow('dslaunch-killed', nodes=1).folder, flush=True)"
    script = f"import os, slurm_cluster; {start}; os.kill(os.getpid(), 9)"
    reply = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    cluster = slurm_cluster.Cluster(reply.stdout.strip())
    left = processes(cluster)
    assert left
    with slurm_cluster.Cluster.start(cluster.folder, nodes=1):
        assert not set(left) & set(processes(cluster))
    assert traces(cluster) == NOTHING


@pytest.mark.parametrize(("nodes", "accepted"), [(4096, True), (4097, False)])
def test_a_large_cluster_answers_without_starting_anything(slurm_big, nodes, accepted):
    ask = [f"--nodes={nodes}", "--gpus-per-node=8", "--ntasks-per-node=8", "--exclusive"]
    reply = slurm_big.run(["sbatch", "--test-only", *ask, "--wrap", "true"])
    assert (reply.returncode == 0) is accepted, reply.stderr
