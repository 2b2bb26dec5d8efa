"""What a login node does for a dslaunch that is elsewhere; it reaches Python through ssh's standard input.

Standard input: sixteen digits, so many bytes of JSON, the rest belongs to the request. The answer stands in a frame
that begins with the request's own nonce: whatever a login script prints around it is not read.

    {"nonce": "9f..", "op": "run", "argv": ["squeue"], "timeout": 30}     -> {"code": 0, "out": "..", "err": ".."}
    {"nonce": "9f..", "op": "put", "folder": "runs/x", "link": "runs", "make": ["ckpt"]}
                                                                          -> {"folder": "/home/u/runs/x"}, after a tar
    {"nonce": "9f..", "op": "get", "folder": "runs/x", "have": {}}        -> {"files": [[path, size, offset, bytes]]}
    {"nonce": "9f..", "op": "missing", "paths": [["/a", "file"]]}         -> {"missing": ["/a"]}

Standard library of Python 3.6.
"""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from typing import Any, Dict, Iterator, Tuple

Request = Dict[str, Any]

STRANGE = ("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_", "SACCT_", "SCONTROL_")  # options in disguise
WHOLE = ("journal.jsonl", "exit-code", "hostfile", "seen.json")
LIMIT = 4 << 20  # bytes of one file that has changed somewhere in its middle
NEWEST = 16 << 20  # bytes of the end of a log that nobody has yet


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
    half = os.path.join(os.path.dirname(folder), ".%s.half" % os.path.basename(folder))
    if not os.path.isdir(folder):
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        shutil.rmtree(half, ignore_errors=True)
        os.mkdir(half, 0o700)
        with tarfile.open(fileobj=io.BytesIO(payload), mode="r:gz") as archive:
            for member in archive.getmembers():
                place = os.path.normpath(os.path.join(half, member.name))
                if not place.startswith(half + os.sep):
                    raise ValueError("%s leads out of the run directory" % member.name)
            if hasattr(tarfile, "fully_trusted_filter"):  # links of a snapshot lead wherever they led
                archive.extraction_filter = tarfile.fully_trusted_filter
            archive.extractall(half)  # noqa: S202 - looked at above
        above = at_home(request["link"])
        os.symlink(above, os.path.join(half, "submitted-from"))
        for path in request["make"]:  # what a link of the snapshot leads to
            os.makedirs(os.path.join(above, path), exist_ok=True)
        os.rename(half, folder)
    return {"folder": folder}


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
    rows, parts = [], []
    for path in listed(folder):
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
    return {"files": rows, "there": os.path.isdir(folder)}, b"".join(parts)


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


main()
