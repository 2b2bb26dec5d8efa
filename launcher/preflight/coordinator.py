"""One preflight: wait for every node's agent, ask them stage by stage, say who trains.

    coordinator --port 20957 --setting preflight.json --out DIR --names n1,n2

Ends with the verdict's exit code; DIR gets progress.jsonl as it goes, verdict.json and `train`, one node a line.
Standard library only: torch lives in the agents' workers.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from launcher import checks
from launcher.checks import addresses
from launcher.preflight import (
    COULD_NOT,
    DIFFERS,
    FABRIC,
    OK,
    OK_WITHOUT,
    TOO_FEW,
    Curve,
    Finding,
    Setting,
    Verdict,
    decision,
    from_json,
    history,
    parity,
    pods,
    speed,
    to_json,
    transport,
)
from launcher.preflight.agent import LINE, setting_of, write_whole
from launcher.preflight.tournament import Tournament

BEAT = 2.0  # seconds between two questions whether a node is still there
CLEAR, LOOKS = 0.85, 3  # of the fastest: below that such a measurement is repeated, so many times in all
UNSTEADY = 0.6  # of the median rate: an iteration in a hundred below that is looked at again. Steady links: 0.97
IMPORT = 600.0  # seconds for a worker to import torch: a cold shared file system takes minutes
RESTLESS = 8  # links that come and go are looked at again, at most: some ten seconds each
WORDS = 60  # lines of the verdict that every agent is told
OPS = ("all_gather", "reduce_scatter", "all_to_all", "sendrecv")  # beside all_reduce, at one size


class Gone(Exception):
    """A node that does not answer any more. Its reason is a finding already."""


@dataclass
class Peer:
    """A node, as the coordinator sees it."""

    name: str
    index: int
    address: str
    boot: str
    switch: str
    writer: asyncio.StreamWriter
    heard: float
    asked: float = 0.0  # when the oldest question that it has not reacted to was put; 0: it owes nothing
    gone: str = ""
    waiting: dict[int, asyncio.Future[Any]] = field(default_factory=dict)

    def lose(self, why: str) -> None:
        if not self.gone:
            self.gone = why
            for future in self.waiting.values():
                if not future.done():
                    future.set_exception(Gone(why))
            self.waiting.clear()
            self.writer.close()


class Coordinator:
    def __init__(self, setting: Setting, names: Sequence[str], out: str, token: str) -> None:
        self.setting, self.out, self.token = setting, out, token
        everyone = range(setting.nodes + setting.spares)
        self.names = list(names) or [pods.waiting(setting.name, index) for index in everyone]
        self.named = bool(names)
        self.peers: dict[str, Peer] = {}
        self.findings: list[Finding] = []
        self.all_here = asyncio.Event()
        self.count = 0
        self.stages: dict[str, float] = {}
        self.verdict: dict[str, Any] = {}  # what stages add to it
        self.inventory: dict[str, dict[str, Any]] = {}
        self.over = False
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.writing = threading.Thread(target=self.write, daemon=True)
        self.writing.start()
        self.measured: dict[tuple[str, str], float] = {}  # GB/s of each directed link, the best of all rounds
        self.fastest = 0.0
        self.unsteady: dict[tuple[str, str], list[float]] = {}  # GB/s of the slowest iteration, where far below most
        self.rails: dict[str, str] = {}  # node -> the one of its rails that is slow
        self.by_cpus = 0  # measurements in which they were the limit

    # --- the nodes

    async def welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps({"coordinator": self.setting.name}).encode() + b"\n")
        peer: Peer | None = None
        # strangers may connect, and say what they like
        nonsense = (OSError, ValueError, KeyError, TypeError, AttributeError, asyncio.TimeoutError)
        with contextlib.suppress(*nonsense, asyncio.CancelledError):
            hello = json.loads(await asyncio.wait_for(reader.readline(), 30))
            peer = self.admit(hello, writer)
            while peer and (line := await reader.readline()):
                peer.heard, peer.asked = time.monotonic(), 0.0
                message = json.loads(line)
                number = message.get("id", message.get("pong"))
                future = peer.waiting.pop(number, None)
                if future and not future.done():
                    future.set_result(message.get("value"))
        writer.close()
        if peer and not self.over:
            self.lose(peer, "its agent ended in the middle of the preflight: killed, or the node went down")

    def admit(self, hello: Mapping[str, Any], writer: asyncio.StreamWriter) -> Peer | None:
        index = int(hello["index"])
        if hello.get("token", "") != self.token or not 0 <= index < len(self.names):
            return None
        if any(peer.index == index for peer in self.peers.values()):
            return None
        name = str(hello["hello"])
        if not self.named:  # pods are known by rank until they say where they run
            self.names[index] = name = pods.named(name, index, self.names)
        if name not in self.names or name in self.peers:
            return None
        peer = Peer(name, index, hello["address"], hello["boot"], hello["switch"], writer, time.monotonic())
        self.peers[name] = peer
        self.event("joined", node=name, count=len(self.peers), of=len(self.names))
        if len(self.peers) == len(self.names):
            self.all_here.set()
        return peer

    def lose(self, peer: Peer, why: str) -> None:
        if not peer.gone:
            peer.lose(why)
            fix = "look at the node's console and kernel log; leave it out until it is known why"
            self.find(Finding("agent", "exclude", why, node=peer.name, fix=fix))

    async def watch(self) -> None:
        """A question every two seconds. What this process slept through itself is nobody's silence."""
        last = time.monotonic()
        while True:
            await asyncio.sleep(BEAT)
            now = time.monotonic()
            stalled, last = now - last > 2 * BEAT, now
            for peer in self.alive():
                if stalled or not peer.asked:
                    peer.asked = now
                if now - peer.asked > self.setting.silence:
                    silent = f"{self.setting.silence:g} s"
                    what = f"it has not answered for {silent}: its agent is stopped, or the node hangs"
                    self.lose(peer, what)
                else:
                    self.count += 1
                    self.send(peer, do="ping", id=-self.count)

    def alive(self) -> list[Peer]:
        return [self.peers[name] for name in self.names if name in self.peers and not self.peers[name].gone]

    def healthy(self) -> list[Peer]:
        bad = {one.node for one in self.findings if one.level == "exclude"}
        return [peer for peer in self.alive() if peer.name not in bad]

    def send(self, peer: Peer, **message: Any) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            peer.writer.write(json.dumps(message).encode() + b"\n")

    async def ask(self, peer: Peer, patience: float, **message: Any) -> Any:
        """The agent's answer. Raises Gone when the node is lost, or silent on this for `patience` seconds."""
        if peer.gone:
            raise Gone(peer.gone)
        self.count += 1
        number = self.count
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        peer.waiting[number] = future
        self.send(peer, id=number, **message)
        try:
            return await asyncio.wait_for(future, patience)
        except asyncio.TimeoutError:
            self.lose(peer, f"no answer to `{message['do']}` within {patience:g} s")
            raise Gone(peer.gone) from None

    async def work(self, peer: Peer, rank: int, command: Mapping[str, Any] | None, timeout: float) -> dict[str, Any]:
        """What a worker answers; {"error": ...} when it, or its node, does not."""
        try:
            answer: dict[str, Any] = await self.ask(
                peer, timeout + 10, do="work", rank=rank, command=command, timeout=timeout
            )
        except Gone as gone:
            return {"error": str(gone), "gone": True}
        return answer

    # --- the stages

    async def run(self) -> Verdict:
        watcher = asyncio.create_task(self.watch())
        steps = {
            "inventory": lambda: self.look("inventory"),
            "host": lambda: self.look("host"),
            "node": self.node_stage,
            "pairs": self.pairs,
            "whole": self.whole,
            "deep": self.deep,
        }
        try:
            await self.join()
            self.place()
            for stage, step in steps.items():
                if stage not in self.setting.stages:
                    continue
                if self.decide().code not in (OK, OK_WITHOUT) and stage != "deep":
                    continue  # nothing can start anyway
                started = time.monotonic()
                before = len(self.findings)
                self.event("stage", stage=stage, nodes=len(self.healthy()))
                await step()
                self.stages[stage] = round(time.monotonic() - started, 2)
                found = sum(one.level in ("warn", "exclude", "block") for one in self.findings[before:])
                self.event("checked", stage=stage, seconds=self.stages[stage], findings=found)
        finally:
            watcher.cancel()
        return self.conclude()

    async def join(self) -> None:
        """All of them start together: once most are here, the last ones get four times as long, at least 45 s."""
        started = time.monotonic()
        until = started + self.setting.join_timeout
        most = False
        while len(self.peers) + len(self.failed()) < len(self.names) and time.monotonic() < until:
            if not most and len(self.peers) * 2 > len(self.names):
                most = True
                until = min(until, started + max(self.setting.late, 4 * (time.monotonic() - started)))
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.all_here.wait(), 0.5)
        waited = round(time.monotonic() - started)
        self.stages["join"] = float(waited)
        failed = self.failed()
        for name in self.names:
            if name in failed:
                fix = "the environment of the job file has to be on every node"
                self.find(Finding("join", "exclude", failed[name], node=name, fix=fix, code=DIFFERS))
            elif name not in self.peers:
                what = f"it did not report within {waited} s"
                fix = "is the node up, does it see the run directory, and can it reach the first node's address?"
                self.find(Finding("join", "exclude", what, node=name, fix=fix))

    def failed(self) -> dict[str, str]:
        """Nodes whose script ended before their agent ran, and what they left about it."""
        found = {}
        for name in self.names:
            if name not in self.peers:
                with contextlib.suppress(OSError), open(os.path.join(self.out, f"failed-{name}")) as file:
                    found[name] = file.read().strip() or "its script ended before the agent ran"
        return found

    def place(self) -> None:
        """The address of whoever shares this machine: its own name may mean 127.0.1.1 to it, as Debian has it."""
        far = [peer for peer in self.alive() if not addresses.loopback(peer.address)]
        for peer in self.alive():
            if far and addresses.loopback(peer.address):
                peer.address = far[0].writer.get_extra_info("sockname")[0]  # where the others reached this machine
                self.send(peer, do="address", id=0, address=peer.address)

    async def look(self, stage: str, peers: Sequence[Peer] | None = None) -> None:
        """Every check of a stage, on every node at the same time."""
        peers = self.healthy() if peers is None else peers
        # a clock is compared with ours, so its question goes alone; imports are timed on one node, then on all
        names = [name for name in checks.of(stage) if name not in ("clock", "imports")]
        found: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in checks.of(stage)}
        longest = max([getattr(checks.load(name), "SECONDS", 0.0) for name in found], default=0.0)
        patience = max(longest, self.setting.stage_timeout * 2) + 30

        async def one(peer: Peer, names: Sequence[str]) -> None:
            asked = time.time()
            try:
                answers = await self.ask(peer, patience, do="stage", stage=stage, checks=names)
            except Gone:
                return
            for name, answer in answers.items() if "error" not in answers else ():
                times = {"asked": asked, "answered": time.time()} if name == "clock" else {}
                found[name][peer.name] = {**answer, **times}
            if "error" in answers:
                self.find(Finding(stage, "exclude", f"it could not be looked at: {answers['error']}", node=peer.name))

        if stage == "inventory" and peers:
            await asyncio.gather(*(one(peer, ["clock"]) for peer in peers))
            await one(peers[0], ["imports"])
            alone = found["imports"].get(peers[0].name, {}).get("seconds")
            await asyncio.gather(*(one(peer, ["imports"]) for peer in peers))
            for answer in found["imports"].values():
                answer["alone"] = alone
        await asyncio.gather(*(one(peer, names) for peer in peers))
        for name, answers in found.items():
            self.judge(name, answers)

    def judge(self, name: str, answers: Mapping[str, Mapping[str, Any]]) -> None:
        """A check that stumbles over an answer says nothing about the others."""
        try:
            check = checks.load(name)
            facts = getattr(check, "facts", None)
            for node, answer in answers.items():
                if facts and "unknown" not in answer and "skipped" not in answer:
                    self.inventory.setdefault(node, {}).update(facts(answer))
            for finding in check.judge(answers, self.setting):
                self.find(finding)
        except Exception as error:
            what = f"the check `{name}` failed on what it was told: {type(error).__name__}: {error}"
            self.find(Finding(name, "unknown", what, fix="please report this"))

    async def start_workers(self) -> None:
        """One process with torch for each GPU, for the rest of the preflight; those that run stay."""
        ranks = self.ranks()

        async def one(peer: Peer, rank: int) -> None:
            ready = await self.work(peer, rank, None, IMPORT)
            if "error" in ready and not ready.get("gone"):
                what = f"torch does not start for rank {rank}: {ready['error']}"
                self.find(Finding("worker", "exclude", what, node=peer.name, fix="python3 -c 'import torch' there"))

        await asyncio.gather(*(one(peer, rank) for peer in self.healthy() for rank in range(ranks)))

    def ranks(self) -> int:
        """Workers on a node: one for each GPU, one on CPU."""
        return self.setting.gpus or 1

    def shared(self) -> bool:
        """Whether nodes are one machine: they would measure each other's load."""
        boots = [peer.boot for peer in self.alive()]
        return len(set(boots)) < len(boots)

    async def node_stage(self) -> None:
        await self.start_workers()
        room = asyncio.Semaphore(1 if self.shared() else 10_000)
        compute: dict[str, list[dict[str, Any]]] = {}
        inside: dict[str, dict[str, Any]] = {}
        binaries: dict[str, dict[str, Any]] = {}

        async def one(peer: Peer) -> None:
            async with room:
                command = {"do": "matmul", "seconds": self.setting.seconds}
                patience = self.setting.round_timeout
                ranks = range(self.ranks())
                answers = await asyncio.gather(*(self.work(peer, rank, command, patience) for rank in ranks))
                compute[peer.name] = list(answers)
                if self.ranks() > 1:
                    size = self.setting.node.bytes if self.setting.node else 1 << 30
                    measure = [{"op": "all_reduce", "bytes": size, "seconds": self.setting.seconds, "check": True}]
                    inside[peer.name] = await self.group([peer], measure)
                if self.setting.nccl_tests:
                    command = {"do": "nccl_tests", "directory": self.setting.nccl_tests, "gpus": self.setting.gpus}
                    binaries[peer.name] = await self.work(peer, 0, command, IMPORT)

        await asyncio.gather(*(one(peer) for peer in self.healthy()))
        found = speed.judge_node(compute, inside, self.setting, shared=self.shared())
        for finding in (*found, *speed.judge_nccl_tests(binaries, self.setting)):
            self.find(finding)

    async def group(self, peers: Sequence[Peer], measure: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """These measurements by all workers of these nodes: {"results": [...]} or {"error": ...}."""
        ranks, leader = self.ranks(), peers[0]
        each = self.setting.round_timeout  # of one operation
        patience = each * max(1, len(measure))
        size = ranks * len(peers)
        host = {"do": "host", "address": leader.address, "size": size}
        opened = await self.work(leader, 0, host, 30)
        if "error" in opened:
            return {**opened, "node": leader.name}
        command = {
            "do": "group", "address": leader.address, "port": opened["port"], "size": size,
            "timeout": each, "measure": list(measure),
        }  # fmt: skip
        answers = await asyncio.gather(
            *(
                self.work(peer, rank, {**command, "rank": place * ranks + rank}, patience + 10)
                for place, peer in enumerate(peers)
                for rank in range(ranks)
            )
        )
        errors = [(answer, peers[number // ranks].name) for number, answer in enumerate(answers) if "error" in answer]
        if errors:
            # who was cut off knows less than who ran into the time-out or died
            answer, node = min(errors, key=lambda error: (not error[0].get("gone"), not error[0].get("timeout")))
            await self.mend(peers, answers)
            return {**answer, "node": node, "results": answers[0].get("results", [])}
        return {"results": answers[0]["results"]}

    async def mend(self, peers: Sequence[Peer], answers: Sequence[Mapping[str, Any]]) -> None:
        """Workers that were killed, or end after an error of NCCL, are there again before the next command."""
        ranks = self.ranks()
        broken = [
            (peers[number // ranks], number % ranks)
            for number, answer in enumerate(answers)
            if "error" in answer and not answer.get("gone")
        ]
        await asyncio.gather(*(self.work(peer, rank, None, IMPORT) for peer, rank in broken))

    async def pairs(self) -> None:
        names = [peer.name for peer in self.healthy()]
        if len(names) < 2:
            self.find(Finding("pairs", "note", "one node has no pairs: no bandwidth between nodes was measured"))
            return
        await self.start_workers()
        tournament = Tournament(names, limit=self.setting.pair, history=self.setting.history)
        at_once = self.setting.at_once or (1 if self.shared() else len(names))
        room = asyncio.Semaphore(at_once)
        wrong: list[speed.Corruption] = []
        errors: dict[tuple[str, str], str] = {}

        async def one(left: str, right: str) -> dict[tuple[str, str], float | None]:
            async with room:
                return await self.pair(left, right, wrong, errors)

        number = 0
        while pairs := tournament.next():
            number += 1
            cells: dict[tuple[str, str], float | None] = {}
            for measured in await asyncio.gather(*(one(left, right) for left, right in pairs)):
                cells |= measured
            for name in names:
                if self.peers[name].gone:
                    tournament.drop(name)
                    cells = {pair: value for pair, value in cells.items() if name not in pair}
            tournament.record(cells)
            rates = [value for value in cells.values() if value is not None]
            self.event(
                "round", round=number, of=max(number, tournament.total()), pairs=len(pairs),
                slowest=min(rates, default=0.0), best=max(rates, default=0.0),
            )  # fmt: skip
        # a link that comes and goes is fast in most iterations: it is looked at twice more, the worst ones first
        for left, right in sorted(self.unsteady, key=lambda link: min(self.unsteady[link]))[:RESTLESS]:
            for _ in range(2):
                if not (self.peers[left].gone or self.peers[right].gone):
                    await self.pair(left, right, wrong, errors)
        result = tournament.result()
        named = {one.node for one in result.findings if one.level in ("warn", "exclude")}
        for finding in speed.judge_unsteady(self.unsteady, self.measured, named):
            self.find(finding)
        for finding in (*result.findings, *speed.judge_corruption(wrong, "pairs")):
            reason = errors.get((finding.node, finding.peer)) or errors.get((finding.peer, finding.node))
            reason = reason or self.rails.get(finding.node, "")
            self.find(replace(finding, what=f"{finding.what} ({reason})") if reason else finding)
        matrix = result.matrix
        if self.by_cpus:
            what = "the CPUs limit what gloo moves between nodes: a link is only called slow below that"
            self.find(Finding("pairs", "note", what, measured=f"in {self.by_cpus} measurements"))
            rows = zip(matrix.nodes, matrix.cells, strict=True)
            real = tuple(
                tuple(
                    cell and self.measured.get((left, right), cell)
                    for right, cell in zip(matrix.nodes, row, strict=True)
                )
                for left, row in rows
            )
            matrix = replace(matrix, cells=real, warn=0.0, exclude=0.0, source="limited by the CPUs")
        self.verdict |= {"matrix": matrix, "rounds": number}
        if self.setting.backend == "nccl":
            await self.transports()

    async def pair(
        self, left: str, right: str, wrong: list[speed.Corruption], errors: dict[tuple[str, str], str]
    ) -> dict[tuple[str, str], float | None]:
        """GB/s in both directions, one after the other, over all rails at the same time."""
        one, other = self.peers[left], self.peers[right]
        ranks = self.ranks()
        mine, theirs = list(range(ranks)), list(range(ranks, 2 * ranks))
        base = {"op": "sendrecv", "bytes": 0, "seconds": self.setting.seconds, "check": True}
        directions = [((left, right), mine, theirs), ((right, left), theirs, mine)]
        cells: dict[tuple[str, str], float | None] = {}
        for _ in range(LOOKS):
            answer = await self.group(
                [one, other], [{**base, "from": sender, "to": receiver} for _, sender, receiver in directions]
            )
            if "error" in answer:
                # a node that hangs is found by its silence; only then can the other one be cleared
                asked = time.monotonic()
                while not (one.gone or other.gone) and min(one.heard, other.heard) < asked:
                    await asyncio.sleep(0.2)
                if one.gone or other.gone:
                    return {}
                errors[left, right] = answer["error"]
                return {(left, right): 0.0, (right, left): 0.0}
            unclear = False
            for (link, _, _), result in zip(directions, answer["results"], strict=True):
                if "unsupported" in result:
                    errors[left, right] = result["unsupported"]
                    cells[link] = None
                    continue
                rate, by_cpus = self.seen_by(result, link)
                cells[link] = self.fastest if by_cpus else rate
                unclear = unclear or (by_cpus and rate < CLEAR * self.fastest)
                if spoiled := speed.corruption(result, (left, right), ranks):
                    wrong.append(spoiled)
            if not unclear:
                break
        return cells

    def seen_by(self, result: Mapping[str, Any], link: tuple[str, str]) -> tuple[float, bool]:
        """GB/s, and whether the CPUs were the limit: then the link has that much at least."""
        rate = float(result["busbw"])
        self.measured[link] = max(rate, self.measured.get(link, 0.0))
        self.fastest = max(self.fastest, rate)
        if self.setting.backend == "gloo" and result["busy"] > speed.BUSY:
            self.by_cpus += 1
            return rate, True
        if speed.tail(result) < UNSTEADY * rate:
            self.unsteady.setdefault(link, []).append(speed.tail(result))
        if rail := speed.slow_rail(result):
            for node in link:
                self.rails[node] = rail
        return rate, False

    async def transports(self) -> None:
        """What NCCL really used, from its own log: a missing plugin means TCP, ten times slower, without a word."""
        found: list[Finding] = []

        async def one(peer: Peer, rank: int) -> None:
            answer = await self.work(peer, rank, {"do": "transport"}, 30)
            if "transport" in answer:
                read = from_json(transport.Transport, answer["transport"])
                found.extend(transport.blame(read, self.setting, node=peer.name))
            elif not answer.get("gone"):
                why = answer.get("skipped") or answer.get("error")
                found.append(Finding("transport", "unknown", f"NCCL's log is not there: {why}", node=peer.name))

        await asyncio.gather(*(one(peer, rank) for peer in self.healthy() for rank in range(self.ranks())))
        for finding in parity.together(
            list(dict.fromkeys(found)), [peer.name for peer in self.healthy()], code=FABRIC
        ):
            self.find(finding)

    async def whole(self) -> None:
        """All healthy nodes together: what the plan may count on, over message sizes."""
        peers = self.healthy()
        if len(peers) * self.ranks() < 2:
            self.find(Finding("whole", "note", "one rank has nobody to talk to: no collective was measured"))
            return
        await self.start_workers()
        rates = [self.measured[link] for link in self.measured if {*link} <= {peer.name for peer in peers}]
        slowest = min(rates, default=self.setting.link_gbits / 8 or 1.0)
        sizes = speed.sizes(self.setting, slowest)
        base = {"seconds": self.setting.seconds, "check": True}
        measure = [{**base, "op": "all_reduce", "bytes": size} for size in sizes]
        measure += [{**base, "op": op, "bytes": sizes[-1]} for op in OPS]
        answer = await self.group(peers, measure)
        if answer.get("gone") and len(self.healthy()) >= self.setting.nodes:  # a node died: the others once more
            peers = self.healthy()
            answer = await self.group(peers, measure)
        results = [result for result in answer.get("results", ()) if "unsupported" not in result]
        if "error" in answer and not answer.get("gone"):  # who is gone has a finding already
            tried = measure[min(len(results), len(measure) - 1)]
            self.find(
                Finding(
                    "whole", "block", f"all nodes together do not finish {tried['op']}: {answer['error']}",
                    node=answer.get("node", ""), code=COULD_NOT,
                    fix="where pairs work it is what all of them share: switches above, a limit of connections",
                )
            )  # fmt: skip
        if not results:
            self.find(Finding("whole", "unknown", "no collective was measured"))
            return
        self.verdict["curves"] = tuple(
            Curve(
                op,
                tuple(one["bytes"] for one in results if one["op"] == op),
                tuple(one["busbw"] for one in results if one["op"] == op),
                tuple(speed.tail(one) for one in results if one["op"] == op),
            )
            for op in dict.fromkeys(one["op"] for one in results)
        )
        self.verdict["bandwidth"] = speed.planned(results, self.setting.backend)
        nodes = [peer.name for peer in peers]
        for finding in speed.judge_whole(results, nodes, self.setting, slowest_pair=slowest if rates else 0.0):
            self.find(finding)

    async def deep(self) -> None:
        """Long tests, only of nodes that something speaks against."""
        suspects = {one.node for one in self.findings if one.level in ("warn", "exclude") and one.node}
        suspects |= {node for node, score in self.setting.history.items() if score >= 1}
        peers = [peer for peer in self.alive() if peer.name in suspects]
        for peer in peers:
            self.send(peer, do="rest", id=0)  # dcgmi wants the GPUs to itself
        if peers:
            await self.look("deep", peers)

    # --- the end

    def find(self, finding: Finding) -> None:
        self.findings.append(finding)
        self.event("finding", finding=to_json(finding))

    def event(self, event: str, **fields: Any) -> None:
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields})
        self.lines.put(line)
        if os.environ.get(pods.TO_LOG):
            print(pods.PROGRESS + line, flush=True)

    def write(self) -> None:
        """In a thread: a shared file system may hang, and nodes are waiting. `beat` says that we do not."""
        line: str | None = ""
        while line is not None:
            try:
                line = self.lines.get(timeout=BEAT)
            except queue.Empty:
                line = ""
            with contextlib.suppress(OSError), open(os.path.join(self.out, "beat"), "w"):
                os.utime(os.path.join(self.out, "beat"))
            if not line:
                continue
            with contextlib.suppress(OSError), open(os.path.join(self.out, "progress.jsonl"), "a") as file:
                file.write(line + "\n")

    def decide(self) -> decision.Decision:
        switches = {peer.name: peer.switch for peer in self.peers.values() if peer.switch}
        return decision.decide(self.setting, self.names, self.findings, switches)

    def conclude(self) -> Verdict:
        bandwidth = self.verdict.get("bandwidth", 0.0)
        if told := speed.told(bandwidth, self.setting):
            self.find(told)
        made = self.decide()
        for block in made.shared:
            self.find(block)
        return Verdict(
            made.code, made.headline, made.train, made.excluded, tuple(self.findings), tuple(self.names),
            stages=self.stages, inventory=self.inventory, **self.verdict,
        )  # fmt: skip

    async def dismiss(self, verdict: Verdict) -> None:
        self.over = True
        self.event("verdict", code=verdict.code, headline=verdict.headline)
        for peer in self.alive():
            words = pods.last_words(verdict, self.setting, (peer.name, f"{peer.name}/{peer.index}"))
            self.send(peer, do="end", id=0, code=verdict.code, why=words[:WORDS])
        drained: Iterable[Awaitable[None]] = (peer.writer.drain() for peer in self.alive())
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.gather(*drained, return_exceptions=True), 5)
        until = time.monotonic() + 5  # they close; a hung one does not
        while any(not peer.writer.is_closing() for peer in self.alive()) and time.monotonic() < until:
            await asyncio.sleep(0.1)
        self.lines.put(None)
        await asyncio.to_thread(self.writing.join, 10)


async def coordinate(setting: Setting, *, port: int, names: Sequence[str], out: str, token: str) -> Verdict:
    coordinator = Coordinator(setting, names, out, token)
    server = await asyncio.start_server(coordinator.welcome, None, port, limit=LINE)
    main = asyncio.create_task(coordinator.run())
    loop = asyncio.get_running_loop()
    stopped: list[str] = []

    def stop(number: int) -> None:
        stopped.append(signal.Signals(number).name)
        coordinator.over = True  # agents end by the same signal, and are no bad nodes
        main.cancel()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, stop, number)
    try:
        verdict = await asyncio.wait_for(main, setting.deadline)
    except (asyncio.CancelledError, asyncio.TimeoutError):
        what = f"stopped by {stopped[0]} before it was done" if stopped else f"not done after {setting.deadline:g} s"
        coordinator.find(Finding("coordinator", "block", what, code=COULD_NOT))
        verdict = coordinator.conclude()
    except Exception as error:  # whatever it is, it is no pass
        coordinator.find(Finding("coordinator", "block", f"{type(error).__name__}: {error}", code=COULD_NOT))
        verdict = coordinator.conclude()
    await coordinator.dismiss(verdict)
    server.close()
    return verdict


def plain(verdict: Verdict) -> list[str]:
    """The verdict for a job's log, one line each."""
    found = [one for one in verdict.findings if one.level != "note"]
    return [
        f"dslaunch preflight: {verdict.headline} (exit code {verdict.code})",
        *(f"  {pods.sentence(one)}" for one in found),
    ]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="coordinator.py", allow_abbrev=False)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--setting", required=True, metavar="FILE")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--names", default="", help="of the nodes, with commas, in the scheduler's order")
    options = parser.parse_args(arguments)
    setting = setting_of(options.setting)
    if only := os.environ.get("DSLAUNCH_PREFLIGHT_STAGES"):  # between two attempts to train
        setting = replace(setting, stages=tuple(stage for stage in setting.stages if stage in only.split(",")))
    os.makedirs(options.out, exist_ok=True)
    lemons = history.default(os.environ)
    now = time.time()
    setting = replace(setting, history={**history.load(lemons, now), **setting.history})
    names = [name for name in options.names.split(",") if name]
    token = os.environ.get("DSLAUNCH_PREFLIGHT_TOKEN", "")
    verdict = asyncio.run(coordinate(setting, port=options.port, names=names, out=options.out, token=token))
    write_whole(os.path.join(options.out, "train"), "".join(f"{name}\n" for name in verdict.train))
    write_whole(os.path.join(options.out, "exclude"), "".join(f"{name}\n" for name in verdict.excluded))
    write_whole(os.path.join(options.out, "bandwidth"), f"{verdict.bandwidth:g}\n")
    rung = speed.rung(verdict.bandwidth, setting)
    write_whole(os.path.join(options.out, "config"), f"{rung.config if rung else 'ds_config.json'}\n")
    write_whole(os.path.join(options.out, "verdict.json"), json.dumps(to_json(verdict), indent=1) + "\n")
    if verdict.code in (OK, OK_WITHOUT, TOO_FEW):  # a broken environment makes no bad machine
        bad = [one for one in verdict.findings if one.node in verdict.excluded and one.code != DIFFERS]
        history.append(lemons, bad, now)
    print("\n".join(plain(verdict)), file=sys.stderr, flush=True)
    if os.environ.get(pods.TO_LOG):
        print(pods.VERDICT + json.dumps(to_json(verdict), separators=(",", ":")), flush=True)
    write_whole(os.path.join(options.out, "code"), f"{verdict.code}\n")  # last: whoever sees it finds the rest
    return verdict.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
