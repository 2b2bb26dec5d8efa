"""sbatch scripts of others as job files, and those that dslaunch rendered back to what they were rendered from.

data/scripts/ has scripts in the patterns that sites publish: one for each centre, cloud and framework.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher import cli, launchlint, plan, shell, spec, sweep
from launcher.backends import slurm
from launcher.backends.slurm import array
from launcher.errors import UserError
from launcher.imports import Imported, rendered, sbatch, write

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((Path(__file__).parent / "data" / "scripts").glob("*.sbatch"))
GALLERY = sorted((ROOT / "slurm").glob("*/job.yaml"))
VARIABLES = {name: f"/{name.lower()}" for name in
             "HOME PWD WORK SCRATCH DSDIR PROJECT_DIR six_ALL_CCFRWORK six_ALL_CCFRSCRATCH".split()}  # fmt: skip


@pytest.fixture(autouse=True)
def no_site_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("DSLAUNCH_SITE", raising=False)


def imported(name: str) -> Imported:
    path = ROOT / "tests" / "data" / "scripts" / f"{name}.sbatch"
    return sbatch.read(path.read_text(), name=str(path))


def read(body: str, *, head: str = "#SBATCH -N 2 --gpus-per-node=4\nexport NCCL_IB_HCA=mlx5\n") -> dict[str, Any]:
    return sbatch.read(f"#!/bin/bash\n{head}{body}\n", name="x.sbatch").job


def at(job: Any, path: str) -> Any:
    for key in path.split("."):
        job = job[int(key)] if isinstance(job, (list, tuple)) else job[key]
    return job


def said(made: Imported, kind: str) -> str:
    return "\n".join(note.message for note in made.notes if note.kind == kind)


# --- whole scripts --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_becomes_a_job_file_that_loads_and_renders(path):
    made = sbatch.read(path.read_text(), name=path.name)
    assert made.typed / (made.typed + made.raw) >= 0.8
    text, problems, variables = write.checked(made, name=path.name)
    assert problems == []
    assert variables <= set(VARIABLES)
    document = spec.load(text, name="job.yaml", environ=VARIABLES)
    if document.spec.sweep:
        assert len(sweep.points(document.spec.sweep)) > 1
    else:
        script = slurm.render(plan.make(document.spec)).text("job.sbatch")
        assert script.startswith("#!/bin/bash")


EXPECTED: dict[str, dict[str, Any]] = {
    "jsc-torchrun": {
        "slurm.address_suffix": "i", "slurm.cpu_bind": "none", "slurm.gpus_as": "gres", "resources.cpus_per_node": 48,
        "modules": ["Stages/2024", "GCC", "OpenMPI", "CUDA/12", "PyTorch"], "venv": "/p/project/cstdl/envs/tune",
        "train.script": "finetune.py", "train.config_flag": "none", "slurm.time": "0-06:00:00",
    },
    "lumi-singularity": {
        "train.launcher": "srun", "resources.fabric": "slingshot", "resources.cpus_per_node": 56,
        "container.runtime": "singularity", "container.mounts.0": "/scratch/project_465000001:/data",
        "modules.use": ["/appl/local/containers/ai-modules"], "setup": ["${WITH_CONDA}"], "resources.memory": "0",
        "slurm.cpu_bind": "mask_cpu:0xfe000000000000,0xfe00000000000000,0xfe0000,0xfe000000,0xfe,0xfe00,"
        "0xfe00000000,0xfe0000000000",
    },
    "leonardo-accelerate": {
        "train.launcher": "accelerate", "train.script": "scripts/sft.py", "slurm.qos": "boost_qos_dbg",
        "train.launcher_args": ["--config_file", "configs/zero3.yaml", "--mixed_precision", "bf16"],
        "venv": {"env": "WORK", "append": "/envs/sft"}, "env.HF_HOME": {"env": "WORK", "append": "/hf"},
    },
    "marenostrum-conda": {
        "conda.root": "/gpfs/apps/MN5/ACC/ANACONDA/2023.07", "conda.env": "/gpfs/projects/ehpc42/conda/llm",
        "slurm.time": "02-00:00:00", "resources.gpus_per_node": 4, "train.args.0": "--epochs",
    },
    "jeanzay-srun-python": {
        "train.launcher": "srun", "train.workdir": {"env": "WORK", "append": "/gpt"}, "slurm.warn_before_end": 120,
        "train.args.2": {"env": "DSDIR", "append": "/corpus"}, "slurm.hint": "nomultithread",
    },
    "perlmutter-shifter": {
        "container.runtime": "shifter", "container.modules": ["gpu", "nccl-plugin"],
        "slurm.licenses": ["scratch", "cfs"],
        "slurm.constraint": "gpu&hbm80g", "slurm.gpus_as": "gpus-per-task", "slurm.gpu_bind": "none",
        "resources.gpus_per_node": 4, "train.launcher": "srun",
    },
    "frontier-srun": {
        "resources.gpus_per_node": 8, "slurm.core_spec": 0, "slurm.network": "single_node_vni",
        "modules.swap": {"PrgEnv-cray": "PrgEnv-gnu"}, "stage.0.to": "/mnt/bb/tokenizer.bin",
        "conda": "/lustre/orion/abc123/proj-shared/envs/torch", "slurm.gpu_bind": "closest",
    },
    "alps-edf": {
        "container.environment": "/capstor/store/cscs/swissai/env.toml", "container.runtime": "edf",
        "slurm.network": "disable_rdzv_get", "slurm.mpi": "pmix", "env.OMP_NUM_THREADS": "72",
        "train.workdir": "/iopsstor/scratch/megatron", "slurm.dependency": "singleton", "slurm.requeue": False,
    },
    "snellius-module": {
        "resources.gpus_per_node": 4, "slurm.gpus_as": "gpus", "slurm.cpus_as": "cpus-per-gpu",
        "venv": {"env": "HOME", "append": "/venvs/bert"}, "train.launcher": "srun",
    },
    "aws-efa-pyxis": {
        "resources.fabric": "efa", "resources.gpus_per_node": 8, "slurm.gpus_as": "none",
        "slurm.wait_all_nodes": True,
        "container.image": "/fsx/apps/pytorch-fsdp.sqsh", "secrets.HF_TOKEN": {"from_env": "HF_TOKEN"},
        "train.script": "/fsx/src/train.py",
    },
    "azure-ndv5": {
        "resources.fabric": "azure-nd", "container.mount_home": False, "train.launcher": "srun",
        "container.image": "nvcr.io#nvidia/nemo:24.09", "container.workdir": "/shared/megatron", "slurm.mpi": "pmix",
    },
    "gcp-tcpxo": {
        "resources.fabric": "gcp-tcpxo", "train.module": "litgpt", "container.name": "litgpt",
        "container.host_env": ["NCCL_FASTRAK_CTRL_DEV"], "secrets.WANDB_API_KEY": {"from_env": "WANDB_API_KEY"},
    },
    "coreweave-neox": {
        "train.launcher": "job", "resources.fabric": "coreweave", "train.workdir": "/mnt/home/gpt-neox",
        "slurm.comment": "neox_run_3", "slurm.reservation": "training",
    },
    "oci-rdma": {
        "train.launcher": "deepspeed", "train.config_flag": "--deepspeed_config", "train.global_batch": 64,
        "train.micro_batch": 2, "train.zero": 2, "train.offload": {"optimizer": "cpu"}, "resources.fabric": "oci",
        "train.optimizer": {"type": "AdamW", "lr": 2e-5, "betas": [0.9, 0.95]}, "train.args": ["--epochs", "1"],
        "train.deepspeed": {"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": False},
        "slurm.exclude": "gpu-[003,017]",
    },
    "bigscience-launcher": {
        "train.script": "pretrain_gpt.py", "train.micro_batch": 2, "train.zero": 1, "conda": "meg",
        "train.workdir": {"env": "six_ALL_CCFRWORK", "append": "/code/Megatron-DeepSpeed"},
        "slurm.account": "six@a100",
    },
    "torchtitan": {
        "train.module": "torchtitan.train", "resources.gpus_per_node": 8, "resources.cpus_per_node": 96,
        "train.args.1": "./torchtitan/models/llama3/train_configs/llama3_70b.toml",
    },
    "composer-llmfoundry": {
        "train.launcher": "composer", "train.script": "train/train.py", "slurm.requeue": True,
        "train.workdir": "/data/llm-foundry/scripts", "container.image": "/images/llm-foundry.sqsh",
    },
    "megatron-task-per-gpu": {
        "train.launcher": "srun", "resources.gpus_per_node": 8, "slurm.gpus_as": "none", "slurm.overcommit": True,
        "train.script": "pretrain_gpt.py", "name": "llmservice-gpt3-175b",
    },
    "trl-vllm": {
        "resources.nodes": 4, "services.0.name": "vllm", "services.0.port": 8000, "train.launcher": "accelerate",
        "services.0.ready": {"port": 8000},
    },
    "openrlhf-ray": {
        "resources.nodes": 1, "services.0.name": "ray-head", "services.1.name": "ray-workers", "services.1.nodes": 3,
        "services.1.after": ["ray-head"], "container.image": "nvcr.io/nvidia/pytorch:24.07-py3",
    },
    "nanotron": {
        "train.script": "/fsx/nanotron/run_train.py", "conda.root": "/fsx/miniforge3", "slurm.begin": "now+0minutes",
        "env.USE_FAST": "1", "resources.nodes": 2,
    },
    "olmo-wrapper": {
        "slurm.time_min": "8:00:00", "slurm.distribution": "block:block", "train.launcher": "srun",
        "resources.nodes": 32,
    },
    "axolotl": {
        "train.launcher": "accelerate", "train.module": "axolotl.cli.train", "train.args": ["config.yml"],
        "resources.memory": "480G", "slurm.memory_as": "mem-per-gpu",
        "conda": {"env": "axolotl", "root": {"env": "HOME", "append": "/miniconda3"}},
        "secrets.HUGGING_FACE_HUB_TOKEN": {"from_env": "HUGGING_FACE_HUB_TOKEN"},
    },
    "local-staging-sweep": {
        "sweep.over": {"env.LR": ["1e-4", "3e-4", "1e-3"]}, "sweep.parallel": 2, "slurm.gpu_type": "a100",
        "stage.0": {"source": "/project/def-someone/imagenet.tar", "to": "imagenet"}, "slurm.tmp": "200G",
    },
    "llamafactory-wrapper": {
        "train.launcher": "node", "train.command": ["llamafactory-cli", "train", "examples/llama3_full_sft.yaml"],
        "venv": "/opt/venvs/lf", "env.FORCE_TORCHRUN": "1",
    },
    "per-node-loop": {
        "train.script": "train.py", "resources.nodes": 2, "resources.cpus_per_node": 96, "slurm.oversubscribe": True,
    },
    "one-node-python": {
        "uv": {"project": "."}, "train.script": "train.py", "resources.nodes": 1, "resources.memory": "64G",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", [path.stem for path in SCRIPTS])
def test_what_matters_arrives_in_its_field(name):
    job = imported(name).job
    assert {path: at(job, path) for path in EXPECTED[name]} == EXPECTED[name]


def test_run_time_values_stay_with_the_names_that_dslaunch_gives_them():
    assert imported("trl-vllm").job["train"]["args"][-2:] == ["--vllm_server_host", {"host": "vllm"}]
    args = imported("local-staging-sweep").job["train"]["args"]
    assert args == [
        "--lr", {"node": "LR"}, "--data", {"node": "local", "append": "/imagenet/imagenet"},
        "--out", {"job": "id", "prepend": "runs/"},
    ]  # fmt: skip
    assert {"node": "MASTER_ADDR", "prepend": "--master_addr="} in imported("frontier-srun").job["train"]["command"]


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("jsc-torchrun", "left out", "SRUN_CPUS_PER_TASK: dslaunch hands the CPUs on to srun"),
        ("jsc-torchrun", "left out", "[ENV008]"),  # a time-out that means for ever
        ("oci-rdma", "left out", "--hostfile"),
        ("bigscience-launcher", "left out", "CUDA_LAUNCH_BLOCKING"),
        ("aws-efa-pyxis", "carried", "LD_PRELOAD -> train.prefix"),
        ("nanotron", "left out", "--array=1-3%1: no line uses its index"),
        ("per-node-loop", "left out", "python prepare_data.py --out /data/tok: it prepares"),
        ("gcp-tcpxo", "carried", "nccl-env-profile.sh: resources.fabric: gcp-tcpxo reads it itself"),
        ("alps-edf", "carried", "numactl --membind=0-3 -> train.prefix"),
    ],
)
def test_nothing_is_dropped_without_a_word(name, kind, words):
    assert words in said(imported(name), kind)


def test_a_secret_s_value_goes_nowhere():
    made = imported("local-staging-sweep")
    text = write.text(made.job) + "\n".join(note.message for note in made.notes)
    assert "0123456789abcdef" not in text


def test_a_heterogeneous_job_is_a_service_with_nodes_of_its_own():
    text = (
        "#!/bin/bash\n#SBATCH -N 2 --gpus-per-node=4 -p gpu\n#SBATCH hetjob\n#SBATCH -N 1 -p cpu --mem=64G -c 16\n"
        "export NCCL_IB_HCA=mlx5\nsrun --het-group=1 python reward_server.py --port 9000 &\n"
        "srun --het-group=0 torchrun train.py\n"
    )
    job = sbatch.read(text, name="x").job
    assert (job["resources"]["nodes"], job["slurm"]["partition"]) == (2, "gpu")
    assert job["services"] == [
        {
            "name": "reward", "command": ["python", "reward_server.py", "--port", "9000"], "port": 9000,
            "ready": {"port": 9000}, "component": {"partition": "cpu"}, "gpus_per_node": 0, "cpus_per_node": 16,
            "memory": "64G",
        }
    ]  # fmt: skip


def test_a_secret_on_the_command_line_becomes_a_variable_of_the_submitting_shell():
    secret = "hf_" + "a1b2" * 8
    program = f"srun torchrun t.py --hub_token {secret} --key $MY_API_KEY"
    text = f"#SBATCH --gpus-per-node=1\nwandb login {secret}\n{program}\n"
    made = sbatch.read(text, name="x")
    body, problems, _ = write.checked(made, name="x")
    assert problems == []
    assert secret not in body + "".join(note.message for note in made.notes)
    assert made.job["secrets"] == {"HF_TOKEN": {"from_env": "HF_TOKEN"}, "MY_API_KEY": {"from_env": "MY_API_KEY"}}
    assert made.job["train"]["command"][2].endswith('--hub_token "${HF_TOKEN}" --key "${MY_API_KEY}"')


# --- single lines ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "path", "value"),
    [
        ("srun torchrun --nproc_per_node=4 --no-python ./run.sh a", "train.command", ["./run.sh", "a"]),
        ("srun torchrun --nproc_per_node=4 -m pkg.train a", "train.module", "pkg.train"),
        ("srun python -m torch.distributed.launch --use_env t.py", "train.script", "t.py"),
        ("deepspeed --include localhost:0,1 t.py --x", "train.launcher", "deepspeed"),
        ("srun bash train.sh --x", "train.command", ["bash", "train.sh", "--x"]),
        ("srun ./train.sh", "train.launcher", "node"),
        ("srun --ntasks-per-node=4 python t.py", "train.launcher", "srun"),
        ("srun --ntasks-per-node=4 /opt/conda/bin/python t.py", "train.command", ["/opt/conda/bin/python", "t.py"]),
        ("srun env A=1 torchrun t.py", "env.A", "1"),
        ("A=1 srun torchrun t.py", "env.A", "1"),
        ("srun --export=ALL,A=1 torchrun t.py", "env.A", "1"),
        ("srun --mem-bind=local torchrun t.py", "slurm.mem_bind", "local"),
        ("srun --kill-on-bad-exit=0 torchrun t.py", "slurm.kill_on_bad_exit", False),
        ("srun --oom-kill-step=1 --slurmd-debug=2 torchrun t.py", "slurm.srun", ["--slurmd-debug=2"]),
        ("srun --site-thing=2 torchrun t.py", "slurm.plugin_options", ["site-thing"]),
        ("srun -n8 bash -c 'CUDA_VISIBLE_DEVICES=$SLURM_LOCALID python t.py'", "train.visible_gpus", "own"),
        ("srun apptainer exec --nv -B $SCRATCH:/data x.sif torchrun t.py", "container.mounts",
         [{"env": "SCRATCH", "append": ":/data"}]),
        ("srun apptainer exec --rocm --cleanenv --pwd /w x.sif torchrun t.py", "container",
         {"runtime": "apptainer", "gpus": "rocm", "clean_env": True, "workdir": "/w", "image": "x.sif"}),
        ("srun --container-image=a.sqsh --container-mounts=$PWD:/w torchrun t.py", "container.mounts",
         [{"env": "PWD", "append": ":/w"}]),
        ("ml purge; ml use /m; ml GCC CUDA\nsrun torchrun t.py", "modules",
         {"purge": True, "use": ["/m"], "load": ["GCC", "CUDA"]}),
        ("module restore mine\nsrun torchrun t.py", "setup", ["module restore mine"]),
        ("micromamba activate e\nsrun torchrun t.py", "conda", {"env": "e", "tool": "micromamba"}),
        ("source env.sh\nsrun torchrun t.py", "source", ["env.sh"]),
        ("cd $SLURM_SUBMIT_DIR/src\nsrun torchrun t.py", "train.workdir", "src"),
        ("cp -r /data/x $TMPDIR/\nsrun torchrun t.py", "stage", [{"source": "/data/x", "to": "x"}]),
        ("for LR in 1 2; do srun torchrun t.py --lr $LR; done", "sweep.over", {"env.LR": ["1", "2"]}),
        ("export NCCL_BLOCKING_WAIT=0\nsrun torchrun t.py", "env.TORCH_NCCL_BLOCKING_WAIT", "0"),
        ("export PATH=/x/bin:$PATH\nsrun torchrun t.py", "env.PATH",
         {"node": "PATH", "prepend": "/x/bin:"}),
        ("A=--x\n[ -n \"$B\" ] && A+=\" --y\"\nsrun torchrun t.py $A", "train.args", ["--x"]),
        ("srun torchrun t.py --x \"$@\"", "train.args", ["--x"]),
        ("srun -n2 enroot import docker://a\nsrun torchrun t.py", "train.script", "t.py"),
        ("export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-4}\nsrun torchrun t.py", "env.OMP_NUM_THREADS", "4"),
        ("go() { srun torchrun t.py --cfg $1; }\ngo a.yaml", "train.args", ["--cfg", "a.yaml"]),
        ("C='torchrun t.py'\neval srun \"$C --x\"", "train.args", ["--x"]),
        ("srun torchrun t.py 2>&1 | tee log.txt", "train.script", "t.py"),
        ("srun bash -c 'module load a; source /v/bin/activate; torchrun t.py'", "venv", "/v"),
        ("srun --cpu-bind=v,mask_cpu=0xff,0xff00 torchrun t.py", "slurm.cpu_bind", "mask_cpu:0xff,0xff00"),
        ("srun --container-image=a --container-env=$X torchrun t.py", "container", "a"),
        ("LIB=/l source /l/profile.sh\nsrun torchrun t.py", "setup", ['LIB=/l source /l/profile.sh']),
        ("N=$(f)\nsrun accelerate launch --config_file a --gradient_accumulation_steps $N t.py",
         "train.launcher_args", ["--config_file", "a"]),
        ("srun $SRUN_ARGS torchrun t.py --x", "train.args", ["--x"]),
        ("srun $MORE -u torchrun t.py --x", "train.args", ["--x"]),
        ("srun $PROGRAM --lr 1", "train.command", [{"env": "PROGRAM"}, "--lr", "1"]),
        ("srun $SRUN_ARGS -u bash -c 'torchrun t.py --x'", "train.args", ["--x"]),
        ("E=--x\nif [ 2 -gt 1 ]; then E=--y; fi\nsrun torchrun t.py $E", "train.args", ["--y"]),
        ("E=a\nif [ $E = b ]; then srun python u.py; else srun torchrun t.py; fi", "train.script", "t.py"),
        ("[ $SLURM_JOB_NUM_NODES -gt 1 ] && X=--far\nsrun torchrun t.py $X", "train.args", ["--far"]),
        ("case a in a) X=1;; *) X=2;; esac\nsrun torchrun t.py $X", "train.args", ["1"]),
        ("A=(--x 1)\nif f; then A=\"${A[@]} --y\"; else A=\"${A[@]} --z\"; fi\nsrun torchrun t.py $A", "train.args",
         ["--x", "1", "--z"]),
        ("export MASTER_ADDR=$(scontrol show hostnames | head -n1)i\nsrun my.sh $MASTER_ADDR:29400", "train.command",
         ["my.sh", {"node": "MASTER_ADDR", "append": ":29400"}]),
        ("srun torchrun_jsc t.py", "slurm.address_suffix", "i"),
        ("srun torchrun_jsc t.py", "train.script", "t.py"),
        ("srun shifter --image=a:b --env X=$HOME/y,Z=1 torchrun t.py", "env",
         {"X": {"env": "HOME", "append": "/y"}, "Z": "1"}),
        ("srun --export=ALL,A=$HOME/y,B=2 torchrun t.py", "env", {"A": {"env": "HOME", "append": "/y"}, "B": "2"}),
        ("srun --ntasks-per-node=4 /opt/env/bin/python t.py", "venv", "/opt/env"),
        ("srun /w/miniconda3/envs/a/bin/python -m torch.distributed.run t.py", "conda", "/w/miniconda3/envs/a"),
        ("T=./env/bin/torchrun\nsrun $T t.py", "venv", "./env"),
        ("mkdir -p /x/$SLURM_JOB_ID\nmkdir logs\nsrun torchrun t.py", "mkdir",
         [{"job": "id", "prepend": "/x/"}, "logs"]),
        ("srun python -c 'import a; a.clean()'\nsrun torchrun t.py", "setup", ["python -c 'import a; a.clean()'"]),
        ("sbcast -pf /l/e.tar.gz /mnt/bb/${USER}/e.tar.gz\nsrun mkdir /mnt/bb/$USER/e\n"
         "srun tar -xzf /mnt/bb/${USER}/e.tar.gz -C /mnt/bb/${USER}/e\nsrun torchrun t.py", "stage",
         [{"source": "/l/e.tar.gz", "to": "e"}]),
        ("srun bash -c 'export LD_LIBRARY_PATH=/x:$LD_LIBRARY_PATH; torchrun t.py'", "env",
         {"LD_LIBRARY_PATH": {"node": "LD_LIBRARY_PATH", "prepend": "/x:"}}),
        ("srun torchrun t.py --out /s/$USER/x runs/$SLURM_JOB_ID", "train.args",
         ["--out", {"env": "USER", "prepend": "/s/", "append": "/x"}, {"job": "id", "prepend": "runs/"}]),
        ("D=/home/$(whoami)/x\nsrun torchrun t.py --d $D", "train.args.1",
         {"env": "USER", "prepend": "/home/", "append": "/x"}),
        ("srun torchrun t.py --d $A:$B", "train.args",
         ["--d", {"env": "A", "append": {"env": "B", "prepend": ":"}}]),
        ("srun numactl --membind=0-3 torchrun t.py", "train.prefix", ["numactl", "--membind=0-3"]),
        ("source /v/bin/activate\nsrun /v/bin/torchrun t.py", "train.script", "t.py"),
        ("R=runs/$(date +%s)\nmkdir -p $R\nsrun torchrun t.py", "mkdir", [{"job": "id", "prepend": "runs/"}]),
        ("D=/d\nsrun torchrun t.py --d $(f $D/x)", "train.command.2", 'exec python -u t.py --d "$(f /d/x)"'),
        ("ulimit -n 65535 || true\nulimit -s unlimited\nulimit -a\nsrun torchrun t.py", "ulimit",
         {"nofile": 65535, "stack": "unlimited"}),
        ("ulimit -n $(ulimit -Hn)\nsrun torchrun t.py", "setup", ['ulimit -n "$(ulimit -Hn)"']),
        ("srun torchrun t.py --d $TMPDIR/x", "train.args", ["--d", {"node": "TMPDIR", "append": "/x"}]),
        ("srun torchrun t.py --d /mnt/bb/$USER/x", "train.args", ["--d", {"node": "local", "append": "/x"}]),
        ("srun torchrun t.py --d /mnt/bb/$USER/x", "local_disk", {"env": "USER", "prepend": "/mnt/bb/"}),
        ("export LD_PRELOAD=/l/x.so\nsrun torchrun t.py", "train.prefix", ["env", "LD_PRELOAD=/l/x.so"]),
        ("export SINGULARITYENV_A=1\nsrun torchrun t.py", "env", {"A": "1"}),
        ("export CC=$(which gcc)\nsrun torchrun t.py", "env.CC", "gcc"),
        ("srun bash -c 'export A=$(hostname | cut -d. -f1); torchrun t.py'", "env.A", {"node": "name"}),
        ("export A=$(hostname | cut -d. -f1)\nsrun torchrun t.py", "env.A", {"node": "MASTER_ADDR"}),
        ("srun my.sh --rdzv_endpoint=$(hostname)", "train.command",
         ["my.sh", {"node": "MASTER_ADDR", "prepend": "--rdzv_endpoint="}]),
        ("P=$(cd ../..; pwd)\nsrun --container-image=i --container-mounts=$P:/w torchrun t.py", "container.mounts",
         [{"env": "PWD", "append": "/../..:/w"}]),
        ("export A=$(hostname | tr a b)\nsrun torchrun t.py", "setup", ['export A="$(hostname | tr a b)"']),
        ("export X=$1\nsrun torchrun t.py", "env.X", "FILL_IN_ARGUMENT_1"),
        ("uv sync --extra gpu --extra b\nsource .venv/bin/activate\nsrun torchrun t.py", "uv",
         {"project": ".", "sync": True, "extras": ["gpu", "b"]}),
        ("source env.sh a\nsrun torchrun t.py", "setup", ["source env.sh a"]),
        ("cd /a\ncd b\nsrun torchrun t.py", "train.workdir", "/a/b"),
        ("srun --container-image=i --container-workdir=/w bash -c 'cd a && cd b && torchrun t.py'", "train.workdir",
         "/w/a/b"),
        ("srun --container-image=i --container-workdir=/w bash -c 'cd a && torchrun t.py'", "container", "i"),
        ("f() { scontrol requeue $SLURM_JOB_ID; }\ntrap f USR1\nsrun torchrun t.py", "slurm.requeue", True),
        ("trap 'scontrol requeue $SLURM_JOB_ID' USR1\nsrun torchrun t.py", "slurm.requeue", True),
        ("srun bash -c 'CUDA_VISIBLE_DEVICES=0,1 python vllm_server.py --port 80 & torchrun t.py & wait'", "services",
         [{"name": "vllm", "command": ["python", "vllm_server.py", "--port", "80"], "on": "all", "port": 80,
           "ready": {"port": 80}, "gpus_per_node": 2}]),
        ("srun torchrun t.py --d $(realpath data)", "train.args", ["--d", "data"]),
        ('A=(--x 1)\nsrun torchrun t.py "${A[@]:?}"', "train.args", ["--x", "1"]),
        ("E=\nsrun $E --mpi=none torchrun t.py", "slurm.mpi", "none"),
        ("srun bash <<'EOF'\nexport A=1\ntorchrun t.py\nEOF", "env.A", "1"),
        ("srun --ntasks-per-node=4 torchrun --nproc_per_node=1 t.py", "train.launcher", "srun"),
        ("srun my.sh $(hostname -i)", "train.command", ["my.sh", {"node": "MASTER_ADDR"}]),
    ],
)  # fmt: skip
def test_a_line_becomes_a_field(line, path, value):
    assert at(read(line), path) == value


@pytest.mark.parametrize(
    ("line", "place", "words"),
    [
        ("E=\"\"\n[ -d /opt/x ] && E=--a\nsrun torchrun t.py $E", ("train",), "`[ -d /opt/x ]` makes it --a"),
        ("A=(--x 1)\nif f; then A=\"${A[@]} --y\"; else A=\"${A[@]} --z\"; fi\nsrun torchrun t.py $A", ("train",),
         "`f` makes it --x 1 --y"),
        ("if [ -n \"$K\" ]; then L=1; else export M=off; fi\nsrun torchrun t.py", ("env", "M"), "M=off here"),
        ("srun torchrun $training_commands", ("train", "command"), "${training_commands} is set by no line"),
        ("srun deepspeed $TASK_ARGS --x", ("train", "script"), "what TASK_ARGS is"),
        ("srun deepspeed \"${TASK_ARGS}\" --x", ("train", "script"), "what TASK_ARGS is"),
        ("if [ $H = a ]; then module load b; fi\nsrun torchrun t.py", ("modules",),
         "module load b stands in a condition"),
        ("if f; then NGPU=8; else NGPU=4; fi\nsrun torchrun --nproc_per_node $NGPU t.py",
         ("resources", "gpus_per_node"), "NGPU=4 here; `f` makes it 8"),
        ("source /v/bin/activate\nsrun /w/bin/torchrun t.py", ("train",), "is not the torchrun of the environment"),
        ("srun my.sh $SLURM_LOCALID", ("train", "launcher"), "counts 1 tasks on a node"),
        ("srun accelerate launch --gradient_accumulation_steps $(f) t.py", ("train",),
         "--gradient_accumulation_steps"),
        ("srun -N1 -n1 ray start --head &\nsrun -N1 -n1 ray job submit -- python t.py",
         ("services", 0, "gpus_per_node"), "as many as the job has"),
    ],
)  # fmt: skip
def test_what_only_a_run_would_tell_is_marked_and_not_guessed(line, place, words):
    head = "#SBATCH -N 2\nexport NCCL_IB_HCA=mlx5\n"
    made = sbatch.read(f"#!/bin/bash\n{head}{line}\n", name="x.sbatch")
    assert words in made.comments[place]
    assert words in said(made, "fill in")


def test_nodes_that_no_line_says_are_asked_for_where_the_script_counts_them():
    text = "#SBATCH --gpus-per-node=4\nsrun torchrun t.py{}\n"
    made = sbatch.read(text.format(" --n $SLURM_NNODES"), name="x")
    assert "no #SBATCH line says it" in made.comments["resources", "nodes"]
    made = sbatch.read(text.format(""), name="x")
    assert not made.comments
    assert "no #SBATCH line says --nodes: 1" in said(made, "left out")
    assert "no #SBATCH line says --time" in said(made, "left out")


MEGATRON = """\
cat <<EOT > ds.json
{"train_micro_batch_size_per_gpu": 4, "train_batch_size": 64, "zero_optimization": {"stage": 0}}
EOT
srun torchrun pretrain_gpt.py --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --micro-batch-size 4 \\
    --global-batch-size 64 --seq-length 2048 --train-iters 500 --deepspeed --deepspeed_config ds.json
