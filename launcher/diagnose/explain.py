"""From what the logs and the scheduler say to one cause.

Roots (rank 1 to 4) come before what carries their words (5) and what follows from them (6 to 9). Among roots, those
that say what happened (1, 2) come before those that say only that something did not come (3, 4), and what a node
survives ("monitor") comes last. Then the earliest wins; close to it, the more specific one. So a port that went down
is blamed and not the "error 12" five seconds later, and an ECC error and not the collective that waited for its rank.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from launcher.diagnose import Cause, Diagnosis, Evidence, Exit, Found, Line, Signature, exits, match, tables
from launcher.diagnose.match import Crash, Reading

NOTHING = Evidence()
SKEW = 5.0  # seconds that clocks of two hosts may differ; the preflight refuses more than 2
NEAR = 60.0  # seconds between a fault and what it makes others say
LINES = 200  # the same in one file without clocks
# A job does not go on that long after what ends it: the watchdog of NCCL waits 10 to 30 minutes for a dead rank.
OUTLIVED = 2700.0
LAST_WORDS = 500  # lines that one process prints at most about its end: a traceback and a C++ stack
SHOWN = 8  # lines that speak for one cause

# The exception that ended a rank, where no signature knows its message.
EXCEPTIONS = {
    "ModuleNotFoundError": "python_import_error",
    "ImportError": "python_import_error",
    "SyntaxError": "python_syntax_error",
    "IndentationError": "python_syntax_error",
    "TabError": "python_syntax_error",
    "FileNotFoundError": "python_file_missing",
    "NotADirectoryError": "python_file_missing",
    "IsADirectoryError": "python_file_missing",
    "HFValidationError": "python_file_missing",  # a path that is not there, taken for the name of a model
    "PermissionError": "permission_denied",
    "MemoryError": "host_memory_exhausted",
    "ArrowMemoryError": "host_memory_exhausted",
    "OutOfMemoryError": "cuda_oom",
    "KeyboardInterrupt": "interrupted_by_user",
    "ConnectionRefusedError": "net_connect_refused",
    "ConnectionResetError": "peer_closed",
    "BrokenPipeError": "peer_closed",
    "EOFError": "peer_closed",
}
# What the innermost frame says, where neither the exception's name nor its message is known.
PLACES = tuple(
    (re.compile(pattern), cause)
    for pattern, cause in (
        (r"^(?:wandb|mlflow|comet_ml|neptune|clearml|swanlab|aim)/", "tracker_failed"),
        (r"^huggingface_hub/|^transformers/utils/hub\.py|^modelscope/hub/", "hub_unreachable"),
        (r"^(?:(?:aio)?botocore|boto3|s3transfer|s3fs|gcsfs|adlfs|oss2|ossfs|minio|azure|s3torchconnector|cloudpathlib|"
         r"google/(?:cloud|auth|api_core|resumable_media))/",
         "object_store_error"),
        (r"^triton/|^torch/_(?:inductor|dynamo)/", "triton_compile_failed"),
        (r"^deepspeed/ops/op_builder/|^torch/utils/cpp_extension\.py", "ds_op_build_failed"),
        (r"^deepspeed/runtime/(?:config\w*\.py|zero/config\.py)|"
         r"^(?:accelerate/utils|transformers(?:/integrations)?|(?:pytorch_)?lightning/\S+)/deepspeed\.py .*config",
         "ds_config_invalid"),
        (r"^(?:hydra|omegaconf|hyperpyyaml|jsonargparse|simple_parsing|tyro|draccus|dacite)/", "arguments_rejected"),
        (r"^bitsandbytes/(?:cextension|cuda_setup)", "bitsandbytes_setup"),
        (r"^torch/distributed/(?:rendezvous\.py|elastic/rendezvous/)", "rendezvous_timeout"),
        (r"^torch/distributed/checkpoint/.* \w*(?:load|read)\w*$|^torch/serialization\.py _?load|"
         r"^megatron/core/dist_checkpointing/.* \w*load\w*$|^(?:orbax|flax/training/checkpoints|tensorstore)\b.*"
         r" \w*(?:load|restore|read)\w*$|^torch/(?:optim|nn)/.* load_state_dict$",
         "ds_ckpt_incompatible"),
        (r"^torch/cuda/__init__\.py _lazy_init$", "gpu_missing_or_busy"),
    )
)  # fmt: skip
# Exceptions that only pass on that something ended.
CARRIERS = frozenset(
    "SystemExit CalledProcessError ChildFailedError SignalException ProcessExitedException ProcessRaisedException "
    "DistBackendError DistNetworkError DistStoreError RemoteException RayTaskError RayActorError TimeoutExpired "
    "ActorDiedError WorkerCrashedError TrainingFailedError EngineDeadError BdbQuit GeneratorExit".split()
)
# Services that a client library talks to, and what its tracebacks say of the network before they come to its
# own words: a name that does not resolve there is not that of a rank.
SERVICES = frozenset({"tracker_failed", "hub_unreachable", "hub_access_denied", "object_store_error"})
CLIENTS = frozenset("dns_or_gloo_iface net_connect_refused net_connect_timeout net_no_route python_error".split())
_CLIENT = re.compile(
    r"\bsocket\.(?:gaierror|timeout)\b|\b(?:ConnectionRefusedError|TimeoutError|OSError: \[Errno 1\d\d\])|"
    r"\b(?:urllib3|requests|httpx|httpcore|aiohttp|urllib\.error)\.|"
    r"\b(?:NameResolutionError|NewConnectionError|MaxRetryError|ConnectTimeoutError)\b"
)
MEMORY = re.compile(r"memory|oom", re.I)  # without such a word a log tells of SIGKILL, and not why
FATAL = re.compile(r"\bFatal\b")  # of an NVLink 5 Xid: "Nonfatal" is another word
_PREVIOUS = re.compile(r"previous Xid:? (\d+)", re.I)
_XID = re.compile(r"xid_(\d+)(?:_(\d+))?")
_MORE_XIDS = {79: "gpu_fallen_off_bus", 120: "xid_119_gsp_timeout"}


def diagnose(
    files: Sequence[str], evidence: Evidence = NOTHING, *, starts: Mapping[str, int] | None = None
) -> Diagnosis:
    """Logs and evidence to a diagnosis; `starts` gives bytes of a log that belong to earlier attempts."""
    return explain(read(files, starts or {}), evidence)


def read(files: Sequence[str], starts: Mapping[str, int]) -> Reading:
    """Logs held against the table."""
    _, signatures = tables.read()
    whole = match.read([file for file in files if not starts.get(file)], signatures)
    for file in files:
        if starts.get(file):
            whole = match.joined(whole, match.read([file], signatures, start=starts[file]))
    return whole


class _Candidate:
    """A cause of one process, and where it stands in time."""

    def __init__(self, found: Found, order: int | None, file: str, number: int) -> None:
        self.found, self.order, self.file, self.number = found, order, file, number

    @property
    def cause(self) -> Cause:
        return self.found.cause

    @property
    def key(self) -> tuple[int, int, int]:
        """Of two that are near each other the smaller one is blamed.

        A network error often is a dead peer's, and what has no layer ("NCCL error") says less than any other.
        """
        order = self.order if self.order is not None else 1 << 62
        return (self.cause.rank, {"net": 1, "-": 2}.get(self.cause.layer, 0), order)


def strength(cause: Cause) -> int:
    """0 says what happened, 1 that something did not, 2 is what a node survives; then carriers and what follows."""
    if cause.rank <= 4 and cause.exclude == "monitor":
        return 2
    return 0 if cause.rank <= 2 else 1 if cause.rank <= 4 else 3 + cause.rank


def _before(one: _Candidate, other: _Candidate) -> bool:
    if one.file == other.file and one.order is not None and other.order is not None:
        return one.order < other.order
    here, there = one.found.at, other.found.at
    if here is not None and there is not None and abs(here - there) > SKEW:
        return here < there
    if one.cause.rank != other.cause.rank:
        return one.cause.rank < other.cause.rank
    if here is not None and there is not None and here != there:
        return here < there
    return one.key < other.key


def _near(one: _Candidate, other: _Candidate) -> bool:
    here, there = one.found.at, other.found.at
    if here is not None and there is not None:
        return abs(here - there) <= NEAR
    if one.file == other.file and one.number and other.number:
        return abs(one.number - other.number) <= LINES
    return bool(one.file and other.file)


def _fatal(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Without those that their process or job outlived: a retried download, an Xid of last week."""

    def outlived(one: _Candidate, later: _Candidate) -> bool:
        if later.cause.layer == "net":  # it may be a late word of the same
            return False
        if one.found.at is not None and later.found.at is not None:
            return later.found.at - one.found.at > OUTLIVED
        alone = one.file == later.file and match.named(one.file)[1] is not None and one.number and later.number
        return bool(alone and later.number - one.number > LAST_WORDS)

    return [one for one in candidates if not any(outlived(one, later) for later in candidates)]


