"""What `train.launcher_args` may not say: where a rank is, and how many there are, is known from the job file."""

from __future__ import annotations

from launcher.errors import Problem
from launcher.spec import JobSpec

RECOVERS = "recover.attempts: dslaunch starts the job again, on healthy nodes and from a checkpoint"
PLACES = "leave it out: dslaunch tells the launcher on every node"
PROGRAM = "leave it out: train.script, module or command say what a rank runs"
GPUS = "train.visible_gpus: own"

# Options that dslaunch gives itself, or undoes, by launcher; what to do instead.
TORCHRUN = {
    **dict.fromkeys(["--nnodes", "--nproc-per-node", "--node-rank", "--master-addr", "--master-port"], PLACES),
    # c10d hands out ranks in the order in which nodes come: none would know which rank runs where
    **dict.fromkeys(["--rdzv-backend", "--rdzv-endpoint", "--standalone", "--local-addr"], PLACES),
    "--max-restarts": RECOVERS,
    **dict.fromkeys(["--module", "-m", "--no-python", "--run-path"], PROGRAM),
    "--virtual-local-rank": GPUS,
}
DEEPSPEED = {
    **dict.fromkeys(["--node-rank", "--master-addr", "--master-port", "--world-info"], PLACES),
    **dict.fromkeys(["--module", "--no-python", "--no-local-rank"], PROGRAM),
    # of the `deepspeed` command, which logs in to the nodes; they have one deepspeed.launcher.launch each
    **dict.fromkeys(
        """--hostfile -H --include -i --exclude -e --num-nodes --num-gpus --no-ssh --launcher --launcher-args
        --ssh-port --force-multi --no-ssh-check --elastic-training --autotuning""".split(),
        PLACES,
    ),
}
ACCELERATE = {
    **dict.fromkeys(["--num-machines", "--num-processes", "--machine-rank", "--main-process-ip"], PLACES),
    **dict.fromkeys(["--main-process-port", "--same-network", "--rdzv-backend", "--mpirun-hostfile"], PLACES),
    **dict.fromkeys(["--deepspeed-hostfile", "--deepspeed-multinode-launcher"], PLACES),
    **dict.fromkeys(["--deepspeed-exclusion-filter", "--deepspeed-inclusion-filter"], PLACES),
    "--max-restarts": RECOVERS,
    **dict.fromkeys(["--module", "-m", "--no-python"], PROGRAM),
    "--gpu-ids": "leave it out: the scheduler hands out the GPUs",
    "--cpu": "launcher: torchrun; accelerate itself starts one rank on a CPU",
    **dict.fromkeys(["--tpu", "--tpu-cluster", "--tpu-use-cluster"], "GPUs: dslaunch plans for no TPU"),
}
COMPOSER = {
    **dict.fromkeys(["--nproc", "-n", "--world-size", "--base-rank", "--node-rank"], PLACES),
    **dict.fromkeys(["--master-addr", "--master-port"], PLACES),
    **dict.fromkeys(["--module-mode", "-m", "--command-mode", "-c"], PROGRAM),
}
OURS = {"torchrun": TORCHRUN, "deepspeed": DEEPSPEED, "accelerate": ACCELERATE, "composer": COMPOSER}
ITSELF = ("node", "job")  # a program that starts ranks
WITHOUT = {"srun": "slurm.srun", **dict.fromkeys(ITSELF, "train.command: it is your program that starts the ranks")}

# What binds ranks to cores already, beside `train.numa`.
BINDS = {
    "torchrun": ("--numa-binding",),
    "deepspeed": ("--bind-cores-to-rank", "--bind-core-list"),
    "accelerate": ("--enable-cpu-affinity",),
}
# Told to every program that starts its ranks itself.
TOLD = ("NNODES", "NPROC_PER_NODE")
HOSTFILES = ("DSLAUNCH_HOSTFILE", "DLTS_HOSTFILE")  # and to one that starts those of the whole job


def option(word: str) -> str:
    """--nproc_per_node=8 is --nproc-per-node; 8 is none, and neither is a negative number."""
    name = word.partition("=")[0]
    return name.replace("_", "-") if name.startswith("-") and name.lstrip("-")[:1].isalpha() else ""


def own(name: str, ours: dict[str, str]) -> str:
    """The option of ours that this is, also cut short as argparse allows: --nproc is --nproc-per-node."""
    if name in ours:
        return name
    return next((one for one in ours if name.startswith("--") and len(name) > 4 and one.startswith(name)), "")


