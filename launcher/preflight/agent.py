"""One node's part of a preflight: do what the coordinator asks, and keep answering it.

    agent --connect 10.0.0.1,node1:20957 --setting preflight.json --name node3 --index 2

Every check runs in a process of its own, every GPU has a worker that stays: whatever hangs is killed, and this
loop goes on. Standard library only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import json
import os
import pkgutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from launcher import checks
from launcher.checks import addresses
from launcher.preflight import COULD_NOT, OK, OK_WITHOUT, START, Setting, from_json, pods, xids

LINE = 1 << 24  # bytes of one message
HERE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PR_SET_PDEATHSIG = 1
libc = ctypes.CDLL(None)


def with_us() -> None:
    """In a child: it ends when the agent does, killed or not."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def environment(address: str) -> dict[str, str]:
    """Of checks and workers. gloo would listen where the host name points, which may be 127.0.1.1."""
    found = addresses.interfaces(checks.Probe())
    name = next((name for name, one in found.items() if address in one["addresses"]), "")
    return {**({"GLOO_SOCKET_IFNAME": name} if name else {}), **os.environ, "DSLAUNCH_ADDRESS": address}


def kill(child: asyncio.subprocess.Process) -> None:
    """With its whole process group, which no child of ours leaves."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


class Worker:
    """One process that has torch, for one GPU. It answers one command at a time."""

    def __init__(self, rank: int, setting: Setting, env: Mapping[str, str], log: str) -> None:
        self.rank, self.setting, self.env, self.log = rank, setting, env, log
        self.child: asyncio.subprocess.Process | None = None

    async def start(self) -> dict[str, Any]:
        """Where none runs: what the new one says once it has torch."""
        if self.child is not None and self.child.returncode is None:
            return {"ready": True}
        log = f"{self.log}-{self.rank}"
        nccl = ["--nccl-log", log + ".nccl"] if self.setting.backend == "nccl" else []
        with open(log + ".err", "ab") as errors:
            self.child = await asyncio.create_subprocess_exec(
                sys.executable, "-c", START, HERE, "preflight.worker", "--local-rank", str(self.rank),
                "--backend", self.setting.backend, *nccl,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=errors, limit=LINE,
                env=self.env, start_new_session=True, preexec_fn=with_us,
            )  # fmt: skip
        return await self._line()

    async def ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        ready = await self.start()
        if "error" in ready:
            return ready
        assert self.child is not None
        assert self.child.stdin is not None
        try:
            self.child.stdin.write(json.dumps(command).encode() + b"\n")
            await self.child.stdin.drain()
        except OSError as error:
            return {"error": f"worker {self.rank}: {error}"}
        return await self._line()

    async def _line(self) -> dict[str, Any]:
        assert self.child is not None
        assert self.child.stdout is not None
        line = await self.child.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = await self.child.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return {"error": f"worker {self.rank} {how}: {last_line(f'{self.log}-{self.rank}.err')}"}

    def kill(self) -> None:
        if self.child is not None and self.child.returncode is None:
            kill(self.child)
        self.child = None


def last_line(path: str) -> str:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, os.stat(path).st_size - 4096))
        lines = file.read().decode("utf-8", "replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
    return ""


class Unreached(Exception):
    """There is no coordinator to be found."""


class Agent:
    def __init__(self, options: argparse.Namespace, setting: Setting) -> None:
        self.options, self.setting = options, setting
        self.workers: dict[int, Worker] = {}
        self.env: dict[str, str] = {}
        self.code = COULD_NOT  # until somebody says how it went
        self.why = ["preflight: the coordinator ended without a verdict; the first node's log says more"]
        self.writer: asyncio.StreamWriter
        self.tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        reader, self.writer = await self.connect()
        address = self.writer.get_extra_info("sockname")[0]
        self.env = environment(address)
        self.tell(
            hello=self.options.name,
            index=self.options.index,
            address=address,
            boot=checks.Probe().read("/proc/sys/kernel/random/boot_id") or "",
            switch=os.environ.get("SLURM_TOPOLOGY_ADDR", "").rpartition(".")[0],
            token=os.environ.get("DSLAUNCH_PREFLIGHT_TOKEN", ""),
        )
        while line := await self.next_line(reader):
            message = json.loads(line)
            if message["do"] == "ping":
                self.tell(pong=message["id"])
            elif message["do"] == "address":
                self.env = environment(message["address"])
            elif message["do"] == "rest":
                self.rest()
            elif message["do"] == "end":
                self.code, self.why = message["code"], message["why"]
                break
            else:
                task = asyncio.create_task(self.answer(message))
                self.tasks.add(task)
                task.add_done_callback(self.tasks.discard)
        self.rest()
        self.writer.close()
        if self.code not in (OK, OK_WITHOUT) and pods.inside():
            explain(self.why)
            await asyncio.sleep(pods.LINGER if self.options.index else 0)
        return int(self.code)

    async def next_line(self, reader: asyncio.StreamReader) -> bytes:
        """Nothing when the coordinator is gone, or has hung: it asks something every two seconds."""
        try:
            return await asyncio.wait_for(reader.readline(), 2 * self.setting.silence + 10)
        except (asyncio.TimeoutError, OSError):
            self.why = ["preflight: the coordinator is gone, or hangs: it has not said a word for a minute"]
            return b""

    def rest(self) -> None:
        for worker in self.workers.values():
            worker.kill()

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The first of the coordinator's addresses that this node can reach; it may not listen yet."""
        addresses, _, port = self.options.connect.rpartition(":")
        until = time.monotonic() + self.setting.join_timeout
        why = "no address given"
        while time.monotonic() < until:
            for address in dict.fromkeys(filter(None, addresses.split(","))):
                try:
                    reader, writer = await asyncio.wait_for(
                        asyncio.open_connection(address, int(port), limit=LINE), timeout=3
                    )
                    greeting = await asyncio.wait_for(reader.readline(), timeout=3)
                    if json.loads(greeting).get("coordinator") == self.setting.name:
                        return reader, writer
                    why = f"{address}:{port} is somebody else"
                except (OSError, ValueError, asyncio.TimeoutError) as error:
                    why = f"{address}:{port}: {error or type(error).__name__}"
            await asyncio.sleep(0.5)
        raise Unreached(
            f"{self.options.name} cannot reach the coordinator within {self.setting.join_timeout:g} s ({why})"
        )

    def tell(self, **message: Any) -> None:
        self.writer.write(json.dumps(message).encode() + b"\n")

    async def answer(self, message: Mapping[str, Any]) -> None:
        try:
            value = await (self.stage(message) if message["do"] == "stage" else self.work(message))
        except Exception as error:
            value = {"error": f"{type(error).__name__}: {error}"}
        self.tell(id=message["id"], value=value)

    async def stage(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of every check of a stage, a few at a time."""
        room = asyncio.Semaphore(max(2, len(os.sched_getaffinity(0))))

        async def one(name: str) -> dict[str, Any]:
            async with room:
                return await self.measure(name, getattr(checks.load(name), "SECONDS", self.setting.stage_timeout))

        names = message["checks"]
        return dict(zip(names, await asyncio.gather(*map(one, names)), strict=True))

    async def measure(self, name: str, timeout: float) -> dict[str, Any]:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", START, HERE, "preflight.agent", "--measure", name,
            "--setting", self.options.setting, stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            env=self.env, start_new_session=True, preexec_fn=with_us, limit=LINE,
        )  # fmt: skip
        try:
            out, _ = await asyncio.wait_for(child.communicate(), timeout)
            answer: dict[str, Any] = json.loads(out)
        except asyncio.TimeoutError:
            kill(child)
            return {"unknown": f"no answer within {timeout:g} s", "timeout": timeout}
        except ValueError:
            return {"unknown": f"the check ended with exit code {child.returncode} and no answer"}
        return answer

    async def work(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """One command for one worker, which is killed when it does not answer in time, and started again later."""
        rank = message["rank"]
        if rank not in self.workers:
            log = os.path.join(self.options.logs, f"worker-{self.options.name}")
            self.workers[rank] = Worker(rank, self.setting, self.env, log)
        worker = self.workers[rank]
        command = message["command"]
        try:
            call = worker.start() if command is None else worker.ask({"id": message["id"], **command})
            return await asyncio.wait_for(call, message["timeout"])
        except asyncio.TimeoutError:
            worker.kill()
            return {"error": f"no answer within {message['timeout']:g} s", "timeout": True}


def explain(lines: list[str]) -> None:
    """On standard error, and to Kubernetes where that is what runs us."""
    print("\n".join(f"dslaunch: {line}" for line in lines), file=sys.stderr, flush=True)
    pods.tell(lines)


def write_whole(path: str, text: str) -> None:
    """The whole file or none: readers come at any time."""
    draft = f"{path}.{os.getpid()}"
    with open(draft, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def measure(name: str, setting: Setting) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = checks.load(name).measure(setting, checks.Probe())
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(last.filename)}:{last.lineno}"
        return {"unknown": f"{type(error).__name__}: {error} ({where})"}
    return answer


def setting_of(path: str) -> Setting:
    """What preflight.json says, with the table of Xids that travels beside it."""
    with open(path, encoding="utf-8") as file:
        setting: Setting = from_json(Setting, json.load(file))
    table = pkgutil.get_data("launcher", "data/xids.tsv") if setting.gpus else None
    return replace(setting, xids=xids(table.decode())) if table else setting


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="agent.py", allow_abbrev=False)
    parser.add_argument("--setting", required=True, metavar="FILE")
    parser.add_argument("--connect", metavar="ADDRESS[,ADDRESS...]:PORT")
    parser.add_argument("--name", default=socket.gethostname())
    parser.add_argument("--index", type=int, default=0)
    parser.add_argument("--logs", default=".", metavar="DIR")
    parser.add_argument("--measure", metavar="CHECK", help="one check, here and now, its answer on standard output")
    options = parser.parse_args(arguments)
    setting = setting_of(options.setting)
    if options.measure:
        out = os.dup(1)
        os.dup2(2, 1)  # a check's own prints are no answer
        answer = json.dumps(measure(options.measure, setting))
        with os.fdopen(out, "w") as file:
            file.write(answer + "\n")
        return 0
    os.makedirs(options.logs, exist_ok=True)
    try:
        return asyncio.run(Agent(options, setting).run())
    except Unreached as why:
        explain([f"preflight: {why}"])
        return COULD_NOT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