def _earliest(candidates: Sequence[_Candidate]) -> _Candidate:
    best = candidates[0]
    for one in candidates[1:]:
        if _before(one, best):
            best = one
    near = [one for one in candidates if _near(one, best) and one.cause.rank < best.cause.rank]
    near += [one for one in candidates if one.cause.rank == best.cause.rank and _near(one, best)]
    if best.cause.layer in ("net", "-") or any(one.cause.rank < best.cause.rank for one in near):
        return min([best, *near], key=lambda one: one.key)
    return best


def explain(
    reading: Reading,
    evidence: Evidence = NOTHING,
    *,
    more: Sequence[Found] = (),
    causes: Mapping[str, Cause] | None = None,
) -> Diagnosis:
    """The root, what else was seen, and the hosts to leave out; `more` is what a cluster named by itself."""
    known = causes if causes is not None else tables.read()[0]
    seen = _lines(reading, evidence, known)
    told = [_Candidate(one, None, "", 0) for one in [*more, *exits.found(evidence, known)]]
    root = _root(seen, told, evidence)
    if root is not None and root.cause.rank > 4 and evidence.code in (0, exits.STOPPED_EARLY):
        root = None
    everything = _merged([*seen, *told])
    chosen = next((one for one in everything if root is not None and one.cause.id == root.cause.id), None)
    if chosen is not None and root is not None:
        own = root.found
        said = {(line.text, line.rank) for line in own.lines}
        lines = own.lines + tuple(line for line in chosen.lines if (line.text, line.rank) not in said)
        chosen = replace(chosen, lines=lines[:SHOWN], node=own.node or chosen.node, rank=own.rank, at=own.at,
                         signature=own.signature, said=own.said or chosen.said)  # fmt: skip
    others = tuple(one for one in everything if root is None or one.cause.id != root.cause.id)
    hosts = _excluded(chosen, [*seen, *told], evidence) if chosen else ()
    return Diagnosis(chosen, others[:12], hosts, evidence.code)


