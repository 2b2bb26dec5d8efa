"""What a command starts: launchers with their arguments, servers, wrappers, and what only prints or prepares."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from posixpath import basename
from typing import Literal

from launcher import launchlint, shell
from launcher.shell import Command, Piece, Script, Word

Starter = Literal["torchrun", "deepspeed", "accelerate", "composer", "python", "node", "job"]


@dataclass(frozen=True)
class Program:
    """`torchrun --nproc_per_node 8 --role x train.py --lr 1`: options [--role, x], target train.py."""

    launcher: Starter
    kind: Literal["script", "module", "command"]
    target: Word | None
    arguments: tuple[Word, ...] = ()
    options: tuple[Word, ...] = ()  # of the launcher, that stay
    head: tuple[Word, ...] = ()  # what stands before the target where it becomes a command
    dropped: tuple[str, ...] = ()  # options that dslaunch replaces
    per_node: int | None = None  # ranks, as the launcher is told
    processes: int | None = None
    note: str = ""


def said(word: Word) -> str:
    """Its text; $(which python) is python."""
    text = word.partial if word.value is None else word.value
    return re.sub(r"(\$\(|`)\s*(which|command -v)\s+(\S+?)\s*[)`]", r"\3", text)


def made(text: str, near: Word) -> Word:
    return Word(text, (Piece(text),), near.line, near.column)


# --- launchers ------------------------------------------------------------------------------------

# Options that say who the ranks are and where they meet.
MEETING = frozenset(
    """nnodes nproc_per_node nproc rdzv_backend rdzv_endpoint rdzv_id rdzv_conf node_rank master_addr
    master_port local_addr standalone hostfile include exclude num_nodes num_gpus num_accelerators launcher
    force_multi no_ssh no_ssh_check ssh_port world_info num_processes num_machines machine_rank main_process_ip
    main_process_port same_network multi_gpu deepspeed_hostfile deepspeed_multinode_launcher
    deepspeed_exclusion_filter deepspeed_inclusion_filter gpu_ids n world_size base_rank use_env max_restarts
    monitor_interval log_dir tee redirects stdout stderr role launcher_args local_ranks_filter save_pid
    enable_each_rank_log procs_per_node start_method logs_specs""".split()
)


def _started(kinds: Mapping[str, str]) -> dict[str, Starter]:
    """Of those that can start a rank here; deepspeed-node is deepspeed."""
    starters: tuple[Starter, ...] = ("torchrun", "deepspeed", "accelerate", "composer")
    return {name: one for name, kind in kinds.items() for one in starters if one == kind.partition("-")[0]}


JSC = "torchrun_jsc"  # torchrun that meets at the names which the fast network has at Jülich: NAMEi
NAMES, MODULES = {**_started(launchlint.NAMES), JSC: "torchrun"}, _started(launchlint.MODULES)
PYTHON = re.compile(r"(python[0-9.]*|pypy3?|conda-python-(simple|distributed))\Z")
PYTHON_VALUES = ("-X", "-W", "--check-hash-based-pycs")
MPI = frozenset(["mpirun", "mpiexec", "mpiexec.hydra", "orterun", "horovodrun", "ibrun", "aprun", "jsrun"])
ELSEWHERE = frozenset(["aprun", "jsrun"])  # of schedulers that are not Slurm
MPI_HOSTFILES = ("hostfile", "machinefile", "default-hostfile", "f", "hostsfile")
MPI_COUNTS = ("np", "n", "c", "num-proc")
MPI_PER_NODE = ("npernode", "N", "ppn", "perhost")


def read(argv: Sequence[Word]) -> Program | None:
    """The launcher or Python program at the beginning of a command; None for any other."""
    if not argv:
        return None
    name = basename(said(argv[0]))
    if name in NAMES:
        return _launched(NAMES[name], argv[0], argv[1:])
    if name == "accelerate" and len(argv) > 1:
        return _launched("accelerate", argv[0], argv[2:]) if said(argv[1]) == "launch" else None
    if name == "axolotl" and len(argv) > 1 and said(argv[1]) in ("train", "preprocess"):
        rest = tuple(
            word for word in _until(argv[2:], "--") if said(word) != "--launcher" and said(word) not in NAMES
        )
        note = "axolotl train starts accelerate itself: its module is started instead"
        module = made(f"axolotl.cli.{said(argv[1])}", argv[0])
        return Program("accelerate", "module", module, rest, head=_module_head(argv[0]), note=note)
    if name in MPI - ELSEWHERE:
        return _mpi(argv)
    if PYTHON.match(name):
        return _python(argv)
    if re.fullmatch(r"[\w./${}-]+\.py", said(argv[0])):  # executable itself
        return Program("python", "command", argv[0], tuple(argv[1:]))
    return None


def _until(words: Sequence[Word], end: str) -> list[Word]:
    texts = [said(word) for word in words]
    return list(words[: texts.index(end)] if end in texts else words)


def _module_head(near: Word) -> tuple[Word, ...]:
    return (made("python", near), made("-u", near), made("-m", near))


def _python(argv: Sequence[Word]) -> Program | None:
    at = 1
    while at < len(argv):
        text = said(argv[at])
        if text == "-m" and at + 1 < len(argv):
            module = said(argv[at + 1])
            if module in MODULES:
                return _launched(MODULES[module], argv[0], argv[at + 2 :])
            if not re.fullmatch(r"[A-Za-z_][\w.]*", module):
                return None
            return Program("python", "module", argv[at + 1], tuple(argv[at + 2 :]), head=tuple(argv[: at + 1]))
        if text in ("-c", "-V", "--version", "-"):
            return None
        if text in PYTHON_VALUES:
            at += 2
        elif text.startswith("-"):
            at += 1
        else:
            break
    if at >= len(argv):
        return None
    if basename(said(argv[at])) == "deepy.py":
        return Program("job", "command", None, tuple(argv), note=f"deepy.py {REACHES}; DLTS_HOSTFILE is set for it")
    own = "/" in said(argv[0]) and not said(argv[0]).startswith(("/usr/bin/", "/bin/"))
    if own:  # an interpreter of its own is part of the command
        return Program("python", "command", argv[at], tuple(argv[at + 1 :]), head=tuple(argv[:at]))
    return Program("python", "script", argv[at], tuple(argv[at + 1 :]), head=tuple(argv[:at]))


REACHES = "starts the ranks of all nodes -> train.launcher: job: it runs on the first one, and dslaunch sees it alone"


def _ours(name: str, near: Word) -> Word:
    """A word that is known where the program runs: "$DSLAUNCH_HOSTFILE"."""
    return Word(f"${name}", (Piece(f"${name}", name, "ours"),), near.line, near.column)


def _mpi(argv: Sequence[Word]) -> Program:
    """mpirun -np 16 --hostfile hosts python t.py as it is, with the run's hostfile and what is known of its ranks."""
    words = list(argv)
    numbers: dict[str, int] = {}
    at = 1
    while at < len(words) and read(words[at:]) is None:
        name = said(words[at]).lstrip("-").partition("=")[0] if said(words[at]).startswith("-") else ""
        value = words[at + 1] if at + 1 < len(words) else None
        if name in MPI_HOSTFILES and "=" not in said(words[at]) and value is not None:
            words[at + 1] = _ours("DSLAUNCH_HOSTFILE", value)
        elif name in MPI_HOSTFILES:
            words[at : at + 1] = [made(f"--{name}", words[at]), _ours("DSLAUNCH_HOSTFILE", words[at])]
        elif name in (*MPI_COUNTS, *MPI_PER_NODE) and value is not None:
            if said(value).isdigit():
                numbers.setdefault("per node" if name in MPI_PER_NODE else "in all", int(said(value)))
            elif name in MPI_COUNTS:
                words[at + 1] = _ours("SLURM_NTASKS", value)
        at += 1
    name = basename(said(argv[0]))
    return Program(
        "job", "command", None, tuple(words), per_node=numbers.get("per node"), processes=numbers.get("in all"),
        note=f"{name} {REACHES}",
    )  # fmt: skip


