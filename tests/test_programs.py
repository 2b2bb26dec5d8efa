"""Programs that bring their own configuration, whatever starts their ranks and wherever those run."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_node import Node, until

from launcher import bundle, plan, show, spec
from launcher.backends import local, slurm
from launcher.errors import UserError
from launcher.node import rank, supervise

GPUS = "resources: {nodes: 4, gpus_per_node: 4, gpu: a100-40gb, fabric: infiniband}\n"
HERE = Path(__file__).parent
DSLAUNCH = str(Path(sys.executable).parent / "dslaunch")


def made(text: str) -> plan.Plan:
    return plan.make(spec.load(f"name: demo\n{text}", name="job.yaml").spec)


def refused(text: str) -> list[tuple[str, str]]:
    """(message and hint, line) of every problem."""
    document = spec.load(f"name: demo\n{text}", name="job.yaml")
    with pytest.raises(UserError) as error:
        plan.make(document.spec)
    return [(f"{p.message} -> {p.hint}", document.place(p).where) for p in error.value.problems]


def node_script(of: plan.Plan) -> str:
    return bundle.node_script(of)


# --- no model ---------------------------------------------------------------------------------------------


def test_without_a_model_nothing_is_predicted_and_nothing_is_handed_over():
    one = made(f"train: {{script: pretrain_gpt.py, args: [--deepspeed_config, theirs.json]}}\n{GPUS}")
    assert (one.model, one.setup, one.batch, one.config, one.estimate, one.time) == (None,) * 6
    assert one.command == ("python3", "-u", "pretrain_gpt.py", "--deepspeed_config", "theirs.json")
    assert any("neither memory nor time is predicted" in note and "model: a preset" in note for note in one.notes)
    rendered = local.render(made("train: {script: pretrain_gpt.py}\nresources: {processes_per_node: 2}\n"))
    assert "ds_config.json" not in {file.path for file in rendered.files}
    script = rendered.text("node.sh")
    assert "pretrain_gpt.py: 1 x 2 ranks" in script
    for left_out in ("DSLAUNCH_DS_CONFIG", "DSLAUNCH_STEPS", "DSLAUNCH_SEQ_LEN", "--stage"):
        assert left_out not in script
    assert "--steps 0 --model-parallel 1 --vouch" in script


def test_what_is_said_about_the_run_is_told_to_the_program():
    script = node_script(
        made(
            "train: {command: [bash, run.sh], steps: 20, seq_len: 4096, parallel: {tensor: 2, pipeline: 2}}\n"
            "resources: {processes_per_node: 8}\n"
        )
    )
    for line in ("DSLAUNCH_STEPS=20", "DSLAUNCH_SEQ_LEN=4096", "TENSOR_PARALLEL=2", "--model-parallel 4"):
        assert line in script


@pytest.mark.parametrize(
    ("train", "field"),
    [
        ("zero: 3", "zero"),
        ("precision: bf16", "precision"),
        ("optimizer: {lr: 1e-5}", "optimizer"),
        ("lr_schedule: {warmup_steps: 5}", "lr_schedule"),
        ("gradient_clipping: 0.5", "gradient_clipping"),
        ("offload: {optimizer: cpu}", "offload"),
        ("attention: flash", "attention"),
        ("lora: {rank: 8}", "lora"),
        ("compression: lossy", "compression"),
        ("activation_checkpointing: true", "activation_checkpointing"),
        ("parallel: {tensor: auto}", "parallel.tensor"),
        ("parallel: {virtual: 2}", "parallel.virtual"),
        ("parallel: {split_hidden: true}", "parallel.split_hidden"),
    ],
)
def test_a_field_that_would_do_nothing_is_refused(train, field):
    ((said, where),) = refused(f"train:\n  script: x.py\n  {train}\n{GPUS}")
    assert said.startswith(f"{field} is given, and without a model or a DeepSpeed config it would do nothing")
    assert "model: a preset" in said
    assert where.startswith("job.yaml:4:")


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("config_flag: --ds, offload: {optimizer: cpu}", "nobody chooses the ZeRO stage"),
        ("config_flag: --ds, zero: 3, offload: {nvme_path: /nvme}", "nothing is offloaded to nvme"),
        ("config_flag: --ds, lr_schedule: {type: cosine}", "nobody said how many steps"),
        ("checkpoint: {every: auto}", "a share of a run whose steps nobody said"),
        ("zero: 2, deepspeed: {zero_optimization: {stage: 3}}", "zero_optimization.stage 3 contradicts the 2"),
        ("config_flag: --ds, deepspeed: {zero_optimization: {stag: 3}}", "stag"),
    ],
)
def test_what_a_deepspeed_config_cannot_say_without_a_model_is_refused(train, words):
    ((said, _),) = refused(f"train: {{script: x.py, micro_batch: 1, {train}}}\n{GPUS}")
    assert words in said


def test_neither_a_model_nor_a_program_is_refused():
    ((said, _),) = refused(GPUS)
    assert "there is nothing to train -> model: gpt2" in said


@pytest.mark.parametrize(
    ("train", "config"),
    [
        (
            "zero: 2, precision: bf16, micro_batch: 2, gradient_accumulation: 4, offload: {optimizer: cpu}",
            {
                "train_batch_size": 128,
                "train_micro_batch_size_per_gpu": 2,
                "gradient_accumulation_steps": 4,
                "gradient_clipping": 1.0,
                "bf16": {"enabled": True},
                "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
            },
        ),
        (  # Hugging Face's Trainer fills in the rest, and refuses what differs from its own arguments
            "deepspeed: {train_micro_batch_size_per_gpu: auto, gradient_accumulation_steps: auto, "
            "train_batch_size: auto, zero_optimization: {stage: 3}}",
            {
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "train_batch_size": "auto",
                "zero_optimization": {"stage": 3},
            },
        ),
    ],
)
def test_a_config_that_is_asked_for_holds_what_the_job_file_says_and_no_more(train, config):
    one = made(f"train: {{script: x.py, config_flag: --deepspeed, {train}}}\n{GPUS}")
    assert one.config == config
    assert one.command[-2:] == ("--deepspeed", "ds_config.json")


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("global_batch: 100, micro_batch: 3", "100 is not a multiple of 16 data-parallel ranks x micro_batch 3 = 48"),
        ("global_batch: 64, micro_batch: 2, gradient_accumulation: 4", "= 128 -> global_batch: 128"),
        ("global_batch: 102, micro_batch: 2, parallel: {tensor: 4, pipeline: 2}", "2 data-parallel ranks"),
        ("parallel: {tensor: 3}", "does not divide 16 ranks"),
    ],
)
def test_batch_arithmetic_is_checked_all_the_same(train, words):
    said = [text for text, _ in refused(f"train: {{script: x.py, {train}}}\n{GPUS}")]
    assert any(words in text for text in said)


def test_the_plan_shows_what_is_known():
    text = f"name: demo\ntrain: {{command: [bash, run.sh], launcher: node, global_batch: 64, micro_batch: 2}}\n{GPUS}"
    document = spec.load(text, name="job.yaml")
    one = plan.make(document.spec)
    said = show.plan(one, document)
    assert said.startswith("demo: bash run.sh on 4 x 4")
    assert "2 per rank x 2 accumulation x 16 data-parallel ranks" in said
    assert "each node runs, and that starts its ranks" in said
    assert "memory per GPU" not in said
    told = json.loads(show.plan_json(one, document))
    assert (told["model"], told["deepspeed"], told["step_time"], told["zero_stage"]) == (None,) * 4
    assert "bash run.sh" in show.picture(one)


# --- arguments of launchers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("launcher", "words", "own", "hint"),
    [
        ("torchrun", ["--nproc_per_node=8"], "--nproc_per_node=8", "leave it out"),
        ("torchrun", ["--rdzv-conf", "timeout=900", "--nnodes", "4"], "--nnodes", "leave it out"),
        ("torchrun", ["--nnode", "4"], "--nnode is dslaunch's own (--nnodes)", "leave it out"),
        ("torchrun", ["--rdzv_endpoint=a:1"], "--rdzv_endpoint=a:1", "leave it out"),
        ("torchrun", ["--rdzv-backend", "c10d"], "--rdzv-backend", "leave it out"),
        ("torchrun", ["--standalone"], "--standalone", "leave it out"),
        ("torchrun", ["--max_restarts=3"], "--max_restarts=3", "recover.attempts"),
        ("torchrun", ["-m"], "-m", "train.script"),
        ("torchrun", ["--virtual-local-rank"], "--virtual-local-rank", "visible_gpus: own"),
        ("torchrun", ["train.py"], "launcher_args begins with 'train.py'", "options of the launcher"),
        ("torchrun", ["--tee", "3", "--"], "-- is dslaunch's own", "leave it out"),
        ("deepspeed", ["--master_port", "1"], "--master_port", "leave it out"),
        ("deepspeed", ["--hostfile", "hosts"], "--hostfile", "leave it out"),
        ("deepspeed", ["--no-local-rank"], "--no-local-rank", "train.script"),
        ("accelerate", ["--num_processes", "8"], "--num_processes", "leave it out"),
        ("accelerate", ["--main-process-ip=a"], "--main-process-ip=a", "leave it out"),
        ("accelerate", ["--deepspeed_multinode_launcher", "pdsh"], "--deepspeed_multinode_launcher", "leave it out"),
        ("accelerate", ["--gpu_ids", "0,1"], "--gpu_ids", "the scheduler"),
        ("composer", ["-n", "8"], "-n", "leave it out"),
        ("composer", ["--world_size=8"], "--world_size=8", "leave it out"),
        ("srun", ["--mpi=pmix"], "launcher srun takes no launcher_args", "slurm.srun"),
        ("node", ["--tee"], "launcher node takes no launcher_args", "train.command"),
        ("job", ["--tee"], "launcher job takes no launcher_args", "train.command"),
    ],
)
def test_launcher_arguments_that_contradict_the_job_file_are_refused(launcher, words, own, hint):
    listed = json.dumps(words)
    ((said, _),) = refused(f"train: {{script: x.py, launcher: {launcher}, launcher_args: {listed}}}\n{GPUS}")
    assert own in said
    assert hint in said.partition(" -> ")[2]


@pytest.mark.parametrize(
    ("launcher", "words"),
    [
        ("torchrun", ["--tee", "3", "--rdzv_conf=timeout=900", "--role", "trainer", "--numa-binding=node"]),
        ("deepspeed", ["--bind_cores_to_rank", "--log_level", "error"]),
        (
            "accelerate",
            ["--config_file", "fsdp.yaml", "--mixed_precision", "bf16", "--num_cpu_threads_per_process=4"],
        ),
        ("composer", ["-v"]),
    ],
)
def test_other_arguments_reach_the_launcher_word_for_word(launcher, words):
    one = made(f"train: {{script: x.py, launcher: {launcher}, launcher_args: {json.dumps(words)}}}\n{GPUS}")
    script = node_script(one)
    line = script.partition('node/supervise.py"')[2].partition(" -- ")[0].replace("\\\n", " ")
    flags = subprocess.run(["bash", "-c", f"logs=L; printf '%s\\0' {line}"], capture_output=True, check=True).stdout
    given = [word.decode() for word in flags.split(b"\0")[:-1] if not word.startswith(b'"')]
    assert [word.partition("=")[2] for word in given if word.startswith("--launcher-arg=")] == words
    assert any("finds none of it" in note for note in one.notes) == ("--tee" in words)


@pytest.mark.parametrize(
    ("train", "env", "words"),
    [
        ("launcher: node", "", "the reference trainer does not"),
        ("script: x.py, launcher: node, visible_gpus: own", "", "visible_gpus is for ranks"),
        ("script: x.py, launcher: node, numa: auto", "", "numa is for ranks"),
        ("launcher: job", "", "the reference trainer does not"),
        ("script: x.py, launcher: job, numa: auto", "", "numa is for ranks"),
        ("script: x.py, launcher: job", "env: {DLTS_HOSTFILE: /h}", "DLTS_HOSTFILE stands in env"),
        ("script: x.py, launcher: node", "env: {NNODES: '2'}", "NNODES stands in env"),
        ("script: x.py, numa: [3, 1]", "", "numa names 2 NUMA nodes, and a node has 4 ranks"),
        ("script: x.py, numa: [3, 1, 2, 0], launcher_args: [--numa-binding, node]", "", "binds ranks to cores"),
    ],
)
def test_a_field_that_this_launcher_cannot_act_on_is_refused(train, env, words):
    model = "" if "script" in train else "model: gpt-demo\n"
    said = [text for text, _ in refused(f"{model}train: {{{train}}}\n{env}\n{GPUS}")]
    assert any(words in text for text in said), said


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("visible_gpus: own", "visible_gpus own without GPUs"),
        ("numa: auto", "numa auto without GPUs"),
        ("launcher: accelerate", "accelerate starts one rank on a node without GPUs"),
    ],
)
def test_what_needs_gpus_is_refused_without_them(train, words):
    ((said, _),) = refused(f"train: {{script: x.py, {train}}}\nresources: {{processes_per_node: 2}}\n")
    assert words in said


@pytest.mark.parametrize(
    ("given", "nodes", "there", "absent"),
    [
        ([], 2, {"--multi_gpu", "--deepspeed_multinode_launcher=standard"}, ()),
        ([], 1, {"--multi_gpu"}, ("--deepspeed_multinode_launcher",)),
        (["--config-file=fsdp.yaml"], 2, {"--config-file=fsdp.yaml"}, ("--multi_gpu",)),
        (["--use_deepspeed"], 2, {"--deepspeed_multinode_launcher=standard"}, ("--multi_gpu",)),
    ],
)
def test_accelerate_starts_ranks_on_this_node_alone(given, nodes, there, absent):
    """`--use_deepspeed` on two nodes would otherwise log in to all of them from each."""
    options = supervise.Options("accelerate", nodes, 4, "/l", 1, 1, False, False, ["x"], launcher_args=tuple(given))
    where = supervise.Place(nodes - 1, "n0", 2000, [], "")
    words = supervise.command(options, where, python="py", rank_py="rank.py", plan="p")
    assert words[:3] == ["py", "-m", "accelerate.commands.launch"]
    assert words[-4:] == ["--no_python", "py", "rank.py", "p"]
    assert there <= set(words)
    assert {f"--num_machines={nodes}", f"--num_processes={4 * nodes}", f"--machine_rank={nodes - 1}"} <= set(words)
    assert not [word for word in words if word.startswith(tuple(absent))] if absent else True


def test_accelerate_gets_the_deepspeed_config_itself():
    train = "script: x.py, launcher: accelerate, launcher_args: [--use_deepspeed], deepspeed: {train_batch_size: 16}"
    one = made(f"train: {{{train}}}\n{GPUS}")
    assert one.command == ("python3", "-u", "x.py")
    words = node_script(one).replace("\\\n", " ").split()
    at = words.index("--launcher-arg=--deepspeed_config_file")
    assert words[at + 1] == '--launcher-arg="$here/ds_config.json"'


# --- launchers that start ranks ---------------------------------------------------------------------------

# What accelerate 1.15 and composer 0.3x document, as far as dslaunch gives it: anything else is an error.
ACCELERATE = """
import argparse, os, subprocess, sys
parser = argparse.ArgumentParser(allow_abbrev=False)
for name in ("num_machines", "num_processes", "machine_rank", "main_process_port", "max_restarts"):
    parser.add_argument(f"--{name}", type=int, required=True)