# --- Candidates -----------------------------------------------------------------------------------------------------


def _lines(reading: Reading, evidence: Evidence, causes: Mapping[str, Cause]) -> list[_Candidate]:
    ended = {one.rank: one for one in evidence.exits}
    found = []
    for hit in reading.hits:
        cause = causes.get(hit.signature.cause)
        if cause is None:
            continue
        if hit.signature.rank:
            cause = replace(cause, rank=hit.signature.rank, exclude="no")
        line = hit.first
        if cause.id == "xid_45_cleanup":
            cause = _charged(line.text, causes) or cause
        if cause.id == "xid_154_recovery_action" and any(
            line.file == file for file in _xid_files(reading, hit.order)
        ):
            cause = replace(cause, rank=6)  # it says what the Xid before it needs
        one = _candidate(cause, hit.signature, hit.lines, hit.order, evidence, ended)
        if cause.id == "host_oom_killed" and not MEMORY.search(line.text) and exits.spared(evidence, one.found.node):
            one.found = replace(one.found, cause=causes.get("killed_from_outside", cause))
        found.append(one)
    places = sorted(hit.order for hit in reading.hits if not hit.signature.rank)
    told = []
    for crash in reading.crashes:
        if _explained(crash, places) or crash.name in CARRIERS or crash.name.endswith("Warning"):
            continue
        cause = causes.get(EXCEPTIONS.get(crash.name) or _raised_by(crash))
        if cause is not None:
            found.append(_candidate(cause, None, crash.lines, crash.order, evidence, ended, crash))
            if cause.id in SERVICES:
                told.append(crash.lines[-1])
    told += [hit.first for hit in reading.hits if hit.signature.cause in SERVICES]
    found = [one for one in found if not (one.cause.id in CLIENTS and _served(one.found.lines[-1], told))]
    return sorted(found, key=lambda one: one.order or 0)


