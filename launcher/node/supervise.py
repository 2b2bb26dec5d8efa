"""One node's share of a job: check it, start its launcher, look after its ranks, tell how it ended.

    supervise.py --launcher torchrun --nodes 4 --per-node 2 --logs DIR -- python3 train.py --x 1

NODE_RANK, MASTER_ADDR and MASTER_PORT come from the environment. Standard library only: this file, rank.py and the
packages in `code` beside them are copied to nodes that have no dslaunch.

Ends as the rank that failed first on this node; with 124 where the ranks hung and were ended, with 75 where all
stopped early with a checkpoint, with 69, 70 or 78 where nothing of the user's was to blame or had run.
"""

from __future__ import annotations

import argparse
import array
import base64
import contextlib
import ctypes
import errno
import fcntl
import glob
import hashlib
import importlib.metadata
import ipaddress
import json
import os
import pkgutil
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

HERE = os.path.dirname(os.path.abspath(__file__))
CODE = os.path.join(HERE, "code")  # in a pod a zip; in a checkout this file lies in the package itself
sys.path.insert(0, next(filter(os.path.exists, (CODE, CODE + ".zip")), os.path.dirname(os.path.dirname(HERE))))

from launcher.diagnose import Evidence, Exit, Hang  # noqa: E402
from launcher.supervision import HUNG, NO_HOST, Refused, evidence, overseer, report, resume  # noqa: E402
from launcher.supervision import write as write_whole  # noqa: E402
from launcher.supervision.overseer import Overseer  # noqa: E402
from launcher.supervision.voucher import LAST, Voucher  # noqa: E402

CONFIG = 78  # EX_CONFIG: started in a way that cannot be right; nothing of the user's has run
STOPPED_EARLY = 75  # EX_TEMPFAIL: the program saved a checkpoint and wants to be started again
BROKEN = 70  # EX_SOFTWARE: the launcher says 0, but not every rank has a record
SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, signal.SIGCHLD})
STOPS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
TERMINATION_LOG = "/dev/termination-log"  # what `kubectl describe pod` shows
SHOWN = 20  # lines of a failed rank's log
HOOK = "dslaunch_pulse.py"  # what programs import
CHUNK = 1 << 18
LONGEST = 1 << 16  # bytes of a line that is printed in one piece
PROGRESS = 10.0  # seconds between two states of a progress bar
OTHERS = 15  # seconds that the other nodes get to end with 75, where they cannot be told
LAST_WORDS = 5.0  # seconds that hanging ranks get between SIGTERM and SIGKILL
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

# What an operator or an outer launcher leaves behind. PyTorchJob's RANK is the node's, its WORLD_SIZE the
# number of nodes: a program that sees them trains in another world than planned.
STALE = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "CROSS_RANK", "ROLE_NAME"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "CROSS_SIZE", "LOCAL_SIZE"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"),
    *("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_ERROR_FILE"),
}
OURS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # under srun the backend has set these for the one rank
CACHES = (
    ("TORCH_EXTENSIONS_DIR", "extensions"),
    ("TRITON_CACHE_DIR", "triton"),
    ("TORCHINDUCTOR_CACHE_DIR", "inductor"),
)

ITSELF = ("node", "job")  # a program that starts ranks: those of its node, or of all from the first
DIRECT = ("srun", *ITSELF)  # rank.py is started without a launcher: per rank, or once for a program with its own
VISIBLE = ("VISIBLE_DEVICES", "VISIBLE_MODULES", "ZE_AFFINITY_MASK")


@dataclass(frozen=True)
class Options:
    launcher: str
    nodes: int
    per_node: int
    logs: str
    grace: float
    resolve_timeout: float
    same_host: bool
    shared_logs: bool
    argv: list[str]
    hang: float = 0.0
    first_step: float = 1800.0
    steps: int = 0
    stage: int | None = None
    model_parallel: int = 1
    fresh: bool = False
    vouch: bool = False
    launcher_args: tuple[str, ...] = ()
    own_gpu: bool = False
    numa: str | tuple[int, ...] = "none"

    @property
    def world(self) -> int:
        return self.nodes * self.per_node

    @property
    def programs(self) -> int:
        """Those that rank.py starts in the whole job."""
        return {"node": self.nodes, "job": 1}.get(self.launcher, self.world)


@dataclass(frozen=True)
class Place:
    """Which part of the job this is. `ranks` are the ones started here."""

    node: int
    master: str
    port: int
    ranks: list[int]
    name: str  # of this supervisor's files: "node-0001", one per rank under srun: "node-0001-03"


@dataclass(frozen=True)
class Verdict:
    code: int
    reason: str  # one sentence, empty when all is well
    first: Mapping[str, Any] | None = None
    lines: tuple[str, ...] = ()  # the last ones of whoever failed
    signalled: str | None = None
    hang: Hang | None = None
    files: Mapping[str, int] = field(default_factory=dict)  # logs of this attempt, and where it begins in them
    exits: tuple[Exit, ...] = ()
    step: int | None = None
    oom_kills: int | None = None


def say(text: str) -> None:
    print(f"dslaunch: {text}", file=sys.stderr, flush=True)


# What we were asked to do


