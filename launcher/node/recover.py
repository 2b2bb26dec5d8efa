"""What comes after an attempt to train: another one here, a job without the bad node, or the end.

    recover.py begin --run DIR --job 4711 --nodes 4 --attempts 3       prints the number of the attempt that comes
    recover.py after --run DIR --job 4711 ... --attempt 0 --code 137   prints "restart 0 node1 node2 node4"

The job's own script asks, on the batch host, before any environment is loaded: Python 3.6 has to read this. What
happened stands in the journal; `decide` looks at nothing else. The ranks' logs were read on their nodes, and each
node's word says what it found; here the words are put together: the earliest root on any node wins.
"""

import argparse
import contextlib
import glob
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Set, Tuple

import journal  # type: ignore[import-not-found]  # its neighbour, on the batch host too

Entry = Dict[str, Any]

STOPPED_EARLY, DO_NOT_RESTART = 75, 93
UNAVAILABLE = 69  # EX_UNAVAILABLE: nobody can tell whether another job of this run lives
DUPLICATE, OVER = 100, 101  # of begin: another job has this run; it is used up

# What a cause's `retry` in causes.tsv means here. What stands in no row stops: it was not foreseen.
RETRY = {"yes": "again", "elsewhere": "again", "wait": "again", "once": "once", "after fix": "stop", "no": "stop"}

# The same where nothing names a root, by the exit code of the rank that failed first; any other one stops.
CODES = {
    137: ("killed_from_outside", "yes", "was killed by SIGKILL, and nothing says that memory was short"),
    143: ("sigterm", "yes", "was ended by SIGTERM, and not by this job"),
    134: ("sigabrt", "once", "aborted (SIGABRT), and nothing says why"),
    135: ("bus_error", "once", "had a bus error (SIGBUS), and nothing says why"),
    139: ("segfault", "once", "crashed (SIGSEGV), and nothing says why"),
}
# What a cause's `exclude` means for the node it was found on: at the first time, at the second, never.
EXCLUDE = {"yes": 1, "temp": 1, "probe": 2, "repeat": 2, "monitor": 0, "no": 0}

PAUSES = (0.0, 5.0, 15.0)  # seconds before the first, second, third start without progress; then the last one
DOWN = ("DOWN", "FAIL", "NOT_RESPONDING", "POWERED_DOWN", "POWERING_DOWN", "ERROR")  # in Slurm's state of a node
BEAT = 5.0  # seconds between two heartbeats of a node, as supervise.py writes them
SILENT = 4 * BEAT  # without one: the node is asked for
MANIFEST = "complete.json"
BEFORE = "failed-before-ranks"  # what node.sh says of a module, a setup line or an environment that was not to be had
TRAINER = "checkpoint-*/*"  # where Hugging Face's Trainer has DeepSpeed's folder


class Verdict(NamedTuple):
    """How an attempt ended, all nodes' words taken together."""

    code: int  # of the job: that of the rank that failed first
    cause: str = ""  # of causes.tsv; empty where nothing names one
    layer: str = ""
    retry: str = ""
    exclude: str = "no"
    node: str = ""  # where the root was found
    rank: Optional[int] = None
    step: Optional[int] = None  # the last one that any rank made
    lost: Tuple[str, ...] = ()  # nodes that are gone, as Slurm or two silent questions say
    leave: Tuple[str, ...] = ()  # further nodes that a node's diagnosis leaves out
    told: bool = False  # to stop, by Slurm or a person
    warned: bool = False  # by Slurm, that the time is nearly up
    preempted: bool = False  # another job takes the nodes
    checkpoint: int = -1  # step of the newest verified one; -1 none
    why: str = ""


class Resources(NamedTuple):
    nodes: int  # that train
    attempts: int  # starts without a new checkpoint in between
    hosts: Tuple[str, ...] = ()  # of the allocation, spares too; () is one machine, which has no other
    down: Tuple[str, ...] = ()
    requeue: bool = False  # at the time limit
    run: str = ""  # its id, the seed of the pauses


class Action(NamedTuple):
    kind: str  # restart, requeue, resubmit, stop
    exclude: Tuple[str, ...] = ()  # all nodes that this run does without from now on
    why: str = ""
    pause: float = 0.0
    hosts: Tuple[str, ...] = ()  # of a restart


# --- the policy, pure -----------------------------------------------------------------------------


