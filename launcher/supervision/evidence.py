"""What hanging ranks are doing, written down before they are ended. Everything here has a time-out of its own."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launcher.supervision import Fact, Told

SECONDS = 20.0  # for everything: a hang costs the whole job meanwhile
EACH = 12.0  # for one command
TAIL = 64 << 10  # bytes of a rank's log that are looked at
LINES = 40
DUMP = 32 << 20  # bytes of a flight recorder's dump that are kept; 2000 entries with stacks have some MB
FRAME = re.compile(
    r'^ +(?:File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<name>\S+)|(?P<name2>\S+) \((?P<at>[^()]+)\))'
)
# Frames that say a rank is inside a collective, and those that say nothing about where the program is.
COMMUNICATION = ("torch/distributed/distributed_c10d.py", "deepspeed/comm/")
NOISE = ("torch/distributed/c10d_logger.py", "dslaunch_pulse.py", "torch/utils/_contextlib.py")


@dataclass(frozen=True)
class Rank:
    """A process to look at."""

    rank: int
    pid: int
    log: str
    log_from: int
    progress: str  # the file of its progress, with .stacks beside it
    told: Told


def read(path: str, limit: int = 4096) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(limit).decode("utf-8", "replace")
    except OSError:
        return ""


def state(pid: int) -> tuple[str, float]:
    """("S", 12.5): the letter that ps shows and the seconds of processor time; ("", 0) when it is gone."""
    after = read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if len(after) < 13:
        return "", 0.0
    return after[0], (int(after[11]) + int(after[12])) / os.sysconf("SC_CLK_TCK")


def trainer(pid: int, told: Told) -> int:
    """The process that trains: the one that says so, else of `pid` and those below it the one with most memory."""
    if told.pid and state(told.pid)[0]:
        return told.pid
    below = [pid]
    for parent in below:
        for task in glob.glob(f"/proc/{parent}/task/*/children"):
            below += [int(word) for word in read(task, 1 << 16).split()]

    def resident(one: int) -> int:
        words = read(f"/proc/{one}/statm").split()
        return int(words[1]) if len(words) > 1 else 0

    return max(below, key=resident)


def last_lines(path: str, start: int) -> list[str]:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(start, size - TAIL))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line.rpartition("\r")[2] for line in text.rstrip("\r\n").split("\n")[-LINES:]]


def py_spy() -> list[str]:
    """The command, from PATH or beside this Python; empty where there is none."""
    found = shutil.which("py-spy") or shutil.which("py-spy", path=os.path.dirname(sys.executable))
    return [found] if found else []


def ask(argv: Sequence[str], path: str, seconds: float) -> str:
    """What a command says, also into a file; nothing when it cannot be started or does not end."""
    try:
        with open(path, "wb") as out:
            subprocess.run(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
            )
    except (OSError, subprocess.TimeoutExpired) as error:
        with contextlib.suppress(OSError), open(path, "ab") as out:
            out.write(f"\ndslaunch: {error}\n".encode())
    return read(path, 1 << 20)


def stacks(one: Rank, pid: int, folder: str, until: float) -> str:
    """Of all threads of a rank: by py-spy, which also sees stopped processes, else by the process itself."""
    path = os.path.join(folder, f"rank-{one.rank:05d}.stacks")
    command = py_spy()
    if command:
        text = ask([*command, "dump", "--nonblocking", "--pid", str(pid)], path, min(EACH, until - time.monotonic()))
        if "Thread" in text:
            return text
    own = one.progress + ".stacks"
    caught = next((row for row in read(f"/proc/{pid}/status").splitlines() if row.startswith("SigCgt")), "SigCgt: 0")
    if not one.told.stacks or not int(caught.split()[1], 16) >> (one.told.stacks - 1) & 1:
        return read(path, 1 << 20)
    before = os.path.getsize(own) if os.path.exists(own) else 0
    with contextlib.suppress(OSError):
        os.kill(pid, one.told.stacks)
    size = before
    while time.monotonic() < min(until, time.monotonic() + 2):
        time.sleep(0.2)
        now = os.path.getsize(own) if os.path.exists(own) else 0
        if now == size > before:
            break
        size = now
        if state(pid)[0] in ("T", "t", "", "Z"):
            break
    with contextlib.suppress(OSError), open(own, "rb") as source, open(path, "wb") as target:
        source.seek(before)
        target.write(source.read(1 << 20))
    return read(path, 1 << 20)


def frames(text: str) -> list[tuple[str, str]]:
    """Of the thread that runs the program, innermost first: ("all_reduce", "torch/distributed/x.py:2810").

    py-spy and faulthandler both show one block a thread, the main one last or named MainThread.
    """
    blocks = re.split(r"^(?=Thread |Current thread )", text, flags=re.MULTILINE)[1:]
    main = next((block for block in blocks if "MainThread" in block.partition("\n")[0]), blocks[-1] if blocks else "")
    found = []
    for line in main.splitlines():
        match = FRAME.match(line)
        if match:
            at = match["at"] or f"{match['file']}:{match['line']}"
            found.append((match["name"] or match["name2"], at))
    return found


def place(stack: list[tuple[str, str]]) -> tuple[str, str]:
    """(the collective a stack is in, the innermost frame of the program); each empty when there is none."""
    called = [name for name, at in stack if any(part in at for part in COMMUNICATION)]
    outside = [(name, at) for name, at in stack if not any(part in at for part in (*COMMUNICATION, *NOISE))]
    shown = ""
    if outside:
        name, at = outside[0]
        shown = f"{name} ({'/'.join(at.split('/')[-2:])})"
    return (called[-1] if called else ""), shown


def look(one: Rank, *, node: int, host: str, folder: str, until: float) -> Fact:
    """One rank: its process, its stacks, its last words."""
    pid = trainer(one.pid, one.told)
    letter, before = state(pid)
    clock = time.monotonic()
    text = stacks(one, pid, folder, until) if letter else ""
    time.sleep(max(0.0, min(1.0 - (time.monotonic() - clock), until - time.monotonic())))
    again, after = state(pid)
    called, frame = place(frames(text))
    spent = (after - before) / max(1.0, time.monotonic() - clock)
    fact = Fact(
        rank=one.rank,
        node=node,
        host=host,
        step=one.told.step,
        phase=one.told.phase,
        doing=one.told.doing or called,
        letter=again or letter,
        cpu=round(max(0.0, spent), 3),
        frame=frame,
    )
    status = dict(row.split(":", 1) for row in read(f"/proc/{pid}/status").splitlines() if ":" in row)
    value = {
        **asdict(fact),
        "pid": pid,
        "wchan": read(f"/proc/{pid}/wchan"),
        "threads": status.get("Threads", "").strip(),
        "memory": status.get("VmRSS", "").strip(),
        "progress": read(one.progress, 1024).strip(),
        "lines": last_lines(one.log, one.log_from),
    }
    path = os.path.join(folder, f"rank-{one.rank:05d}.json")
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as out:
        json.dump(value, out, indent=1)
    return fact


def recorders(prefix: str, ranks: Iterable[int], folder: str, until: float) -> None:
    """Ask NCCL's flight recorders for a dump through their pipes, and keep what has been written.

    `prefix` is TORCH_FR_DUMP_TEMP_FILE; a recorder polls its pipe every second.
    """
    asked = False
    for rank in ranks:
        with contextlib.suppress(OSError):
            pipe = os.open(f"{prefix}{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
            with contextlib.suppress(OSError):
                os.write(pipe, b"1\n")
                asked = True
            os.close(pipe)
    if asked:
        time.sleep(max(0.0, min(3.0, until - time.monotonic() - 2)))
    keep(prefix, folder)


def keep(prefix: str, folder: str) -> list[str]:
    """Dumps of flight recorders, moved from this node to where the logs are."""
    kept = []
    for path in glob.glob(glob.escape(prefix) + "*"):
        with contextlib.suppress(OSError):
            if path.endswith(".pipe") or not 0 < os.path.getsize(path) <= DUMP:
                continue
            os.makedirs(os.path.join(folder, "flight"), 0o700, exist_ok=True)
            target = os.path.join(folder, "flight", path[len(prefix) :].zfill(5))
            shutil.copyfile(path, target)
            kept.append(target)
    return kept


def commands(node: str) -> dict[str, list[str]]:
    """What a node has to say: a file's name and the command."""
    found = {
        f"{node}.dmesg": ["sh", "-c", "dmesg -T 2>&1 | tail -n 200"],
        f"{node}.ncclras": ["ncclras", "-v"],
        f"{node}.nvidia-smi": ["nvidia-smi", "-q", "-d", "ECC,UTILIZATION,PERFORMANCE,TEMPERATURE"],
    }
    return {name: argv for name, argv in found.items() if shutil.which(argv[0])}