LAUNCHERS = ("torchrun", "deepspeed", "srun", "accelerate", "composer", *ITSELF)


def numa(text: str) -> str | tuple[int, ...]:
    return text if text in ("auto", "none") else tuple(map(int, text.split(",")))


def parse(arguments: list[str]) -> Options:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        prog="supervise.py", usage="%(prog)s [options] -- PROGRAM [ARGUMENT ...]", allow_abbrev=False
    )
    parser.add_argument("--launcher", choices=LAUNCHERS, required=True)
    parser.add_argument("--launcher-arg", dest="launcher_args", action="append", default=[], help="a further one")
    parser.add_argument("--own-gpu", action="store_true", help="a rank sees its own GPU alone")
    parser.add_argument("--numa", type=numa, default="none", help="auto, or those of the local ranks: 3,3,1,1")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--per-node", type=int, required=True)
    parser.add_argument("--logs", required=True)
    parser.add_argument("--grace", type=float, default=25.0, help="seconds between SIGTERM and the end")
    parser.add_argument("--resolve-timeout", type=float, default=300.0)
    parser.add_argument("--same-host", action="store_true", help="all nodes are this machine")
    parser.add_argument("--shared-logs", action="store_true", help="all nodes see the same DIR")
    parser.add_argument("--hang", type=float, default=0.0, help="seconds without a step; 0: no rank ever hangs")
    parser.add_argument("--first-step", type=float, default=1800.0, help="seconds to the first steps")
    parser.add_argument("--steps", type=int, default=0, help="after the last one nobody waits for another")
    parser.add_argument("--stage", type=int, help="of ZeRO, to judge checkpoints by")
    parser.add_argument("--model-parallel", type=int, default=1)
    parser.add_argument("--vouch", action="store_true", help="write manifests of the checkpoints that appear")
    parser.add_argument("--fresh", action="store_true", help="start over whatever checkpoints there are")
    values = parser.parse_args(arguments[:split])
    argv = arguments[split + 1 :]
    if not argv:
        parser.error("after -- comes the program of one rank, and it is missing")
    if values.nodes < 1 or values.per_node < 1:
        parser.error("--nodes and --per-node start at 1")
    values.logs = os.path.abspath(values.logs)
    values.launcher_args = tuple(values.launcher_args)
    return Options(argv=argv, **vars(values))


def number(env: Mapping[str, str], name: str, *, below: int, least: int = 0) -> int:
    text = env.get(name, "")
    if not text:
        raise Refused(f"{name} is not set: start this through node.sh, which the job's backend gives it")
    if not (text.isascii() and text.isdecimal() and least <= int(text) < below):
        raise Refused(f"{name} is {text!r}, it should be a number from {least} to {below - 1}")
    return int(text)


def place(options: Options, env: Mapping[str, str]) -> Place:
    node = number(env, "NODE_RANK", below=1 if options.launcher == "job" else options.nodes)
    if not env.get("MASTER_ADDR"):
        raise Refused("MASTER_ADDR is not set: this node does not know where rank 0 is")
    port = number(env, "MASTER_PORT", below=65536, least=1)
    if options.launcher == "srun":
        rank, local = number(env, "RANK", below=options.world), number(env, "LOCAL_RANK", below=1 << 16)
        return Place(node, env["MASTER_ADDR"], port, [rank], f"node-{node:04d}-{local:02d}")
    if options.launcher in ITSELF:
        return Place(node, env["MASTER_ADDR"], port, [node], f"node-{node:04d}")
    first = node * options.per_node
    ranks = list(range(first, first + options.per_node))
    return Place(node, env["MASTER_ADDR"], port, ranks, f"node-{node:04d}")


def attempt(env: Mapping[str, str]) -> int:
    """How many times training was started before in this run."""
    count = env.get("DSLAUNCH_ATTEMPT") or env.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdecimal() else 0


# The master, as this node sees it


def look_up(name: str, port: int) -> list[str]:
    found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[4][0]) for address in found))


def resolve(where: Place, *, timeout: float) -> list[str]:
    """A pod's name exists once the pod does, so not having one yet is no error for a while."""
    until = time.monotonic() + timeout
    waiting = False
    while True:
        try:
            return look_up(where.master, where.port)
        except (OSError, UnicodeError) as error:
            if time.monotonic() >= until:
                raise Refused(
                    f"MASTER_ADDR {where.master!r} does not resolve on {host()} after {timeout:.0f} s "
                    f"({error}): does node 0 run, and do the nodes know each other by these names?",
                    code=NO_HOST,
                ) from None
            if not waiting:
                say(f"waiting up to {timeout:.0f} s for the name {where.master} of node 0 ({error})")
                waiting = True
        got = signal.sigtimedwait(STOPS, min(2.0, max(0.1, until - time.monotonic())))
        if got is not None:
            name = signal.Signals(got.si_signo).name
            raise Refused(f"{name} while waiting for the name {where.master}", code=128 + got.si_signo)


