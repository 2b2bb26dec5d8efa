"""One rank: check the world, start the program, hand signals on, write down how it ended.

The node's launcher starts `rank.py FILE` once per rank. FILE is written by supervise.py and holds the
program, because torchrun replaces "$$" and "$local_rank" in arguments and DeepSpeed logs them all. A program
that starts its ranks itself is started once, and is what the others call a rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

CONFIG = 78  # EX_CONFIG: started in a way that cannot be right
STOPPED_EARLY = 75  # EX_TEMPFAIL: the program saved a checkpoint and wants to be started again
HOLD = 60.0  # seconds to wait for the other ranks' 75
ORPHAN = 25.0  # seconds a program may live on when the launcher is gone
SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGCHLD})
SHELLS = ("sh", "bash", "dash", "ash", "zsh", "ksh")
PR_SET_PDEATHSIG = 1
SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237, "ppc64le": 261}  # the kernel's numbers; libc has no name for it
MPOL_PREFERRED = 1
NODES = 1024  # NUMA nodes that a kernel can have
# What names the GPUs a process may use. ROCm's runtime reads the first, and HIP counts among those that it left.
BELOW = "ROCR_VISIBLE_DEVICES"
MASKS = (
    *("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"),
    *("ZE_AFFINITY_MASK", "ASCEND_RT_VISIBLE_DEVICES", "HABANA_VISIBLE_MODULES"),
)


def wrong_world(env: Mapping[str, str], world: int) -> str:
    """Empty if this rank belongs to a job of `world` ranks, else what is wrong.

    world 8, WORLD_SIZE 2: "this job was planned for 8 ranks, WORLD_SIZE is 2: refusing to train 4
    separate worlds".
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not env.get(name)]
    if missing:
        return f"{', '.join(missing)} not set for this rank: its launcher did not make it part of a job"
    odd = [f"{name}={env[name]}" for name in names if name != "MASTER_ADDR" and not env[name].isdecimal()]
    if odd:
        return f"{', '.join(odd)}: that should be a number"
    rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
    if size != world:
        worlds = f"{world // size} separate worlds" if size and world % size == 0 else "in that world"
        return f"this job was planned for {world} ranks, WORLD_SIZE is {size}: refusing to train {worlds}"
    if rank >= size:
        return f"RANK is {rank}, but a world of {size} has the ranks 0 to {size - 1}"
    return ""


def write_json(path: str, value: Mapping[str, Any]) -> None:
    """The whole file or the old one: readers come at any time."""
    draft = f"{path}.{os.getpid()}.tmp"
    with open(draft, "w", encoding="utf-8") as file:
        json.dump(value, file)
        file.write("\n")
    os.replace(draft, path)


def record(state: str, logs: str, entry: Mapping[str, Any]) -> None:
    """First where the supervisor looks, then for everybody else: the shared disk may be full."""
    name = f"rank-{entry['rank']:05d}.json"
    write_json(os.path.join(state, name), entry)
    public = {key: value for key, value in entry.items() if key not in ("wrapper", "log", "log_from")}
    try:
        write_json(os.path.join(logs, name), public)
    except OSError as error:
        print(f"dslaunch: cannot write {os.path.join(logs, name)}: {error.strerror}", file=sys.stderr)


def status(pid: int) -> dict[str, str]:
    """/proc/PID/status as a table; empty when the process is gone."""
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            rows = (line.partition(":") for line in file)
            return {key: value.strip() for key, _, value in rows}
    except OSError:
        return {}


def catches(row: Mapping[str, str], number: int) -> bool:
    """SigCgt 0000000000000800 is bit 11, so signal 12, SIGUSR2, has a handler."""
    return bool(int(row.get("SigCgt", "0"), 16) >> (number - 1) & 1)


def children(pid: int) -> dict[int, dict[str, str]]:
    found = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            row = status(int(name))
            if row.get("PPid") == str(pid):
                found[int(name)] = row
    return found


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def heed(pid: int, number: int) -> list[int]:
    """The first ones that have a handler, down from `pid`: a rank behind a script and a torchrun, not its workers."""
    if catches(status(pid), number):
        return [pid]
    return [found for child in children(pid) for found in heed(child, number)]


def deliver(pid: int, number: int) -> set[int]:
    """Signal the program; for a shell without a trap, what it runs. Returns those the shell waits for.

    USR2 goes only to who handles it, as it kills everything else. A shell told to TERM would die
    and leave its training without a parent and without the time to save, so it comes second.
    """
    own = status(pid)
    shell = own.get("Name") in SHELLS and not catches(own, number)
    below = children(pid) if shell else {}
    if number == signal.SIGUSR2:
        for target, row in {pid: own, **below}.items():
            if catches(row, number):
                send(target, number)
        return set()
    for target in below or {pid: own}:
        send(target, number)
    return set(below)


