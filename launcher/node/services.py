"""The programs beside a training: started in their order, asked whether they answer, stopped with the trainer.

    services.py place --run DIR --job 4711 --attempt 0 --train n1 n2 --behind n3     who runs where, on which port
    services.py run   --run DIR --job 4711 --attempt 0 --script PID --train ...      until DIR/services/over is there

The job's own script calls it on the batch host, before any environment is loaded: Python 3.6 has to read this. What
lies in DIR/services is of one attempt: `environment` for the script to read, `ready` once all of them are, `failed`
with an exit code where one of them ends the attempt, NAME.step with Slurm's name of each one's step.
"""

import argparse
import contextlib
import glob
import http.client
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from typing import Any, BinaryIO, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

import port  # type: ignore[import-not-found]  # its neighbours, on the batch host too
import recover  # type: ignore[import-not-found]

UNAVAILABLE = 69  # EX_UNAVAILABLE: a service that never answered, or that left without a code of its own
LOOK = 0.2  # seconds between two looks at everything
KNOCK = 2.0  # seconds that one question to a service may take
STOP = 10.0  # seconds between SIGTERM and SIGKILL for a service: as `docker stop` has it
SAVE = 30.0  # the same for ranks, as Slurm's KillWait has it: they save on SIGTERM
PIECE = 1 << 20  # bytes of a log in memory
Row = Dict[str, Any]


class Place(NamedTuple):
    """Where one service runs in this attempt."""

    name: str
    hosts: List[str]
    port: int


# --- where ----------------------------------------------------------------------------------------


def places(
    rows: Sequence[Row], *, train: Sequence[str], behind: Sequence[str], seed: str, groups: Dict[int, List[str]]
) -> List[Place]:
    """Nodes of their own are dealt out in the order of the job file; no two services get one port.

    >>> rows = [{"name": "reward", "on": "own", "nodes": 1, "port": 8000}]
    >>> rows.append({"name": "log", "on": "first", "nodes": 1, "port": 8001})
    >>> places(rows, train=["n1", "n2"], behind=["n3"], seed="7:0", groups={})
    [Place(name='reward', hosts=['n3'], port=8000), Place(name='log', hosts=['n1'], port=8001)]
    """
    found, left, taken = [], list(behind), {row["port"] for row in rows if row.get("port")}
    for row in rows:
        if row.get("group"):
            hosts = groups[row["group"]][: row["nodes"]]
        elif row["on"] == "own":
            hosts, left = left[: row["nodes"]], left[row["nodes"] :]
        else:
            hosts = list(train) if row["on"] == "all" else list(train[:1])
        number = row.get("port") or 0
        for turn in range(port.TRIES):
            if number:
                break
            wanted = port.pick("%s:%s:%d" % (seed, row["name"], turn))
            number = wanted if wanted and wanted not in taken else 0
        taken.add(number)
        found.append(Place(row["name"], hosts, number))
    return found


def variable(kind: str, name: str) -> str:
    """DSLAUNCH_HOST_RAY_HEAD of `ray-head`."""
    return "DSLAUNCH_%s_%s" % (kind, name.upper().replace("-", "_"))


def environment(placed: Sequence[Place], *, train: Sequence[str], suffix: str = "") -> Dict[str, str]:
    """What trainer and services see of each other; `suffix` makes the name that leads over the fast network."""
    found = {"DSLAUNCH_TRAIN_HOSTS": ",".join(host + suffix for host in train)}
    for place in placed:
        names = [host + suffix for host in place.hosts]
        found[variable("HOST", place.name)] = names[0]
        found[variable("HOSTS", place.name)] = ",".join(names)
        found[variable("PORT", place.name)] = str(place.port)
    return found


def expand(nodes: str) -> List[str]:
    return recover.ask(["scontrol", "show", "hostnames", nodes])[1].split() if nodes else []


# --- one service ----------------------------------------------------------------------------------


