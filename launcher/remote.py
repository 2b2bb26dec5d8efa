"""A Slurm whose login node is reached over ssh: its commands, the run directory there, and a copy of it here.

One connection a request. Nothing that a shell could read is ever sent: requests are JSON on standard input
(node/far.py), answers stand in a frame, and what a login script prints is skipped.
"""

from __future__ import annotations

import io
import json
import os
import re
import secrets
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher import runs
from launcher.errors import Problem, Unreachable, UserError
from launcher.node import journal
from launcher.run import Result, Run, run

AGENT = Path(__file__).parent / "node" / "far.py"
# No question is asked, no unknown host is trusted, nothing of ours is forwarded.
SSH = (
    "ssh", "-T", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", "-o", "ConnectTimeout=10",
    "-o", "ForwardAgent=no", "-o", "ClearAllForwardings=yes", "-o", "ServerAliveInterval=15",
)  # fmt: skip
UNCONNECTED = "ssh did not connect"
SLOW = 30.0  # seconds for a login, on top of what is asked
AGAIN = 2.0  # seconds in which what was fetched is new enough
HAVE = "there.json"
DEFAULT = "dslaunch-runs"  # in the home directory there
WHOLE = ("journal.jsonl", "exit-code", "hostfile", "seen.json")  # what far.py sends, and what is below
BELOW = ("logs/", "preflight/")
MOST = 160 << 20  # bytes of one answer: twice far.py's 64 MiB and a file more, for what programs print
LARGEST = 1 << 40  # bytes of a log; a week of one MB each second is 0.6 TB
ROUNDS = 64  # answers to one look, of 64 MiB each
_fetched: dict[str, float] = {}


def login(extra: Mapping[str, Any]) -> str:
    """Where a run was submitted: user@host, or nothing for this machine."""
    return str(extra.get("login", ""))


def folder(record_id: str, extra: Mapping[str, Any]) -> str:
    return f"{extra.get('login_dir') or DEFAULT}/{record_id}"


def ask(
    host: str, request: Mapping[str, Any], payload: bytes = b"", *, timeout: float = 30.0, mark: Sequence[str] = ()
) -> tuple[dict[str, Any], bytes]:
    """The answer and what follows it. Raises Unreachable with ssh's own words, UserError where it went wrong there.

    `mark`: words that show in this machine's process list, so that a look-up sees a submission that is on its way.
    """
    agent, nonce = AGENT.read_bytes(), secrets.token_hex(16)
    text = json.dumps({**request, "nonce": nonce}).encode()
    # a login shell has the site's PATH; it sees numbers and fixed words alone
    start = f"exec bash -lc 'exec python3 -c \"import sys; exec(sys.stdin.buffer.read({len(agent)}).decode())\"'"
    done = run(
        [*SSH, "--", host, " ".join([start, *(["#", *mark] if mark else [])])],
        timeout=timeout + SLOW, bounded=bool(mark), stdin=agent + b"%16d" % len(text) + text + payload, binary=True,
        most=MOST,
    )  # fmt: skip
    raw = done.raw
    at = raw.find(nonce.encode())
    if at < 0:
        words = " ".join(done.err.split())[-400:]
        connected = done.code not in (None, 255)
        problem = f"{host}: {words or 'no answer'}" if connected else f"{UNCONNECTED} to {host}: {words}"
        raise Unreachable(Problem(problem, _hint(words, host), ("slurm", "login")))
    head = at + len(nonce)
    sizes = [re.fullmatch(rb" *(\d+)", raw[start : start + 16]) for start in (head, head + 16)]
    if len(raw) < head + 32:
        raise _torn(host)
    if not sizes[0] or not sizes[1]:
        raise _nonsense(host, "no sizes")
    size, more = int(sizes[0][1]), int(sizes[1][1])
    body = raw[head + 32 :]
    if len(body) < size + more:
        raise _torn(host)
    answer = _checked(host, str(request["op"]), body[:size], more)
    if "error" in answer:
        raise UserError(Problem(f"{host}: {answer['error']}", at=("slurm", "login")))
    return answer, body[size : size + more]


def _torn(host: str) -> Unreachable:
    return Unreachable(Problem(f"{host}: the connection ended in the middle of the answer", "ask again"))


def _nonsense(host: str, what: str) -> Unreachable:
    return Unreachable(Problem(f"{host} answered nonsense: {what}", at=("slurm", "login")))


# What an answer holds.
ANSWERS: dict[str, dict[str, tuple[type, ...]]] = {
    "run": {"code": (int, type(None)), "out": (str,), "err": (str,)},
    "put": {"folder": (str,)},
    "get": {"files": (list,), "there": (bool,), "more": (bool,)},
    "missing": {"missing": (list,)},
    "error": {"error": (str,)},
}


