"""The journal of a run: one checksummed line of JSON for each thing that happened, in journal.jsonl.

    {"seq": 12, "time": 1763.123, "host": "login1", "event": "submitted", "job": "7", "crc": "5e0c11d2"}

Intent stands before a side effect and its result after it, each on disk before `append` returns. Any host that
sees the directory may append: a lock file keeps lines whole, also on NFS. Stands alone and runs on Python 3.6,
as it is used by batch scripts before any environment is loaded.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import zlib
from typing import Any, Dict, List, Optional, Tuple

NAME = "journal.jsonl"
LOCK = "journal.lock"
Entry = Dict[str, Any]
TAIL = 1 << 16  # bytes read to know the last number; one line is far shorter
MARK = b'{"seq":'  # inside a value it would be {\"seq\":


class Busy(OSError):
    """Somebody else holds the lock, and did so for as long as we could wait."""


# --- lines ----------------------------------------------------------------------------------------


def line(entry: Entry) -> bytes:
    """The entry as it stands in the file, with its newline."""
    plain = json.loads(json.dumps(entry))  # keys that are numbers become text before they are sorted
    plain["crc"] = checksum(plain)
    return (json.dumps(plain, separators=(", ", ": ")) + "\n").encode("ascii")


def checksum(entry: Entry) -> str:
    """Eight hex digits over all fields but `crc`, in one spelling."""
    rest = {key: value for key, value in entry.items() if key != "crc"}
    return "%08x" % zlib.crc32(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode("ascii"))


def parse(data: bytes) -> Tuple[List[Entry], List[int]]:
    """Entries in the order of the file, and the numbers of lines that are cut off or damaged, from 1.

    What surrounds a damaged line stays: two lines whose newline was lost are still two. An entry that came twice
    byte for byte is one. Two different ones may have one `seq`, when a lock was lost in a pause.
    """
    entries = []  # type: List[Entry]
    torn = []  # type: List[int]
    seen = set()
    for number, raw in enumerate(data.split(b"\n"), 1):
        raw = raw.strip(b"\0 \t\r")  # a crash may leave a block of zeros
        if not raw:
            continue
        found = _entry(raw)
        pieces = [found] if found else [_entry(piece) for piece in _pieces(raw)]
        if not found:
            torn.append(number)
        for entry in pieces:
            if entry is None or (entry.get("crc"), entry.get("seq"), entry.get("time")) in seen:
                continue
            if "crc" in entry:
                seen.add((entry["crc"], entry.get("seq"), entry.get("time")))
            entries.append(entry)
    return entries, torn


def _entry(raw: bytes) -> Optional[Entry]:
    """The entry of one line; None unless it is whole. Lines of before there were checksums have neither mark."""
    try:
        entry = json.loads(raw.decode("utf-8"))
    except ValueError:
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("event"), str):
        return None
    if "seq" not in entry and "crc" not in entry:
        return entry
    whole = isinstance(entry.get("seq"), int) and entry.get("crc") == checksum(entry)
    return entry if whole else None


def _pieces(raw: bytes) -> List[bytes]:
    """What may be entries in a line that is none."""
    starts = []
    at = raw.find(MARK)
    while at >= 0:
        starts.append(at)
        at = raw.find(MARK, at + 1)
    return [raw[a : raw.rfind(b"}", a, b) + 1] for a, b in zip(starts, [*starts[1:], len(raw)])]


# --- the file -------------------------------------------------------------------------------------


def read(folder: Any) -> Tuple[List[Entry], List[int]]:
    """As `parse`; nothing where there is no journal."""
    try:
        with open(os.path.join(str(folder), NAME), "rb") as file:
            return parse(file.read())
    except (FileNotFoundError, NotADirectoryError):
        return [], []


def append(folder: Any, event: str, **fields: Any) -> Entry:
    """One more line, on disk before this returns; the entry as it was written."""
    path = os.path.join(str(folder), NAME)
    with Lock(os.path.join(str(folder), LOCK)) as lock:
        new = not os.path.exists(path)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(descriptor).st_size
            tail = _read_at(descriptor, max(0, size - TAIL))
            entries, _ = parse(tail)
            numbers = [entry["seq"] for entry in entries if "seq" in entry]
            if not numbers and size:  # nothing but lines without a number, or damaged ones: the whole file knows
                entries, _ = parse(_read_at(descriptor, 0))
                numbers = [entry["seq"] for entry in entries if "seq" in entry] or [len(entries)]
            entry = {"seq": max([0, *numbers]) + 1, "time": round(time.time(), 3), "host": socket.gethostname()}
            entry.update(event=event, **fields)
            text = line(entry)
            if tail and not tail.endswith(b"\n"):
                text = b"\n" + text  # whoever wrote last was killed in the middle
            if not lock.held():
                raise Busy("%s: the lock was lost while this process was paused" % path)
            _write(descriptor, text, size)
            if new:
                sync_folder(folder)
        finally:
            os.close(descriptor)
    written, _ = parse(text)
    return written[0]


def _read_at(descriptor: int, start: int) -> bytes:
    parts = []  # type: List[bytes]
    os.lseek(descriptor, start, os.SEEK_SET)
    while True:
        part = os.read(descriptor, 1 << 20)
        if not part:
            return b"".join(parts)
        parts.append(part)


def _write(descriptor: int, text: bytes, size: int) -> None:
    """All of it, or as much taken back as the file system lets us: a full disk leaves no half line."""
    rest = text
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, size)
        raise


def sync_folder(folder: Any) -> None:
    """The names in it survive a crash too. Not every file system can; then it needs not."""
    with contextlib.suppress(OSError):
        descriptor = os.open(str(folder), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- the lock -------------------------------------------------------------------------------------


class Lock:
    """A lock file that any host may take; one left by a process that died is taken over.

    Creating it exclusively is what NFS does atomically. The holder touches it every third of the lease. It is stale
    when it is older than the lease by the file system's own clock, or its process is dead on this very machine.
    Only who claims it may take a lock instance away, and it looks again after it has: of two that found it stale one
    wins, and neither takes the next holder's.
    """

    def __init__(self, path: Any, lease: float = 30, wait: float = 120) -> None:
        self.path, self.lease, self.wait = str(path), lease, wait
        self.nonce = ""
        self.touched = 0.0
        self._descriptor = -1
        self._done = threading.Event()

    def __enter__(self) -> "Lock":
        deadline = time.monotonic() + self.wait
        pause = 0.002
        while not self._create():
            if self._stale() and self._take_away(self._holder().get("nonce", "")):
                continue
            if time.monotonic() > deadline:
                holder = self._holder()
                who = "process %s on %s" % (holder.get("pid", "?"), holder.get("host", "?"))
                raise Busy("%s is held by %s" % (self.path, who))
            time.sleep(pause * (0.5 + ord(os.urandom(1)) / 256.0))
            pause = min(pause * 1.5, 0.25)
        self._done = threading.Event()
        threading.Thread(target=self._refresh, args=(self._done,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        # fresh: nobody can have found it stale. Otherwise it may be another's by now
        if time.monotonic() - self.touched < self.lease / 2.0:
            if self._holder().get("nonce") == self.nonce:
                _remove(self.path)
        else:
            self._take_away(self.nonce)
        os.close(self._descriptor)

    def held(self) -> bool:
        """Whether it is still ours, after whatever pause."""
        fresh = time.monotonic() - self.touched < self.lease / 2.0
        return fresh or self._holder().get("nonce") == self.nonce

    def _create(self) -> bool:
        nonce = os.urandom(8).hex()
        me = {"host": socket.gethostname(), "pid": os.getpid(), "start": _start(os.getpid()), "space": _space()}
        me["nonce"] = nonce
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, json.dumps(me).encode("ascii"))
            os.fsync(descriptor)
        except OSError:
            os.close(descriptor)
            _remove(self.path)
            raise
        self.nonce, self._descriptor, self.touched = nonce, descriptor, time.monotonic()
        return True

    def _refresh(self, done: threading.Event) -> None:
        while not done.wait(self.lease / 3.0):
            begun = time.monotonic()
            if begun - self.touched > self.lease:  # it may have been taken while this process was stopped
                return
            try:
                os.utime(self._descriptor)  # by descriptor: never another's lock of this name
                self.touched = begun
            except OSError:
                return

    def _holder(self) -> Entry:
        """What the lock file says; empty while it is being written, or gone."""
        try:
            with open(self.path, "rb") as file:
                found = json.loads(file.read().decode("ascii"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _stale(self) -> bool:
        holder = self._holder()
        if (
            holder
            and holder.get("space")
            and holder["space"] == _space()
            and _start(holder.get("pid", 0)) != holder.get("start")
        ):
            return True
        age = self._age(self.path)
        return age is not None and age > self.lease

    def _age(self, path: str) -> Optional[float]:
        """Seconds since it was touched, by the clock of the file system; None when it is gone.

        Both are opened, as NFS asks the server about a file only then.
        """
        mine = "%s.%s.now" % (self.path, os.urandom(8).hex())
        descriptor = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.utime(descriptor)
            now = os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
            _remove(mine)
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            return now - os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)

    def _take_away(self, nonce: str) -> bool:
        """Remove the lock instance `nonce`, if it is still the one that lies there. Whether we did."""
        claim = self._claim(nonce)
        if claim is None:
            return False
        try:
            if self._holder().get("nonce", "") != nonce:
                return False
            aside = "%s.%s.stale" % (self.path, os.urandom(8).hex())
            try:
                os.rename(self.path, aside)
            except FileNotFoundError:
                return False
            _remove(aside)
            return True
        finally:
            _remove(claim)

    def _claim(self, nonce: str) -> Optional[str]:
        """A file that one process alone can create; None when another has. One left by a dead process is passed."""
        for number in range(1, 100):
            claim = "%s.%s.claim-%d" % (self.path, nonce or "empty", number)
            try:
                os.close(os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
                return claim
            except FileExistsError:
                age = self._age(claim)
                if age is None or age < self.lease:
                    return None
        return None


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _space() -> str:
    """What process ids are counted in: this boot of this machine, this container. Empty where nobody knows."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start(pid: int) -> str:
    """Clock ticks since boot at which the process began; empty when it is gone."""
    try:
        with open("/proc/%d/stat" % pid, "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except (OSError, ValueError, TypeError):
        return ""
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode("ascii")


def main(argv: List[str]) -> None:
    """journal.py FOLDER EVENT [field=text] [field:=json]..."""
    fields = {}
    for word in argv[3:]:
        name, _, value = word.partition("=")
        fields[name.rstrip(":")] = json.loads(value) if name.endswith(":") else value
    append(argv[1], argv[2], **fields)


if __name__ == "__main__":
    main(sys.argv)