parser.add_argument("--main_process_ip", required=True)
parser.add_argument("--rdzv_backend", choices=["static"])
parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16", "fp8"], default="no")
for name in ("same_network", "multi_gpu", "no_python"):
    parser.add_argument(f"--{name}", action="store_true")
parser.add_argument("--deepspeed_multinode_launcher", choices=["pdsh", "standard"], default="pdsh")
parser.add_argument("script")
parser.add_argument("rest", nargs=argparse.REMAINDER)
asked = parser.parse_args()
assert asked.no_python and asked.same_network, asked
each = asked.num_processes // asked.num_machines if asked.multi_gpu else 1
os.environ.update(MASTER_ADDR=asked.main_process_ip, MASTER_PORT=str(asked.main_process_port))
os.environ["ACCELERATE_MIXED_PRECISION"] = asked.mixed_precision
ranks = []
for local in range(each):
    mine = {"RANK": str(asked.machine_rank * each + local), "LOCAL_RANK": str(local)}
    mine = {**mine, "WORLD_SIZE": str(asked.num_processes)} if asked.multi_gpu else {}
    ranks.append(subprocess.Popen([asked.script, *asked.rest], env={**os.environ, **mine}))
sys.exit(max(rank.wait() for rank in ranks) and 1)
"""
COMPOSER = """
import argparse, os, subprocess, sys
parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("-n", "--nproc", type=int)
parser.add_argument("-v", "--verbose", action="store_true")
parser.add_argument("-c", "--command_mode", action="store_true")
parser.add_argument("-m", "--module_mode", action="store_true")
for name in ("world_size", "node_rank", "master_port"):
    parser.add_argument(f"--{name}", type=int)