def _launched(kind: Starter, word: Word, words: Sequence[Word]) -> Program | None:
    kept: list[Word] = []
    dropped: list[str] = []
    numbers: dict[str, int] = {}
    module = program = False
    note = ""
    rest = list(words)
    while rest and (said(rest[0]).startswith("-") or _unknown(rest[0])):
        option = rest.pop(0)
        text = said(option)
        if not text.startswith("-"):
            if not any(not said(word).startswith("-") and not _unknown(word) for word in rest):
                rest.insert(0, option)  # deepspeed $TASK_ARGS --lr 1: it holds the program, too
                break
            kept.append(option)
            continue
        name, equals, inline = text.lstrip("-").partition("=")
        name = name.replace("-", "_")
        takes = name in launchlint.VALUES[kind]
        value: Word | None = None
        if equals:
            value = shell.cut(option, text.index("=") + 1) if option.value is not None else made(inline, option)
        elif takes and rest:
            value = rest.pop(0)
        if value is not None and said(value).isdigit():
            numbers[name] = int(said(value))
        if name in ("m", "module"):
            module = True
        elif name in ("no_python", "run_path"):
            program, note = True, f"{text}: train.command is the program itself"
        elif name in MEETING:
            dropped.append(text if equals or value is None else f"{text} {said(value)}")
            if name == "include" and value is not None and ":" in said(value):
                numbers["nproc_per_node"] = len(said(value).partition(":")[2].partition("@")[0].split(","))
        else:
            kept += [option] if equals or value is None else [option, value]
    if not rest:
        return None
    target, arguments = rest[0], tuple(rest[1:])
    if PYTHON.match(basename(said(target))) and arguments:  # accelerate launch python train.py
        inner = _python(rest)
        if inner is not None and inner.launcher == "python" and inner.target is not None:
            target, arguments, module = inner.target, inner.arguments, inner.kind == "module"
    shape: Literal["script", "module", "command"] = "module" if module else "command" if program else "script"
    head = _module_head(word) if module else () if program else (made("python", word), made("-u", word))
    per_node = next((numbers[key] for key in ("nproc_per_node", "nproc", "n", "num_gpus", "num_accelerators")
                     if key in numbers), None)  # fmt: skip
    processes = numbers.get("num_processes") or numbers.get("world_size")
    return Program(
        kind, shape, target, arguments, tuple(kept), head, tuple(dropped), per_node, processes, note=note,
    )  # fmt: skip