"""


def test_megatron_s_degrees_keep_the_accumulation_of_its_deepspeed_config():
    made = sbatch.read(f"#SBATCH -N 1 --gpus-per-node=4\n{MEGATRON}", name="x")
    train = made.job["train"]
    assert (train["parallel"], train["seq_len"], train["steps"]) == ({"tensor": 2, "pipeline": 2}, 2048, 500)
    text, problems, _ = write.checked(made, name="x")
    assert problems == []
    config = plan.make(spec.load(text, name="job.yaml").spec).config
    # 64 samples, 4 per pass, on 4 GPUs / (2 x 2) = 1 replica
    assert config["gradient_accumulation_steps"] == 16


def test_megatron_s_numbers_that_differ_from_its_deepspeed_config_are_asked_for():
    text = MEGATRON.replace("--global-batch-size 64", "--global-batch-size 128")
    made = sbatch.read(f"#SBATCH -N 1 --gpus-per-node=4\n{text}", name="x")
    assert "told 128, its DeepSpeed config 64" in made.comments["train", "global_batch"]
    text = MEGATRON.replace("--seq", "--context-parallel-size 2 --seq")
    made = sbatch.read(f"#SBATCH -N 1 --gpus-per-node=4\n{text}", name="x")
    assert "parallel" not in made.job["train"]


def test_a_ray_head_has_the_job_s_gpus_and_keeps_its_program():
    job = read("nodes=($(scontrol show hostnames))\nexport ip_head=${nodes[0]}:6379\n"
               "srun -N1 -n1 -w ${nodes[0]} /r/bin/ray start --head --port=6379 --block &\n"
               "srun -N1 -n1 -w ${nodes[1]} /r/bin/ray start --address $ip_head --block &\n"
               "srun --overlap -N1 -n1 /r/bin/ray job submit -- python t.py")  # fmt: skip
    head, workers = job["services"]
    assert head["gpus_per_node"] == 4
    assert head["command"][2].startswith("exec /r/bin/ray start --head")
    assert workers["command"][2].startswith("exec /r/bin/ray start --block")
    assert "setup" not in job


def test_a_node_s_own_address_is_not_the_first_one_s():
    made = sbatch.read(
        "#SBATCH -N 2 --gpus-per-node=4\nnodes=($(scontrol show hostnames))\nexport ip_head=${nodes[0]}:6379\n"
        "srun -N1 -n1 -w ${nodes[0]} ray start --head --port=6379 --block &\n"
        "for i in 1; do\nip=$(srun -N1 -n1 -w ${nodes[$i]} hostname --ip-address)\n"
        "srun -N1 -n1 -w ${nodes[$i]} env VLLM_HOST_IP=$ip ray start --address $ip_head --block &\ndone\n"
        "python t.py\n", name="x")  # fmt: skip
    assert "env" not in made.job["services"][1]
    assert "each node's own address" in said(made, "left out")


def test_what_stands_behind_the_training_is_named():
    text = "srun torchrun t.py\ncp -r out /archive\npython plot.py\n"
    made = sbatch.read(f"#SBATCH --gpus-per-node=1\n{text}", name="x")
    notes = said(made, "left out")
    assert "cp -r out /archive: it runs after the training" in notes
    assert "python plot.py: it runs after the training" in notes


def test_the_value_of_a_loop_that_is_no_sweep_is_the_user_s_to_say():
    text = "for c in /a /b; do if [ -r $c ]; then export X=$c; break; fi; done\nsrun torchrun t.py\n"
    made = sbatch.read(f"#SBATCH --gpus-per-node=1\n{text}", name="x")
    assert (made.job["env"], "setup" in made.job) == ({"X": "/a"}, False)
    assert "c is one of /a, /b" in made.comments["env", "X"]


def test_an_array_s_index_less_one_picks_from_values():
    text = "#SBATCH --array=1-3\nLRS=(1 2 3)\nLR=${LRS[$((SLURM_ARRAY_TASK_ID - 1))]}\nsrun torchrun t.py --lr $LR"
    job = sbatch.read(text, name="x").job
    assert job["sweep"]["over"] == {"env.LR": ["1", "2", "3"]}
    assert job["train"]["args"] == ["--lr", {"node": "LR"}]


def test_a_script_s_arguments_may_be_said():
    text = 'export LR=${2:-1}\nN=$#\nshift\nsrun torchrun t.py "$@" --x $1\n'
    made = sbatch.read(f"#SBATCH --gpus-per-node=1\n{text}", name="x", arguments=["a", "3e-4", "b c"])
    assert made.job["env"] == {"LR": "3e-4"}
    assert made.job["train"]["args"] == ["3e-4", "b c", "--x", "3e-4"]
    assert not made.to_fill


def test_parts_of_the_command_are_no_variables_of_the_program():
    job = read("export SCRIPT=t.py\nexport SCRIPT_ARGS=' --a 1 '\nexport CMD=\"torchrun $SCRIPT $SCRIPT_ARGS\"\n"
               "export DATA=/d\nsrun $CMD --d $DATA")  # fmt: skip
    assert job["env"] == {"DATA": "/d"}
    assert job["train"]["args"] == ["--a", "1", "--d", "/d"]


# --- as people write them -------------------------------------------------------------------------


def test_a_function_around_srun_is_read_at_every_call():
    text = ('run() { srun "$@"; }\nrun torchrun --nproc_per_node 4 train.py --lr 1\n'
            "for s in 1 2; do\nrun python eval.py --seed $s\ndone\n")  # fmt: skip
    made = sbatch.read(f"#SBATCH -N 2 --gpus-per-node=4\n{text}", name="x")
    assert made.job["train"] == {"script": "train.py", "args": ["--lr", "1"], "config_flag": "none"}
    assert "eval.py --seed ${s}: it runs after the training" in said(made, "left out")


@pytest.mark.parametrize("line", ['srun "$@"', 'run() { srun "$@"; }', 'run() { srun "$@"; }\nrun'])
def test_a_program_that_nothing_names_is_asked_for(line):
    made = sbatch.read(f"#SBATCH -N 2\n{line}\n", name="x")
    assert any(one.startswith("train.command: ") for one in made.to_fill)


LOOP = """#SBATCH -N 3 --gpus=24
nodes=($(scontrol show hostnames $SLURM_JOB_NODELIST))
srun -N1 -n1 -w ${nodes[2]} --gpus 8 singularity exec --nv vllm.sif vllm serve Q --port 8000 &
for i in 0 1; do
srun -N1 -n1 -w ${nodes[$i]} singularity exec --nv train.sif accelerate launch --machine_rank $i t.py --of $i &
done
wait
python eval.py --ckpt out
"""


def test_a_loop_over_nodes_is_one_job_and_a_service_keeps_its_container():
    made = sbatch.read(LOOP, name="x")
    assert "sweep" not in made.job
    assert made.job["resources"] == {"nodes": 2, "gpus_per_node": 8}
    assert (made.job["train"]["script"], made.job["train"]["args"]) == ("t.py", ["--of", {"node": "rank"}])
    assert made.job["services"][0]["container"] == {"runtime": "singularity", "gpus": "nv", "image": "vllm.sif"}
    assert made.job["container"]["image"] == "train.sif"
    assert "python eval.py --ckpt out: it runs after the training" in said(made, "left out")


def test_values_that_run_side_by_side_are_a_sweep_whose_nodes_are_asked_for():
    loop = "for lr in 1e-4 3e-4; do srun -N2 torchrun t.py --lr $lr & done\nwait\n"
    made = sbatch.read(f"#SBATCH -N 4 --gpus-per-node=4\n{loop}", name="x")
    assert made.job["sweep"]["over"] == {"env.lr": ["1e-4", "3e-4"]}
    assert any(one.startswith("resources.nodes: ") for one in made.to_fill)


def test_a_comment_that_eval_sees_is_said_with_what_it_cuts_off():
    text = 'ARGS="\n--a 1 # depth\n--b 2\n"\nCMD="torchrun t.py $ARGS"\neval $CMD\n'
    made = sbatch.read(f"#SBATCH -N 1 --gpus-per-node=4\n{text}", name="x")
    assert made.job["train"]["args"] == ["--a", "1"]
    assert "`# depth --b 2`: none of it reached the program" in said(made, "fill in")
    assert "ARGS=" not in said(made, "left out")


def test_an_option_that_looks_like_one_of_sbatch_s_is_no_plugin_s():
    made = sbatch.read(
        "#SBATCH -N 2\n#SBATCH --gpu-per-node=8\n#SBATCH --ntasks_per_node=1\nsrun torchrun t.py\n", name="x"
    )
    assert "slurm" not in made.job or not {"sbatch", "plugin_options"} & set(made.job["slurm"])
    assert "did you mean --gpus-per-node?" in said(made, "fill in")
    assert "did you mean --ntasks-per-node?" in said(made, "fill in")


@pytest.mark.parametrize(
    ("line", "kind", "words"),
    [
        ('srun torchrun t.py "${T[@]:1}"', "fill in", "${T[@]:1} is an array that only the script knows"),
        ("srun torchrun t.py ${A:+--a}", "fill in", "makes it --a"),
        ("LR=${1:-3e-4}\nsrun torchrun t.py --lr $LR", "left out", "${1} is 3e-4 here, its default"),
        ("for c in conf/*.yaml; do srun torchrun t.py $c; done", "fill in", "for c in conf/*.yaml: one of the files"),
        ("srun torchrun t.py --name $(date +%F)", "carried", "$(date +%F) -> the job's id"),
        ("env X=1 timeout 3600 torchrun t.py", "left out", "timeout 3600: slurm.time"),
        ("# SBATCH --mem=0\nsrun torchrun t.py", "left out", "a comment to sbatch"),
    ],
)
def test_what_is_odd_about_a_word_is_said_once(line, kind, words):
    made = sbatch.read(f"#SBATCH -N 1 --gpus-per-node=4\n{line}\n", name="x")
    assert said(made, kind).count(words) == 1


def test_an_array_is_no_variable_of_the_submitting_shell():
    job = read('srun torchrun "${ARGS[@]}" t.py')
    assert set(job.get("env", {})) <= {"NCCL_IB_HCA"}
    assert read('T=(t.py --a 1)\nsrun torchrun "${T[@]:0:2}" "${T[@]:2}"')["train"]["args"] == ["--a", "1"]
    assert read("env X=1 timeout 3600 torchrun t.py")["env"]["X"] == "1"
    args = read('srun torchrun t.py --name "r_${SLURM_JOB_ID}_$(date +%F)" --seed $RANDOM')["train"]["args"]
    assert args == ["--name", {"job": "id", "prepend": "r_"}, "--seed", {"job": "id"}]


def test_an_archive_unpacked_into_the_local_disk_itself_is_looked_for_where_it_is():
    job = read("cp /s/data.tar $TMPDIR/\ntar xf $TMPDIR/data.tar -C $TMPDIR\nsrun torchrun t.py --data $TMPDIR/data")
    assert job["stage"] == [{"source": "/s/data.tar", "to": "data"}]
    assert job["train"]["args"] == ["--data", {"node": "local", "append": "/data/data"}]


# --- nothing is lost ------------------------------------------------------------------------------


def lost(text: str) -> list[str]:
    """Words of commands, assignments and directives that stand neither in the job file nor in a note."""
    made = sbatch.read(text, name="x.sbatch")
    notes = [note.message for note in made.notes]
    told = "\n".join([write.text(made.job), *notes]).replace("{", "").replace("}", "")
    flat = re.sub(r"\s+", " ", told)

    def missing(word: shell.Word) -> list[str]:
        texts = [piece.text for piece in word.pieces if not piece.name]
        unknown = [piece.name for piece in word.pieces if piece.name.isidentifier() and not piece.meaning]
        names = [name for name in unknown if not name.startswith("SLURM")]
        tokens = [token for text in texts for token in re.split(r"[^\w./%+@-]+", text) if re.search(r"\w", token)]
        return [token for token in [*tokens, *names] if token.rstrip("/") not in told]

    found = []
    script = shell.read(text, "x.sbatch")
    for one in script.directives:
        if one.text not in told and f"#SBATCH --{one.option}" not in told:
            found.append(f"{one.line}: {one.text}")
    for part in [script, *(command.script for command in script.everything() if command.script)]:
        for command in part.commands:
            named = re.sub(r"\s+", " ", command.text).replace("{", "").replace("}", "") in flat
            if named or "substitution" in command.inside or command.name in part.functions or command.script:
                continue
            words = [word for word in command.argv if word.value not in ("srun", "exec")]
            found += [f"{command.line}: {command.name} {token}" for word in words for token in missing(word)]
        for one in part.assignments:
            if any(re.match(rf"{one.name}\b", note) for note in notes):
                continue
            words = list(one.array) if one.array is not None else [one.value] if one.value else []
            found += [f"{one.line}: {one.name}={token}" for word in words for token in missing(word)]
    secret = re.compile(r"hf_|TOKEN|_KEY|[0-9a-f]{16}")
    return [row for row in found if not secret.search(row)]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_word_of_a_script_is_in_the_job_file_or_in_a_note(path):
    assert lost(path.read_text()) == []


def test_every_word_of_a_script_made_of_odd_lines_is_in_the_job_file_or_in_a_note():
    lines = ["B=(--one 1 --two two)", "if [ -d /q ]; then C=--three; D=four; fi", "E=five; export F=$E/six",
             "frobnicate --seven", "for i in 1 2; do echo $i; done", "G=$(mystery eight)", "H=/nine/$USER/$J/ten",
             "srun --unknown-thing=eleven $K torchrun --role twelve t.py ${B[@]} $C --thirteen $G $H",
             "cp fourteen /fifteen", "L=sixteen"]  # fmt: skip
    head = "#!/bin/bash\n#SBATCH -N 2 --gres=gpu:4\n#SBATCH --comment=seventeen --site-option=eighteen\n"
    assert lost(head + "\n".join(lines)) == []


@pytest.mark.parametrize(
    ("line", "path", "value"),
    [
        ("--gres=gpu:h100:4,nvme:1", "slurm.gres", ["nvme:1"]),
        ("--gres=gpu:h100:4", "slurm.gpu_type", "h100"),
        ("--gpus=8 -N 2", "resources.gpus_per_node", 4),
        ("--gpus-per-task=1 --ntasks-per-node=4", "resources.gpus_per_node", 4),
        ("--mem-per-cpu=4G -c 8 --gres=gpu:1", "resources.memory", "32G"),
        ("--mem=480GB --gres=gpu:1", "resources.memory", "480G"),
        ("--signal=B:USR1@300 --gres=gpu:1", "slurm.warn_before_end", 300),
        ("--switches=1@4:00:00 --gres=gpu:1", "slurm.switches", "1@4:00:00"),
        ("--segment=16 --gres=gpu:1", "slurm.segment", 16),
        ("--nice --gres=gpu:1", "slurm.nice", 100),
        ("--power=high --gres=gpu:1", "slurm.sbatch", {"power": "high"}),
        ("-D /work/x --gres=gpu:1", "train.workdir", "/work/x"),
        ("-J My_Job.1 --gres=gpu:1", "name", "my-job-1"),
        ("--nodes=2-4 --gres=gpu:1", "resources.nodes", 4),
    ],
)
def test_a_directive_becomes_a_field(line, path, value):
    assert at(read("srun torchrun t.py", head=f"#SBATCH {line}\n"), path) == value


@pytest.mark.parametrize(
    ("line", "field", "words"),
    [
        ("-N two", "resources.nodes", "`two` is no count"),
        ("-N 0", "resources.nodes", "`0` is no count"),
        ("--nodes=2-x", "resources.nodes", "`2-x` is no count"),
        ("--nodes", "resources.nodes", "it has no value"),
        ("-n x", "resources.nodes", "`x` is no count"),
        ("-N 2 --gpus-per-node=a100:x", "resources.gpus_per_node", "`a100:x` is no count"),
        ("-N 2 --cpus-per-task=x", "resources.cpus_per_node", "`x` is no count"),
    ],
)
def test_a_count_that_is_none_is_asked_for(line, field, words):
    made = sbatch.read(f"#!/bin/bash\n#SBATCH {line}\nsrun torchrun t.py\n", name="x.sbatch")
    assert any(words in text for text in made.comments.values())
    asked = [note.message for note in made.notes if note.kind == "fill in" and words in note.message]
    assert asked
    assert asked[0].startswith(f"{field}: #SBATCH ")
    assert not [note for note in made.notes if note.kind == "carried" and line.split()[-1] in note.message]
    assert "as sbatch takes it" not in said(made, "left out")


def test_what_the_user_has_to_say_is_marked_in_the_job_file():
    text = "#!/bin/bash\n#SBATCH -N 2\nsrun torchrun train.py --out /scratch/${A%%x}/$1\n"
    made = sbatch.read(text, name="x.sbatch")
    body, problems, _ = write.checked(made, name="x.sbatch")
    assert "gpus_per_node: 1  # FILL IN: the script does not say how many GPUs a node has" in body
    assert "FILL_IN_ARGUMENT_1" in body
    assert "resources:  # FILL IN: 2 nodes with GPUs, and no network is named" in body
    assert [problem.message for problem in problems] == ["2 nodes with GPUs, and no network is named"]
    spec.load(body, name="job.yaml", environ={"A": "b"})


@pytest.mark.parametrize(
    ("line", "command"),
    [
        (
            "mpirun -np 8 -x PATH python t.py --lr 1",
            ["mpirun", "-np", "8", "-x", "PATH", "python", "t.py", "--lr", "1"],
        ),
        (
            "mpirun -np $SLURM_NTASKS --hostfile hosts_$SLURM_JOB_ID -npernode 4 ./t --np 3",
            [
                "bash",
                "-c",
                'exec mpirun -np "${SLURM_NTASKS}" --hostfile "${DSLAUNCH_HOSTFILE}" -npernode 4 ./t --np 3',
            ],
        ),
        ("srun -n1 horovodrun -np 8 python t.py", ["horovodrun", "-np", "8", "python", "t.py"]),
        ("python deepy.py train.py -d configs a.yml", ["python", "deepy.py", "train.py", "-d", "configs", "a.yml"]),
        ("mpiexec apptainer exec t.sif python t.py", ["mpiexec", "apptainer", "exec", "t.sif", "python", "t.py"]),
    ],
)
def test_what_starts_the_ranks_of_all_nodes_runs_once_on_the_first(line, command):
    job = read(line)
    assert (job["train"]["launcher"], job["train"]["command"]) == ("job", command)
    assert "container" not in job
    assert (job["resources"]["nodes"], job["resources"]["gpus_per_node"]) == (2, 4)


def test_ranks_of_mpirun_count_the_gpus_where_nothing_else_does():
    job = read("mpirun -npernode 8 python t.py", head="#SBATCH -N 3\n")
    assert job["resources"]["gpus_per_node"] == 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("#!/bin/bash\n#PBS -l select=2\nmpiexec python t.py\n", "PBS"),
        ("#BSUB -nnodes 2\njsrun python t.py\n", "LSF"),
        ("#COBALT -n 2\naprun python t.py\n", "Cobalt"),
        ("#$ -pe mpi 8\npython t.py\n", "Grid Engine"),
        ("#!/bin/bash\nsalloc -N 2 srun python t.py\n", "salloc"),
        ("#!/bin/bash\n#SBATCH -N 2\njsrun -n 16 python t.py\n", "jsrun"),
        ("#!/bin/bash\n#SBATCH -N 2\napptainer exec t.sif mpirun -np 16 python t.py\n", "container"),
        ("#!/bin/bash\necho hello\n", "no batch script"),
        ("", "no batch script"),
    ],
)
def test_what_is_no_sbatch_script_of_ours_to_run_is_refused_with_a_way_out(text, words):
    with pytest.raises(UserError) as error:
        sbatch.read(text, name="x.sh")
    (problem,) = error.value.problems
    assert words in problem.message
    assert problem.hint
    assert problem.where.startswith("x.sh")


PIECES = [line for path in SCRIPTS for line in path.read_text().splitlines(keepends=True) if line.strip()]
ODD = ['run() { srun "$@"; }\n', "run ", "srun ", '"$@"', '"${T[@]:1}"', "${A:+--a}", "shift; ", "env A=1 ", "eval ",
       "for i in 0 1; do ", "done\n", "& ", "if [ 1 ; then\n", "singularity exec a.sif ", "vllm serve ",
       "ray start "]  # fmt: skip


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(PIECES + ODD * 8), st.integers(0, 200)), min_size=1, max_size=14))
def test_whatever_stands_in_a_script_is_imported_or_refused(pieces):
    """Lines of every sample, each cut anywhere, in any order."""
    text = "#SBATCH -N 2\n" + "".join(line[:end] if end < len(line) else line for line, end in pieces)
    with contextlib.suppress(UserError):
        write.checked(sbatch.read(text, name="x.sbatch"), name="x.sbatch")


@pytest.mark.slow
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_that_is_cut_off_is_imported_or_refused(path):
    text = path.read_text()
    for end in range(0, len(text), max(len(text) // 7, 1)):
        try:
            made = sbatch.read(text[:end], name=path.name)
        except UserError:
            continue
        text_of, problems, variables = write.checked(made, name=path.name)
        if problems:  # half a value, say: it is marked
            assert text_of.count("# FILL IN:") >= 1
        else:
            spec.load(text_of, name="job.yaml", environ=dict.fromkeys(variables, "/x"))


@pytest.mark.parametrize(
    "line",
    [
        "deepspeed --save_pid --log_level info --elastic_training train.py --lr 1",
        "accelerate launch --enable_cpu_affinity --downcast_bf16 --mixed_precision bf16 train.py --lr 1",
    ],
)
def test_a_flag_of_a_launcher_does_not_take_the_program_for_its_value(line):
    assert at(read(f"srun {line}"), "train.script") == "train.py"


def options_of(parser: argparse.ArgumentParser) -> tuple[set[str], set[str]]:
    """Those with a value, and those without."""
    found: tuple[set[str], set[str]] = (set(), set())
    for action in parser._actions:
        found[action.nargs == 0].update(name.lstrip("-").replace("-", "_") for name in action.option_strings)
    return found


def test_the_options_with_a_value_are_those_of_the_launchers_that_are_installed():
    run = pytest.importorskip("torch.distributed.run")
    valued, flags = options_of(run.get_args_parser())
    assert valued <= launchlint.VALUES["torchrun"]
    assert not flags & launchlint.VALUES["torchrun"]


@pytest.mark.slow
@pytest.mark.parametrize(("module", "kind"), [("runner", "deepspeed"), ("launch", "deepspeed-node")])
def test_the_options_with_a_value_are_those_of_the_deepspeed_that_is_installed(module, kind, monkeypatch):
    launcher = pytest.importorskip(f"deepspeed.launcher.{module}")
    asked = []
    monkeypatch.setattr(sys, "argv", ["deepspeed", "train.py"])
    real = argparse.ArgumentParser.parse_args

    def parsed(self: argparse.ArgumentParser, *given: Any, **named: Any) -> argparse.Namespace:
        asked.append(self)
        return real(self, *given, **named)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    with contextlib.suppress(SystemExit):
        launcher.parse_args()
    valued, flags = options_of(asked[0])
    assert valued <= launchlint.VALUES[kind]
    assert not flags & launchlint.VALUES[kind]


@pytest.mark.parametrize(
    "line",
    ["torchrun -r 3 -t 3 --nproc-per-node 8 train.py --lr 1", "deepspeed -H hosts -i n1 train.py --lr 1",
     "accelerate launch --parallelism_config_tp_size 2 --fp8_format E4M3 -t 3 train.py --lr 1"],
)  # fmt: skip
def test_a_value_of_an_option_is_not_the_program(line):
    assert at(read(f"srun {line}"), "train.script") == "train.py"


@pytest.mark.parametrize(
    ("line", "option"), [("#SBATCH --gid=5", "gid"), ("#SBATCH --gpus-per-socket=2", "gpus-per-socket")]
)
def test_an_option_that_no_job_file_may_pass_on_is_left_out_and_said(line, option):
    body = f"{line}\n#SBATCH --propagate=NONE --power=high\nsrun python train.py\n"
    made = sbatch.read(f"#!/bin/bash\n{body}", name="x")
    assert option in said(made, "left out")
    assert made.job["slurm"]["sbatch"] == {"power": "high"}


# --- our own --------------------------------------------------------------------------------------


def files_of(path: Path, text: str | None = None) -> dict[str, str]:
    """What is rendered of a job file; of a sweep the array with its points."""
    beside = path.with_name("site.yaml")
    site = str(beside) if text is None and beside.is_file() else None
    asked = cli.read(str(path), site, (), text=text)
    if asked.spec.sweep:
        points = cli.swept(str(path), site, (), text=text)
        bundle = array.render([point.plan for point in points], parallel=asked.spec.sweep.parallel)
    else:
        document, made = cli.load(str(path), site, (), text=text)
        bundle = cli.render(slurm, document, made)
    return {file.path: file.text for file in bundle.files}


def again(files: dict[str, str], path: Path) -> dict[str, str]:
    made = rendered.read(files["job.sbatch"], name="job.sbatch", beside=files.get)
    return files_of(path.parent / "again.yaml", write.text(made.job))


@pytest.mark.parametrize("path", GALLERY, ids=lambda path: path.parent.name)
def test_rendered_imported_and_rendered_again_is_the_same(path):
    files = files_of(path)
    assert again(files, path) == files


def test_a_sweep_comes_back_as_its_points(tmp_path):
    base = (ROOT / "slurm" / "cpu-demo" / "job.yaml").read_text()
    path = tmp_path / "job.yaml"
    files = files_of(
        path, base + "sweep: {over: {train.optimizer.lr: [1e-4, 3e-4], train.seq_len: [64, 128]}, parallel: 1}\n"
    )
    made = rendered.read(files["job.sbatch"], name="job.sbatch", beside=files.get)
    assert made.job["sweep"]["over"]["train.seq_len"] == [64, 128, 64, 128]
    assert files_of(path, write.text(made.job)) == files


def test_a_directive_that_was_edited_in_a_rendered_script_is_carried_over():
    path = ROOT / "slurm" / "llama-8b-pyxis-4x8" / "job.yaml"
    files = files_of(path)
    files["job.sbatch"] = files["job.sbatch"].replace("--partition=batch", "--partition=long").replace(
        "--time=12:00:00", "--time=1-00:00:00")  # fmt: skip
    made = rendered.read(files["job.sbatch"], name="job.sbatch", beside=files.get)
    assert (made.job["slurm"]["partition"], made.job["slurm"]["time"]) == ("long", "1-00:00:00")
    assert "written since -> slurm.time" in said(made, "carried")


def test_a_rendered_script_alone_says_what_is_missing():
    files = files_of(GALLERY[0])
    assert rendered.ours(files["job.sbatch"])
    with pytest.raises(UserError, match=r"job\.json"):
        rendered.read(files["job.sbatch"], name="job.sbatch", beside=lambda name: None)
    assert not any(rendered.ours(path.read_text()) for path in SCRIPTS)


def test_what_a_rendering_carries_is_no_secret():
    """Only names of variables stand in it, as in the job file."""
    text = (ROOT / "slurm" / "cpu-demo" / "job.yaml").read_text() + "secrets: {HF_TOKEN: {from_env: HF_TOKEN}}\n"
    document = spec.load(text, name="job.yaml", environ={"HF_TOKEN": "very-secret"})
    told = slurm.render(plan.make(document.spec)).text("job.json")
    assert json.loads(told)["secrets"] == {"HF_TOKEN": {"from_env": "HF_TOKEN"}}
    assert "very-secret" not in told


# --- the command ----------------------------------------------------------------------------------


def test_the_command_prints_the_job_file_alone_on_standard_output(tmp_path):
    path = ROOT / "tests" / "data" / "scripts" / "composer-llmfoundry.sbatch"
    result = CliRunner().invoke(cli.cli, ["import", str(path)])
    assert result.exit_code == 0
    assert spec.load(result.stdout, name="job.yaml").spec.name == "mpt-7b"
    assert "left out: --world_size 16" in result.stderr
    assert "16 of 16 fields are typed" in result.stderr
    out = tmp_path / "job.yaml"
    assert CliRunner().invoke(cli.cli, ["import", str(path), "-o", str(out)]).exit_code == 0
    assert out.read_text() == result.stdout


def test_a_file_that_is_there_is_replaced_on_purpose_only(tmp_path):
    path = ROOT / "tests" / "data" / "scripts" / "composer-llmfoundry.sbatch"
    out = tmp_path / "job.yaml"
    out.write_text("# edited by hand\n")
    refused = CliRunner().invoke(cli.cli, ["import", str(path), "-o", str(out)])
    assert "is there already" in str(refused.exception)
    assert out.read_text() == "# edited by hand\n"
    assert CliRunner().invoke(cli.cli, ["import", str(path), "-o", str(out), "--force"]).exit_code == 0
    assert "name: mpt-7b" in out.read_text()
    assert CliRunner().invoke(cli.cli, ["import", str(path), "--force"]).exit_code == 2


def test_the_command_reads_a_run_directory(tmp_path):
    files = files_of(ROOT / "slurm" / "cpu-demo" / "job.yaml")
    for name in ("job.sbatch", "job.json"):
        (tmp_path / name).write_text(files[name])
    result = CliRunner().invoke(cli.cli, ["import", str(tmp_path / "job.sbatch")])
    assert result.exit_code == 0, result.stderr
    (tmp_path / "again.yaml").write_text(result.stdout)
    assert files_of(tmp_path / "again.yaml") == files


def test_the_command_takes_a_script_s_arguments(tmp_path):
    path = tmp_path / "x.sbatch"
    path.write_text("#SBATCH --gpus-per-node=1\nsrun torchrun t.py $1\n")
    result = CliRunner().invoke(cli.cli, ["import", str(path), "--", "--lr=1"])
    assert result.exit_code == 0, result.stderr
    assert "args: [--lr=1]" in result.stdout
    path.write_text((ROOT / "tests" / "data" / "manifests" / "plain-pod.yaml").read_text())
    assert "takes no arguments" in CliRunner().invoke(cli.cli, ["import", str(path), "a"]).stderr


def test_the_command_exits_1_when_something_is_left_to_say(tmp_path):
    (tmp_path / "x.sbatch").write_text("#SBATCH -N 2\nsrun torchrun train.py\n")
    result = CliRunner().invoke(cli.cli, ["import", str(tmp_path / "x.sbatch")])
    assert result.exit_code == 1
    assert "# FILL IN:" in result.stdout


def test_the_reader_of_shell_is_loaded_by_the_commands_that_need_it_alone():
    code = "import sys; from launcher import cli, shell; cli.cli(['plan', '--help'], standalone_mode=False); " \
           "sys.exit('tree_sitter' in sys.modules)"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