def takes_config(spec: JobSpec) -> bool:
    """Whether the launcher itself wants the DeepSpeed config: accelerate hands it to the Accelerator."""
    given = set(map(option, spec.train.launcher_args))
    theirs = "--deepspeed-config-file" in given
    return spec.train.launcher == "accelerate" and "--use-deepspeed" in given and not theirs


def problems(spec: JobSpec) -> list[Problem]:
    """Arguments that contradict the job file, and fields that this launcher cannot act on."""
    train, launcher = spec.train, spec.train.launcher
    found = []
    if train.launcher_args and launcher in WITHOUT:
        message = f"launcher {launcher} takes no launcher_args"
        found.append(Problem(message, f"use {WITHOUT[launcher]}", ("train", "launcher_args")))
    elif train.launcher_args and not option(train.launcher_args[0]):
        message = f"launcher_args begins with {train.launcher_args[0]!r}: {launcher} would take it for the program"
        found.append(Problem(message, "options of the launcher, [--tee, '3']", ("train", "launcher_args", 0)))
    else:
        for index, word in enumerate(train.launcher_args):
            one = own(option(word), OURS[launcher]) if option(word) else ""
            if one or word == "--":
                message = f"launcher_args: {word} is dslaunch's own" + (f" ({one})" if one != option(word) else "")
                hint = OURS[launcher].get(one, "leave it out")
                found.append(Problem(message, hint, ("train", "launcher_args", index)))
    found += _binding(spec)
    if launcher == "accelerate" and not spec.resources.gpus_per_node and spec.world > 1:
        message = f"accelerate starts one rank on a node without GPUs, and this job has {spec.per_node}"
        found.append(Problem(message, "launcher: torchrun, with ACCELERATE_USE_CPU: 'true' under env", AT))
    if launcher in ITSELF:
        found += [
            Problem(f"{name} stands in env, and dslaunch tells every node its own", "remove it", ("env", name))
            for name in (*TOLD, *(HOSTFILES if launcher == "job" else ()))
            if name in spec.env
        ]
        if not (train.script or train.module or train.command):
            message = (
                f"launcher {launcher} is for programs that start their ranks, which the reference trainer does not"
            )
            found.append(Problem(message, "launcher: torchrun, or train.command", AT))
    return found


def notes(spec: JobSpec) -> list[str]:
    logs = [word for word in spec.train.launcher_args if option(word) in LOGS]
    if spec.train.launcher == "job" and spec.resources.nodes > 1:
        return list(UNSEEN)
    if not logs:
        return []
    return [
        f"launcher_args: each rank's output goes to its own file in the run's logs, so {logs[0]} finds none of it"
    ]


AT = ("train", "launcher")
UNSEEN = (
    "launcher job: dslaunch watches your program on the first node, and not the ranks it starts on others: a hang is "
    "seen by that program's own output alone, a rank elsewhere that dies by what the program says of it, and none of "
    "them is warned before the end of the time",
    "launcher job: what the program starts over ssh is no step of the job, and outlives it where the site has no "
    "pam_slurm_adopt; it has neither the env nor the setup of this file, which srun hands on",
)
# Where a launcher keeps what its ranks print.
LOGS = ("--tee", "-t", "--redirects", "-r", "--log-dir", "--enable-each-rank-log", "--stdout", "--stderr")


def _binding(spec: JobSpec) -> list[Problem]:
    train, per_node = spec.train, spec.per_node
    found = []
    for field, given in (("visible_gpus", train.visible_gpus == "own"), ("numa", train.numa != "none")):
        if given and train.launcher in ITSELF:
            message = f"{field} is for ranks, and with launcher {train.launcher} it is your program that starts them"
            found.append(Problem(message, "leave it out, and let that program bind them", ("train", field)))
        elif given and train.numa in ("auto", "none") and not spec.resources.gpus_per_node:
            message = f"{field} {getattr(train, field)} without GPUs"
            hint = "leave it out" + (", or give a NUMA node for each local rank" if field == "numa" else "")
            found.append(Problem(message, hint, ("train", field)))
    if isinstance(train.numa, tuple) and len(train.numa) != per_node and train.launcher not in ITSELF:
        message = f"numa names {len(train.numa)} NUMA nodes, and a node has {per_node} ranks"
        found.append(Problem(message, f"one for each local rank, {per_node} in all", ("train", "numa")))
    twice = [word for word in train.launcher_args if option(word) in BINDS.get(train.launcher, ())]
    if twice and train.numa != "none":
        message = f"launcher_args: {twice[0]} binds ranks to cores, and so does train.numa"
        found.append(Problem(message, "keep one", ("train", "numa")))
    return found