def _unknown(word: Word) -> bool:
    """A variable alone that may hold options: $DISTRIBUTED_ARGS of a file that is sourced; not "$ARGS", one word."""
    return (
        word.value is None
        and word.quoting == "none"
        and not any(piece.quoted for piece in word.pieces)
        and re.fullmatch(r"\$\{?[A-Z_]*(ARGS|OPTS|OPTIONS|FLAGS)[A-Z_]*\}?", word.partial) is not None
    )


CONFIG_FLAGS = ("--deepspeed", "--deepspeed_config", "--deepspeed-config", "--ds_config", "--ds-config",
                "--deepspeed_config_file")  # fmt: skip

# Words of a script that tell its network; the first that fits. Public documentation of the sites and vendors says so.
FABRICS = (
    (r"NCCL_FASTRAK_|/tcpxo\b", "gcp-tcpxo", "TCPXO"),
    (r"NCCL_GPUDIRECTTCPX|/tcpx\b", "gcp-tcpx", "TCPX"),
    (r"NCCL_NET=['\"]?gIB|/gib\b", "gcp-gib", "gIB"),
    (r"FI_PROVIDER=['\"]?efa|FI_EFA_|/opt/amazon/efa|/opt/sagemaker_cluster", "efa", "EFA"),
    (r"nd(v4|v5|r_v[0-9])-topo", "azure-nd", "the topology of Azure's ND machines"),
    (r"FI_CXI_|FI_PROVIDER=['\"]?cxi|\bhsn[0-9]?\b|single_node_vni|disable_rdzv_get", "slingshot", "Slingshot"),
    (
        r"/pscratch/|nersc/|/lustre/orion|/capstor/|/iopsstor/|#SBATCH +--(environment|uenv)\b|/appl/local/containers"
        r"|partition/G\b|#SBATCH +(-p|--partition)[= ]*(standard|small|dev)-g\b",
        "slingshot",
        "a site with Slingshot",
    ),
    (r"NCCL_IB_TC=(41|105)\b", "oci", "traffic classes of Oracle's RDMA network"),
    (r"NCCL_MNNVL_ENABLE=1", "nvl72", "multi-node NVLink"),
    (r"NCCL_IB_HCA=['\"]?ibp", "coreweave", "the names of CoreWeave's HCAs"),
    (r"SHARP_COLL_|NCCL_COLLNET_ENABLE=1", "sharp", "SHARP"),
    (r"NCCL_IB_GID_INDEX=", "roce", "a GID index, which RoCE needs"),
    (
        r"NCCL_IB_(?!DISABLE=1)|SOCKET_IFNAME=['\"]?ib|\bmlx5|UCX_NET_DEVICES=['\"]?(mlx|ib)",
        "infiniband",
        "InfiniBand",
    ),
    (
        r"--partition[= ]booster|boost_usr_prod|acc_(ehpc|bsc|debug|res)|gpu_h100\b|gpu_a100\b|qos_gpu_(a|h)100"
        r"|#SBATCH +(-p|--partition)[= ]*gh(-dev)?\s",
        "infiniband",
        "a site with InfiniBand",
    ),
    (r"NCCL_IB_DISABLE=1", "ethernet", "InfiniBand switched off"),
)