def is_loopback(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


def check_master(options: Options, where: Place, addresses: list[str]) -> None:
    if options.nodes == 1 or options.same_host or not all(map(is_loopback, addresses)):
        return
    seen = f"MASTER_ADDR {where.master} resolves to {addresses[0]} on {host()}"
    if where.node == 0:
        say(f"note: {seen}; fine on node 0, which listens on every interface, if the others see another")
        return
    raise Refused(
        f"{seen} (NODE_RANK {where.node}), which is this machine itself: it would wait for a node 0 that "
        f"is elsewhere. Most likely /etc/hosts maps the name to 127.0.1.1, as Debian does with a machine's "
        f"own name, or MASTER_ADDR was set to localhost. Use node 0's address on the network."
    )


def host() -> str:
    return os.uname().nodename


# The environment of the ranks


def interface_of(address: str) -> str | None:
    """The name, "eth0", of the interface with this address."""
    if ":" in address:
        packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0]).hex()
        try:
            with open("/proc/net/if_inet6", encoding="ascii") as file:
                return next((row.split()[5] for row in file if row.startswith(packed)), None)
        except OSError:
            return None
    room = array.array("B", bytes(40 * 1024))  # struct ifreq has 40 bytes on 64-bit machines
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        filled = fcntl.ioctl(sock, 0x8912, struct.pack("iL", len(room), room.buffer_info()[0]))  # SIOCGIFCONF
    rows = room.tobytes()[: struct.unpack("iL", filled)[0]]
    for start in range(0, len(rows), 40):
        if rows[start + 20 : start + 24] == socket.inet_aton(address):
            label = rows[start : start + 16].partition(b"\0")[0].decode()
            return label.partition(":")[0]  # eth0:1 is a second address of eth0
    return None


def local_address(remote: str) -> str | None:
    """The address this machine would write to `remote` from. Connecting UDP sends nothing."""
    family = socket.AF_INET6 if ":" in remote else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((remote, 9))
            return str(sock.getsockname()[0])
    except OSError:
        return None


def gloo_interface(addresses: Iterable[str]) -> str | None:
    for remote in addresses:
        own = None if is_loopback(remote) else local_address(remote)
        name = interface_of(own) if own else None
        if name:
            return name
    return None