class Service:
    """A step of the job that is wanted, starting, ready or over."""

    def __init__(self, row: Row, place: Place, run: str, suffix: str) -> None:
        self.name: str = row["name"]
        self.row, self.place, self.run, self.suffix = row, place, run, suffix
        self.process: Optional[subprocess.Popen[bytes]] = None
        self.ready = self.over = False
        self.begun = 0.0
        self.missing = ""  # what it is waited for
        self.started = 0.0  # by the file system's clock
        self.sizes: Dict[str, int] = {}
        self.seen: Dict[str, int] = {}  # how far its output was searched

    def path(self, end: str) -> str:
        return os.path.join(self.run, "services", self.name + end)

    def logs(self) -> List[str]:
        there = os.path.join(glob.escape(os.path.join(self.run, "logs")), "service-" + self.name)
        return sorted(
            path for path in glob.glob(there + "*.log") if re.fullmatch(r"(-\d+)?\.log", path[len(there) :])
        )

    def start(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self.path(".step"))
        self.sizes = {path: os.path.getsize(path) for path in self.logs()}  # an earlier attempt's
        self.seen = {}
        with open(self.path(".started"), "w"):
            pass
        self.started = os.stat(self.path(".started")).st_mtime
        command = ["bash", self.path(".srun"), self.run, ",".join(self.place.hosts)]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self.begun = time.monotonic()

    def step(self) -> str:
        """Slurm's name of its step, 4711.2; empty before its first task runs."""
        words = recover.read_lines(self.path(".step"))
        return words[0] if words and re.fullmatch(r"\d+([_+]\d+)?\.\d+", words[0]) else ""

    def answers(self) -> bool:
        """Whether everything holds that the job file asks of it; what does not yet is in `missing`."""
        asked, last = self.row["ready"], self.place.hosts
        number = self.place.port if asked.get("port") in (None, False, True) else asked["port"]
        everywhere = asked.get("hosts") == "all" or (asked.get("hosts") is None and self.row["on"] == "all")
        hosts = [host + self.suffix for host in (last if everywhere else last[:1])]
        if not self.step():
            self.missing = "no task of it has started"
            return False
        if asked.get("port"):
            for host in hosts:
                if not listens(host, number):
                    self.missing = "nothing listens on %s:%d" % (host, number)
                    return False
        if asked.get("http"):
            for host in hosts:
                said = answered(host, number, asked["http"])
                if said:
                    self.missing = "http://%s:%d%s: %s" % (host, number, asked["http"], said)
                    return False
        if asked.get("log") and not any(self.says(path, asked["log"]) for path in self.logs()):
            self.missing = "its output does not say `%s`" % asked["log"]
            return False
        if asked.get("file") and not self.newer(asked["file"]):
            self.missing = "%s is not there" % asked["file"]
            return False
        return True

    def says(self, path: str, text: str) -> bool:
        """Whether its output holds the text; what was searched in vain is not read again."""
        start, back = self.sizes.get(path, 0), len(text.encode("utf-8")) - 1  # it may be written in two pieces
        at = max(start, self.seen.get(path, 0) - back)
        try:
            with open(path, "rb") as file:
                if file.seek(0, 2) < at:  # it was cut, and begins anew
                    at = 0
                found, end = holds(file, text.encode("utf-8"), at)
        except OSError:
            return False
        if not found:
            self.seen[path] = end
        return found

    def newer(self, path: str) -> bool:
        """One that an earlier attempt left says nothing. Relative to where the service runs, as it would say it."""
        try:
            return os.stat(os.path.join(self.run, self.row["workdir"], path)).st_mtime >= self.started
        except OSError:
            return False

    def last_words(self) -> str:
        """What the shell before it complained of, or the last line of its output."""
        with contextlib.suppress(OSError), open(self.path(".failed"), errors="replace") as file:
            return file.readline().strip()[:300]
        for path in self.logs():
            with contextlib.suppress(OSError):
                with open(path, "rb") as file:
                    size = file.seek(0, 2)
                    file.seek(max(self.sizes.get(path, 0), size - 4096))
                    lines = file.read().decode("utf-8", "replace").split("\n")
                said = [line.strip() for line in lines if line.strip()]
                if said:
                    return said[-1][:300]
        return ""

    def signal(self, name: str) -> None:
        """To its tasks: srun would take a signal of its own as leave to kill."""
        step = self.step()
        if step:
            recover.ask(["scancel", "--signal=" + name, step])
        if self.process and self.process.poll() is None and (name == "KILL" or not step):
            with contextlib.suppress(OSError):
                os.kill(self.process.pid, signal.SIGKILL if name == "KILL" else signal.SIGTERM)


def listens(host: str, number: int) -> bool:
    try:
        socket.create_connection((host, number), timeout=KNOCK).close()
    except OSError:
        return False
    return True


