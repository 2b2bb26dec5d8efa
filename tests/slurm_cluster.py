"""A real Slurm of several nodes on one machine, for tests. Needs root; no systemd, ssh or database.

    python tests/slurm_cluster.py start /tmp/c && eval "$(python tests/slurm_cluster.py env /tmp/c)" && sinfo

Every node is a set of namespaces (net, uts, pid, mount, ipc): its own host name, address, processes, /dev/shm
and /etc/hosts, and a slurmd. The controller runs outside them, so this machine is the login node. Files are
shared, as on a cluster. Everything lives in one folder, but for a bridge and cgroups named after the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import hashlib
import ipaddress
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "ip", "unshare", "nsenter")
INSTALL = "apt-get install -y slurm-wlm munge iproute2 util-linux"
PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
NAMESPACES = ("--net", "--uts", "--ipc", "--pid", "--mount")
CGROUPS = (
    Path("/sys/fs/cgroup/freezer"),
    Path("/sys/fs/cgroup/devices"),
)  # version 1; without them: linuxproc
SUBNETS = list(ipaddress.ip_network("198.18.0.0/15").subnets(new_prefix=24))  # set aside for benchmarks
FOLDERS = ("run", "log", "munge", "state", "spool", "dev", "cgroup")
DONE = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL")
T = TypeVar("T")

# pid 1 of a node once its cable is in: NAME ADDRESS FOLDER TAG. It outlives its slurmd, and collects orphans.
INIT = r"""
read -r cable || exit 1
exec </dev/null
echo "$1" >/proc/sys/kernel/hostname
ip link set lo up && ip addr add "$2/24" dev eth0 && ip link set eth0 up
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount --bind "$3/hosts" /etc/hosts
for group in "$3"/cgroup/*; do
    [ ! -d "$group" ] || mount --bind "/sys/fs/cgroup/${group##*/}/$4" "$group"
