"""One torch process of a node, alive for the whole preflight: a JSON command a line in, a JSON answer a line out.

    python3 -m launcher.preflight.worker --local-rank 0 --backend gloo

    {"ready": true, "torch": "2.13.0", ...}                              it says by itself
    {"id": 1, "do": "host", "address": "10.0.0.1", "size": 2}            -> {"id": 1, "port": 40123}
    {"id": 2, "do": "group", "address": ..., "port": 40123, "rank": 0, "size": 2, "timeout": 30, "measure": [...]}
    {"id": 3, "do": "matmul", "seconds": 1.0}
    {"id": 4, "do": "transport"}                                         -> what NCCL's own log says, parsed
    {"id": 5, "do": "nccl_tests", "directory": "/opt/nccl-tests/build"}
    {"id": 6, "do": "quit"}                                              or the end of its input

What goes wrong in a command is its answer, {"id": 2, "error": "one line"}, and the worker goes on; "results" are of
the measurements before it. After an error in a group of NCCL the state of the device is unknown: the answer has
"ends": true, and the worker ends.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from launcher.preflight import bandwidth, gemm, nccl_tests, to_json, transport


class Worker:
    def __init__(self, backend: str, device: Any, nccl_log: str = ""):
        self.backend = backend
        self.device = device
        self.nccl_log = nccl_log
        self.store: Any = None  # the one that we host; others are in it until the next

    def host(self, command: dict[str, Any]) -> dict[str, Any]:
        """A store for one group, on a port that the system chooses."""
        dist: Any = importlib.import_module("torch.distributed")
        self.store = None
        self.store = dist.TCPStore(
            command["address"],
            0,
            int(command["size"]),
            is_master=True,
            timeout=timedelta(seconds=float(command.get("timeout", 30))),
            wait_for_workers=False,
        )
        return {"port": self.store.port}

    def group(self, command: dict[str, Any]) -> dict[str, Any]:
        """Joins, measures in order, leaves."""
        dist: Any = importlib.import_module("torch.distributed")
        timeout = float(command.get("timeout", 30))
        rank, size = int(command["rank"]), int(command["size"])
        patience = timedelta(seconds=timeout)
        store = dist.TCPStore(command["address"], int(command["port"]), size, is_master=False, timeout=patience)
        store = dist.PrefixStore("preflight", store)
        results: list[dict[str, Any]] = []
        now = "joining"
        try:
            group = bandwidth.join(
                store, rank=rank, size=size, backend=self.backend, device=self.device, timeout=timeout
            )
            for wanted in command["measure"]:
                now = str(wanted["op"])
                results.append(bandwidth.measure(group, wanted))
        except Exception as error:
            failed = {"error": f"{now}: {one_line(error)}", "results": results}
            return failed if self.backend == "gloo" else {**failed, "ends": True}
        finally:
            if dist.is_initialized() and not (self.backend == "nccl" and len(results) < len(command["measure"])):
                dist.destroy_process_group()
        return {"results": results}

    def matmul(self, command: dict[str, Any]) -> dict[str, Any]:
        return gemm.matmul(self.device, float(command.get("seconds", 1.0)))

    def transport(self, command: dict[str, Any]) -> dict[str, Any]:
        """Of the groups so far; launcher.preflight.transport judges it."""
        if not self.nccl_log:
            return {"skipped": "no log of NCCL is kept"}
        with open(self.nccl_log, encoding="utf-8", errors="replace") as file:
            return {"transport": to_json(transport.read(file.read()))}

    def nccl_tests(self, command: dict[str, Any]) -> dict[str, Any]:
        """On all GPUs of this node, beside the workers that wait."""
        torch: Any = importlib.import_module("torch")
        gpus = int(command.get("gpus") or torch.cuda.device_count())
        size, timeout = int(command.get("bytes") or 8 << 30), float(command.get("timeout", 300))
        return nccl_tests.run(command["directory"], gpus=gpus, size=size, timeout=timeout)

    def quit(self, command: dict[str, Any]) -> dict[str, Any]:
        return {"quit": True}

    def answer(self, line: str) -> dict[str, Any]:
        """Of a line that is a command, and of any other line."""
        command: Any = None
        try:
            command = json.loads(line)
            known = {
                "host": self.host,
                "group": self.group,
                "matmul": self.matmul,
                "transport": self.transport,
                "nccl_tests": self.nccl_tests,
                "quit": self.quit,
            }
            return {"id": command.get("id"), **known[command["do"]](command)}
        except Exception as error:
            asked = command if isinstance(command, dict) else {}
            return {"id": asked.get("id"), "error": one_line(error)}


def one_line(error: BaseException) -> str:
    """The first line that says something, after the kind of error."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def start(backend: str, local_rank: int) -> tuple[dict[str, Any], Any]:
    """What this process runs on, with torch imported and its device in use."""
    begin = time.perf_counter()
    torch: Any = importlib.import_module("torch")
    importlib.import_module("torch.distributed")
    seconds = time.perf_counter() - begin
    if backend == "nccl":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.ones(1, device=device).sum().item()
        name, nccl = torch.cuda.get_device_name(device), ".".join(map(str, torch.cuda.nccl.version()))
    else:
        device, name, nccl = torch.device("cpu"), platform.machine() or "cpu", ""
    return {
        "ready": True,
        "torch": torch.__version__.partition("+")[0],
        "cuda": torch.version.cuda or "",
        "nccl": nccl,
        "import_seconds": round(seconds, 3),
        "device": name,
    }, device


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launcher.preflight.worker")
    parser.add_argument("--local-rank", type=int, default=0)
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="gloo")
    parser.add_argument("--nccl-log", default="", help="file for NCCL's own lines")
    options = parser.parse_args(argv)

    # Libraries print to 1 as they like: answers go where 1 went, and 1 goes to stderr.
    commands, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    if options.backend == "nccl":
        # From NCCL 2.30 on: ranks that see different networks are an error. Older releases do not read it, and there
        # the count of ports that each node's own log names tells.
        os.environ["NCCL_IGNORE_NET_MISMATCH"] = "0"
        if options.nccl_log:
            os.environ.update(
                NCCL_DEBUG="INFO", NCCL_DEBUG_SUBSYS="INIT,NET,ENV,GRAPH", NCCL_DEBUG_FILE=options.nccl_log
            )
    try:
        ready, device = start(options.backend, options.local_rank)
    except Exception as error:
        say({"ready": False, "error": one_line(error)})
        return 1
    say(ready)
    worker = Worker(options.backend, device, options.nccl_log)
    for line in commands:
        if not line.strip():
            continue
        answer = worker.answer(line)
        if answer.get("quit"):
            break
        say(answer)
        if answer.get("ends"):
            os._exit(1)  # destructors would wait for the other ranks
    return 0


if __name__ == "__main__":
    sys.exit(main())