def answered(host: str, number: int, path: str) -> str:
    """Empty for a 200; else what came instead. No proxy: it is a node of this job."""
    connection = http.client.HTTPConnection(host, number, timeout=KNOCK)
    try:
        connection.request("GET", path)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
    finally:
        connection.close()
    return "" if status == 200 else "answers %d" % status


def holds(file: BinaryIO, text: bytes, start: int) -> Tuple[bool, int]:
    """Whether the text stands behind `start`, and how far it was looked for."""
    file.seek(start)
    before = b""
    while True:
        piece = file.read(PIECE)
        if text in before + piece:
            return True, file.tell()
        if not piece:
            return False, file.tell()
        before = (before + piece)[len(before + piece) - len(text) + 1 :] if len(text) > 1 else b""


# --- all of them ----------------------------------------------------------------------------------


class Keeper:
    def __init__(self, options: argparse.Namespace, told: Row, placed: Sequence[Place]) -> None:
        self.options = options
        self.run: str = options.run
        there = {place.name: place for place in placed}
        self.services = [Service(row, there[row["name"]], self.run, told["suffix"]) for row in told["services"]]
        self.failed = False

    def file(self, name: str) -> str:
        return os.path.join(self.run, "services", name)

    def finished(self) -> bool:
        return os.path.exists(self.file("over")) or os.getppid() != self.options.script

    def told(self) -> bool:
        """Slurm or a person ends the job: then everything in it ends, and nothing has failed."""
        names = [os.path.join("logs", "told-%d" % self.options.attempt), "cancelled"]
        return any(os.path.exists(os.path.join(self.run, name)) for name in names)

    def keep(self) -> None:
        while not self.finished():
            self.look()
            time.sleep(LOOK)
        if recover.read_lines(self.file("over")) != ["0"]:
            self.look()  # one that died just now is why the trainer did
        self.stop()

    def look(self) -> None:
        for service in self.services:
            code = service.process.poll() if service.process and not service.over else None
            if code is not None:
                self.ended(service, code)
        if self.failed or self.finished():
            return
        known = {service.name: service for service in self.services}
        for service in self.services:
            if not service.process and all(known[name].ready for name in service.row["after"]):
                recover.say("service %s starts on %s" % (service.name, ", ".join(service.place.hosts)))
                service.start()
            elif service.process and not service.ready and not service.over:
                self.knock(service)
        if all(service.ready for service in self.services) and not os.path.exists(self.file("ready")):
            write(self.file("ready"), "")

    def knock(self, service: Service) -> None:
        waited = time.monotonic() - service.begun
        if service.answers():
            service.ready = True
            recover.say("service %s is ready after %.1f s" % (service.name, waited))
            recover.note(self.run, "service", name=service.name, state="ready", attempt=self.options.attempt,
                         hosts=service.place.hosts, port=service.place.port, seconds=round(waited, 1))  # fmt: skip
        elif waited > service.row["ready"]["timeout"]:
            text = "service %s on %s was not ready within %g s: %s"
            said = service.last_words()
            why = text % (service.name, service.place.hosts[0], service.row["ready"]["timeout"], service.missing)
            self.fail(service, UNAVAILABLE, why + (" (%s)" % said if said else ""))

    def ended(self, service: Service, code: int) -> None:
        """Its srun is over; where the whole job is being ended, that is why."""
        service.over = True
        code = 128 - code if code < 0 else code
        # the trainer may have asked it to go as the last thing it does; and what ends the whole job, it hears of too
        until = time.monotonic() + {0: STOP, 130: 2.0, 137: 2.0, 143: 2.0}.get(code, 0.0)
        while not self.told() and time.monotonic() < until and not self.finished():
            time.sleep(LOOK)
        if self.told() or self.failed or recover.read_lines(self.file("over")) == ["0"]:
            return
        when = "before the trainer did" if service.ready else "before it was ready"
        how = "was killed by signal %d" % (code - 128) if code > 128 else "ended with exit code %d" % code
        said = service.last_words()
        why = "service %s on %s %s %s" % (service.name, ",".join(service.place.hosts[:3]), how, when)
        why += ": %s" % said if said else ""
        if service.row["essential"]:
            self.fail(service, code or UNAVAILABLE, why)
        elif not self.finished():
            service.ready = True  # nobody waits for it any more
            recover.say("%s; it is not essential" % why)
            recover.note(self.run, "service", name=service.name, state="ended", code=code, why=why,
                         attempt=self.options.attempt)  # fmt: skip

    def fail(self, service: Service, code: int, why: str) -> None:
        """The attempt is over: what comes next is decided where it is for ranks, in recover.py."""
        self.failed = True
        recover.say(why)
        recover.note(self.run, "service", name=service.name, state="failed", code=code, why=why,
                     attempt=self.options.attempt, hosts=service.place.hosts)  # fmt: skip
        told = {"attempt": self.options.attempt, "service": service.name, "code": code, "why": why}
        write(self.file("failed.json"), json.dumps(dict(told, hosts=service.place.hosts)))
        write(self.file("failed"), "%d\n" % code)
        begun = time.monotonic()
        asked: Set[str] = set()
        while not self.finished():  # ranks that wait for a dead server wait for ever
            late = time.monotonic() - begun > SAVE
            for step in self.training():
                if late or step not in asked:  # srun may be about to start it
                    recover.ask(["scancel", "--signal=" + ("KILL" if late else "TERM"), step])
                    asked.add(step)
            time.sleep(1)

    def training(self) -> List[str]:
        """Steps of the job that are no service's."""
        mine = {service.step() for service in self.services}
        return [step for step in recover.steps_of(self.options.job) if step not in mine]

    def stop(self) -> None:
        left = [service for service in self.services if service.process and service.process.poll() is None]
        for service in reversed(left):
            service.signal("TERM")
        until = time.monotonic() + STOP
        while time.monotonic() < until and any(service.process.poll() is None for service in left if service.process):
            time.sleep(LOOK / 2)
        for service in left:
            if service.process and service.process.poll() is None:
                service.signal("KILL")
                service.process.wait()