def die_with_parent(number: int) -> None:
    libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def before_program() -> None:
    """Between fork and exec. A group of its own, as torchrun signals all of rank.py's: rank.py decides."""
    os.setpgid(0, 0)
    die_with_parent(signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def start(argv: list[str], env: dict[str, str], log: int) -> subprocess.Popen[bytes] | tuple[int, str]:
    try:
        return subprocess.Popen(
            argv, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=before_program
        )
    except FileNotFoundError:
        return 127, f"cannot start {argv[0]!r}: no such program here (or none to interpret its #! line)"
    except OSError as error:
        return 126, f"cannot start {argv[0]!r}: {error.strerror}; is it executable, and for this machine?"


def wait(program: subprocess.Popen[bytes], *, ranks_below: bool = False, alone: bool = False) -> int:
    """Until it ends, handing on signals: TERM and INT once, as the launcher repeats them, USR2 each time.

    `ranks_below`: the program starts ranks itself, and USR2 is for them. `alone`: it starts those of other nodes too,
    and nobody hears of USR2: mpirun hands it to every rank, where it kills who has no handler.
    """
    parent = os.getppid()
    handed: dict[int, float] = {}
    shell_waits_for: set[int] = set()
    shell_signal = 0
    orphaned = 0.0
    while True:
        got = signal.sigtimedwait(SIGNALS, 0.2 if shell_waits_for else 1.0)
        code = program.poll()
        if code is not None:
            return code
        now = time.monotonic()
        if got is not None and got.si_signo != signal.SIGCHLD:
            number = got.si_signo
            # Slurm may signal every process of a step: the supervisor's copy follows within the second
            fresh = number not in handed or (number == signal.SIGUSR2 and now - handed[number] > 1.0)
            if fresh:
                handed[number] = now
                if alone and number == signal.SIGUSR2:
                    continue
                if ranks_below and number == signal.SIGUSR2:
                    for target in heed(program.pid, number):
                        send(target, number)
                    continue
                below = deliver(program.pid, number)
                if below:
                    shell_waits_for, shell_signal = below, number
        if shell_waits_for and not shell_waits_for & set(children(program.pid)):
            shell_waits_for = set()
            send(program.pid, shell_signal)
        if os.getppid() != parent:
            orphaned = orphaned or now
            if now - orphaned > ORPHAN:
                program.kill()


def others_run(state: str, rank: int) -> bool:
    for name in os.listdir(state):
        if name.startswith("rank-") and name.endswith(".json"):
            with open(os.path.join(state, name), encoding="utf-8") as file:
                entry = json.load(file)
            if entry["rank"] != rank and entry["ended"] is None:
                return True
    return False


def hold(state: str, rank: int) -> None:
    """A launcher kills the node's ranks when the first one ends with 75, though they are about to as well."""
    until = time.monotonic() + HOLD
    while time.monotonic() < until and others_run(state, rank):
        got = signal.sigtimedwait(SIGNALS - {signal.SIGCHLD, signal.SIGUSR2}, 0.1)
        if got is not None:
            return


def name_of(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"  # the real-time ones


def attempt(env: Mapping[str, str]) -> int:
    count = env.get("DSLAUNCH_ATTEMPT") or env.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdecimal() else 0


def restore(env: dict[str, str], visible: Mapping[str, str]) -> dict[str, str]:
    """DeepSpeed's launcher makes GPUs 0..P-1 visible whichever ones the scheduler has allotted."""
    mask = ("VISIBLE_DEVICES", "VISIBLE_MODULES", "ZE_AFFINITY_MASK")
    return {**{name: value for name, value in env.items() if not name.endswith(mask)}, **visible}


def itself(env: Mapping[str, str], *, nodes: int, per_node: int, alone: bool = False) -> dict[str, str]:
    """For a program that starts its ranks itself: no rank, but the node's place as scripts and torchrun read it.

    An operator's elastic rendezvous has told torchrun already, and more nodes than one number. Who is `alone` starts
    those of the other nodes too, whose place is not that of the first: srun and mpirun hand this environment on.
    """
    kept = {name: value for name, value in env.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    told = {"NNODES": str(nodes), "NPROC_PER_NODE": str(per_node)}
    place = {name: env[name] for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT")}
    if alone:
        return {**{name: value for name, value in kept.items() if name != "NODE_RANK"}, **told}
    if "PET_RDZV_ENDPOINT" in env:
        return {**kept, **told}
    return {**kept, **told, **{f"PET_{name}": value for name, value in {**told, **place}.items()}}


# Its GPU, and what lies near it


def own_gpu(env: Mapping[str, str], local: int, *, amd: bool) -> dict[str, str]:
    """The masks that leave local rank 2 one GPU: of CUDA_VISIBLE_DEVICES=4,5,6,7 the 6. Raises ValueError.

    Whoever got one GPU from the scheduler keeps it.
    """

    def pick(name: str, at: int) -> str:
        devices = env[name].split(",")
        if len(devices) == 1:
            return devices[0]
        if at >= len(devices):
            raise ValueError(f"{name}={env[name]} has no GPU for local rank {local}")
        return devices[at]

    given = [name for name in MASKS if env.get(name)]
    if env.get(BELOW):
        inner = pick(given[0], local) if given else str(local)
        outer = pick(BELOW, int(inner) if inner.isdecimal() else local)
        return {BELOW: outer, **dict.fromkeys(given, "0")}
    if not given:
        return {BELOW if amd else "CUDA_VISIBLE_DEVICES": str(local)}
    return {name: pick(name, local) for name in given}


def lines(path: str) -> dict[str, str]:
    """As a table, `Device Minor: 3` and `location_id 49408` alike; empty when there is no such file."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            rows = (line.replace(":", " ", 1).strip().rpartition(" ") for line in file)
            return {key.strip(): value for key, _, value in rows}
    except OSError:
        return {}


def opens(path: str) -> bool:
    """Whether a device is there and this job may use it: Slurm hides the others' GPUs this way alone."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def gpus(root: str) -> list[tuple[str, str]]:
    """The PCI address and the UUID of each GPU this job may use, in the order in which CUDA and ROCm count them."""
    found = []
    folder = f"{root}proc/driver/nvidia/gpus"
    for address in sorted(names(folder)):
        told = lines(f"{folder}/{address}/information")
        if opens(f"{root}dev/nvidia{told.get('Device Minor', '')}"):
            found.append((address.lower(), told.get("GPU UUID", "")))
    folder = f"{root}sys/class/kfd/kfd/topology/nodes"
    for node in sorted((name for name in names(folder) if name.isdecimal()), key=int):
        told = lines(f"{folder}/{node}/properties")
        at = int(told.get("location_id", "0"))
        if int(told.get("simd_count", "0")) and opens(f"{root}dev/dri/renderD{told.get('drm_render_minor', '')}"):
            bus = f"{int(told.get('domain', '0')):04x}:{at >> 8 & 0xFF:02x}:{at >> 3 & 0x1F:02x}.{at & 7}"
            found.append((bus, ""))
    return found


def numa_of_gpu(env: Mapping[str, str], local: int, root: str) -> int | None:
    """The NUMA node that local rank's GPU hangs on; None where nobody says."""
    masks = [env[name].split(",") for name in (BELOW, "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES") if env.get(name)]
    devices = masks[0] if masks else []
    name = devices[0] if len(devices) == 1 else devices[local] if local < len(devices) else str(local)
    known = gpus(root)
    if name.isdecimal():
        address = known[int(name)][0] if int(name) < len(known) else ""
    else:
        address = next((address for address, uuid in known if uuid and uuid.startswith(name)), "")
    try:
        with open(f"{root}sys/bus/pci/devices/{address}/numa_node", encoding="ascii") as file:
            node = int(file.read())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def cpus_of(node: int, root: str) -> set[int]:
    """32 of them where it says 0-15,64-79; none where there is no such node."""
    try:
        with open(f"{root}sys/devices/system/node/node{node}/cpulist", encoding="ascii") as file:
            parts = [part.partition("-") for part in file.read().strip().split(",") if part]
    except OSError:
        return set()
    return {cpu for first, _, last in parts for cpu in range(int(first), int(last or first) + 1)}


def bind(node: int, root: str) -> str:
    """Run on this NUMA node's CPUs and take memory there first. Raises ValueError when none of them is ours.

    Preferred, not bound: a node that is full would otherwise end the rank. Says what could not be done.
    """
    there, allowed = cpus_of(node, root), os.sched_getaffinity(0)
    if not there & allowed:
        own = f"the CPUs {min(there)} to {max(there)}" if there else "no CPUs"
        raise ValueError(f"NUMA node {node} has {own}, and this rank may use {len(allowed)} others")
    os.sched_setaffinity(0, there & allowed)
    call = SET_MEMPOLICY.get(os.uname().machine)
    mask = (ctypes.c_ulong * (NODES // 64))()
    mask[node // 64] = 1 << node % 64
    if call is None or libc.syscall(call, MPOL_PREFERRED, ctypes.byref(mask), NODES + 1):
        why = os.strerror(ctypes.get_errno()) if call else os.uname().machine
        return f"bound to the CPUs of NUMA node {node}, but its memory cannot be preferred here ({why})"
    return ""


def near(numa: Any, env: Mapping[str, str], local: int, root: str = "/") -> str:
    """Bind this rank as `train.numa` says. Raises ValueError; says what is not known or could not be done."""
    if numa != "auto":
        return bind(numa[local], root)
    node = numa_of_gpu(env, local, root)
    if node is None:
        return f"nothing says which NUMA node the GPU of local rank {local} hangs on: not bound"
    try:
        return bind(node, root)
    except ValueError as error:
        return f"{error}: not bound"


def main(plan_file: str) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # the launcher was started with USR2 ignored
    die_with_parent(signal.SIGTERM)
    parent = os.getppid()
    with open(plan_file, encoding="utf-8") as file:
        plan = json.load(file)
    state, logs = os.path.dirname(plan_file), plan["logs"]
    env = restore(dict(os.environ), plan["visible"])
    host = os.uname().nodename
    problem = wrong_world(env, plan["world"])
    if problem:
        problem = f"dslaunch: {problem} ({host}, NODE_RANK {plan['node_rank']})"
    if not env.get("RANK", "").isdecimal():
        print(problem, file=sys.stderr)
        return CONFIG

    rank = int(env["RANK"])
    env["DSLAUNCH_PROGRESS"] = os.path.join(state, f"progress-{rank:05d}")
    log_name = os.path.join(logs, f"rank-{rank:05d}.log")
    try:
        log = os.open(log_name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    except OSError as error:
        print(f"dslaunch: rank {rank} on {host} cannot write {log_name}: {error.strerror}", file=sys.stderr)
        return CONFIG
    local = env.get("LOCAL_RANK", "")
    entry: dict[str, Any] = {
        "rank": rank,
        "local_rank": int(local) if local.isdecimal() else None,
        "node_rank": plan["node_rank"],
        "host": host,
        "pid": None,
        "started": time.time(),
        "ended": None,
        "code": None,
        "signal": None,
        "orphaned": False,
        "attempt": attempt(env),
        "wrapper": os.getpid(),
        "log": log_name,
        "log_from": os.fstat(log).st_size,
    }
    if entry["attempt"]:
        os.write(log, f"dslaunch: attempt {entry['attempt']} of rank {rank} on {host}\n".encode())

    per_node = plan.get("starts_itself", 0)
    try:
        if not problem and per_node:
            env = itself(env, nodes=plan["nodes"], per_node=per_node, alone=plan["alone"])
        if not problem and plan.get("numa", "none") != "none":
            said = near(plan["numa"], env, int(local))
            if said:
                os.write(log, f"dslaunch: rank {rank} on {host}: {said}\n".encode())
        if not problem and plan.get("own_gpu"):
            env.update(own_gpu(env, int(local), amd=os.path.exists("/dev/kfd")))
            # programs take LOCAL_RANK for the number of their GPU
            env.update(LOCAL_RANK="0", DSLAUNCH_LOCAL_RANK=local)
    except ValueError as error:
        problem = f"dslaunch: {error} ({host}, rank {rank})"

    program = (CONFIG, problem) if problem else start(plan["argv"], env, log)
    if isinstance(program, tuple):
        code, message = program
        message = message if problem else f"dslaunch: rank {rank} on {host} {message}"
        print(message, file=sys.stderr)
        os.write(log, message.encode("utf-8", "backslashreplace") + b"\n")
        entry.update(ended=time.time(), code=code)
        record(state, logs, entry)
        return code

    os.close(log)
    entry["pid"] = program.pid
    record(state, logs, entry)
    code = wait(program, ranks_below=per_node > 0, alone=plan.get("alone", False))
    entry.update(ended=time.time(), orphaned=os.getppid() != parent)
    if code < 0:
        entry["signal"], code = name_of(-code), 128 - code
    entry["code"] = code
    record(state, logs, entry)
    if code == STOPPED_EARLY:
        hold(state, rank)
    return code


libc = ctypes.CDLL(None, use_errno=True)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
