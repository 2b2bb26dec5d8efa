"""What exit codes, the scheduler's word and a supervisor's verdict say about a cause, where no line needs to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from launcher.diagnose import Cause, Evidence, Exit, Found, Hang

# The scheduler's word, by its first word, in either scheduler's spelling -> cause.
STATES = {
    "OUT_OF_MEMORY": "slurm_oom_kill",
    "NODE_FAIL": "slurm_node_fail",
    "BOOT_FAIL": "slurm_node_fail",
    "TIMEOUT": "slurm_time_limit",
    "DEADLINE": "slurm_time_limit",
    "PREEMPTED": "slurm_preempted",
    "REQUEUED": "slurm_requeued",
    "CANCELLED": "slurm_step_cancelled",
    "LAUNCH_FAILED": "slurm_launch_failed",
    "RECONFIG_FAIL": "slurm_launch_failed",
    "OOMKilled": "k8s_oomkilled",
    "Evicted": "k8s_evicted",
    "Preempted": "k8s_evicted",
    "Preempting": "k8s_evicted",
    "PreemptionByScheduler": "k8s_evicted",
    "EvictionByEvictionAPI": "k8s_evicted",
    "TerminationByKubelet": "k8s_evicted",
    "DeletionByTaintManager": "k8s_node_not_ready",
    "DeletionByPodGC": "k8s_node_not_ready",
    "NodeNotReady": "k8s_node_not_ready",
    "FailedMount": "k8s_volume_failed",
    "FailedAttachVolume": "k8s_volume_failed",
    "FailedCreatePod": "k8s_quota_exceeded",
    "ErrImagePull": "k8s_image_pull",
    "ImagePullBackOff": "k8s_image_pull",
    "InvalidImageName": "k8s_image_pull",
    "CreateContainerConfigError": "k8s_config_error",
    "CreateContainerError": "k8s_config_error",
    "ContainerCannotRun": "command_not_found",
    "StartError": "command_not_found",
    "DeadlineExceeded": "k8s_deadline",
    "NodeLost": "k8s_node_not_ready",
    "NodeShutdown": "k8s_node_not_ready",
    "UnexpectedAdmissionError": "k8s_device_unhealthy",
    "Unschedulable": "k8s_unschedulable",
    "BackoffLimitExceeded": "k8s_back_off",
    "CrashLoopBackOff": "k8s_back_off",
}
STOPPED_EARLY = 75  # the program saved a checkpoint and stopped: no failure
MEMORY = ("slurm_oom_kill", "k8s_oomkilled")
# Codes as a shell has them: 128 and the signal. Python's own -9 is 137.
CODES = {
    126: "command_not_found",
    127: "command_not_found",
    130: "interrupted_by_user",
    134: "sigabrt",
    135: "bus_error",
    137: "host_oom_killed",
    132: "abi_mismatch",
    136: "sigfpe",
    139: "segfault",
    143: "sigterm",
}
ONE_BYTE = frozenset(256 - number for number in (4, 6, 7, 8, 9, 11, 15))
SIGNALS = {
    129: "SIGHUP",
    130: "SIGINT",
    132: "SIGILL",
    134: "SIGABRT",
    135: "SIGBUS",
    136: "SIGFPE",
    137: "SIGKILL",
    139: "SIGSEGV",
    143: "SIGTERM",
}
HANGS = {"laggard": "hang_laggard", "all wait": "hang_all_wait", "desync": "collective_desync"}


def code(value: int | None) -> int | None:
    """-9, 137 and 247 are the same: a signal as Python, as a shell, and as one byte of Python's tells it."""
    if value is not None and value < 0:
        return 128 - value
    return 384 - value if value in ONE_BYTE else value


def word(state: str) -> str:
    """`CANCELLED by 1000` is CANCELLED, and so is `cancelled: by 1000`; OOMKilled stays what it is."""
    first = state.split()[0].rstrip("+:;,") if state.split() else ""
    return first if first in STATES else first.upper() if first.upper() in STATES else first