parser.add_argument("--master_addr")
parser.add_argument("script")
parser.add_argument("rest", nargs="...")
asked = parser.parse_args()
ranks = []
for local in range(asked.nproc):
    number = asked.node_rank * asked.nproc + local
    mine = {"RANK": number, "WORLD_SIZE": asked.world_size, "LOCAL_RANK": local, "MASTER_ADDR": asked.master_addr,
            "MASTER_PORT": asked.master_port, "LOCAL_WORLD_SIZE": asked.nproc}
    mine = {name: str(value) for name, value in mine.items()}
    run = [] if asked.command_mode else [sys.executable]
    ranks.append(subprocess.Popen(
        [*run, asked.script, *map(os.path.expandvars, asked.rest)], env={**os.environ, **mine}
    ))
sys.exit(max(rank.wait() for rank in ranks))
"""


@pytest.fixture
def stubs(tmp_path: Path) -> dict[str, str]:
    """An environment in which accelerate and composer are importable, and start ranks as theirs do."""
    for path, text in (("accelerate/commands/launch.py", ACCELERATE), ("composer/cli/__main__.py", COMPOSER)):
        file = tmp_path / "stubs" / path
        file.parent.mkdir(parents=True)
        file.write_text(text)
        for folder in (file.parent, file.parent.parent):
            (folder / "__init__.py").touch()
    return {"PYTHONPATH": str(tmp_path / "stubs")}


def both(home: Path, launcher: str, *argv: str, flags: tuple[str, ...] = (), **env: str) -> list[Node]:
    """The two nodes of a job on this machine, once they have ended."""
    nodes = [
        Node(home, launcher, nodes=2, per_node=2, rank=i, flags=("--same-host", *flags), env=env) for i in (0, 1)
    ]
    nodes[1].mark = nodes[0].mark
    started = [node.start(*argv) for node in nodes]
    for process in started:
        process.wait(timeout=120)
    assert nodes[0].left() == []
    return nodes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "flag"), [("accelerate", "--launcher-arg=--mixed_precision=bf16"), ("composer", "--launcher-arg=-v")]
)
def test_every_rank_of_both_nodes_has_its_place(tmp_path, stubs, launcher, flag):
    show = "import os, sys, json; json.dump([dict(os.environ), sys.argv[1:]], open('seen' + os.environ['RANK'], 'w'))"
    nodes = both(tmp_path, launcher, sys.executable, "-c", show, "$HOME ~", flags=(flag,), WORLD_SIZE="9", **stubs)
    assert [node.err for node in nodes] == ["", ""]
    for number in range(4):
        env, argv = json.loads((tmp_path / f"seen{number}").read_text())
        assert argv == ["$HOME ~"]
        assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) == (str(number), str(number % 2), "4")
        assert env.get("ACCELERATE_MIXED_PRECISION") == ("bf16" if launcher == "accelerate" else None)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", "composer"])
def test_the_code_is_that_of_the_rank_that_failed(tmp_path, stubs, launcher):
    program = "import os; os._exit(7 if os.environ['RANK'] == '3' else 0)"
    nodes = both(tmp_path, launcher, sys.executable, "-c", program, **stubs)
    words = [json.loads((tmp_path / f"logs/node-000{i}.json").read_text()) for i in (0, 1)]
    assert [word["code"] for word in words] == [0, 7]
    assert "rank 3 (local 1)" in nodes[1].err


@pytest.mark.slow
def test_a_single_rank_of_accelerate_is_a_world_of_one(tmp_path, stubs):
    node = Node(tmp_path, "accelerate", env=stubs)
    assert node.run("sh", "-c", 'test "$RANK/$WORLD_SIZE" = 0/1') == 0


@pytest.mark.slow
def test_a_launcher_that_is_not_installed_is_named(tmp_path):
    node = Node(tmp_path, "composer", per_node=2)
    assert node.run("true") == 1
    assert "composer on" in node.err
    assert "No module named" in node.err


# --- a program that starts the ranks of all nodes --------------------------------------------------------


def test_one_machine_has_no_other_nodes_to_reach():
    with pytest.raises(UserError, match="one machine has no other nodes to reach"):
        local.render(made("train: {command: [mpirun, t], launcher: job}\nresources: {nodes: 2}\n"))


def test_it_has_the_job_s_numbers_and_no_place_of_its_own(tmp_path):
    node = Node(tmp_path, "job", nodes=3, per_node=4)
    assert node.python("import json, os; json.dump(dict(os.environ), open('told.json', 'w'))") == 0
    told = json.loads((tmp_path / "told.json").read_text())
    assert (told["NNODES"], told["NPROC_PER_NODE"]) == ("3", "4")
    assert {"MASTER_ADDR", "MASTER_PORT"} <= set(told)
    assert not [name for name in told if name.startswith("PET_") or name in ("RANK", "WORLD_SIZE", "NODE_RANK")]


@pytest.mark.slow
def test_what_starts_ranks_elsewhere_is_not_told_that_time_is_nearly_up(tmp_path):
    node = Node(tmp_path, "job", nodes=3)
    process = node.start("sh", "-c", 'trap "exit 9" USR2; touch ready; for n in 1 2 3 4; do sleep 0.5; done; exit 3')
    until(lambda: (tmp_path / "ready").exists())
    process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=60) == 3


# --- a program that starts its ranks itself ---------------------------------------------------------------


@pytest.mark.slow
def test_a_program_of_its_own_is_told_its_place_once_per_node(tmp_path):
    words = (
        "NODE_RANK",
        "NNODES",
        "NPROC_PER_NODE",
        "MASTER_ADDR",
        "PET_NNODES",
        "PET_NODE_RANK",
        "RANK",
        "WORLD_SIZE",
    )
    tell = " ".join(f'"{word}=${{{word}-}}"' for word in words)
    nodes = both(tmp_path, "node", "bash", "-c", f"echo {tell}", RANK="1", WORLD_SIZE="2", PET_NNODES="7")
    for i, node in enumerate(nodes):
        place = f"NODE_RANK={i} NNODES=2 NPROC_PER_NODE=2 MASTER_ADDR=localhost PET_NNODES=2 PET_NODE_RANK={i}"
        assert f"[rank {i}] {place} RANK= WORLD_SIZE=\n" in node.out
        assert node.record(i)["code"] == 0


@pytest.mark.slow
def test_an_operators_elastic_rendezvous_is_left_to_the_programs_own_torchrun(tmp_path):
    node = Node(tmp_path, "node", env={"PET_RDZV_ENDPOINT": "w0:1", "PET_NNODES": "1:4"})
    assert node.run("sh", "-c", 'test "$PET_NNODES-$PET_RDZV_ENDPOINT-${PET_NODE_RANK-no}" = 1:4-w0:1-no') == 0


@pytest.mark.slow
def test_the_program_of_a_node_that_fails_is_named(tmp_path):
    node = Node(tmp_path, "node", per_node=4)
    assert node.run("sh", "-c", "echo last words; exit 9") == 9
    assert f"the program of node 0 on {socket.gethostname()} ended with exit code 9 first" in node.err
    assert "    last words" in node.err


BELOW = """
import os, signal, subprocess, sys, time
from pathlib import Path
signal.signal(signal.SIGUSR2, lambda *_: Path("noted" + sys.argv[1]).touch())
print("ready", sys.argv[1], flush=True)
if sys.argv[1] == "0":
    worker = os.fork()
    if not worker:
        signal.signal(signal.SIGUSR2, lambda *_: Path("worker").touch())
        time.sleep(60)
        os._exit(0)