def _checked(host: str, op: str, text: bytes, more: int) -> dict[str, Any]:
    """The answer as far.py gives it: whoever administers a login node is not who uses this one."""
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        raise _nonsense(host, "no JSON") from None
    if not isinstance(answer, dict):
        raise _nonsense(host, f"a {type(answer).__name__}")
    for key, kinds in ANSWERS["error" if "error" in answer else op].items():
        if type(answer.get(key)) not in kinds or key not in answer:
            raise _nonsense(host, f"no {key}")
    if not all(isinstance(path, str) for path in answer.get("missing", ())):
        raise _nonsense(host, "missing")
    files = answer.get("files", [])
    for row in files:
        if not isinstance(row, list) or list(map(type, row)) != [str, int, int, int, int] or not _fits(*row):
            raise _nonsense(host, f"the file {str(row)[:200]}")
    if sum(row[3] for row in files) != more:
        raise _nonsense(host, f"{more} bytes, and other files")
    return answer


def _fits(name: str, size: int, offset: int, length: int, mtime: int) -> bool:
    """Only what far.py looks for: not this machine's own record of the run, nor anything outside of it."""
    known = name in WHOLE or name.startswith(BELOW)
    parts = name.split("/")
    plain = name.isprintable() and not {"", ".", ".."} & set(parts) and all(len(os.fsencode(p)) < 256 for p in parts)
    whole = min(offset, length) >= 0 and size == offset + length and size <= LARGEST
    return known and plain and whole and len(name) < 1024 and 0 <= mtime < 1 << 63


HINTS = (
    ("host key verification failed", "log in once by hand and compare the fingerprint: ssh {host}"),
    ("no matching host key", "log in once by hand and compare the fingerprint: ssh {host}"),
    ("permission denied", "a key without a password prompt: ssh-add, and ssh -o BatchMode=yes {host} true"),
    ("could not resolve", "slurm.login names a host of DNS or of ~/.ssh/config"),
    ("python3", "the login node needs a python3 on its PATH"),
)  # fmt: skip


def _hint(words: str, host: str) -> str:
    found = next((hint for phrase, hint in HINTS if phrase in words.lower()), "ssh -o BatchMode=yes {host} true")
    return found.format(host=host)


def runner(host: str) -> Run:
    """`run` as if on the login node; one that cannot be reached is a command that did not answer."""

    def there(
        argv: Sequence[str],
        *,
        timeout: float = 30.0,
        env: Mapping[str, str] | None = None,
        bounded: bool = False,
        stdin: bytes = b"",
    ) -> Result:
        mark = (
            [word for word in argv if word == "sbatch" or word.startswith("--job-name=")]
            if argv[0] == "sbatch"
            else []
        )
        try:
            answer, _ = ask(
                host, {"op": "run", "argv": list(argv), "timeout": timeout}, stdin, timeout=timeout, mark=mark
            )
        except (Unreachable, UserError) as error:
            return Result(None, "", error.problems[0].message)
        return Result(answer["code"], answer["out"], answer["err"])

    return there


def put(record: runs.Record) -> str:
    """The run directory, there too; its absolute path. Secrets are kept there alone."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as archive:
        for path in sorted(record.folder.iterdir()):
            if path.name != "submitted-from" and not path.name.endswith(".lock"):
                archive.add(path, arcname=path.name)
    where = folder(record.id, record.extra)
    above = record.extra.get("login_dir") or DEFAULT
    saves = [record.extra["saves"]] if record.extra.get("saves") else []
    request = {"op": "put", "folder": where, "link": above, "make": saves}
    answer, _ = ask(login(record.extra), request, buffer.getvalue(), timeout=300.0)
    runs.forget_secrets(record)
    return str(answer["folder"])


def missing(host: str, paths: Sequence[tuple[str, str]]) -> list[str]:
    """Of ("/data", "directory") and ("/x/train.py", "file"), the paths that are not there."""
    answer, _ = ask(host, {"op": "missing", "paths": [list(row) for row in paths]})
    return [str(path) for path in answer["missing"]]


def fetch(record: runs.Record) -> bool:
    """What the job has written there since the last look; whether there is a run directory."""
    host = login(record.extra)
    if time.monotonic() - _fetched.get(str(record.folder), -AGAIN) < AGAIN:
        return True
    path = record.folder / HAVE
    try:
        have = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        have = {}
    request = {"op": "get", "folder": folder(record.id, record.extra), "have": have}
    for _ in range(ROUNDS):
        answer, data = ask(host, request, timeout=120.0)
        at = 0
        for name, size, offset, length, mtime in answer["files"]:
            _store(record, host, name, offset, data[at : at + length])
            at += length
            have[name] = [size, mtime]
        if answer["files"]:
            half = path.with_suffix(".half")
            half.write_text(json.dumps(have), encoding="utf-8")
            half.replace(path)
        if not answer["more"]:
            break
    _fetched[str(record.folder)] = time.monotonic()
    return bool(answer["there"])


def _store(record: runs.Record, host: str, name: str, offset: int, data: bytes) -> None:
    """What follows `offset` of a file that `_fits`."""
    place = record.folder / (runs.THERE if name == journal.NAME else name)
    try:
        if record.folder.resolve() not in place.resolve().parents:
            raise UserError(Problem(f"{host} sent {name!r}, which leads out of the run directory"))
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600), "wb") as file:  # noqa: PTH123
            file.seek(offset)
            file.write(data)
            file.truncate(offset + len(data))
    except (FileExistsError, IsADirectoryError, NotADirectoryError):
        raise _nonsense(host, f"{name!r}, which is a directory and a file") from None