def first(exits: Sequence[Exit]) -> Exit | None:
    """The rank that failed first; those ended by SIGTERM count only where there is no other."""
    failed = [one for one in exits if code(one.code) not in (0, STOPPED_EARLY, None)]
    own = [one for one in failed if code(one.code) != 143] or failed
    return min(own, key=lambda one: (one.ended is None, one.ended or 0.0, one.rank)) if own else None


def killed(evidence: Evidence) -> bool:
    """Whether SIGKILL ended a rank, or the job where nobody knows its ranks."""
    if evidence.exits:
        return any(code(one.code) == 137 for one in evidence.exits)
    return code(evidence.code) in (137, None)


def found(evidence: Evidence, causes: Mapping[str, Cause]) -> Iterator[Found]:
    """Causes that evidence alone names; one that the table does not have is left out."""
    for name, said, node, rank, at in _said(evidence):
        if name in causes:
            yield Found(causes[name], "", (), node, rank, at, said)


def _said(evidence: Evidence) -> Iterator[tuple[str, str, str, int | None, float | None]]:
    state = word(evidence.state)
    if state in STATES:
        lost = ", ".join(evidence.down)
        where = evidence.down[0] if STATES[state] == "slurm_node_fail" and evidence.down else ""
        yield (
            STATES[state],
            "the scheduler says " + evidence.state + (" of " + lost if where else ""),
            where,
            None,
            None,
        )
    for host, kills in sorted(evidence.oom_kills.items()):
        if kills:
            times = f"{kills} processes" if kills > 1 else "a process"
            at = min((one.ended for one in evidence.exits if one.host == host and one.ended), default=None)
            name = "k8s_oomkilled" if state in ("OOMKilled", "Error", "Failed") else "slurm_oom_kill"
            yield name, f"the memory limit ended {times} on {host}", host, None, at
    for host in evidence.down:
        if STATES.get(state) != "slurm_node_fail":
            yield "node_lost", f"nothing is heard of {host} any more", host, None, None
    if evidence.hang:
        yield from _hang(evidence.hang)
    one = first(evidence.exits)
    value = code(one.code) if one else code(evidence.code)
    if value in CODES:
        name = CODES[value]
        text = f"{SIGNALS[value]}, code {value}" if value in SIGNALS else f"code {value}"
        if name == "host_oom_killed":
            name, text = _sigkill(evidence, one.host if one else "", text)
        who = f"rank {one.rank} on {one.host} ended first, with " if one else "the job ended with "
        yield name, who + text, one.host if one else "", one.rank if one else None, one.ended if one else None


def _hang(hang: Hang) -> Iterator[tuple[str, str, str, int | None, float | None]]:
    said = f"no step for {hang.seconds:.0f} s after step {hang.step} (limit {hang.limit:.0f} s)"
    if hang.collective:
        said += ", in " + hang.collective
    if hang.ranks:
        said += "; not there: " + ", ".join(f"rank {rank}" for rank in hang.ranks[:8])
        said += f" of {len(hang.ranks)}" if len(hang.ranks) > 8 else ""
    if hang.why:
        said += ": " + hang.why
    name = HANGS.get(hang.kind, "hang_unknown")
    yield name, said, hang.hosts[0] if hang.hosts else "", hang.ranks[0] if hang.ranks else None, None


def _sigkill(evidence: Evidence, host: str, text: str) -> tuple[str, str]:
    """SIGKILL: lack of memory most likely, unless a counter says that the limit killed nothing there."""
    if spared(evidence, host) or word(evidence.state) == "Error":
        return "killed_from_outside", text + "; the memory limit killed nothing"
    return "host_oom_killed", text + ": most likely the host's memory ran out"


def spared(evidence: Evidence, host: str) -> bool:
    """Whether the counters say that lack of memory killed nothing there; everywhere, where no host is named."""
    kills = evidence.oom_kills
    return kills.get(host) == 0 if host else bool(kills) and not any(kills.values())
