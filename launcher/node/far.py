"""What a login node does for a dslaunch that is elsewhere; it reaches Python through ssh's standard input.

Standard input: sixteen digits, so many bytes of JSON, the rest belongs to the request. The answer stands in a frame
that begins with the request's own nonce: whatever a login script prints around it is not read.

    {"nonce": "9f..", "op": "run", "argv": ["squeue"], "timeout": 30}     -> {"code": 0, "out": "..", "err": ".."}
    {"nonce": "9f..", "op": "put", "folder": "runs/x", "link": "runs", "make": ["ckpt"]}
                                                                          -> {"folder": "/home/u/runs/x"}, after a tar
    {"nonce": "9f..", "op": "get", "folder": "runs/x", "have": {}}
                                   -> {"files": [[path, size, offset, bytes, mtime]], "there": true, "more": false}
    {"nonce": "9f..", "op": "missing", "paths": [["/a", "file"]]}         -> {"missing": ["/a"]}

Standard library of Python 3.6.
"""

import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
from typing import Any, Dict, Iterator, Tuple

Request = Dict[str, Any]

STRANGE = ("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_", "SACCT_", "SCONTROL_")  # options in disguise
WHOLE = ("journal.jsonl", "exit-code", "hostfile", "seen.json")
LIMIT = 4 << 20  # bytes of one file that has changed somewhere in its middle
NEWEST = 16 << 20  # bytes of the end of a log that nobody has yet
ENOUGH = 64 << 20  # bytes in one answer: whoever asked asks again


def at_home(path: str) -> str:
    return os.path.join(os.path.expanduser("~"), path)