done
ulimit -c 0
slurmd -D -N "$1" &
sleep infinity &
wait
"""

CONF = """\
ClusterName={tag}
SlurmctldHost={host}({login})
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld
SlurmdPidFile={folder}/run/slurmd-%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
MailProg=/bin/true
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU={memory_per_cpu}
GresTypes=gpu
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/{task}
SlurmdTimeout={slurmd_timeout}
MessageTimeout=5
KillWait=5
MinJobAge=86400
ReturnToService=2
JobRequeue=1
EnforcePartLimits=ALL
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,bf_continue
"""

# A node that is not there belongs to a cloud and is switched off: nobody pings it. One that is IDLE gets no job any
# more once slurmctld has had no answer from it, some 12 s after its start.
ABSENT = "Port=1 State=CLOUD"
ABSENT_CONF = """\
PrivateData=cloud
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=1
"""

PARTITIONS = """\
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=short Nodes=ALL MaxTime=2 DefaultTime=1 State=UP
"""


class InUseError(Exception):
    """Another live process has a cluster in this folder."""


def why_not() -> str | None:
    """`None`, or why no cluster can start here and what would change that."""
    if os.geteuid() != 0:
        return "a Slurm cluster of namespaces needs root: run the tests with sudo"
    if missing := [name for name in PROGRAMS if not shutil.which(name, path=PATH)]:
        return f"{', '.join(missing)} not found: {INSTALL}"
    try:
        _run(["unshare", *NAMESPACES, "--fork", "ip", "link", "add", "probe", "type", "bridge"])
    except RuntimeError as error:
        return f"no namespaces or bridges here ({error}): in a container, docker run --privileged"
    return None


def borrow(name: str, **options: Any) -> Cluster:
    """A cluster in the first of /tmp/NAME0, /tmp/NAME1... that no live process has, swept first."""
    for i in range(64):
        with contextlib.suppress(InUseError):
            return Cluster.start(f"/tmp/{name}{i}", **options)
    raise InUseError(f"/tmp/{name}0 to /tmp/{name}63 are all in use")


class Cluster:
    """`with Cluster.start(folder) as slurm: slurm.run(["srun", "-N4", "hostname"])`"""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).resolve()
        self.tag = "ds" + hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:6]  # bridge, cables, cgroups
        self.env = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._children: list[subprocess.Popen[bytes]] = []
        self._lock: int | None = None

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @classmethod
    def start(
        cls,
        folder: str | Path,
        *,
        nodes: int = 4,
        slurmds: bool = True,
        gpus: int = 2,
        gpu_type: str = "fake",
        cpus: int = 16,
        memory: int = 64000,
        extra_conf: str = "",
        extra_node: str = "",
        seconds: float = 60,
    ) -> Cluster:
        """All nodes idle, or an error and nothing left. What a dead process left in `folder` is ended first.

        `extra_conf` is lines of slurm.conf, `extra_node` words of its NodeName lines: Feature=ib TmpDisk=1000.
        `slurmds=False`: a controller that believes in its nodes, for `sbatch --test-only` on thousands.
        """
        self = cls(folder)
        if len(str(self.folder)) > 60:
            raise ValueError(f"{self.folder} is longer than 60 characters, sockets in it would not work")
        if slurmds and nodes > 100:
            raise ValueError(f"{nodes} nodes with a slurmd each: 100 at most, or slurmds=False")
        self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        if self.folder.stat().st_uid != os.geteuid():
            raise PermissionError(f"{self.folder} belongs to another user")
        self._hold()
        try:
            self._clear()
            for name in FOLDERS:
                shutil.rmtree(self.folder / name, ignore_errors=True)
                (self.folder / name).mkdir(mode=0o755)
            login = self._bridge() if slurmds else "127.0.0.1"
            gres = f" Gres=gpu:{gpu_type}:{gpus}" if gpus else ""
            hardware = f"CPUs={cpus} RealMemory={memory}{gres} {extra_node}".rstrip()
            if slurmds:
                prefix = login.rpartition(".")[0]
                hosts = {f"node{i}": f"{prefix}.{100 + i}" for i in range(1, nodes + 1)}
                lines = [f"NodeName={name} NodeAddr={ip} {hardware}" for name, ip in hosts.items()]
                self._write_devices(gpus, gpu_type)
            else:
                hosts = {}
                lines = [f"NodeName=node[1-{nodes}] NodeAddr={login} {hardware} {ABSENT}", ABSENT_CONF]
            self._write(login, hosts, [*lines, PARTITIONS, extra_conf], memory_per_cpu=memory // cpus)
            self._munged()
            self._spawn("slurmctld", ["slurmctld", "-D"])
            for name in hosts:
                self.boot(name)
            self._until(f"{nodes} nodes are idle", seconds, lambda: self._all_live() and self._idle() >= nodes)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End every process of the cluster, jobs too, and what it made outside its folder. Logs stay."""
        if self.folder.exists():
            self._hold()
            try:
                self._clear()
            finally:
                os.close(self._lock)
                self._lock = None

    def nodes(self) -> dict[str, str]:
        """{"node1": "198.18.7.101", ...}"""
        _localhost, _login, *nodes = (self.folder / "hosts").read_text().splitlines()
        return {name: address for address, name in map(str.split, nodes)}

    def run(self, argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """As on the login node. The reply is text, its exit code is yours to judge; `env` adds to ours."""
        env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        env |= options.pop("env", {}) | self.env
        options = {"capture_output": True, "text": True, "timeout": 120} | options
        return subprocess.run(argv, check=False, env=env, **options)

    def sbatch(self, argv: Sequence[str]) -> str:
        """The id of the new job: `sbatch(["-N2", "--wrap", "srun hostname"])`."""
        return self._ask(["sbatch", "--parsable", *argv]).strip()

    def job(self, job: str) -> dict[str, str]:
        """{"JobState": "FAILED", "ExitCode": "7:0", ...}; a value ends at its first space."""
        fields = self._ask(["scontrol", "--oneliner", "show", "job", job]).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(self, job: str, *, states: Sequence[str] = DONE, seconds: float = 60) -> dict[str, str]:
        """The job, once it has ended or is in one of `states`."""

        def there() -> dict[str, str] | None:
            return fields if (fields := self.job(job))["JobState"] in states else None

        return self._until(f"job {job} is {' or '.join(states)}", seconds, there)

    def inside(self, node: str, argv: Sequence[str]) -> list[str]:
        """The command that runs `argv` on `node`, in this working directory and outside any job."""
        if not (pid := self._alive(node)):
            raise RuntimeError(f"{node} is not running")
        target = f"--target={next(_children(pid))}"
        return ["nsenter", target, *NAMESPACES, "env", f"--chdir={Path.cwd()}", *argv]

    def exec(self, node: str, argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run(self.inside(node, argv), **options)

    def crash(self, node: str) -> None:
        """Power loss: everything on `node` is gone at once. Slurm takes about 15 s to notice."""
        self._kill([node])

    def boot(self, node: str) -> None:
        """Power on; a node that was down is idle again some seconds later."""
        if self._alive(node):
            return
        cable = self.tag + node.removeprefix("node")
        subprocess.run(["ip", "link", "del", cable], capture_output=True, check=False)  # of a crash just now
        init = ["sh", "-c", INIT, "init", node, self.nodes()[node], str(self.folder), self.tag]
        options = [*NAMESPACES, "--fork", "--kill-child=KILL", "--mount-proc"]
        process = self._spawn(node, ["unshare", *options, *init], stdin=subprocess.PIPE)
        self._until(f"{node} has namespaces", 10, lambda: next(_children(process.pid), None))
        _run(["ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(process.pid)])
        _run(["ip", "link", "set", cable, "master", self.tag, "up"])
        with process.stdin as pipe:
            pipe.write(b"the cable is in\n")

    def shape(self, node: str, *, tx: float = 0, rx: float = 0, to: dict[str, float] | None = None) -> None:
        """Mbit/s that a node sends, receives, and sends to others by name; 0 is as fast as this machine."""
        cable = self.tag + node.removeprefix("node")
        # the bridge's side of the cable is what the node receives
        subprocess.run(["tc", "qdisc", "del", "dev", cable, "root"], capture_output=True, check=False)
        if rx:
            _run(["tc", "qdisc", "add", "dev", cable, "root", *_bucket(rx)])
        inside = self.inside(node, [])
        subprocess.run([*inside, "tc", "qdisc", "del", "dev", "eth0", "root"], capture_output=True, check=False)
        slower = to or {}
        if not tx and not slower:
            return
        top = tx or 100_000
        add = [*inside, "tc"]
        _run([*add, "qdisc", "add", "dev", "eth0", "root", "handle", "1:", "htb", "default", "1"])
        for minor, (name, rate) in enumerate([("", top), *slower.items()], 1):
            rates = ["rate", f"{rate}mbit", "ceil", f"{rate}mbit", "burst", "64k"]
            _run([*add, "class", "add", "dev", "eth0", "parent", "1:", "classid", f"1:{minor}", "htb", *rates])
            if name:
                match = ["u32", "match", "ip", "dst", f"{self.nodes()[name]}/32", "flowid", f"1:{minor}"]
                _run([*add, "filter", "add", "dev", "eth0", "parent", "1:", "protocol", "ip", *match])

    # --- what start makes

    def _bridge(self) -> str:
        """The address of this machine on a new bridge, in a subnet nobody has."""
        routes = json.loads(_run(["ip", "-json", "-4", "route", "show", "table", "all"]))
        taken = [ipaddress.ip_network(route["dst"]) for route in routes if route["dst"] != "default"]
        first = int(self.tag[2:], 16) % len(SUBNETS)
        order = SUBNETS[first:] + SUBNETS[:first]
        free = next(subnet for subnet in order if not any(map(subnet.overlaps, taken)))
        _run(["ip", "link", "add", self.tag, "type", "bridge"])
        _run(["ip", "addr", "add", f"{free[1]}/24", "dev", self.tag])
        _run(["ip", "link", "set", self.tag, "up"])
        return str(free[1])

    def _write(self, login: str, hosts: dict[str, str], lines: Sequence[str], *, memory_per_cpu: int) -> None:
        host = socket.gethostname().partition(".")[0]
        table = {"localhost": "127.0.0.1", host: login} | hosts
        (self.folder / "hosts").write_text("".join(f"{ip} {name}\n" for name, ip in table.items()))
        with socket.create_server(("", 0)) as probe:
            port = probe.getsockname()[1]
        groups = bool(hosts) and all(os.access(group / "cgroup.procs", os.W_OK) for group in CGROUPS)
        conf = CONF.format(
            tag=self.tag,
            host=host,
            login=login,
            port=port,
            folder=self.folder,
            memory_per_cpu=memory_per_cpu,
            proctrack="cgroup" if groups else "linuxproc",
            task="cgroup" if groups else "none",
            slurmd_timeout=10 if hosts else 0,
        )
        # the last one wins, but Slurm complains about a setting that is given twice, with every command
        given = {line.partition("=")[0].lower() for line in "\n".join(lines).splitlines()}
        settings = [line for line in conf.splitlines() if line.partition("=")[0].lower() not in given]
        (self.folder / "slurm.conf").write_text("\n".join([*settings, *lines, ""]))
        mount = f"CgroupPlugin=cgroup/v1\nCgroupMountpoint={self.folder}/cgroup\nConstrainDevices=yes\n"
        (self.folder / "cgroup.conf").write_text(mount if groups else "")
        # jobs of two clusters have the same ids: each cluster gets a root of its own
        for group in CGROUPS if groups else ():
            (group / self.tag).mkdir()
            (self.folder / "cgroup" / group.name).mkdir()

    def _write_devices(self, gpus: int, gpu_type: str) -> None:
        """A GPU is a device file of its own: with a count alone, or one file for all, nodes register none."""
        for i in range(gpus):
            os.mknod(self.folder / f"dev/gpu{i}", 0o666 | stat.S_IFCHR, os.makedev(240, i))
        line = f"Name=gpu Type={gpu_type} File={self.folder}/dev/gpu[0-{gpus - 1}] Flags=nvidia_gpu_env\n"
        (self.folder / "gres.conf").write_text(line if gpus else "")

    def _munged(self) -> None:
        munge = self.folder / "munge"
        (munge / "key").touch(0o400)
        (munge / "key").write_bytes(secrets.token_bytes(128))
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "seed")]
        self._spawn("munged", ["munged", "-F", "--num-threads=8", f"--socket={munge / 'socket'}", *files])
        self._until("munged listens", 10, lambda: self._all_live() and (munge / "socket").exists())

    # --- what stop ends

    def _hold(self) -> None:
        """Keep others out of the folder until `stop`, or until this process is gone."""
        if self._lock is None:
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(lock, 20).decode()
                os.close(lock)
                raise InUseError(f"process {owner} has a cluster in {self.folder}") from None
            os.truncate(lock, 0)
            os.write(lock, b"%d" % os.getpid())
            self._lock = lock

    def _clear(self) -> None:
        self._kill([record.stem for record in self.folder.glob("run/*.pid")])
        for link in Path("/sys/class/net").glob(f"{self.tag}*"):  # a dead node's cable may vanish on its own
            subprocess.run(["ip", "link", "del", link.name], capture_output=True, check=False)
        for group in CGROUPS:
            for folder, _, _ in os.walk(group / self.tag, topdown=False):
                self._until(f"{folder} is empty", 10, lambda folder=folder: _removed(folder))

    def _kill(self, names: Sequence[str]) -> None:
        """A node ends with its pid 1; `unshare`, which has to collect that, follows by itself."""
        dying = {}
        for name in names:
            if pid := self._alive(name):
                inner = list(_children(pid))
                dying |= {each: _started(each) for each in (pid, *inner)}
                for each in (name.startswith("node") and inner) or [pid]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(each, signal.SIGKILL)
        self._until(f"{[*dying]} have ended", 20, lambda: not any(t and _started(p) == t for p, t in dying.items()))
        for name in names:
            (self.folder / f"run/{name}.pid").unlink(missing_ok=True)
        self._children = [child for child in self._children if child.poll() is None]

    # --- processes: a pid counts only with the start time that was recorded with it

    def _spawn(self, name: str, argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        with (self.folder / f"log/{name}.out").open("ab") as log:
            options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log} | options
            env = {"PATH": PATH, **self.env}
            process = subprocess.Popen(argv, env=env, cwd="/", start_new_session=True, **options)
        (self.folder / f"run/{name}.pid").write_text(f"{process.pid} {_started(process.pid)}")
        self._children.append(process)
        return process

    def _alive(self, name: str) -> int | None:
        try:
            pid, started = (self.folder / f"run/{name}.pid").read_text().split()
        except (FileNotFoundError, ValueError):
            return None
        return int(pid) if _started(int(pid)) == started else None

    def _all_live(self) -> bool:
        if ended := [shlex.join(child.args)[:60] for child in self._children if child.poll() is not None]:
            raise RuntimeError(f"ended too soon: {ended}, see {self.folder}/log")
        return True

    def _idle(self) -> int:
        lines = self.run(["sinfo", "--noheader", "--partition=main", "--format=%D %T"]).stdout.splitlines()
        return sum(int(line.split()[0]) for line in lines if line.endswith((" idle", " idle~")))

    def _ask(self, argv: Sequence[str]) -> str:
        if (reply := self.run(argv)).returncode:
            raise RuntimeError(f"{shlex.join(argv)}: {reply.stderr.strip()}")
        return reply.stdout

    def _until(self, what: str, seconds: float, get: Callable[[], T]) -> T:
        end = time.monotonic() + seconds
        while not (value := get()):
            if time.monotonic() > end:
                raise TimeoutError(f"not within {seconds} s: {what}; see {self.folder}/log")
            time.sleep(0.05)
        return value


def _bucket(mbit: float) -> list[str]:
    return ["tbf", "rate", f"{mbit}mbit", "burst", "64k", "latency", "50ms"]


def _run(argv: Sequence[str]) -> str:
    reply = subprocess.run(argv, capture_output=True, text=True, check=False, env={"PATH": PATH})
    if reply.returncode:
        raise RuntimeError(f"{shlex.join(argv)}: {reply.stderr.strip()}")
    return reply.stdout


def _started(pid: int) -> str | None:
    """When, in ticks since boot; `None` for a process that is gone or only waits to be collected."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else fields[18]


def _children(pid: int) -> Iterator[int]:
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            yield from map(int, listing.read_text().split())


def _removed(folder: str) -> bool:
    try:
        Path(folder).rmdir()
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ENOENT):
            raise
        return error.errno == errno.ENOENT
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["start", "stop", "status", "env"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--gpus", type=int, default=2)
    args = parser.parse_args()
    cluster = Cluster(args.folder)
    up = bool(cluster._alive("slurmctld")) and all(map(cluster._alive, cluster.nodes()))
    if args.action == "stop":
        cluster.stop()
    elif args.action == "env":
        print(*(f"export {name}={shlex.quote(value)}" for name, value in cluster.env.items()), sep="\n")
    elif args.action == "status":
        reply = cluster.run(["sinfo", "--Node", "--partition=main"]).stdout if up else ""
        print(reply or f"no cluster in {cluster.folder}\n", end="")
        return 0 if up else 1
    elif up:
        print(f"already running in {cluster.folder}", file=sys.stderr)
    elif reason := why_not():
        print(reason, file=sys.stderr)
        return 2
    else:
        Cluster.start(args.folder, nodes=args.nodes, gpus=args.gpus)
    return 0


if __name__ == "__main__":
    sys.exit(main())