def fabric(text: str) -> tuple[str, str]:
    """The network that a script speaks of, and the words that say so; ("", "") where none does."""
    code = "\n".join(line for line in text.splitlines() if not re.match(r"\s*(#(?!SBATCH)|unset\b)", line))
    return next(((name, why) for pattern, name, why in FABRICS if re.search(pattern, code)), ("", ""))


# --- beside the training --------------------------------------------------------------------------

SERVERS = (  # words of a command that is a server, and what it is called
    (r"^(\S*/)?vllm serve\b|vllm\.entrypoints|^(\S*/)?trl vllm-serve|vllm_(serve|server\w*)\.py", "vllm"),
    (r"sglang\.launch_server|sglang_router", "sglang"),
    (r"^(\S*/)?text-generation-launcher", "tgi"),
    (r"^(\S*/)?tritonserver", "triton"),
    (r"^(\S*/)?ray start\b.*--head", "ray-head"),
    (r"^(\S*/)?ray start\b", "ray-workers"),
    (r"serve_rm|reward_?(model_)?server|rm_server|reward_api", "reward"),
    (r"(^|[\s/._-])(inference|generation|judge)_?server|\bserver\.py\b", "server"),
    (r"^(\S*/)?(tensorboard|mlflow server|redis-server|nats-server)\b", "helper"),
    (r"^(\S*/)?(dcgmi|nvidia-smi) (dmon|stats|.*-l\b)", "monitor"),
)


def _line(argv: Sequence[Word]) -> str:
    return " ".join(said(word) for word in argv)


def serves(argv: Sequence[Word]) -> bool:
    return any(re.search(pattern, _line(argv)) for pattern, _ in SERVERS)


def service_name(argv: Sequence[Word]) -> str:
    return next(name for pattern, name in SERVERS if re.search(pattern, _line(argv)))


def ray_head(argv: Sequence[Word], gpus: int | None) -> str:
    """The head listens where dslaunch tells the others; other options stay."""
    kept = []
    skip = False
    for word in argv[2:]:
        text = said(word)
        if skip:
            skip = False
            continue
        name, equals, _ = text.partition("=")
        if name in ("--node-ip-address", "--port", "--num-gpus", "--num-cpus", "--head", "--block", "--address"):
            skip = not equals and name not in ("--head", "--block")
            continue
        if word.value is not None:
            kept.append(text)
    line = f'{said(argv[0])} start --head --block --port="${{DSLAUNCH_PORT_RAY_HEAD}}"'
    if gpus:
        line += f" --num-gpus={gpus}"
    return " ".join([line, *kept])


# --- around a program -----------------------------------------------------------------------------

WRAPPERS = {  # what stands before a program, and why it is left out
    "exec": "", "time": "", "nohup": "", "stdbuf": "", "command": "", "nice": "", "setsid": "",
    "numactl": "train.numa binds each rank", "taskset": "slurm.cpu_bind binds",
    "hwloc-bind": "slurm.cpu_bind binds", "timeout": "slurm.time and recover.hang end a job",
    "nsys": "a profiler; put it into train.command where it is wanted",
    "ncu": "a profiler; put it into train.command where it is wanted",
    "rocprof": "a profiler; put it into train.command where it is wanted", "catchsegv": "",
    "dbus-run-session": "", "unbuffer": "", "enroot-run": "",
}  # fmt: skip
WRAPPER_VALUES = {
    "numactl": (), "taskset": ("-c", "--cpu-list"), "nice": ("-n",), "timeout": ("-s", "-k"), "stdbuf": (),
    "nsys": ("-o", "-t", "-c", "-w", "-s", "-x", "-f", "--output", "--trace"),
    "ncu": ("-o", "-k", "--target-processes"),
    "uv": ("--project", "--extra", "--with", "--python", "-p", "--group", "--env-file", "--directory"),
}  # fmt: skip
BOX_VALUES = frozenset(
    """-B --bind --mount --pwd --cwd --workdir --env --env-file --home -H --overlay -o --scratch -S --net
    --network --security --hostname --image -i --module -m --volume -V --add-caps --drop-caps --dns --app
    --fusemount --underlay-path --entrypoint""".split()
)