while not Path("noted" + sys.argv[1]).exists(): time.sleep(0.05)
time.sleep(0.5)
if sys.argv[1] == "0": os.kill(worker, signal.SIGKILL); os.wait()
"""


@pytest.mark.slow
def test_a_warning_reaches_the_ranks_behind_the_program_and_not_their_workers(tmp_path):
    node = Node(tmp_path, "node", per_node=2)
    starter = (
        "import subprocess, sys\n"
        "for one in [subprocess.Popen([sys.executable, '-c', sys.argv[1], number]) for number in '01']: one.wait()"
    )
    process = node.start("bash", "-c", '"$@"; exit $?', "bash", sys.executable, "-c", starter, BELOW)
    log = node.logs / "rank-00000.log"
    until(lambda: log.exists() and log.read_text().count("ready") == 2)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(30) == 0
    assert sorted(path.name for path in tmp_path.glob("noted*")) == ["noted0", "noted1"]
    assert not (tmp_path / "worker").exists()


@pytest.mark.slow
def test_a_program_of_its_own_that_stands_still_hangs_by_what_it_prints(tmp_path):
    node = Node(tmp_path, "node", per_node=2, flags=("--hang", "2"))
    line = " iteration %8d/  250000 | consumed samples:  31 | elapsed time per iteration (ms): 100.0 |"
    program = f"for n in 1 2 3 4 5; do printf '{line}\\n' $n; sleep 1.1; done; sleep 600"
    assert node.run("bash", "-c", program) == 124
    word = json.loads((node.logs / "node-0000.json").read_text())
    assert word["hang"]["step"] == 5
    assert 8 < word["hang"]["limit"] < 25  # ten steps
    assert node.left() == []


RANKS = """
import os, sys
import torch, torch.distributed as d
d.init_process_group("gloo")
x = torch.ones(1)
d.all_reduce(x)
print("sum", int(x), os.environ["RANK"], flush=True)
d.destroy_process_group()
sys.exit(int(os.environ["RANK"] == sys.argv[1]) * 5)
"""


@pytest.mark.slow
def test_a_torchrun_of_ones_own_that_fails_ends_its_node(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    node = Node(tmp_path, "node", per_node=2)
    assert node.run(str(Path(sys.executable).parent / "torchrun"), "ranks.py", "1") == 1  # torchrun's own code
    assert "the program of node 0" in node.err
    assert node.left() == []


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "node"])
def test_a_job_without_a_model_runs(tmp_path, monkeypatch, launcher):
    """Over two nodes; a torchrun of one's own needs no argument, as where it runs stands in its own variables."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "ranks.py").write_text(RANKS)
    torchrun = str(Path(sys.executable).parent / "torchrun")
    program = (
        {"command": [torchrun, "ranks.py", "none"]} if launcher == "node" else {"script": "ranks.py", "args": ["n"]}
    )
    job = {
        "name": "own",
        "train": {**program, "launcher": launcher},
        "resources": {"nodes": 2, "processes_per_node": 2},
    }
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    done = subprocess.run([DSLAUNCH, "local", "job.yaml"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sum 4") == 4
    assert "neither memory nor time is predicted" in done.stderr
    status = subprocess.run([DSLAUNCH, "status", "own"], capture_output=True, text=True, timeout=60)
    assert "done" in status.stdout.lower() + status.stderr.lower(), status


# --- one GPU for each rank, and what lies near it ---------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "local", "amd", "masks"),
    [
        ({}, 2, False, {"CUDA_VISIBLE_DEVICES": "2"}),
        ({}, 2, True, {"ROCR_VISIBLE_DEVICES": "2"}),
        ({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, 2, False, {"CUDA_VISIBLE_DEVICES": "6"}),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1a,GPU-2b"}, 1, False, {"CUDA_VISIBLE_DEVICES": "GPU-2b"}),
        ({"CUDA_VISIBLE_DEVICES": "3"}, 2, False, {"CUDA_VISIBLE_DEVICES": "3"}),  # Slurm's --gpus-per-task gave it
        ({"ROCR_VISIBLE_DEVICES": "0,1,2,3"}, 3, True, {"ROCR_VISIBLE_DEVICES": "3"}),
        (  # HIP counts among those that ROCm's runtime has left
            {"ROCR_VISIBLE_DEVICES": "4,5,6,7", "HIP_VISIBLE_DEVICES": "2,3"},
            1,
            True,
            {"ROCR_VISIBLE_DEVICES": "7", "HIP_VISIBLE_DEVICES": "0"},
        ),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, 1, False, {"CUDA_VISIBLE_DEVICES": "1"}),
    ],
)
def test_a_rank_sees_its_own_gpu(given, local, amd, masks):
    assert rank.own_gpu(given, local, amd=amd) == masks


@pytest.mark.slow
def test_a_rank_without_a_gpu_of_its_own_does_not_start(tmp_path):
    node = Node(tmp_path, per_node=4, rank=3, flags=("--own-gpu",), env={"CUDA_VISIBLE_DEVICES": "0,1"})
    assert node.run("true") == 78
    assert "CUDA_VISIBLE_DEVICES=0,1 has no GPU for local rank 3" in node.err


@pytest.mark.slow
def test_a_rank_with_its_own_gpu_counts_it_as_number_0(tmp_path):
    node = Node(tmp_path, per_node=4, rank=3, flags=("--own-gpu",), env={"CUDA_VISIBLE_DEVICES": "4,5,6,7"})
    assert node.run("sh", "-c", "echo $CUDA_VISIBLE_DEVICES $LOCAL_RANK $DSLAUNCH_LOCAL_RANK $RANK") == 0
    assert "[rank 3] 7 0 3 3\n" in node.out


def fake(root: Path, files: dict[str, str]) -> str:
    for path, text in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return f"{root}/"


def nvidia(minor: int, address: str, node: int) -> dict[str, str]:
    told = f"Model: \t\t NVIDIA A100-SXM4-40GB\nGPU UUID: \t GPU-{minor}ab\nDevice Minor: \t {minor}\n"
    pci = f"sys/bus/pci/devices/{address.lower()}/numa_node"
    return {f"proc/driver/nvidia/gpus/{address}/information": told, f"dev/nvidia{minor}": "", pci: f"{node}\n"}


def amd(number: int, location: int, address: str, node: int) -> dict[str, str]:
    told = f"cpu_cores_count 0\nsimd_count 440\nlocation_id {location}\ndomain 0\ndrm_render_minor {128 + number}\n"
    return {
        f"sys/class/kfd/kfd/topology/nodes/{4 + number}/properties": told,
        f"dev/dri/renderD{128 + number}": "",
        f"sys/bus/pci/devices/{address}/numa_node": f"{node}\n",
    }


A100 = {**nvidia(0, "0000:07:00.0", 3), **nvidia(1, "0000:0F:00.0", 1), **nvidia(2, "0000:47:00.0", 0)}
MI250 = {
    "sys/class/kfd/kfd/topology/nodes/0/properties": "cpu_cores_count 64\nsimd_count 0\nlocation_id 0\n",
    **amd(0, 0xC100, "0000:c1:00.0", 3),
    **amd(1, 0xC600, "0000:c6:00.0", 3),
    **amd(2, 0xC900, "0000:c9:00.0", 1),
}


@pytest.mark.parametrize(
    ("files", "gone", "env", "numa"),
    [
        (A100, "", {}, [3, 1, 0, None]),
        (A100, "dev/nvidia0", {"CUDA_VISIBLE_DEVICES": "0,1"}, [1, 0]),  # hidden by the job's cgroup, renumbered
        (A100, "", {"CUDA_VISIBLE_DEVICES": "1,2"}, [1, 0]),
        (A100, "", {"CUDA_VISIBLE_DEVICES": "GPU-2ab,GPU-0ab"}, [0, 3]),
        (A100, "", {"CUDA_VISIBLE_DEVICES": "MIG-7,MIG-8"}, [None, None]),
        (MI250, "", {"ROCR_VISIBLE_DEVICES": "0,1,2"}, [3, 3, 1]),
        (nvidia(0, "0000:07:00.0", -1), "", {}, [None]),  # a machine with one node says -1
        ({}, "", {}, [None]),
    ],
)
def test_a_gpus_numa_node(tmp_path, files, gone, env, numa):
    root = fake(tmp_path, files)
    if gone:
        (tmp_path / gone).unlink()
    assert [rank.numa_of_gpu(env, local, root) for local in range(len(numa))] == numa


@pytest.mark.parametrize(("text", "cpus"), [("0-2,64-65\n", {0, 1, 2, 64, 65}), ("7\n", {7}), ("\n", set())])
def test_the_cpus_of_a_numa_node(tmp_path, text, cpus):
    root = fake(tmp_path, {"sys/devices/system/node/node1/cpulist": text})
    assert rank.cpus_of(1, root) == cpus
    assert rank.cpus_of(2, root) == set()


BOUND = """
import ctypes, os, sys
sys.path.insert(0, sys.argv[1])
from launcher.node import rank
print(repr(rank.near(eval(sys.argv[2]), {}, 0, sys.argv[3])))
print(sorted(os.sched_getaffinity(0)), flush=True)
os.execvp("head", ["head", "-1", "/proc/self/numa_maps"])
"""


def bound(numa: object, root: str) -> tuple[str, list[int], str]:
    argv = [sys.executable, "-c", BOUND, str(HERE.parent), repr(numa), root]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said, cpus, *maps = done.stdout.splitlines()
    return eval(said), json.loads(cpus), maps[0] if maps else ""


def test_a_rank_is_bound_to_the_cpus_of_its_node_that_it_may_use(tmp_path):
    """For real: the affinity, and the policy that the kernel shows of a program started then."""
    last = max(os.sched_getaffinity(0))
    root = fake(tmp_path, {**nvidia(0, "0000:07:00.0", 0), "sys/devices/system/node/node0/cpulist": f"{last},4000"})
    for numa in ((0,), "auto"):
        said, cpus, maps = bound(numa, root)
        assert cpus == [last]
        assert said == "" or "cannot be preferred here" in said  # a container's seccomp profile may forbid it
        assert not maps or ("prefer:0" in maps) == (said == "")


def test_what_cannot_be_bound_is_said_and_what_was_asked_for_by_number_is_refused(tmp_path):
    root = fake(tmp_path, {**nvidia(0, "0000:07:00.0", 1), "sys/devices/system/node/node1/cpulist": "4000-4003"})
    own = sorted(os.sched_getaffinity(0))
    assert bound("auto", root)[:2] == (
        f"NUMA node 1 has the CPUs 4000 to 4003, and this rank may use {len(own)} others: not bound",
        own,
    )
    assert "nothing says which NUMA node" in bound("auto", f"{tmp_path}/none/")[0]
    with pytest.raises(ValueError, match="NUMA node 1 has the CPUs 4000 to 4003"):
        rank.near((1,), {}, 0, root)
    with pytest.raises(ValueError, match="NUMA node 9 has no CPUs"):
        rank.near((9,), {}, 0, root)


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/sys/devices/system/node/node0/cpulist").exists(), reason="this kernel shows no NUMA node"
)
def test_the_binding_reaches_a_rank(tmp_path):
    node = Node(tmp_path, per_node=2, rank=1, flags=("--numa", "999,0"))
    assert node.run("sh", "-c", "grep -c . /proc/self/numa_maps >/dev/null; echo bound") == 0
    node = Node(tmp_path, per_node=2, rank=0, flags=("--numa", "999,0"))
    assert node.run("true") == 78
    assert "NUMA node 999 has no CPUs" in node.err


def test_a_prefix_starts_the_program_of_every_rank():
    for more in ({}, {"model": {"layers": 2, "hidden": 64, "heads": 2, "vocab": 256}}):
        job = {"name": "x", "train": {"script": "t.py", "prefix": ["nsys", "profile"], "config_flag": "none"}, **more}
        made = plan.make(spec.load(json.dumps(job), name="job.yaml").spec)
        assert made.command[:4] == ("nsys", "profile", "python3", "-u")
        assert "  nsys profile python3 -u t.py" in slurm.render(made).text("node.sh")