def decide(history: Sequence[Entry], verdict: Verdict, resources: Resources) -> Action:
    """`history` is the journal before this verdict.

    >>> four = Resources(nodes=3, attempts=3, hosts=("n1", "n2", "n3", "n4"))
    >>> decide([], Verdict(1, cause="user_import_error", retry="no", node="n2"), four).kind
    'stop'
    >>> decide([], Verdict(1, cause="xid_48_dbe", retry="elsewhere", exclude="yes", node="n2"), four)[::4]
    ('restart', ('n1', 'n3', 'n4'))
    >>> three = four._replace(hosts=("n1", "n2", "n3"))
    >>> decide([], Verdict(1, cause="xid_48_dbe", retry="elsewhere", exclude="yes", node="n2"), three)[:2]
    ('resubmit', ('n2',))
    >>> before = [{"event": "ended", "code": 139, "cause": "segfault", "step": 40, "node": "n1", "checkpoint": 20}]
    >>> decide(before, Verdict(139, cause="segfault", retry="once", step=40, node="n3"), four).why
    'the same failure at the same step, 40, as before (segfault): the ranks do it, not a machine'
    """
    if verdict.code == 0:
        return Action("stop", (), "finished")
    if verdict.told:
        if verdict.preempted:
            return Action("requeue", (), "another job takes its nodes: to go on from step %s" % saved(verdict))
        if verdict.warned and resources.requeue:
            return Action("requeue", (), "its time is up: back to the queue, to go on from step %s" % saved(verdict))
        if verdict.warned:
            text = "its time is up at step %s; slurm.requeue: true would let it go on by itself"
            return Action("stop", (), text % saved(verdict))
        return Action("stop", (), "it was told to stop")
    what = verdict.why or named(verdict)
    way = classify(verdict)
    if way == "stop":
        return Action("stop", (), "%s: starting again would not help" % what)
    if resources.attempts == 0:
        return Action("stop", (), "%s; recover.attempts is 0" % what)

    ended = [entry for entry in history if entry.get("event") == "ended" and not entry.get("told")]
    again = [entry for entry in ended if alike(entry, verdict)]
    bad = blamed(ended if resources.hosts else (), verdict)  # one machine is at every root
    if verdict.step is not None and not bad and any(entry.get("step") == verdict.step for entry in again):
        text = "the same failure at the same step, %d, as before (%s): the ranks do it, not a machine"
        return Action("stop", (), text % (verdict.step, named(verdict)))
    spent = without_progress(ended, verdict.checkpoint)
    if way == "once" and not bad and any(alike(entry, verdict) for entry in spent):
        return Action("stop", (), "%s, for the second time without a new checkpoint in between" % what)
    if len(spent) >= resources.attempts:
        text = "%s; %d starts without a new checkpoint, and recover.attempts is %d"
        return Action("stop", (), text % (what, len(spent), resources.attempts))

    out = left_out(history) | set(bad)
    pause = wait_for(resources.run, len(spent))
    if not resources.hosts:
        if bad:
            return Action("stop", (), "%s, and there is no other machine" % what)
        return Action("restart", (), what, pause)
    left = tuple(host for host in resources.hosts if host not in out and host not in resources.down)
    if len(left) >= resources.nodes:
        return Action("restart", tuple(sorted(out)), what, pause, left)
    gone = set(resources.down) & set(resources.hosts)
    text = "%s; %d of this job's %d nodes are left and %d train"
    return Action(
        "resubmit", tuple(sorted(out | gone)), text % (what, len(left), len(resources.hosts), resources.nodes)
    )


def classify(verdict: Verdict) -> str:
    """again, once or stop.

    >>> classify(Verdict(1)), classify(Verdict(93, retry="yes")), classify(Verdict(1, lost=("n1",)))
    ('stop', 'stop', 'again')
    """
    if verdict.code == DO_NOT_RESTART:
        return "stop"
    known = RETRY.get(verdict.retry, "stop")
    if verdict.lost and not (verdict.layer == "app" and known == "stop"):
        return "again"  # what the others say about the network follows from it
    return known


def blamed(ended: Sequence[Entry], verdict: Verdict) -> Tuple[str, ...]:
    """Nodes to leave out now: lost, broken by what was found there, or at the root for the second time.

    >>> blamed([], Verdict(1, cause="cuda_launch_failure", exclude="repeat", node="n1"))
    ()
    >>> blamed([{"event": "ended", "node": "n1", "code": 1}], Verdict(1, cause="hang", exclude="probe", node="n1"))
    ('n1',)
    """
    if verdict.lost:
        return verdict.lost
    times = EXCLUDE.get(verdict.exclude, 0)
    found = set(verdict.leave) if times else set()
    if verdict.node and times:
        before = sum(entry.get("node") == verdict.node and entry.get("exclude", "repeat") != "no" for entry in ended)
        if before + 1 >= times:
            found.add(verdict.node)
    return tuple(sorted(found))


def without_progress(ended: Iterable[Entry], checkpoint: int) -> List[Entry]:
    """Attempts that failed since the newest verified checkpoint was another one.

    >>> row = {"event": "ended", "checkpoint": 20}
    >>> len(without_progress([row, row], 20)), len(without_progress([row, row], 40))
    (2, 0)
    """
    newest, found = -1, []  # type: int, List[Entry]
    for entry in [*ended, {"checkpoint": checkpoint}]:
        step = entry.get("checkpoint")
        step = step if isinstance(step, int) else -1
        if step > newest:
            newest, found = step, []
        if "event" in entry:
            found.append(entry)
    return found


def left_out(history: Iterable[Entry]) -> Set[str]:
    """Nodes that this run does without, because of a failure or of a preflight."""
    rows = (entry for entry in history if entry.get("event") in ("decided", "preflight"))
    return {node for entry in rows for node in entry.get("exclude") or ()}


def alike(entry: Entry, verdict: Verdict) -> bool:
    if verdict.cause or entry.get("cause"):
        return bool(entry.get("cause") == verdict.cause)
    return bool(entry.get("code") == verdict.code)


def named(verdict: Verdict) -> str:
    return verdict.cause or "exit code %d" % verdict.code