def unwrapped(name: str, words: Sequence[Word]) -> tuple[Word, ...]:
    """numactl --cpunodebind=0 python train.py is python train.py."""
    rest = list(words)
    takes = WRAPPER_VALUES.get(name, ())
    if name == "nsys" and rest and said(rest[0]) in ("profile", "launch"):
        rest.pop(0)
    while rest and said(rest[0]).startswith("-"):
        flag = said(rest.pop(0))
        if flag in takes and rest:
            rest.pop(0)
    if name in ("timeout", "taskset") and rest and re.fullmatch(r"[0-9][0-9a-fx,.smhd-]*", said(rest[0])):
        rest.pop(0)
    return tuple(rest)


# --- what is no training --------------------------------------------------------------------------

QUIET = frozenset(
    """echo printf date hostname nvidia-smi rocm-smi set trap wait sleep exit return true false : unset shift
    local declare typeset readonly let read mapfile readarray scontrol squeue sinfo sacct scancel kill pkill
    killall ls pwd which type command whoami id env printenv lscpu free df du nproc uname cat tee head tail grep
    egrep awk sed cut sort uniq wc tr xargs test [ [[ break continue pushd popd hash umask getent ping ip
    ifconfig ibstat ibv_devinfo lsmod ompi_info nvcc gcc squeue sprio sbatch ssh pdsh pdcp scp rm touch seq
    mktemp basename dirname realpath readlink chmod ldd stat find git curl wget nc ss netstat lsof jq watch
    shopt enable disown jobs fg bg dcgmi sstat seff tree clear reset alias stty nvidia-cuda-mps-control spack cp
    mv ln tar rsync mkdir unzip zip squeue showenv""".split()
)
WHY = {
    "trap": "dslaunch passes the warning on, saves and starts again by itself",
    "scancel": "dslaunch ends a job whose ranks fail", "kill": "services end with the trainer",
    "pkill": "services end with the trainer",
    "sbatch": "slurm.requeue and recover go on with a run; a job of its own",
    "ssh": "dslaunch starts nothing over ssh", "pdsh": "dslaunch starts nothing over ssh",
    "cp": "copy it before, or `stage:` it", "mv": "copy it before, or `stage:` it",
    "rsync": "copy it before, or `stage:` it", "tar": "unpack it before, or `stage:` it",
    "curl": "fetch it before; a service's readiness is services[].ready",
    "wget": "fetch it before", "git": "code: git takes the code along as it is",
    "rm": "a run has a directory of its own",
    "nc": "a service's readiness is services[].ready", "scontrol": "the nodes' names are dslaunch's part",
    "set": "the scripts of dslaunch stop at the first error", "nvidia-smi": "the preflight looks closer",
    "nvidia-cuda-mps-control": "a rank has a GPU of its own", "ln": "do it before", "mkdir": "make it before",
    "dcgmi": "the GPUs' counters are left as they are", "unset": "a job starts with nothing that has to go",
    "shift": "a job file has no arguments of its own", "wait": "dslaunch waits for the ranks",
    "sleep": "dslaunch waits for services until they answer", "exit": "the job ends as its ranks do",
    "touch": "a run has a directory of its own", "chmod": "do it before", "module": "it prints",
    "umask": "a run's files are yours alone", "unzip": "unpack it before, or `stage:` it",
}  # fmt: skip
RENDEZVOUS = {
    **dict.fromkeys(["MASTER_PORT", "MASTER_ADDR", "MAIN_PROCESS_PORT", "MAIN_PROCESS_IP"], "of each attempt, set by "
                    "dslaunch"),
    **dict.fromkeys(["RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE", "NNODES",
                     "NUM_NODES", "NPROC_PER_NODE", "GPUS_PER_NODE", "NUM_PROCESSES", "MACHINE_RANK", "NGPUS",
                     "NUM_GPUS", "N_NODES", "NGPU", "WORLDSIZE", "NUM_MACHINES", "NPROC", "GPUS", "N_GPUS"],
                    "dslaunch sets the ranks"),
    **dict.fromkeys(["HEAD_NODE", "HEAD_NODE_IP", "HOSTFILE", "DLTS_HOSTFILE", "NODELIST", "HOSTNAMES", "MASTER_IP",
                     "RDZV_ID", "RDZV_HOST", "RDZV_PORT", "RDZV_ENDPOINT", "RDZV_BACKEND", "COUNT_NODE", "NODES",
                     "MASTER_NODE", "HEAD_ADDR", "MASTER", "NODE_LIST", "DS_HOSTFILE", "nodes", "head_node",
                     "head_node_ip", "MASTER_HOST"], "the nodes and where they meet are dslaunch's part"),
    "CUDA_VISIBLE_DEVICES": "Slurm and the launcher hand out the devices",
    "ROCR_VISIBLE_DEVICES": "Slurm and the launcher hand out the devices",
    "HIP_VISIBLE_DEVICES": "Slurm and the launcher hand out the devices",
    "CUDA_LAUNCH_BLOCKING": "it makes every kernel wait: for debugging alone",
    "SRUN_CPUS_PER_TASK": "dslaunch hands the CPUs on to srun",
    "DSLAUNCH": "", "HOSTNAME": "bash sets it", "PS1": "a prompt",
}  # fmt: skip
PREPARES = re.compile(
    r"(?i)(^|[\s/_.-])(prep|prepare|preprocess|pre_?process|tokenize|tokenise|download|convert|merge|install|"
    r"setup|compile|nccl[-_]?tests?|all_reduce_perf|check|sanity|hello|verify|eval|evaluate|export|zero_to_fp32)\w*"
)


