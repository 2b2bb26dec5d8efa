"""What a namespace of the Pod Security Standards refuses in a pod, found without a cluster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

BASELINE, RESTRICTED = "baseline", "restricted"
LABEL = "pod-security.kubernetes.io/enforce"
# https://kubernetes.io/docs/concepts/security/pod-security-standards/, of Kubernetes 1.34
CAPABILITIES = frozenset(
    """AUDIT_WRITE CHOWN DAC_OVERRIDE FOWNER FSETID KILL MKNOD NET_BIND_SERVICE SETFCAP SETGID SETPCAP SETUID
    SYS_CHROOT""".split()
)
VOLUMES = frozenset(
    "configMap csi downwardAPI emptyDir ephemeral image persistentVolumeClaim projected secret".split()
)
SYSCTLS = frozenset(
    """kernel.shm_rmid_forced net.ipv4.ip_local_port_range net.ipv4.ip_unprivileged_port_start
    net.ipv4.tcp_syncookies net.ipv4.ping_group_range net.ipv4.ip_local_reserved_ports net.ipv4.tcp_keepalive_time
    net.ipv4.tcp_fin_timeout net.ipv4.tcp_keepalive_intvl net.ipv4.tcp_keepalive_probes net.ipv4.tcp_rmem
    net.ipv4.tcp_wmem""".split()
)
SELINUX = frozenset(["", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"])


class Violation(NamedTuple):
    profile: str  # the weakest that refuses it; whatever refuses more refuses it, too
    field: str  # of the pod's spec
    reason: str


def violations(pod: dict[str, Any]) -> list[Violation]:
    """Those of a pod's spec; none is a pod that a `restricted` namespace admits."""
    return [*_of_the_pod(pod), *(found for row in _containers(pod) for found in _of_a_container(*row, pod))]


def admits(found: Sequence[Violation]) -> str:
    """The strictest profile that lets such a pod in."""
    profiles = {one.profile for one in found}
    return "privileged" if BASELINE in profiles else BASELINE if profiles else RESTRICTED


def _containers(pod: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for kind in ("initContainers", "containers"):
        for one in pod.get(kind) or ():
            yield f"{kind}[{one.get('name')}]", one


def _of_the_pod(pod: dict[str, Any]) -> Iterator[Violation]:
    for name, what in (
        ("hostNetwork", "the node's own network"),
        ("hostPID", "the node's processes"),
        ("hostIPC", "the node's shared memory"),
    ):
        if pod.get(name):
            yield Violation(BASELINE, name, what)
    for volume in pod.get("volumes") or ():
        at = f"volumes[{volume['name']}]"
        for source in set(volume) - {"name"}:
            if source == "hostPath":
                yield Violation(BASELINE, at, f"hostPath {volume[source].get('path')}")
            elif source not in VOLUMES:
                yield Violation(RESTRICTED, at, f"a volume of kind {source}")
    yield from _shared(pod.get("securityContext") or {}, "securityContext")
    for row in (pod.get("securityContext") or {}).get("sysctls") or ():
        if row.get("name") not in SYSCTLS:
            yield Violation(BASELINE, "securityContext.sysctls", str(row.get("name")))


def _shared(context: dict[str, Any], at: str) -> Iterator[Violation]:
    """What a pod and each of its containers can say alike."""
    if (context.get("seccompProfile") or {}).get("type") == "Unconfined":
        yield Violation(BASELINE, f"{at}.seccompProfile", "Unconfined")
    if (context.get("appArmorProfile") or {}).get("type", "RuntimeDefault") not in ("RuntimeDefault", "Localhost"):
        yield Violation(BASELINE, f"{at}.appArmorProfile", "Unconfined")
    linux = context.get("seLinuxOptions") or {}
    if linux.get("type", "") not in SELINUX or linux.get("user") or linux.get("role"):
        yield Violation(BASELINE, f"{at}.seLinuxOptions", "a type, user or role of its own")
    if (context.get("windowsOptions") or {}).get("hostProcess"):
        yield Violation(BASELINE, f"{at}.windowsOptions", "hostProcess")
    if context.get("runAsUser") == 0:
        yield Violation(RESTRICTED, f"{at}.runAsUser", "root")


def _of_a_container(at: str, one: dict[str, Any], pod: dict[str, Any]) -> Iterator[Violation]:
    context, around = one.get("securityContext") or {}, pod.get("securityContext") or {}
    yield from _shared(context, f"{at}.securityContext")
    if context.get("privileged"):
        yield Violation(BASELINE, f"{at}.securityContext.privileged", "every right that the node has")
    if context.get("procMount", "Default") != "Default":
        yield Violation(BASELINE, f"{at}.securityContext.procMount", str(context["procMount"]))
    added = [str(name).removeprefix("CAP_") for name in (context.get("capabilities") or {}).get("add") or ()]
    for name in added:
        if name not in CAPABILITIES:
            yield Violation(BASELINE, f"{at}.securityContext.capabilities.add", name)
        elif name != "NET_BIND_SERVICE":
            yield Violation(RESTRICTED, f"{at}.securityContext.capabilities.add", name)
    for port in one.get("ports") or ():
        if port.get("hostPort"):
            yield Violation(BASELINE, f"{at}.ports", f"hostPort {port['hostPort']}")
    for hook, what in _handlers(one):
        if (what.get("httpGet") or what.get("tcpSocket") or {}).get("host"):
            yield Violation(BASELINE, f"{at}.{hook}", "asks a host that it names")
    if context.get("allowPrivilegeEscalation") is not False:
        yield Violation(RESTRICTED, f"{at}.securityContext.allowPrivilegeEscalation", "has to be false")
    if context.get("runAsNonRoot", around.get("runAsNonRoot")) is not True:
        yield Violation(RESTRICTED, f"{at}.securityContext.runAsNonRoot", "has to be true")
    if not (context.get("seccompProfile") or around.get("seccompProfile")):
        yield Violation(RESTRICTED, f"{at}.securityContext.seccompProfile", "has to be RuntimeDefault or Localhost")
    if "ALL" not in ((context.get("capabilities") or {}).get("drop") or ()):
        yield Violation(RESTRICTED, f"{at}.securityContext.capabilities.drop", "has to be [ALL]")


def _handlers(one: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in ("livenessProbe", "readinessProbe", "startupProbe"):
        if name in one:
            yield name, one[name]
    for name, what in (one.get("lifecycle") or {}).items():
        if isinstance(what, dict):
            yield f"lifecycle.{name}", what