def saved(verdict: Verdict) -> int:
    return max(verdict.checkpoint, 0)


def wait_for(run: str, failed: int) -> float:
    """0, 5, 15, 15 seconds, each up to a third more or less, so that a site's jobs do not come back together.

    >>> wait_for("demo", 0), 5 * 2 / 3 <= wait_for("demo", 1) <= 5 * 4 / 3
    (0.0, True)
    """
    base = PAUSES[min(failed, len(PAUSES) - 1)]
    digest = hashlib.sha256(("%s:%d" % (run, failed)).encode("utf-8", "surrogateescape")).digest()
    return round(base * (2 / 3 + digest[0] / 255 * 2 / 3), 1)


def merge(
    words: Sequence[Entry], *, code: int, hosts: Sequence[str], lost: Sequence[str] = (), **more: Any
) -> Verdict:
    """The nodes' words of one attempt. A root that a dead peer may cause (3, 4) comes after one it cannot (1, 2).

    >>> root = {"cause": {"id": "cuda_oom", "rank": 1, "layer": "app", "retry": "no", "exclude": "no"}, "at": 9.0}
    >>> peer = {"cause": {"id": "net_connect_refused", "rank": 3, "retry": "once", "exclude": "probe"}, "at": 8.0}
    >>> words = [{"node_rank": 0, "diagnosis": {"root": peer}}, {"node_rank": 1, "diagnosis": {"root": root}}]
    >>> merge(words, code=1, hosts=["n1", "n2"])[1:6]
    ('cuda_oom', 'app', 'no', 'no', 'n2')
    """
    roots = []
    for word in words:
        root = (word.get("diagnosis") or {}).get("root")
        if root and root.get("cause") and (root["cause"].get("rank", 9) < 5 or code not in CODES):
            first = word.get("first_failure") or {}
            at = root.get("at") or first.get("ended") or word.get("ended") or float("inf")
            roots.append((root["cause"].get("rank", 4) > 2, at, word.get("node_rank") or 0, root, word))
    step = max((word["step"] for word in words if isinstance(word.get("step"), int)), default=None)
    step = more.pop("step", None) if step is None else max(step, more.pop("step", None) or 0)
    base = Verdict(code, step=step, lost=tuple(lost), **more)
    firsts = [word for word in words if word.get("first_failure")]
    firsts.sort(key=lambda word: word["first_failure"].get("ended") or float("inf"))
    if roots:
        *_, root, word = min(roots, key=lambda row: row[:3])
        cause, node = root["cause"], place(root.get("node") or "", word, hosts)
        leave = [place(name, {}, hosts) for name in (word.get("diagnosis") or {}).get("exclude") or ()]
        base = base._replace(
            cause=cause["id"], layer=cause.get("layer", ""), retry=cause.get("retry", ""), node=node,
            exclude=cause.get("exclude", "no"), rank=root.get("rank"), leave=tuple(name for name in leave if name),
            why="%s%s" % (cause.get("meaning") or cause["id"], " on %s" % node if node else ""),
        )  # fmt: skip
    elif firsts or code in CODES:
        word = firsts[0] if firsts else {}
        said = next((one for one in words if one.get("code") == code and not one.get("signalled")), {})
        host, rank = place(word.get("host") or "", word, hosts), (word.get("first_failure") or {}).get("rank")
        cause, retry, text = CODES.get(
            code, ("", "", "ended with exit code %d, and its output names no cause" % code)
        )
        base = base._replace(
            # without a word it may be srun that ended these, after others
            cause=cause, retry=retry if word or said else "once", node=host, rank=rank,
            exclude="repeat" if cause else "no",
            why="rank %s on %s %s" % (rank, host, text) if word
            else said.get("reason") or "no node said how it ended (%d)" % code,
        )  # fmt: skip
    hang = next((word["hang"] for word in words if (word.get("hang") or {}).get("kind") in ("laggard", "dead")), None)
    if hang and hang.get("hosts") and RETRY.get(base.retry, "") != "stop":
        late = place(hang["hosts"][0], {}, hosts)
        why = "no step for %.0f s: %s" % (hang.get("seconds") or 0, hang.get("why") or late)
        base = base._replace(
            cause=base.cause or "collective_timeout", node=late, exclude="probe", leave=(), step=hang.get("step"),
            retry="yes", why=why,
        )  # fmt: skip
    kills = [place(word.get("host") or "", word, hosts) for word in words if word.get("oom_kills")]
    if kills and (not base.cause or base.cause == CODES[137][0]):
        why = "the memory limit of the job ended processes on %s: more memory a node, or fewer data loaders"
        base = base._replace(cause="slurm_oom_kill", retry="after fix", exclude="no", why=why % ", ".join(kills))
    if lost and classify(base) == "again":
        base = base._replace(
            cause="slurm_node_fail", layer="node", retry="elsewhere", exclude="yes", node=lost[0], leave=(),
            why="%s went away" % ", ".join(lost),
        )  # fmt: skip
    return base