FETCHES = re.compile(r"(enroot|docker|podman|podman-hpc|skopeo|aws|gsutil|gcloud|azcopy|rclone|huggingface-cli|hf)\Z")


def prepares(words: Sequence[str], command: Command) -> bool:
    """A line of preparation: what the shell itself runs, and no program that trains."""
    name = basename(words[0])
    return name in ("spack", "eb", "nvidia-cuda-mps-control", "export", "umask", "python_setup", "virtualenv", "make",
                    "cmake", "ninja", "pip", "pip3", "easy_install", "ulimit", "enroot", "modprobe") or (
        words[0].startswith("$") and len(words) == 1 and command.after in ("", "&&")
    ) or (name.startswith("python") and words[1:3] in (["-m", "venv"], ["-m", "pip"]))  # fmt: skip


CHANGES = frozenset("cp mv ln tar rsync mkdir unzip zip rm touch chmod git curl wget".split())  # files, that is


def changes(argv: Sequence[Word]) -> bool:
    """srun mkdir, srun python -c "clean()": a step that does something, and is no training."""
    name = basename(said(argv[0]))
    code = said(argv[2]) if len(argv) > 2 and said(argv[1]) == "-c" else ""
    return name in CHANGES or bool(PYTHON.match(name) and code and not re.search(r"\bprint\b|__version__", code))


def informs(argv: Sequence[Word], nested: Script | None) -> bool:
    """srun hostname, srun nvidia-smi: a step that only prints."""
    name = basename(said(argv[0]))
    if name in QUIET:
        return True
    if name in ("bash", "sh") and nested is not None:
        return all(basename(command.name) in QUIET for command in nested.commands if command.argv)
    if PYTHON.match(name) and len(argv) > 1 and said(argv[1]) in ("-c", "--version", "-V", "-"):
        return True
    return name in ("ds_report", "all_reduce_perf", "ib_write_bw", "nvbandwidth", "ray") and (
        name != "ray" or said(argv[1]) in ("status", "stop") if len(argv) > 1 else True
    )


def looks_like_work(argv: Sequence[Word]) -> bool:
    """bash train.sh, ./run.sh, llamafactory-cli train: a program whose inside is not known."""
    name = basename(said(argv[0]))
    if serves(argv):
        return True
    if name in ("bash", "sh") and len(argv) > 1:
        return bool(re.search(r"\.(sh|bash|slurm)$", said(argv[1])))
    if name == "ray":
        return len(argv) > 1 and said(argv[1]) in ("job", "start")
    known = (
        "llamafactory-cli",
        "trl",
        "tune",
        "swift",
        "olmo",
        "python",
        "xtuner",
        "colossalai",
        "megatron",
        "torchx",
    )
    return name in known or bool(re.search(r"\.(sh|bash)$", said(argv[0])))


def command_like(text: str) -> bool:
    """The value of CMD or LAUNCHER, which is put into a command."""
    return bool(re.search(r"(^|\s)--?[A-Za-z]|\.py\b|\bsrun\b|\bpython|torchrun|launch\b", text))
