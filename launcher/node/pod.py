"""The first process of a pod that may start again: counts attempts, and ends the pod for good or not.

    pod.py --folder CHECKPOINTS/.dslaunch/NAME --nodes 4 --attempts 3 -- bash node.sh

A PyTorchJob with `restartPolicy: ExitCode` takes a code from 1 to 127 as the end of the job; a pod that ends with 128
or more it deletes and creates again, that one alone, and without counting. So one pod that fails ends all others
here, each says "again" with one code, and the first node counts and decides, in a journal that outlives the pods:

    journal.jsonl        as every run has it; the first node writes
    logs/                of all nodes and attempts
    logs/pod-0001.json   the attempt that node 1 last began, and the machine it was on
    logs/node-0001.json  how node 1 ended, written by supervise.py, or here where that never came to it

With --gang all pods start again when the first of them ends, as a JobSet's do. So the others let the first decide
before they end, and a pod that was told to go counts like one that failed: nobody knows for whose sake it was told.

Runs before any environment is loaded: Python 3.6 has to read this.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any, Dict, List, Sequence

import journal  # type: ignore[import-not-found]  # its neighbour
import recover  # type: ignore[import-not-found]  # its neighbour

Entry = Dict[str, Any]

AGAIN = 144  # 128 + 16, a signal that nothing sends: 137 and 143 remain the kernel's and the kubelet's
KILLED = 137  # of a pod that came to say nothing
STOPPED_EARLY = 75
LOOK = 1.0  # seconds between two looks at what the others say
DECIDES = 120.0  # seconds that the others of a gang give the first node, which may need OWN + HARD + WORDS + a pause
READS = 50.0  # files of the others that one node reads a second, at most: 1,000 pods share one volume
OWN = 15.0  # seconds that a node has to fail by itself when another one did: its words are evidence
HARD = 20.0  # seconds after that for its processes to go; all in all less than 60
WORDS = 15.0  # seconds to wait for the words of the others
SILENT = 60.0  # seconds without a heartbeat, which comes every 5: the node is lost
TERMINATION_LOG = os.environ.get(
    "DSLAUNCH_TERMINATION_LOG", "/dev/termination-log"
)  # `kubectl describe pod` shows it
LONGEST = 4096  # bytes of it that the kubelet keeps


class Told(Exception):
    """This pod has to go: SIGTERM."""


class Pod:
    def __init__(self, options: argparse.Namespace, env: Dict[str, str]) -> None:
        run = env.get("DSLAUNCH_RUN", "")
        self.options = options
        self.node = int(env["NODE_RANK"])
        self.machine = env.get("DSLAUNCH_NODE", "")
        self.folder = os.path.join(options.folder, run) if run else options.folder
        self.checkpoints = os.path.dirname(os.path.dirname(options.folder))
        self.logs = os.path.join(self.folder, "logs")
        self.restarted = env.get("DSLAUNCH_RESTARTED", "0") not in ("", "0")
        self.told = False
        self.child = None  # type: Any
        self.counted = True

    # --- files ---

    def word(self, node: int) -> str:
        return os.path.join(self.logs, "node-%04d.json" % node)

    def mark(self, node: int) -> str:
        return os.path.join(self.logs, "pod-%04d.json" % node)

    def history(self) -> List[Entry]:
        """Since the last job of this name that came to an end."""
        entries, _ = journal.read(self.folder)
        ends = [number for number, entry in enumerate(entries) if entry.get("event") == "finished"]
        return list(entries[ends[-1] + 1 :]) if ends else list(entries)

    def note(self, event: str, **fields: Any) -> None:
        self.counted = recover.note(self.folder, event, **fields) and self.counted

    def hosts(self) -> List[str]:
        return [recover.read_json(self.mark(node)).get("node") or "" for node in range(self.options.nodes)]

    def speak(self, number: int, node: int, code: int, why: str, *, signalled: str = "") -> None:
        value = {"node_rank": node, "host": os.uname().nodename if node == self.node else "", "code": code,
                 "signalled": signalled or None, "first_failure": None, "reason": why, "ended": time.time(),
                 "attempt": number}  # fmt: skip
        write_json(self.word(node), value)

    # --- the turn ---

    def turn(self) -> int:
        """The number of the attempt that this pod is part of; waits for the first node to begin it."""
        mine = recover.read_json(self.mark(self.node)).get("attempt", -1)
        if mine >= 0 and recover.read_json(self.word(self.node)).get("attempt", -1) < mine:
            self.speak(mine, self.node, KILLED, "the pod of node %d was killed before it could say why" % self.node)
        number = self.wait(mine) if self.node else self.begin()
        write_json(self.mark(self.node), {"attempt": number, "node": self.machine, "host": os.uname().nodename})
        return number

    def wait(self, mine: int) -> int:
        told = time.monotonic()
        say("node %d waits for the first node to begin attempt %d" % (self.node, mine + 1))
        while True:
            begun = [entry["attempt"] for entry in self.history() if entry.get("event") == "attempt"]
            if begun and begun[-1] > mine:
                return int(begun[-1])
            if self.told:
                raise Told()
            if time.monotonic() - told > 300:
                told = time.monotonic()
                say("node %d still waits for the first node" % self.node)
            time.sleep(LOOK)

    def begin(self) -> int:
        entries, _ = journal.read(self.folder)
        numbers = [entry["attempt"] for entry in entries if entry.get("event") == "attempt"]
        last = max([*numbers, -1])
        recent = [entry for entry in self.history() if entry.get("attempt") == last]
        ended = entries[-1] if entries else {}
        if self.options.gang and self.restarted and ended.get("event") == "finished" and ended.get("code"):
            say("this job came to its end before: %s" % ended.get("why"))
            sys.exit(permanent(int(ended["code"])))
        if recent and not any(entry.get("event") == "decided" for entry in recent):
            action = self.decide(last, KILLED)
            if action.kind == "stop":
                self.finish(last, KILLED, action.why)
        number = int(last) + 1
        self.note("attempt", attempt=number, hosts=[self.machine])
        return number

    # --- the end ---

    def decide(self, number: int, code: int) -> Any:
        """Put the nodes' words together and write down what follows."""
        until = time.monotonic() + WORDS
        words = recover.words_of(self.logs, number)
        while len(words) < self.options.nodes and time.monotonic() < until:
            time.sleep(LOOK / 4)
            words = recover.words_of(self.logs, number)
        hosts = self.hosts()
        bad = [word for word in words if failed(word)]
        told = self.told or (bool(bad) and all(word.get("signalled") == "SIGTERM" for word in bad))
        told = told and not self.options.gang
        first = recover.read_lines(os.path.join(self.logs, "first-failure-%d" % number))
        if first and first[0].isdigit():
            code = int(first[0])
        elif code in (0, 130) and bad:  # 130: ended here, because of another one
            code = ([word for word in bad if word.get("code") != 130] or bad)[0].get("code") or KILLED
        checkpoint = max(recover.newest_checkpoint(self.checkpoints), recover.resumed_from(self.logs, number))
        verdict = recover.merge(words, code=code, hosts=hosts, told=told, checkpoint=checkpoint)
        if code == STOPPED_EARLY and not told:
            verdict = verdict._replace(cause="stopped_early", retry="yes", why="stopped early, with a checkpoint")
        resources = recover.Resources(
            self.options.nodes, self.options.attempts, hosts=tuple(hosts), run=os.path.basename(self.folder)
        )
        action = recover.decide(self.history(), verdict, resources)
        if told:
            action = recover.Action("restart", (), "the pod was told to stop: evicted, preempted, or deleted")
        self.note(
            "ended", attempt=number, code=code, cause=verdict.cause, node=verdict.node, rank=verdict.rank,
            step=verdict.step, checkpoint=checkpoint, hosts=hosts, told=told, exclude=verdict.exclude,
            why=verdict.why,
        )  # fmt: skip
        if not self.counted and action.kind != "stop":
            action = recover.Action("stop", (), "%s; and the journal cannot count what comes next" % action.why)
        kind = "restart" if action.kind in ("requeue", "resubmit") else action.kind
        action = action._replace(kind=kind)
        self.note("decided", attempt=number, action=kind, exclude=list(action.exclude), why=action.why)
        if kind == "restart" and action.exclude and not told:
            say("to keep off %s: --set kubernetes.exclude='[%s]'" % ((",".join(action.exclude),) * 2))
        return action

    def finish(self, number: int, code: int, why: str) -> None:
        self.note("finished", code=code, why=why)
        self.last_words(number, code, "the end: " + why)
        sys.exit(permanent(code))

    def last_words(self, number: int, code: int, why: str) -> None:
        """In front of what supervise.py wrote there."""
        text = "attempt %d ended with %d; %s" % (number, code, why)
        say(text)
        with contextlib.suppress(OSError):
            with open(TERMINATION_LOG, "rb") as file:
                rest = file.read()
            with open(TERMINATION_LOG, "wb") as file:
                file.write((text.encode("utf-8", "replace") + b"\n" + rest)[:LONGEST])

    # --- the attempt ---

    def run(self, number: int) -> int:
        """The code of node.sh, which is ended when another node has failed."""
        env = dict(os.environ, DSLAUNCH_ATTEMPT=str(number), DSLAUNCH_LOGS=self.logs)
        self.child = subprocess.Popen(self.options.command, env=env)
        stages = []  # type: List[Any]
        looked, often = time.monotonic(), max(LOOK, self.options.nodes / READS)
        while True:
            code = self.child.poll()
            if code is not None:
                break
            now = time.monotonic()
            if self.told and not stages:
                self.child.send_signal(signal.SIGTERM)
                stages = [(float("inf"), 0)]  # the kubelet ends what is left after the grace period
            if not stages and now - looked > often:
                looked = now
                other = self.other(number)
                if other:
                    say(other + "; this node has %.0f s to end by itself" % OWN)
                    stages = [(now + OWN, signal.SIGINT), (now + OWN + 1, signal.SIGINT)]
                    stages += [(now + OWN + HARD, signal.SIGKILL)]
            while stages and now >= stages[0][0]:
                self.child.send_signal(stages.pop(0)[1])
                stages = stages or [(float("inf"), 0)]
            time.sleep(0.1)
        code = 128 - code if code < 0 else code
        if recover.read_json(self.word(self.node)).get("attempt") != number:  # it never came to its ranks
            why = "" if code == 0 else "node.sh ended with %d before its ranks ran" % code
            self.speak(number, self.node, code, why, signalled="SIGTERM" if self.told else "")
        return int(code)

    def other(self, number: int) -> str:
        """Why this node has to end: another one did, or is silent. Empty where nothing is wrong."""
        for word in recover.words_of(self.logs, number):
            if word.get("node_rank") != self.node and failed(word):
                return "node %s failed: %s" % (word.get("node_rank"), word.get("reason") or word.get("code"))
        clock = os.path.join(self.logs, ".clock-%04d" % self.node)
        with contextlib.suppress(OSError):
            with open(clock, "w"):
                pass
            now = os.stat(clock).st_mtime  # the volume's clock, as that of the heartbeats
            spoke = {word.get("node_rank") for word in recover.words_of(self.logs, number)}
            # the first node looks at all, and speaks for the silent; the others look at the first
            for node, path in recover.beats_of(self.logs, number, "0000*" if self.node else "*").items():
                if node != self.node and node not in spoke and now - os.stat(path).st_mtime > SILENT:
                    why = "no heartbeat of node %d for %.0f s" % (node, now - os.stat(path).st_mtime)
                    self.speak(number, node, KILLED, why)
                    return why
        return ""

    def stopped(self, number: int) -> bool:
        return os.path.exists(os.path.join(self.logs, "stopped-%d" % number))

    def first(self, number: int, code: int) -> int:
        """The first node: decides. What the pod ends with."""
        if code == 0 and self.stopped(number):
            code = STOPPED_EARLY
        if code == 0:
            until = time.monotonic() + 60
            while time.monotonic() < until and not self.told:
                words = recover.words_of(self.logs, number)
                if len(words) == self.options.nodes or any(map(failed, words)):
                    break
                time.sleep(LOOK)
            if not any(failed(word) for word in recover.words_of(self.logs, number)):
                self.note("ended", attempt=number, code=0, cause="", why="")
                self.note("decided", attempt=number, action="stop", exclude=[], why="finished")
                self.note("finished", code=0, why="")
                return 0
        action = self.decide(number, code)
        said = [entry for entry in self.history() if entry.get("event") == "ended"]
        code = said[-1]["code"] if said else code
        if action.kind == "stop":
            self.finish(number, code, action.why)
        self.last_words(number, code, "starts again: " + action.why)
        until = time.monotonic() + action.pause
        while time.monotonic() < until and not self.told:
            time.sleep(0.1)
        return AGAIN

    def other_nodes(self, number: int, code: int) -> int:
        """Any other node: the end where its own logs say so, else whatever the first node makes of it."""
        word = recover.read_json(self.word(self.node))
        if code == 0 and not self.stopped(number):
            while not self.told:  # a pod that has succeeded would not come again
                words = recover.words_of(self.logs, number)
                if any(failed(one) for one in words):
                    break
                if any(one.get("node_rank") == 0 for one in words):
                    return AGAIN if self.stopped(number) else 0
                time.sleep(LOOK)
            if self.told:
                return 0
        verdict = recover.merge([word], code=code, hosts=self.hosts())
        if self.options.gang:
            return self.with_the_gang(number)
        own = not self.told and word.get("signalled") is None and code not in (0, STOPPED_EARLY)
        if own and code == recover.DO_NOT_RESTART:
            self.finish(number, code, "ended with %d, which says never again" % code)
        if own and verdict.cause and recover.classify(verdict) == "stop":
            self.finish(number, code, verdict.why)
        self.last_words(number, code, "the first node decides whether it starts again")
        return AGAIN

    def with_the_gang(self, number: int) -> int:
        """Any other node of a gang: whoever ends first ends all, and that has to be the one that decides."""
        until = time.monotonic() + DECIDES
        say("node %d waits for the first node to decide what follows attempt %d" % (self.node, number))
        while time.monotonic() < until and not self.told:
            last = (journal.read(self.folder)[0] or [{}])[-1]
            if last.get("event") == "finished":
                return permanent(int(last.get("code") or 1))
            time.sleep(LOOK)
        return AGAIN