def before_ranks(verdict: Verdict, said: str) -> Verdict:
    """node.sh failed on one node: srun ends the others with SIGTERM, and then the step's code is theirs.

    >>> verdict = Verdict(143, cause="sigterm", retry="once", exclude="repeat", why="no node said how it ended (143)")
    >>> before_ranks(verdict, "node.sh on n1 ended with 1: module load cuda/99 failed")[1:4]
    ('', '', '')
    >>> before_ranks(verdict, "") is verdict, before_ranks(verdict._replace(rank=3), "node.sh on n1").cause
    (True, 'sigterm')
    """
    if not said or verdict.rank is not None or verdict.cause not in ("", CODES.get(verdict.code, ("",))[0]):
        return verdict
    return verdict._replace(cause="", layer="", retry="", exclude="no", leave=(), why=said[:500])


def of_service(verdict: Verdict, dead: Entry) -> Verdict:
    """A service that ended first is why, whatever ranks said of it; its code is judged as a rank's is.

    >>> dead = {"service": "reward", "code": 137, "why": "service reward was killed by signal 9", "hosts": ["n3"]}
    >>> one = of_service(Verdict(1, cause="net_connect_refused", retry="once", node="n1", rank=0, step=4), dead)
    >>> one.code, one.retry, one.node, one.rank, one.step
    (137, 'yes', 'n3', None, 4)
    """
    code = dead.get("code") or UNAVAILABLE
    hosts = dead.get("hosts") or [""]
    return verdict._replace(
        code=code, cause="service_failed", layer="app", retry=CODES.get(code, ("", "no", ""))[1], exclude="no",
        node=hosts[0], rank=None, leave=(), told=False, why=dead.get("why") or "a service ended",
    )  # fmt: skip


def place(host: str, word: Entry, hosts: Sequence[str]) -> str:
    """Slurm's name of a node that calls itself `host`: node2.cluster is node2."""
    if host in hosts:
        return host
    rank = word.get("node_rank")
    if isinstance(rank, int) and rank < len(hosts) and host in ("", word.get("host")):
        return hosts[rank]
    return next((one for one in hosts if host and one.partition(".")[0] == host.partition(".")[0]), host)


# --- what lies in the run's directory ---------------------------------------------------------------


def words_of(logs: str, attempt: int) -> List[Entry]:
    found = []
    for path in sorted(glob.glob(os.path.join(glob.escape(logs), "node-*.json"))):
        word = read_json(path)
        if word and word.get("attempt") == attempt:
            found.append(word)
    return found


def beats_of(logs: str, attempt: int, which: str = "*") -> Dict[int, str]:
    """The heartbeat file of every node of this attempt that ever had one; `which` is a pattern of their numbers."""
    found = {}
    for path in glob.glob(os.path.join(glob.escape(logs), "beat-%s.json" % which)):
        beat = read_json(path)
        if beat and beat.get("attempt") == attempt and isinstance(beat.get("node"), int):
            found[beat["node"]] = path
    return found


def read_json(path: str) -> Entry:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            value = json.load(file)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def newest_checkpoint(folder: str) -> int:
    """The step of the newest tag whose manifest is there with every file as long as it says; -1 for none."""
    tags = []
    patterns = [os.path.join(glob.escape(folder), below, MANIFEST) for below in ("", "*", TRAINER)]
    for path in (path for pattern in patterns for path in glob.glob(pattern)):
        told = read_json(path)
        if isinstance(told.get("step"), int):
            tags.append((told["step"], os.path.dirname(path), told.get("files") or {}))
    for step, tag, files in sorted(tags, key=lambda row: row[0], reverse=True):
        if all(length(os.path.join(tag, name)) == expected(size) for name, size in files.items()):
            return int(step)
    return -1


def expected(size: Any) -> Any:
    """A file's size; a manifest may say more about it than that."""
    return size.get("bytes", size.get("size")) if isinstance(size, dict) else size