def _served(line: Line, told: Sequence[Line]) -> bool:
    """Whether a line is how the traceback begins that ends, on `told`, with a service that did not answer."""
    return bool(_CLIENT.search(line.text)) and any(
        (line.file, line.rank) == (one.file, one.rank) and 0 <= one.number - line.number <= LAST_WORDS // 2
        for one in told
    )


def _xid_files(reading: Reading, before: int) -> Iterable[str]:
    """Logs with an Xid, other than 154 and those that follow from others, before this place."""
    for hit in reading.hits:
        name = hit.signature.cause
        root = name == "gpu_fallen_off_bus" or (name.startswith("xid_") and "154" not in name and "_45_" not in name)
        if root and hit.order < before:
            yield hit.first.file


def _charged(text: str, causes: Mapping[str, Cause]) -> Cause | None:
    """Xid 45 "caused by previous Xid 48" is Xid 48's."""
    said = _PREVIOUS.search(text)
    if not said:
        return None
    number = int(said[1])
    for name, cause in causes.items():
        one = _XID.match(name)
        if one and number in [int(group) for group in one.groups() if group]:
            return cause
    return causes.get(_MORE_XIDS.get(number, "xid_other"))


def _raised_by(crash: Crash) -> str:
    return next((cause for pattern, cause in PLACES if pattern.search(crash.inner)), "python_error")


def _explained(crash: Crash, places: Sequence[int]) -> bool:
    """Whether a signature knows words between a traceback's first and last line."""
    at = bisect.bisect_left(places, crash.order)
    return at < len(places) and places[at] <= crash.until


def _candidate(
    cause: Cause,
    signature: Signature | None,
    lines: tuple[Line, ...],
    order: int,
    evidence: Evidence,
    ended: Mapping[int, Exit],
    crash: Crash | None = None,
) -> _Candidate:
    line = lines[0]
    own = ended.get(line.rank) if line.rank is not None else None
    node = host(line.node, evidence) or (own.host if own else "")
    at = line.at if line.at is not None else own.ended if own else None
    said = f"{crash.name} at {crash.place}" if crash and crash.place else ""
    placed = tuple(replace(one, node=node) for one in lines)
    name = signature.id if signature else ""
    return _Candidate(Found(cause, name, placed, node, line.rank, at, said), order, line.file, line.number)


def host(node: str, evidence: Evidence) -> str:
    """The host of node "1", and "gpu7.cluster" of "gpu7" where the job has it so; a pod's name stays what it is."""
    if node.isdigit():
        number = int(node)
        return evidence.hosts[number] if number < len(evidence.hosts) else ""
    short = node.partition(".")[0]
    alike = [one for one in evidence.hosts if one == node or (one.partition(".")[0] == short and "." in one + node)]
    return alike[0] if len(alike) == 1 else node