def collect(
    ranks: Sequence[Rank],
    *,
    node: int,
    name: str,
    host: str,
    folder: str,
    recorder: str = "",
    seconds: float = SECONDS,
) -> list[Fact]:
    """All of it at once, within `seconds`; whoever is not done by then is left out."""
    until = time.monotonic() + seconds
    with contextlib.suppress(OSError):  # a full disk keeps nothing, and the ranks are ended all the same
        os.makedirs(folder, 0o700, exist_ok=True)
    facts: dict[int, Fact] = {}

    def one_rank(one: Rank) -> None:
        facts[one.rank] = look(one, node=node, host=host, folder=folder, until=until)

    jobs: list[Callable[[], Any]] = [lambda one=one: one_rank(one) for one in ranks]  # type: ignore[misc]
    for file, argv in commands(name).items():
        jobs.append(lambda file=file, argv=argv: ask(argv, os.path.join(folder, file), EACH))  # type: ignore[misc]
    if recorder:
        jobs.append(lambda: recorders(recorder, [one.rank for one in ranks], folder, until))
    threads = [threading.Thread(target=job, daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    late = [one for one in ranks if one.rank not in facts]
    for one in late:
        facts[one.rank] = Fact(one.rank, node, host, one.told.step, one.told.phase, one.told.doing, state(one.pid)[0])
    return [facts[one.rank] for one in ranks]