def cpus() -> int:
    """What this process may use: its affinity, less in a container with a quota ("200000 100000" is 2)."""
    bound = len(os.sched_getaffinity(0))
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        return bound if quota == "max" else max(1, min(bound, int(quota) // int(period)))
    except (OSError, ValueError):
        return bound


def threads(options: Options, env: Mapping[str, str]) -> int:
    task = env.get("SLURM_CPUS_PER_TASK", "")
    if options.launcher == "srun" and task.isdecimal():
        return max(1, int(task))  # the affinity may already be that of one rank
    return max(1, cpus() // options.per_node)


def private_directory(env: Mapping[str, str]) -> str:
    """$DSLAUNCH_CACHE, else dslaunch-<uid> in $TMPDIR or /tmp, ours alone: compiled code is run from it."""
    given = env.get("DSLAUNCH_CACHE", "")
    temporary = env.get("TMPDIR", "")
    parent = temporary if os.path.isdir(temporary) else "/tmp"  # noqa: S108
    path = os.path.abspath(given or os.path.join(parent, f"dslaunch-{os.geteuid()}"))
    mend = "set DSLAUNCH_CACHE to a directory on this node that is yours alone"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
        found = os.lstat(path)
        if found.st_uid != os.geteuid() or not stat.S_ISDIR(found.st_mode):
            raise Refused(f"{path} on {host()} is not a directory that belongs to uid {os.geteuid()}: {mend}")
        if not given:
            os.chmod(path, 0o700)
        elif found.st_mode & 0o022:
            raise Refused(f"{path} on {host()} can be written by others: chmod go-w it, or {mend}")
    except OSError as error:
        raise Refused(f"cannot use {path} on {host()}: {error.strerror}; {mend}") from None
    return path


def software() -> str:
    """Changes with Python, torch and DeepSpeed: what one release compiled, another does not load."""
    found = [sys.prefix, sys.version]
    for package in ("torch", "deepspeed"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(importlib.metadata.version(package))
    return hashlib.sha256(os.fsencode("\0".join(found))).hexdigest()[:12]


@contextlib.contextmanager
def compiled(path: str) -> Iterator[None]:
    """The node's cache of compiled code, kept between jobs: building DeepSpeed's operators takes a minute.

    A job killed while it compiled leaves a lock file that every later one waits for without a word. Whoever
    finds nobody else here takes such files away.
    """
    os.makedirs(path, 0o700, exist_ok=True)
    lock = os.open(os.path.join(path, ".in-use"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with contextlib.suppress(OSError):  # in use: its locks are real
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for stale in glob.glob(os.path.join(glob.escape(path), "**", "lock"), recursive=True):
                os.unlink(stale)
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield
    finally:
        os.close(lock)


def rank_environment(
    options: Options, env: Mapping[str, str], *, jit: str, addresses: list[str], state: str, tag: str
) -> tuple[dict[str, str], list[str]]:
    """What the launcher is started with, and what the user may want to know about it."""
    kept = OURS if options.launcher == "srun" else ()
    ours: dict[str, str] = {}
    if options.launcher in ITSELF:
        ours = {"RANK": env["NODE_RANK"], "LOCAL_RANK": "0", "WORLD_SIZE": str(options.programs)}
    elif options.launcher == "accelerate" and options.world == 1:  # which starts a single rank as it is
        ours = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    elastic = options.launcher == "node" and "PET_RDZV_ENDPOINT" in env  # for the program's own torchrun
    result = {
        name: value
        for name, value in env.items()
        if name in kept or not (name in STALE or (name.startswith("PET_") and not elastic))
    }
    result.update(ours)
    notes = []
    for name, folder in CACHES:
        result.setdefault(name, os.path.join(jit, folder))
    result.setdefault("DSLAUNCH_METRICS", os.path.join(options.logs, "metrics.jsonl"))
    result["DSLAUNCH_RESUME"] = tag
    result["PYTHONPATH"] = os.pathsep.join(filter(None, (os.path.join(state, "hook"), env.get("PYTHONPATH"))))
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_PIPE_FILE"):
        result.setdefault(name, recorder(state))  # the second is the first one's name before torch 2.8
    result.setdefault("OMP_NUM_THREADS", str(threads(options, env)))
    several = options.nodes > 1 and options.launcher != "job"  # whose ranks elsewhere may have it under another name
    if several and not options.same_host and "GLOO_SOCKET_IFNAME" not in result:
        name_of_interface = gloo_interface(addresses)
        if name_of_interface:
            result["GLOO_SOCKET_IFNAME"] = name_of_interface
        else:
            notes.append(
                f"note: no interface found that leads to {', '.join(addresses)}, so GLOO_SOCKET_IFNAME is "
                "left to gloo; set it if ranks cannot connect to each other"
            )
    return result, notes


def recorder(state: str) -> str:
    """Where torch's flight recorders write, before the rank's number."""
    return os.path.join(state, "flight-")


# The checkpoint to go on from


def pause(seconds: float, doing: str) -> None:
    """Signals are blocked: whoever waits has to ask for them."""
    got = signal.sigtimedwait(STOPS, seconds)
    if got is not None:
        name = signal.Signals(got.si_signo).name
        raise Refused(f"{name} while {doing}", code=128 + got.si_signo)


def resumed(options: Options, where: Place, env: Mapping[str, str], *, count: int) -> str:
    directory = env.get("DSLAUNCH_CHECKPOINT_DIR", "")
    if not directory:
        return ""
    return resume.gate(
        directory,
        config=env.get("DSLAUNCH_DS_CONFIG", ""),
        first=0 in where.ranks,
        logs=options.logs if options.shared_logs or 0 in where.ranks else None,
        attempt=count,
        # the reference trainer has a flag of this name, and is asked for by it in the job file
        run=resume.Run(
            options.world, options.stage, options.model_parallel, options.fresh or "--fresh" in options.argv
        ),
        say=say,
        pause=pause,
    )


# The launcher


def command(options: Options, where: Place, *, python: str, rank_py: str, plan: str) -> list[str]:
    rank = [python, rank_py, plan]
    more = options.launcher_args
    if options.launcher == "torchrun":
        run = [python, "-m", "torch.distributed.run", f"--nnodes={options.nodes}"]
        run += [f"--node-rank={where.node}", f"--nproc-per-node={options.per_node}"]
        run += [f"--master-addr={where.master}", f"--master-port={where.port}", "--max-restarts=0"]
        return [*run, f"--log-dir={os.path.dirname(plan)}/torchrun", *more, "--no-python", *rank]
    if options.launcher == "deepspeed":
        slots = {f"node{node}": list(range(options.per_node)) for node in range(options.nodes)}
        world = base64.urlsafe_b64encode(json.dumps(slots).encode()).decode()
        run = [python, "-m", "deepspeed.launcher.launch", f"--node_rank={where.node}"]
        run += [f"--master_addr={where.master}", f"--master_port={where.port}", f"--world_info={world}"]
        return [*run, *more, "--no_python", "--no_local_rank", *rank]
    if options.launcher == "accelerate":
        return [python, "-m", "accelerate.commands.launch", *accelerate(options, where), *more, "--no_python", *rank]
    if options.launcher == "composer":
        run = [python, "-m", "composer.cli", f"--nproc={options.per_node}", f"--world_size={options.world}"]
        run += [f"--node_rank={where.node}", f"--master_addr={where.master}", f"--master_port={where.port}"]
        return [*run, *more, "--command_mode", *rank]
    return rank


# What says how accelerate starts ranks; without any of it, it counts the GPUs it sees, and starts one rank on a CPU.
KINDS = ("--config_file", "--multi_gpu", "--cpu", "--tpu", "--use_deepspeed", "--use_fsdp", "--use_megatron_lm")


def accelerate(options: Options, where: Place) -> list[str]:
    """Its place in the job. `standard` for DeepSpeed: otherwise each node would log in to all the others by pdsh."""
    words = {word.partition("=")[0].replace("-", "_").replace("__", "--", 1) for word in options.launcher_args}
    run = [f"--num_machines={options.nodes}", f"--num_processes={options.world}", f"--machine_rank={where.node}"]
    run += [f"--main_process_ip={where.master}", f"--main_process_port={where.port}", "--same_network"]
    run += ["--rdzv_backend=static", "--max_restarts=0"]
    if options.nodes > 1:
        run.append("--deepspeed_multinode_launcher=standard")
    if options.world > 1 and not words & set(KINDS):
        run.append("--multi_gpu")
    return run


def before_launcher() -> None:
    """Between fork and exec. USR2 would kill a launcher; rank.py gives the programs its default back."""
    os.setpgid(0, 0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


# What rank.py writes


def read_json(path: str) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        value: dict[str, Any] = json.load(file)
    return value


def record_names(state: str) -> list[str]:
    return sorted(name for name in os.listdir(state) if name.startswith("rank-") and name.endswith(".json"))


def records(state: str) -> list[dict[str, Any]]:
    return [read_json(os.path.join(state, name)) for name in record_names(state)]


def is_rank(pid: int, plan: str) -> bool:
    """Whether this pid still is one of our rank.py and no later process."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return os.fsencode(plan) in file.read().split(b"\0")
    except OSError:
        return False


def running(state: str, plan: str) -> list[dict[str, Any]]:
    return [one for one in records(state) if one["ended"] is None and is_rank(one["wrapper"], plan)]


# What the ranks say


class Tail:
    """Follows a growing file and gives back whole lines, each with its prefix.

    Of a progress bar, which redraws its line with carriage returns, only what a terminal would show
    in the end is kept, and before that one state every ten seconds.
    """

    def __init__(self, path: str, *, start: int, prefix: str) -> None:
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115  # looked at for as long as the job runs
        self.file.seek(start)
        self.prefix = prefix.encode()
        self.begun = b""
        self.shown = time.monotonic()

    def line(self, text: bytes) -> bytes:
        return self.prefix + text.rstrip(b"\r").rpartition(b"\r")[2] + b"\n"

    def read(self) -> bytes | None:
        """None at the end of the file."""
        new = self.file.read(CHUNK)
        *whole, self.begun = (self.begun + new).split(b"\n")
        found = [self.line(text) for text in whole]
        *states, last = self.begun.rsplit(b"\r", 2)
        if states and states[-1] and time.monotonic() - self.shown > PROGRESS:
            found.append(self.line(states[-1]))
            self.begun = last
        if len(self.begun) > LONGEST:
            self.begun = last
        if len(self.begun) > LONGEST:
            found.append(self.line(self.begun))
            self.begun = b""
        if found:
            self.shown = time.monotonic()
        return b"".join(found) if new or found else None

    def rest(self) -> bytes:
        return self.line(self.begun) if self.begun else b""


class Echo(threading.Thread):
    """Prints all of this node's logs. A thread, so that a reader who stalls does not hold up signals."""

    def __init__(self, state: str, launcher: Tail) -> None:
        super().__init__(daemon=True)
        self.state = state
        self.tails = {"": launcher}  # by the name of the rank's record
        self.last = threading.Event()

    def find(self) -> None:
        for name in set(record_names(self.state)) - set(self.tails):
            one = read_json(os.path.join(self.state, name))
            prefix = f"[rank {one['rank']}] "
            self.tails[name] = Tail(one["log"], start=one["log_from"], prefix=prefix)

    def run(self) -> None:
        while True:
            last = self.last.is_set()  # before looking: nobody writes after it is set
            self.find()
            found = [text for text in (tail.read() for tail in self.tails.values()) if text is not None]
            if not write(b"".join(found)):
                return
            if last and not found:
                break
            if not found:
                self.last.wait(0.2)
        write(b"".join(tail.rest() for tail in self.tails.values()))

    def finish(self, timeout: float = 60.0) -> None:
        self.last.set()
        self.join(timeout)
        if self.is_alive():
            say("nobody reads this output fast enough; the rest of it is in the ranks' logs only")


def write(text: bytes, out: int = 1) -> bool:
    """All of it, to a pipe that may be full or non-blocking. False when nobody listens any more."""
    view = memoryview(text)
    while view:
        try:
            view = view[os.write(out, view) :]
        except BlockingIOError:
            time.sleep(0.05)
        except OSError as error:
            if error.errno != errno.EINTR:
                return False
    return True


def last_lines(path: str, start: int) -> tuple[str, ...]:
    """The last 20 lines written after `start`, as a terminal would show them."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(start, file.tell() - LONGEST))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ()
    lines = text.rstrip("\r\n").split("\n")[-SHOWN:]
    return tuple(line.rstrip("\r").rpartition("\r")[2] for line in lines) if text else ()


# Until it ends


def exit_code(status: int) -> int:
    """137 for a process that SIGKILL ended, never 0 and never -9."""
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def reap() -> dict[int, int]:
    """Whatever child has ended, adopted grandchildren too: pid and wait status."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended[pid] = status
    return ended


def descendants() -> list[int]:
    below: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                letter, parent = file.read().rpartition(b")")[2].split()[:2]
                if letter != b"Z":
                    below.setdefault(int(parent), []).append(int(name))
    found: list[int] = []
    todo = [os.getpid()]
    while todo:
        new = below.get(todo.pop(), [])
        todo += new
        found += new
    return found


def send(pids: Iterable[int], what: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, what)


def sweep() -> None:
    """Leave nothing behind, workers and daemons included: they have 3 s, after TERM 3 s, then KILL."""
    for what, patience in ((0, 3.0), (signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
        until = time.monotonic() + patience
        send(descendants(), what)
        while True:
            reap()
            left = descendants()
            if not left:
                return
            if time.monotonic() > until:
                break
            if what == signal.SIGKILL:
                send(left, what)
            time.sleep(0.05)
    say(f"processes {descendants()} on {host()} do not end even when killed; a stuck device or file system?")


@dataclass(frozen=True)
class End:
    """Of the launcher. `signalled` is what we were told to stop with, SIGTERM say."""

    code: int
    at: float
    killed: bool = False
    signalled: str | None = None


def watch(launcher: int, *, state: str, plan: str, grace: float, over: Overseer) -> End:
    """Hand signals to the ranks, not to their launcher, which would kill them before they have saved."""
    signalled: int | None = None
    told: set[int] = set()
    stages: list[tuple[float, str]] = []
    hung = False
    while True:
        got = signal.sigtimedwait(SIGNALS, 0.5)
        ended = reap()
        if launcher in ended:
            status = ended[launcher]
            name = signal.Signals(signalled).name if signalled else None
            return End(exit_code(status), time.time(), os.WIFSIGNALED(status), name)
        now = time.monotonic()
        if got is not None and got.si_signo == signal.SIGUSR2:
            send((one["wrapper"] for one in running(state, plan)), signal.SIGUSR2)
        elif got is not None and got.si_signo in STOPS:
            first = signalled is None
            signalled = signalled or got.si_signo
            alive = running(state, plan)
            if not alive or (not first and got.si_signo == signal.SIGINT):
                grace = 0  # there is nobody to wait for; or the user has pressed Ctrl-C again
            if first or not grace:
                stages = [(now + grace, "launcher"), (now + grace + 2, "programs"), (now + grace + 3, "all")]
        if signalled is not None:
            new = [one["wrapper"] for one in running(state, plan) if one["wrapper"] not in told]
            send(new, signal.SIGINT if signalled == signal.SIGINT else signal.SIGTERM)
            told.update(new)
        if over.hang and not hung:
            hung = True
            send((one["wrapper"] for one in running(state, plan)), signal.SIGTERM)
            send(descendants(), signal.SIGCONT)  # whoever is stopped does not hear of SIGTERM
            stages = [
                (now + LAST_WORDS, "programs"),
                (now + LAST_WORDS + 2, "launcher"),
                (now + LAST_WORDS + 3, "all"),
            ]
        while stages and now >= stages[0][0]:
            stage = stages.pop(0)[1]
            if stage == "launcher":
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(launcher, signal.SIGTERM)
            elif stage == "programs":  # so that rank.py can still write down what became of them
                send((one["pid"] for one in running(state, plan) if one["pid"]), signal.SIGKILL)
            else:
                send(descendants(), signal.SIGKILL)
                stages = [(now + 1, "all")]


# What became of it


def how(one: Mapping[str, Any]) -> str:
    if one["code"] is None:
        return "vanished, killed together with its rank.py (by the kernel's out-of-memory killer?)"
    if one["signal"]:
        return f"was killed by {one['signal']} ({one['code'] - 128})"
    if 128 < one["code"] < 128 + signal.NSIG:
        return f"ended with exit code {one['code']} (128 + signal {one['code'] - 128})"
    return f"ended with exit code {one['code']}"


def verdict(options: Options, where: Place, ranks: list[dict[str, Any]], end: End) -> Verdict:
    """0 if every rank of this node says so, else what the first one to fail says.

    Rank 3 ends with 7, then the launcher kills the others: 7. All end with 75: 75. One ends with 75
    and another is killed before it has saved: 143.
    """
    hard = sorted((one for one in ranks if one["code"] not in (None, 0, STOPPED_EARLY)), key=lambda one: one["ended"])
    lost = [one for one in ranks if one["code"] is None]
    missing = sorted(set(where.ranks) - {one["rank"] for one in ranks})
    only_killed = all(one["code"] in (128 + signal.SIGTERM, 128 + signal.SIGKILL) for one in hard)
    outlived = (
        bool(ranks)
        and options.launcher not in DIRECT
        and end.code != 0
        and not end.signalled
        and all(one["ended"] is None or one["orphaned"] or one["ended"] > end.at for one in ranks)
        and (end.killed or not lost)
    )
    if lost and only_killed and not (hard and end.signalled):
        hard = [lost[0]]  # it went without a word, and the launcher killed the others
    stop = f"stopped by {end.signalled}; " if end.signalled else ""
    if hard and not outlived:
        first = hard[0]
        who = f"rank {first['rank']} (local {first['local_rank']}) on {first['host']}"
        if options.launcher in ITSELF:
            who = f"the program of node {first['rank']} on {first['host']}"
        text = f"{who} {how(first)} first"
        code = 128 + signal.SIGKILL if first["code"] is None else first["code"]
        return Verdict(code, f"{stop}{text}; see {first['log']}", first, signalled=end.signalled)

    name = "rank.py" if options.launcher in DIRECT else options.launcher
    on = f"on {host()} (node {where.node})"
    if missing or outlived:
        code = BROKEN if end.code in (0, STOPPED_EARLY) else end.code
        if end.signalled and not ranks:
            code = 128 + getattr(signal, end.signalled)
        when = "before its ranks did" if outlived else "before any rank started"
        if missing and ranks:
            when = f"and rank {', '.join(map(str, missing))} never started"
        ended = f"was killed by signal {end.code - 128}" if end.killed else f"ended with exit code {end.code}"
        text = f"{stop}{name} {on} {ended} {when}; see {os.path.join(options.logs, where.name)}.launcher.log"
        return Verdict(code, text, signalled=end.signalled)
    if any(one["code"] == STOPPED_EARLY for one in ranks):
        text = f"{stop}all ranks {on} stopped early with exit code {STOPPED_EARLY}: start the job again"
        return Verdict(STOPPED_EARLY, text, signalled=end.signalled)
    return Verdict(0, "", signalled=end.signalled)


def ended_for(options: Options, found: Hang | None, *, count: int, failed: bool) -> Hang | None:
    """The hang that this node's ranks were ended for, or that took them along when another node's went first."""
    if found or not failed or not options.shared_logs:
        return found
    value = overseer.read(os.path.join(options.logs, f"hang-{count}", "verdict.json"))
    return overseer.hang_of(value) if value else None


def words(found: Hang) -> str:
    return f"hang: no step for {found.seconds:.0f} s after step {found.step} (limit {found.limit:.0f} s): {found.why}"


def diagnosis(options: Options, where: Place, result: Verdict, *, since: float) -> Any:
    """Why, as far as this node's logs tell; None when they cannot be read. The exit code counts more."""
    kills = {} if result.oom_kills is None else {host(): result.oom_kills}
    facts = Evidence(code=result.code, exits=result.exits, oom_kills=kills, hang=result.hang, hosts=(host(),))
    try:
        return report.diagnosis(
            result.files, facts, kernel=os.path.join(options.logs, f"{where.name}.dmesg"), since=since
        )
    except Exception:
        traceback.print_exc()
        return None


def tell_stop(options: Options, count: int) -> int:
    """What to end with when all ranks here stopped early, with their checkpoint.

    A scheduler that ends the others at the first 75 would catch them while they leave. Where all nodes share
    the logs, a file there says it for the job and this node ends with 0; elsewhere the others get some time.
    """
    if options.shared_logs:
        with contextlib.suppress(OSError), open(os.path.join(options.logs, f"stopped-{count}"), "w"):
            return 0
    signal.sigtimedwait(STOPS, OTHERS)
    return STOPPED_EARLY


def write_json(path: str, value: Mapping[str, Any]) -> None:
    """Best effort: the disk may be full, and the exit code counts more."""
    try:
        write_whole(path, value)
    except OSError as error:
        say(f"cannot write {path}: {error.strerror}")


def tell_kubernetes(text: str) -> None:
    if os.path.exists(TERMINATION_LOG):
        with contextlib.suppress(OSError), open(TERMINATION_LOG, "wb") as file:
            file.write(text.encode("utf-8", "replace")[:4096])


def conclude(
    options: Options, where: Place, result: Verdict, *, started: float, count: int, since: float = 0.0
) -> None:
    """Tell the user, whoever reads the logs' directory, and Kubernetes."""
    if result.reason:
        say(result.reason)
        write("".join(f"    {line}\n" for line in result.lines).encode("utf-8", "replace"), out=2)
    if result.code:
        tell_kubernetes("\n".join((result.reason, *result.lines)))
    first = result.first and {
        name: value for name, value in result.first.items() if name not in ("wrapper", "log_from")
    }
    value = {
        "node_rank": where.node,
        "host": host(),
        "code": result.code,
        "signalled": result.signalled,
        "first_failure": first,
        "reason": result.reason,
        "started": started,
        "ended": time.time(),
        "attempt": count,
        "diagnosis": None,
        "hang": overseer.to_json(result.hang),
        "step": result.step,
        "oom_kills": result.oom_kills,
    }
    path = os.path.join(options.logs, f"{where.name}.json")
    write_json(path, value)
    if (result.first or result.hang) and result.code != STOPPED_EARLY and not result.signalled:
        # srun tells the highest exit code of all nodes, which is that of a node it ended itself
        with contextlib.suppress(OSError), open(os.path.join(options.logs, f"first-failure-{count}"), "x") as file:
            file.write(f"{result.code}\n")
    if result.code not in (0, STOPPED_EARLY):  # last: Slurm may end this node while it reads its logs
        value["diagnosis"] = diagnosis(options, where, result, since=since)
        write_json(path, value)


def supervise(options: Options, where: Place, env: Mapping[str, str], *, count: int) -> Verdict:
    addresses = resolve(where, timeout=options.resolve_timeout)
    check_master(options, where, addresses)
    base = private_directory(env)
    jit = os.path.join(base, f"jit-{software()}")
    with compiled(jit), scratch(base) as state:
        over = Overseer(settings(options, where, state=state, count=count), say)
        over.start()
        try:
            tag = resumed(options, where, env, count=count)
            return train(options, where, env, over, jit=jit, addresses=addresses, tag=tag)
        finally:
            over.stop()


@contextlib.contextmanager
def scratch(base: str) -> Iterator[str]:
    """A directory for this supervisor alone. What cannot be deleted, as of NFS while it is open, fails no job."""
    path = tempfile.mkdtemp(prefix="node-", dir=base)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def settings(options: Options, where: Place, *, state: str, count: int) -> overseer.Settings:
    return overseer.Settings(
        node=where.node,
        nodes={"srun": options.world, "job": 1}.get(options.launcher, options.nodes),
        name=where.name,
        host=host(),
        attempt=count,
        logs=options.logs,
        shared=options.shared_logs,
        state=state,
        floor=options.hang,
        first_step=options.first_step,
        steps=options.steps,
        recorder=recorder(state),
    )


def train(
    options: Options,
    where: Place,
    env: Mapping[str, str],
    over: Overseer,
    *,
    jit: str,
    addresses: list[str],
    tag: str,
) -> Verdict:
    state, count = over.settings.state, over.settings.attempt
    os.mkdir(os.path.join(state, "hook"))
    with open(os.path.join(state, "hook", HOOK), "wb") as file:
        file.write(pkgutil.get_data("launcher", f"node/hook/{HOOK}") or b"")
    ranks_env, notes = rank_environment(options, env, jit=jit, addresses=addresses, state=state, tag=tag)
    for note in notes:
        say(note)
    plan = os.path.join(state, "plan.json")
    write_json(plan, rank_plan(options, where, env))
    log = os.path.join(options.logs, f"{where.name}.launcher.log")
    with open(log, "ab") as output:
        log_from = output.tell()
        launcher = subprocess.Popen(
            command(options, where, python=sys.executable, rank_py=beside("rank.py"), plan=plan),
            env=ranks_env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=before_launcher,
        )
    echo = Echo(state, Tail(log, start=log_from, prefix=f"[node {where.node}] "))
    echo.start()
    voucher = None
    if options.vouch and 0 in where.ranks and env.get("DSLAUNCH_CHECKPOINT_DIR"):
        voucher = Voucher(env["DSLAUNCH_CHECKPOINT_DIR"])
        voucher.start()
    end = watch(launcher.pid, state=state, plan=plan, grace=options.grace, over=over)
    launcher.returncode = end.code  # reaped above, with everybody else
    sweep()
    echo.finish()
    if voucher:
        voucher.finish(LAST_WORDS if end.signalled else LAST)  # who was told to stop is killed soon
    over.stop()
    ranks = records(state)
    result = verdict(options, where, ranks, end)
    evidence.keep(recorder(state), over.settings.folder)  # a watchdog of NCCL's may have written them
    found = ended_for(options, over.hang, count=count, failed=result.code != 0)
    if found:
        result = replace(result, code=HUNG, reason=words(found), first=None, hang=found)
    result = replace(
        result,
        files={log: log_from, **{one["log"]: one["log_from"] for one in ranks}},
        exits=tuple(Exit(one["rank"], one["host"], one["code"], one["signal"] or "", one["ended"]) for one in ranks),
        step=over.step(),
        oom_kills=over.oom_kills(),
    )
    if result.code in (0, STOPPED_EARLY) or found:
        return result
    path, start = (result.first["log"], result.first["log_from"]) if result.first else (log, log_from)
    return replace(result, lines=last_lines(path, start))


def rank_plan(options: Options, where: Place, env: Mapping[str, str]) -> dict[str, Any]:
    """What rank.py is told. DeepSpeed's launcher overwrites the visible devices, rank.py puts them back."""
    return {
        "argv": options.argv,
        "world": options.programs,
        "nodes": options.nodes,
        "alone": options.launcher == "job",
        "starts_itself": options.per_node if options.launcher in ITSELF else 0,
        "own_gpu": options.own_gpu,
        "numa": options.numa,
        "logs": options.logs,
        "node_rank": where.node,
        "visible": {name: value for name, value in env.items() if name.endswith(VISIBLE)},
    }


def beside(name: str) -> str:
    return os.path.join(HERE, name)


def main(arguments: list[str]) -> int:
    started, since = time.time(), time.monotonic()
    options = parse(arguments)
    kept = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()  # nohup
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS - kept)
    for number_of_signal in SIGNALS - kept:
        signal.signal(number_of_signal, signal.SIG_DFL)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    env = dict(os.environ)
    count = attempt(env)
    where = None
    try:
        where = place(options, env)
        os.makedirs(options.logs, exist_ok=True)
        result = supervise(options, where, env, count=count)
    except Refused as refused:
        result = Verdict(refused.code, str(refused))
    except OSError as error:
        result = Verdict(CONFIG, f"cannot go on on {host()}: {error}")
    if where is None:
        say(result.reason)
        tell_kubernetes(result.reason)
        return result.code
    conclude(options, where, result, started=started, count=count, since=since)
    if result.code == STOPPED_EARLY and options.world > len(where.ranks):
        return tell_stop(options, count)
    return result.code


libc = ctypes.CDLL(None)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