# --- Which one ------------------------------------------------------------------------------------------------------


def _root(seen: Sequence[_Candidate], told: Sequence[_Candidate], evidence: Evidence) -> _Candidate | None:
    by = {one.cause.id: one for one in told}
    lines = sorted({strength(one.cause) for one in seen})
    fatal = _fatal([one for one in seen if strength(one.cause) == 0])
    clear = _earliest(fatal) if fatal else None
    # A scheduler does not preempt what had failed before.
    if "slurm_preempted" in by:
        return by["slurm_preempted"]
    lost = by.get("slurm_node_fail") or by.get("k8s_node_not_ready") or by.get("node_lost")
    if lost is not None:  # what its own kernel had said is the better word
        own = [one for one in fatal if one.cause.layer == "node"]
        return _earliest(own) if own else lost
    memory = next((by[name] for name in exits.MEMORY if name in by), None)
    if memory is not None and (clear is None or (exits.killed(evidence) and not _died_before(clear, evidence))):
        return memory
    if clear is not None:
        return clear
    sure = [one for one in told if strength(one.cause) == 0]
    if sure:
        return min(sure, key=lambda one: one.key)
    hang = [one for one in told if one.cause.rank <= 4]
    vague = [one for one in seen if strength(one.cause) == 1]
    if hang and not (vague and evidence.hang and evidence.hang.kind == "dead"):
        return hang[0]
    for level in lines:
        of_level = [one for one in seen if strength(one.cause) == level]
        rivals = [one for one in told if strength(one.cause) == level]
        if level > 2 and (told and min(strength(one.cause) for one in told) < level):
            break
        return _earliest([*of_level, *rivals])
    return min(told, key=lambda one: one.key) if told else None


def _died_before(one: _Candidate, evidence: Evidence) -> bool:
    """Whether the rank of this line ended by itself before the first that SIGKILL ended."""
    kills = [row.ended for row in evidence.exits if exits.code(row.code) == 137 and row.ended]
    own = next((row.ended for row in evidence.exits if row.rank == one.found.rank), None)
    return bool(kills and own and own < min(kills))


def _merged(candidates: Sequence[_Candidate]) -> list[Found]:
    """One entry a cause, with the lines of all who said it; roots first."""
    by: dict[str, Found] = {}
    for one in sorted(candidates, key=lambda one: (strength(one.cause), one.key)):
        held = by.get(one.cause.id)
        if held is None:
            by[one.cause.id] = one.found
            continue
        said = {(line.text, line.rank) for line in held.lines}  # a job's output repeats what its ranks' logs say
        more = tuple(line for line in one.found.lines if (line.text, line.rank) not in said)
        by[one.cause.id] = replace(held, lines=(held.lines + more)[:SHOWN], said=held.said or one.found.said)
    return list(by.values())


def _excluded(root: Found, candidates: Sequence[_Candidate], evidence: Evidence) -> tuple[str, ...]:
    """Hosts that the cause is on; none where every host of the job says the same."""
    cause = root.cause
    fatal = cause.exclude == "probe" and cause.id.startswith("xid_") and any(FATAL.search(x.text) for x in root.lines)
    if cause.layer in ("app", "sched", "net") or not (cause.exclude in ("yes", "temp") or fatal):
        return ()
    hosts = [one.found.node for one in candidates if one.cause.id == cause.id and one.found.node]
    if cause.id in ("slurm_node_fail", "k8s_node_not_ready", "node_lost"):
        hosts += evidence.down
    known = {*evidence.hosts, *evidence.down}
    unique = tuple(one for one in dict.fromkeys(hosts) if one in known or not known)
    return () if len(unique) > 1 and set(unique) >= set(evidence.hosts) and evidence.hosts else unique