def run(request: Request, given: bytes) -> Request:
    kept = (name for name in os.environ if name == "SLURM_CONF" or not name.startswith(STRANGE))
    environ = {name: os.environ[name] for name in kept}
    environ["LC_ALL"] = "C"
    try:
        child = subprocess.Popen(
            request["argv"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ,
            start_new_session=True,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        missing = isinstance(error, OSError) and error.errno == 2
        return {
            "code": None,
            "out": "",
            "err": "%s: %s" % (request["argv"][0], "command not found" if missing else error),
        }
    try:
        out, err = child.communicate(given, timeout=request["timeout"])
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return {
            "code": None,
            "out": "",
            "err": "%s did not answer within %g s" % (request["argv"][0], request["timeout"]),
        }
    return {"code": child.returncode, "out": out.decode("utf-8", "replace"), "err": err.decode("utf-8", "replace")}


def put(request: Request, payload: bytes) -> Request:
    """The run directory, there as a whole or not at all. One that is there already stays: jobs write to it."""
    folder = at_home(request["folder"])
    parent = os.path.dirname(folder)
    half = os.path.join(parent, ".%s.half" % os.path.basename(folder))
    before = os.umask(0o022)
    os.umask(before | 0o022)
    try:
        os.makedirs(parent, exist_ok=True)
    finally:
        os.umask(before)
    mode = os.stat(parent).st_mode
    if mode & 0o022 and not mode & stat.S_ISVTX:
        raise ValueError("others can replace what is in %s: chmod go-w %s" % (parent, parent))
    with tarfile.open(fileobj=io.BytesIO(payload), mode="r:gz") as archive:
        if os.path.lexists(folder):
            there = os.lstat(folder)
            if not stat.S_ISDIR(there.st_mode) or there.st_uid != os.geteuid() or there.st_mode & 0o022:
                raise ValueError("%s is there already, and is not a directory of yours alone" % folder)
            if first_line(folder) != first_line_of(archive):
                raise ValueError("%s is there already, and is another run" % folder)
            return {"folder": folder}
        look_at(archive, half)
        if hasattr(tarfile, "fully_trusted_filter"):  # links of a snapshot lead wherever they led
            archive.extraction_filter = tarfile.fully_trusted_filter
        shutil.rmtree(half, ignore_errors=True)
        os.mkdir(half, 0o700)
        try:
            archive.extractall(half)  # noqa: S202 - looked at above
            above = at_home(request["link"])
            os.symlink(above, os.path.join(half, "submitted-from"))
            for path in request["make"]:  # what a link of the snapshot leads to
                os.makedirs(os.path.join(above, path), exist_ok=True)
            os.rename(half, folder)
        except BaseException:
            shutil.rmtree(half, ignore_errors=True)  # secrets are in it
            raise
    return {"folder": folder}


def look_at(archive: tarfile.TarFile, top: str) -> None:
    """Raises ValueError unless every member stays below `top`: by its name, and by no link of the archive's own."""
    members = archive.getmembers()
    links = {os.path.normpath(member.name) for member in members if member.issym()}
    for member in members:
        for name in [member.name] + ([member.linkname] if member.islnk() else []):
            if not os.path.normpath(os.path.join(top, name)).startswith(top + os.sep):
                raise ValueError("%s leads out of the run directory" % name)
            parts = os.path.normpath(name).split(os.sep)
            if any(os.sep.join(parts[:end]) in links for end in range(1, len(parts))):
                raise ValueError("%s leads through a link" % name)
        if not (member.isfile() or member.isdir() or member.issym() or member.islnk()):
            raise ValueError("%s is no file" % member.name)


def first_line(folder: str) -> bytes:
    """What makes a run this one: when, where and as what it was rendered."""
    try:
        with open(os.path.join(folder, WHOLE[0]), "rb") as file:
            return file.readline()
    except OSError:
        return b""


def first_line_of(archive: tarfile.TarFile) -> bytes:
    try:
        file = archive.extractfile(WHOLE[0])
    except KeyError:
        return b""
    return file.readline() if file else b""


def listed(folder: str) -> Iterator[str]:
    for path in WHOLE:
        if os.path.isfile(os.path.join(folder, path)):
            yield path
    for above in ("preflight", "logs"):
        for base, _, names in os.walk(os.path.join(folder, above)):
            for name in names:
                path = os.path.join(base, name)
                if os.path.isfile(path) and not os.path.islink(path):
                    yield os.path.relpath(path, folder)


def get(request: Request, _: bytes) -> Tuple[Request, bytes]:
    """What is new: the rest of a log, the whole of anything else."""
    folder, have = at_home(request["folder"]), request["have"]
    rows, parts, taken = [], [], 0
    for path in listed(folder):
        if taken >= ENOUGH:
            break
        try:
            with open(os.path.join(folder, path), "rb") as file:
                size, mtime = os.fstat(file.fileno()).st_size, int(os.fstat(file.fileno()).st_mtime)
                there, seen = have.get(path, (0, -1))
                grows = path.endswith((".log", ".out", ".jsonl")) and path != "journal.jsonl"
                if (size, mtime) == (there, seen) or (not grows and size > LIMIT):
                    continue
                offset = max(there if 0 < there <= size else 0, size - NEWEST) if grows else 0
                file.seek(offset)
                data = file.read(NEWEST if grows else LIMIT)
        except OSError:
            continue  # gone since
        rows.append([path, offset + len(data), offset, len(data), mtime])
        parts.append(data)
        taken += len(data)
    return {"files": rows, "there": os.path.isdir(folder), "more": taken >= ENOUGH}, b"".join(parts)


def missing(request: Request, _: bytes) -> Request:
    kinds = {"file": os.path.isfile, "directory": os.path.isdir}
    return {"missing": [path for path, kind in request["paths"] if not kinds[kind](at_home(path))]}


def main() -> None:
    source = sys.stdin.buffer
    request = json.loads(source.read(int(source.read(16))).decode())
    payload = source.read()
    does = {"run": run, "put": put, "get": get, "missing": missing}  # type: Dict[str, Any]
    try:
        done = does[request["op"]](request, payload)
    except Exception as error:
        done = {"error": "%s: %s" % (type(error).__name__, error)}
    answer, data = done if isinstance(done, tuple) else (done, b"")
    text = json.dumps(answer).encode()
    sys.stdout.flush()
    sys.stdout.buffer.write(request["nonce"].encode() + b"%16d%16d" % (len(text), len(data)) + text + data)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