def write(path: str, text: str) -> None:
    """Whole or not at all: the script reads it as soon as it is there."""
    part = "%s.%d" % (path, os.getpid())
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(part, path)


# --- the words of the command line ----------------------------------------------------------------


def place(options: argparse.Namespace, told: Row) -> int:
    there = os.path.join(options.run, "services")
    for name in ("ready", "failed", "failed.json", "over", *(row["name"] + ".failed" for row in told["services"])):
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(there, name))
    groups = {row["group"] for row in told["services"] if row.get("group")}
    nodes = {group: expand(os.environ.get("SLURM_JOB_NODELIST_HET_GROUP_%d" % group, "")) for group in groups}
    seed = "%s:%d" % (options.job, options.attempt)
    placed = places(told["services"], train=options.train, behind=options.behind, seed=seed, groups=nodes)
    rows = {row["name"]: row for row in told["services"]}
    for one in placed:
        wanted = rows[one.name]["nodes"] if rows[one.name]["on"] == "own" else 1
        if len(one.hosts) < wanted or not one.port:
            what = "%d nodes and Slurm gives it %d" % (wanted, len(one.hosts)) if one.port else "a port; none is free"
            recover.say("service %s needs %s" % (one.name, what))
            return UNAVAILABLE
    write(os.path.join(there, "places.json"), json.dumps([one._asdict() for one in placed]))
    values = environment(placed, train=options.train, suffix=told["suffix"])
    lines = ["export %s=%s\n" % (name, shlex.quote(value)) for name, value in values.items()]
    write(os.path.join(there, "environment"), "".join(lines))
    return 0


def run(options: argparse.Namespace, told: Row) -> int:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):  # for the ranks; services go on while those save
        signal.signal(number, signal.SIG_IGN)
    with open(os.path.join(options.run, "services", "places.json"), encoding="utf-8") as file:
        placed = [Place(**one) for one in json.load(file)]
    Keeper(options, told, placed).keep()
    return 0


def main(arguments: List[str]) -> int:
    parser = argparse.ArgumentParser(prog="services.py", description=__doc__)
    add = parser.add_argument
    add("verb", choices=("place", "run"))
    add("--run", required=True)
    add("--job", required=True)
    add("--attempt", type=int, required=True)
    add("--script", type=int, default=0, help="pid of the batch script")
    add("--train", nargs="*", default=[], help="nodes that train")
    add("--behind", nargs="*", default=[], help="nodes of the services' own")
    options = parser.parse_args(arguments)
    with open(os.path.join(options.run, "services", "services.json"), encoding="utf-8") as file:
        told = json.load(file)
    return {"place": place, "run": run}[options.verb](options, told)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