def length(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def resumed_from(logs: str, attempt: int) -> int:
    """The step that attempt went on from, as its first node chose it: of programs that write no manifest."""
    tag = read_json(os.path.join(logs, "resume-%d.json" % attempt)).get("tag") or {}
    step = tag.get("step") if isinstance(tag, dict) else None
    return step if isinstance(step, int) else -1


def note(folder: str, event: str, **fields: Any) -> bool:
    """A line in the journal. False where it could not be written: what is not counted is not repeated."""
    try:
        journal.append(folder, event, **fields)
    except OSError as error:
        say("cannot write the journal of this run: %s" % error)
        return False
    return True


def say(text: str) -> None:
    sys.stderr.write("dslaunch: %s\n" % text)
    sys.stderr.flush()


# --- Slurm ----------------------------------------------------------------------------------------


def ask(argv: Sequence[str], *, timeout: float = 30.0, env: Optional[Dict[str, str]] = None) -> Tuple[int, str, str]:
    """Exit code, stdout, stderr; -1 where there was no answer."""
    environ = dict(os.environ if env is None else env, LC_ALL="C")
    try:
        done = subprocess.run(  # noqa: UP022 - 3.6 has no capture_output
            list(argv), stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
            timeout=timeout, env=environ,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return -1, "", str(error)
    return done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace").strip()


def shown(hosts: Sequence[str]) -> Dict[str, Dict[str, str]]:
    """What Slurm says about nodes, by name; empty without an answer."""
    code, out, _ = ask(["scontrol", "--oneliner", "show", "node", ",".join(hosts)]) if hosts else (1, "", "")
    rows = [dict(re.findall(r"(\w+)=(\S+)", line)) for line in out.splitlines()] if code == 0 else []
    return {row["NodeName"]: row for row in rows if "NodeName" in row}


def is_down(state: str) -> bool:
    """MIXED*, DOWN+NOT_RESPONDING and FAILING are; IDLE and MIXED+DRAIN, whose job may end in peace, are not."""
    return state.endswith("*") or any(word.startswith(DOWN) for word in re.split(r"[+]", state))


def slurmd_port() -> int:
    code, out, _ = ask(["scontrol", "show", "config"])
    match = re.search(r"^SlurmdPort\s*=\s*(\d+)", out, re.MULTILINE) if code == 0 else None
    return int(match.group(1)) if match else 6818


def answers(address: str, port: int, *, patience: float = 2.0) -> Optional[bool]:
    """Whether a slurmd listens there; None where the address cannot be looked up, which says nothing about it."""
    try:
        socket.create_connection((address, port), timeout=patience).close()
    except socket.gaierror:
        return None
    except OSError:
        return False
    return True


def unreachable(hosts: Sequence[str]) -> List[str]:
    """Nodes that Slurm calls down, or whose slurmd did not answer two knocks. Silence of Slurm itself names none."""
    rows = shown(hosts)
    found = [host for host in hosts if host in rows and is_down(rows[host].get("State", ""))]
    rest = [host for host in hosts if host in rows and host not in found]
    port = slurmd_port() if rest else 0

    def silent(host: str) -> bool:
        row = rows[host]
        return answers(row.get("NodeAddr", host), int(row.get("Port", port))) is False

    with ThreadPoolExecutor(32) as pool:  # each that is gone takes 2 s
        suspects = [host for host, gone in zip(rest, pool.map(silent, rest)) if gone]
        time.sleep(1 if suspects else 0)
        found += [host for host, gone in zip(suspects, pool.map(silent, suspects)) if gone]
    return [host for host in hosts if host in found]


def alive(job: str) -> Optional[bool]:
    """Whether Slurm still has this job in its queue, or a process of this machine is; None when nobody says."""
    if ":" in job:
        pid, _, started = job.partition(":")
        return bool(started) and bool(journal._start(int(pid)) == started)
    code, out, err = ask(["squeue", "--noheader", "--format=%T", "--jobs=" + job])
    if code == 0:
        return bool(out.strip())
    return False if "Invalid job id" in err else None


def preempted(job: str) -> bool:
    """Whether another job is given the nodes of this one, which then goes back to the queue by itself."""
    code, out, _ = ask(["scontrol", "--oneliner", "show", "job", job])
    match = re.search(r"\bPreemptTime=(\S+)", out) if code == 0 else None
    return match is not None and match.group(1) not in ("None", "Unknown", "N/A")


def siblings(run_id: str, job: str) -> Optional[List[str]]:
    """Other jobs of this run that wait or run; None when Slurm does not say."""
    code, out, _ = ask(["squeue", "--noheader", "--me", "--format=%i|%j|%k"])
    if code != 0:
        return None
    rows = [line.split("|") for line in out.splitlines()]
    ours = [row for row in rows if row[1] == run_id or row[-1].rpartition(",")[2] == "dslaunch:" + run_id]
    return [row[0] for row in ours if row[0].partition("+")[0] != job]


def submit_again(options: argparse.Namespace, exclude: Sequence[str], why: str) -> bool:
    """A second job with the same run directory, that starts once this one is over. Whether there is one.

    The controller takes no new --exclude for a job that runs.
    """
    if "_" in options.job:
        say("a task of an array cannot be submitted again by itself: it may only go back to the queue")
        return False
    run_id = os.path.basename(options.run)
    out = ",".join([*filter(None, [options.exclude]), *exclude])
    command = ["sbatch", "--parsable", "--chdir=" + options.run, "--job-name=" + run_id]
    comment = ",".join(filter(None, [options.comment, "dslaunch:" + run_id]))
    command += ["--comment=" + comment, "--dependency=singleton"]
    command += ["--exclude=" + out] if out else []
    for part in range(1, options.components + 1):
        command += [":", "--job-name=%s.%d" % (run_id, part)]  # of the same name it would wait for the first
    ours = ("SLURM_", "SBATCH_", "SRUN_", "DSLAUNCH_", "MASTER_")
    env = {name: value for name, value in os.environ.items() if name == "SLURM_CONF" or not name.startswith(ours)}
    note(options.run, "resubmitting", token=run_id, exclude=list(exclude), why=why)
    said = ""
    for pause in (0, 2, 5):
        time.sleep(pause)
        before = siblings(run_id, options.job) if pause else []
        if before:  # it was accepted, and the answer was lost
            job = before[0]
        else:
            code, text, said = ask([*command, os.path.join(options.run, options.entry)], env=env)
            job = text.strip().split("\n")[-1].partition(";")[0]
            if code != 0 or not job.isdigit():
                continue
        note(options.run, "resubmitted", job=job, exclude=list(exclude))
        say("submitted again as job %s%s" % (job, ", without " + ", ".join(exclude) if exclude else ""))
        return True
    note(options.run, "unanswered", why=said)
    say("cannot submit again: %s" % said)
    return False


def requeue(options: argparse.Namespace, why: str) -> bool:
    """Slurm ends this very process for it, so that the line behind may never be written.

    A job that another one preempts is Slurm's to requeue only while it lives: one that has saved and ends within
    the grace time is over for good, and asks for itself.
    """
    note(options.run, "requeueing", why=why)
    code, _, said = ask(["scontrol", "requeue", options.job])
    if code == 0:
        note(options.run, "requeued")
        return True
    say("Slurm does not requeue this job: %s" % said)
    return False


# --- the words of the command line ------------------------------------------------------------------


def begin(options: argparse.Namespace) -> int:
    """Claim the run for this job, and say which attempt comes."""
    history, _ = journal.read(options.run)
    other = rival(history, options.job)
    if other:
        for pause in (1, 2, 5, 10, 10):
            lives = alive(other)
            if lives is not None:
                break
            time.sleep(pause)
        if lives is None:
            say("job %s may have this run, and Slurm does not say whether it lives: not started twice" % other)
            return UNAVAILABLE
        if lives:
            say("job %s has this run: job %s is a second copy, and ends without touching it" % (other, options.job))
            return DUPLICATE
    if not intact(options.run, history):
        return UNAVAILABLE
    number = 1 + max((entry["attempt"] for entry in history if entry.get("event") == "attempt"), default=-1)
    note(options.run, "started", job=options.job, restart=options.restart)
    for entry in history:
        if entry.get("event") == "attempt" and not any(
            one.get("event") == "ended" and one.get("attempt") == entry["attempt"] for one in history
        ):
            action = vanished(options, entry)
            if action.kind == "stop":
                note(options.run, "finished", code=UNAVAILABLE, why=action.why)
                say(action.why)
                return OVER
    print(number)
    return 0


def rival(history: Sequence[Entry], job: str) -> str:
    """The job that has the run, as the journal says, where it is not this one.

    >>> rival([{"event": "started", "job": "7"}], "8"), rival([{"event": "started", "job": "7"}], "7")
    ('7', '')
    >>> rival([{"event": "started", "job": "7"}, {"event": "finished"}], "8")
    ''
    >>> rival([{"event": "started", "job": "7"}, {"event": "resubmitted", "job": "8"}], "7")
    '8'
    """
    owner = ""
    for entry in history:
        event = entry.get("event")
        if event in ("started", "resubmitted", "adopted"):
            owner = str(entry.get("job", ""))
        elif event == "finished":
            owner = ""
    return "" if owner == job else owner


def intact(run: str, history: Sequence[Entry], *, patience: float = 60.0) -> bool:
    """Whether what was rendered is here to read: a shared file system may show files late.

    DeepSpeed's config is not looked at: the preflight may have put that of another bandwidth in its place.
    """
    told = (entry["files"] for entry in reversed(history) if entry.get("files"))
    digests = {name: digest for name, digest in next(told, {}).items() if not name.startswith("ds_config")}
    until = time.monotonic() + patience
    while True:
        wrong = [name for name, digest in digests.items() if digest_of(os.path.join(run, name)) != digest]
        if not wrong:
            return True
        if time.monotonic() > until:
            say("%s of this run is not here as it was written, after %.0f s" % (", ".join(wrong[:3]), patience))
            return False
        time.sleep(2)


def digest_of(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError:
        return ""


def vanished(options: argparse.Namespace, entry: Entry) -> Action:
    """An attempt whose own script never came to say how it ended: its node went away, or Slurm took the nodes."""
    number = entry["attempt"]
    logs = os.path.join(options.run, "logs")
    saved_all = os.path.exists(os.path.join(logs, "stopped-%d" % number))
    signalled = os.path.exists(os.path.join(logs, "told-%d" % number))
    hosts = entry.get("hosts") or ()
    lost = unreachable(hosts) if options.restart else []
    spoke = {place(word.get("host") or "", word, hosts) for word in words_of(logs, number)}
    verdict = merge(
        words_of(logs, number), code=137, hosts=hosts, told=saved_all, checkpoint=progress(options, number),
        step=last_step(logs, number),
    )  # fmt: skip
    # which node went is Slurm's to know, and it keeps it out itself: nobody is left out for this here
    why = "%s went away" % ", ".join(lost) if lost else "the node that ran the job's script went away"
    if signalled and not lost:
        why = "Slurm took its nodes"
    verdict = verdict._replace(
        cause="slurm_preempted" if signalled and not lost else "slurm_node_fail",
        retry="yes", exclude="no", leave=(), rank=None, node="", why=why,
    )  # fmt: skip
    history, _ = journal.read(options.run)
    resources = Resources(options.nodes, options.attempts, run=os.path.basename(options.run))
    action = Action("restart", (), why) if saved_all else decide(history, verdict, resources)
    silent = [host for host in hosts if host not in spoke]
    record(options, number, verdict._replace(node=lost[0] if lost else ""), hosts, silent=silent)
    note(options.run, "decided", attempt=number, action=action.kind, exclude=[], why=action.why)
    return action


def progress(options: argparse.Namespace, attempt: int) -> int:
    newest = newest_checkpoint(options.checkpoints) if options.checkpoints else -1
    return max(newest, resumed_from(os.path.join(options.run, "logs"), attempt))


def last_step(logs: str, attempt: int) -> Optional[int]:
    """As the heartbeats say: of nodes that did not come to write their word."""
    steps = [read_json(path).get("step") for path in beats_of(logs, attempt).values()]
    return max((step for step in steps if isinstance(step, int)), default=None)


def record(options: argparse.Namespace, attempt: int, verdict: Verdict, hosts: Sequence[str], **more: Any) -> bool:
    return note(
        options.run, "ended", attempt=attempt, code=verdict.code, cause=verdict.cause, node=verdict.node,
        rank=verdict.rank, step=verdict.step, checkpoint=verdict.checkpoint, hosts=list(hosts), told=verdict.told,
        warned=verdict.warned, exclude=verdict.exclude, why=verdict.why, **more,
    )  # fmt: skip


def attempt(options: argparse.Namespace) -> int:
    with contextlib.suppress(OSError):
        os.remove(os.path.join(options.run, "logs", BEFORE))  # an earlier attempt's
    note(options.run, "attempt", attempt=options.attempt, hosts=options.hosts)
    return 0


def after(options: argparse.Namespace) -> int:
    """Write down how the attempt ended, decide, and do what has to be done outside this job."""
    logs = os.path.join(options.run, "logs")
    history, _ = journal.read(options.run)
    hosts = options.hosts
    everywhere = options.allocation or []
    told = bool(options.told or options.warned) or os.path.exists(os.path.join(options.run, "cancelled"))
    seen = read_lines(os.path.join(logs, "lost-%d" % options.attempt))
    asked = [host for host in everywhere if host not in seen]
    down = [] if told or options.code == 0 else unreachable(asked)
    lost = [host for host in hosts if host in down or host in seen]
    taken = told and options.requeues and preempted(options.job)
    gone = []  # type: List[str]
    verdict = merge(
        words_of(logs, options.attempt), code=options.code, hosts=hosts, lost=lost, told=told,
        preempted=taken, warned=bool(options.warned), checkpoint=progress(options, options.attempt),
        step=last_step(logs, options.attempt),
    )  # fmt: skip
    dead = {} if told else read_json(os.path.join(options.run, "services", "failed.json"))
    if dead.get("attempt") == options.attempt and not lost:
        verdict = of_service(verdict, dead)
        gone = unreachable(dead.get("hosts") or ())
    elif verdict.code and not told and not lost:
        verdict = before_ranks(verdict, " ".join(read_lines(os.path.join(logs, BEFORE))))
    firsts = [(word.get("first_failure") or {}).get("ended") for word in words_of(logs, options.attempt)]
    failed = min((at for at in firsts if isinstance(at, (int, float))), default=None)
    counted = record(options, options.attempt, verdict, hosts, failed=failed)
    resources = Resources(
        options.nodes, options.attempts, tuple(everywhere), tuple({*down, *seen}), bool(options.requeue),
        os.path.basename(options.run),
    )  # fmt: skip
    action = decide(history, verdict, resources)
    if gone and action.kind == "restart":  # a service's own nodes are the job's, and there is no other one for it
        action = Action("resubmit", tuple(sorted({*action.exclude, *gone})), action.why)
    if action.kind != "stop" and not counted:
        action = Action("stop", (), "%s; and the journal cannot count what comes next" % action.why)
    act(options, action)
    return 0


def act(options: argparse.Namespace, action: Action) -> None:
    """One word for the script: restart PAUSE HOSTS, leave (another job, or this one later, goes on), or stop."""
    number = options.attempt
    if options.code:
        note(options.run, "decided", attempt=number, action=action.kind, exclude=list(action.exclude), why=action.why)
    if action.why and action.kind != "stop":
        say("attempt %s: %s -> %s" % (number, action.why, action.kind))
    elif action.why and options.code:
        say("attempt %s is the last one: %s" % (number, action.why))
    if action.kind == "restart":
        print(" ".join(["restart", "%g" % action.pause, *action.hosts]))
        return
    if action.kind == "requeue" and (requeue(options, action.why) or submit_again(options, (), action.why)):
        print("leave")
        return
    if action.kind == "resubmit" and (
        submit_again(options, action.exclude, action.why) or (options.requeues and requeue(options, action.why))
    ):
        print("leave")
        return
    note(options.run, "finished", code=options.code, why=action.why)
    print("stop")


def checked(options: argparse.Namespace) -> int:
    """After a preflight: go, or what follows when nothing may train.

    `--times` bounds how often a first one goes again; between two attempts `recover.attempts` does.
    """
    history, _ = journal.read(options.run)
    bad = read_lines(os.path.join(options.run, "preflight", "exclude"))
    if not options.told:
        note(options.run, "preflight", code=options.code, exclude=bad)
    if options.code in (0, 10):
        print("go")
        return 0
    why = "the preflight ended with %d" % options.code
    times = sum(entry.get("event") == "resubmitted" for entry in history)
    allowed = options.attempts if options.attempt else options.times
    if options.told:
        kind = "requeue" if options.warned and options.requeue else "stop"
        act(options, Action(kind, (), "time was up before anything trained"))
    elif options.code == 20 and bad and times < allowed:
        act(options, Action("resubmit", tuple(sorted(left_out(history) | set(bad))), why))
    else:
        act(options, Action("stop", (), why))
    return 0


def read_lines(path: str) -> List[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().split()
    except OSError:
        return []


def watch(options: argparse.Namespace) -> int:
    """Beside an attempt: a node without a heartbeat whose slurmd does not answer is lost; then the step is ended.

    Slurm takes SlurmdTimeout, 300 s as delivered, to see that, and the ranks' own time-outs 10 minutes and more.
    A node that is cut off may still reach the files, and write heartbeats: where training stands, all are asked.
    """
    ask_at = 0.0
    logs = os.path.join(options.run, "logs")
    clock = os.path.join(logs, ".clock")
    failed = os.path.join(logs, "first-failure-%d" % options.attempt)
    while os.getppid() == options.script:
        time.sleep(BEAT / 2)
        with contextlib.suppress(OSError):
            with open(clock, "w"):
                pass
            now = os.stat(clock).st_mtime  # the file system's clock, as that of the heartbeats
            beats = beats_of(logs, options.attempt)
            patience = SILENT / 2 if os.path.exists(failed) else SILENT  # something did happen: ask earlier
            late = [
                options.hosts[node]
                for node, path in beats.items()
                if node < len(options.hosts) and now - os.stat(path).st_mtime > patience
            ]
            why = "no heartbeat for %.0f s" % patience
            if not late and time.monotonic() >= ask_at and stands(read_json(beats.get(0, ""))):
                late, why = options.hosts, "training stands"
                ask_at = time.monotonic() + SILENT
            lost = unreachable(late) if late else []
            if lost:
                text = "%s: %s, and Slurm's daemon there does not answer: the node is lost"
                say(text % (", ".join(lost), why))
                with open(os.path.join(logs, "lost-%d" % options.attempt), "w") as file:
                    file.write("".join(host + "\n" for host in lost))
                end_step(options)
                return 0
    return 0


def stands(beat: Entry) -> bool:
    """Whether a heartbeat says: no step for two heartbeats, and for five times what one takes.

    >>> stands({"phase": "training", "progress_age": 11.0, "step_seconds": 1.5})
    True
    >>> stands({"phase": "checkpoint", "progress_age": 11.0, "step_seconds": 1.5})
    False
    """
    age, usual = beat.get("progress_age"), beat.get("step_seconds")
    if beat.get("phase") != "training" or not isinstance(age, (int, float)) or not isinstance(usual, (int, float)):
        return False
    return age > max(2 * BEAT, 5 * usual)


def steps_of(job: str) -> List[str]:
    """4711.0 and 4711.1, but not 4711.batch; none without an answer."""
    code, out, _ = ask(["squeue", "--noheader", "--steps", "--format=%i", "--jobs=" + job])
    return [one for one in out.split() if one.rpartition(".")[2].isdigit()] if code == 0 else []


def end_step(options: argparse.Namespace) -> None:
    """Its ranks at once: they wait for the dead. Then srun, which would wait for Slurm to see it too."""
    services = {word for path in glob.glob(os.path.join(glob.escape(options.run), "services", "*.step"))
                for word in read_lines(path)}  # fmt: skip
    steps = [step for step in steps_of(options.job) if step not in services]
    killers = [
        subprocess.Popen(["scancel", "--signal=KILL", step], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for step in steps
    ]
    until = time.monotonic() + 4  # it asks every node, the dead one too; the others have heard it by then
    while time.monotonic() < until and any(one.poll() is None for one in killers):
        time.sleep(0.1)
    with contextlib.suppress(OSError):
        os.kill(options.step, signal.SIGKILL)


def main(arguments: List[str]) -> int:
    parser = argparse.ArgumentParser(prog="recover.py", description=__doc__)
    add = parser.add_argument
    add("verb", choices=("begin", "attempt", "checked", "after", "watch"))
    add("--run", required=True)
    add("--job", default="")
    add("--entry", default="job.sbatch")
    add("--nodes", type=int, required=True)
    add("--attempts", type=int, default=0, help="starts without a new checkpoint in between")
    add("--checkpoints", default="", help="directory")
    add("--components", type=int, default=0, help="of a heterogeneous job, beside the first")
    add("--exclude", default="", help="nodes that the job file leaves out already")
    add("--comment", default="", help="of the job file, before the run's own token")
    add("--requeue", action="store_true", help="at the time limit")
    add("--requeues", action="store_true", help="Slurm may requeue this job")
    add("--times", type=int, default=0, help="that a preflight may submit again")
    add("--restart", type=int, default=0, help="SLURM_RESTART_COUNT")
    add("--attempt", type=int, default=0)
    add("--code", type=int, default=0)
    add("--told", default="", help="not empty: a signal came")
    add("--warned", default="", help="not empty: Slurm's warning before the end came")
    add("--allocation", nargs="*", help="all nodes of the job")
    add("--hosts", nargs="*", default=[], help="those of the attempt, in the order of their ranks")
    add("--script", type=int, default=0, help="pid of the batch script")
    add("--step", type=int, default=0, help="pid of srun")
    options = parser.parse_args(arguments)
    if options.job.endswith(":"):  # a process of this machine: no later one of its number is taken for it
        options.job += journal._start(int(options.job[:-1]))
    verbs = {"begin": begin, "attempt": attempt, "checked": checked, "after": after, "watch": watch}
    return verbs[options.verb](options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