def failed(word: Entry) -> bool:
    return word.get("code") not in (0, STOPPED_EARLY)


def permanent(code: int) -> int:
    """A code from 1 to 127, which ends the job: 1 stays, 137 is 9, the signal.

    >>> permanent(1), permanent(93), permanent(137), permanent(0), permanent(255)
    (1, 93, 9, 1, 127)
    """
    return min(code - 128 if code > 128 else code, 127) or 1


def write_json(path: str, value: Entry) -> None:
    draft = "%s.%d.tmp" % (path, os.getpid())
    with open(draft, "w", encoding="utf-8") as file:
        json.dump(value, file)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def say(text: str) -> None:
    sys.stderr.write("dslaunch: %s\n" % text)
    sys.stderr.flush()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pod.py", description=__doc__)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--attempts", type=int, required=True, help="starts without a new checkpoint in between")
    parser.add_argument("--gang", action="store_true", help="all pods start again when one of them ends")
    parser.add_argument("command", nargs="+")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    pod = Pod(parse(arguments), dict(os.environ))

    def term(*_: Any) -> None:
        pod.told = True

    signal.signal(signal.SIGTERM, term)  # the first process of a pod ignores what it has no handler for
    try:
        os.makedirs(pod.logs, exist_ok=True)
        number = pod.turn()
    except Told:
        return AGAIN
    except OSError as error:
        say("cannot count attempts in %s, and what is not counted is not started: %s" % (pod.folder, error))
        return int(recover.UNAVAILABLE)
    code = pod.run(number)
    try:
        return pod.other_nodes(number, code) if pod.node else pod.first(number, code)
    except OSError as error:
        say("cannot write in %s, so this attempt is the last one: %s" % (pod.folder, error))
        return permanent(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
