"""Network profiles: what a pod needs to reach its fabric, from the rows of data/networks.yaml."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from launcher import facts, yamldoc
from launcher.errors import Path, Problem, UserError
from launcher.spec import JobSpec

AT: Path = ("kubernetes", "network")
MULTUS = "k8s.v1.cni.cncf.io/networks"
GKE_DEFAULT, GKE = "networking.gke.io/default-interface", "networking.gke.io/interfaces"
# Below NodePorts (30000) and the kernel's own (32768). Each job has two: the rendezvous and the preflight's.
FIRST_PORT, JOBS = 20_000, 5_000
SLOW = ("ethernet", "gloo", "nvlink")  # fabrics for which a pod needs nothing


@dataclass(frozen=True)
class Profile:
    name: str
    title: str
    recipe: str
    fabrics: list[str] = field(default_factory=list)
    resource: dict[str, Any] = field(default_factory=dict)
    networks: dict[str, Any] = field(default_factory=dict)
    how: str = ""
    first: int = 0
    annotations: dict[str, str] = field(default_factory=dict)
    volumes: dict[str, dict[str, str]] = field(default_factory=dict)
    ranks: dict[str, Any] = field(default_factory=dict)
    sidecars: list[dict[str, Any]] = field(default_factory=list)
    needs: dict[str, str] = field(default_factory=dict)
    advice: dict[str, str | dict[str, Any]] = field(default_factory=dict)

    def advises(self, gpu: str) -> dict[str, str]:
        """With their reasons, for one GPU type."""
        rows = {name: row if isinstance(row, dict) else {"why": row} for name, row in self.advice.items()}
        return {name: row["why"] for name, row in rows.items() if gpu in row.get("gpus", [gpu])}


@dataclass(frozen=True)
class Attachment:
    """What one job's pods get; empty where they need nothing."""

    profile: Profile | None = None
    resources: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)


@cache
def profiles() -> dict[str, Profile]:
    rows = yamldoc.load_tables(facts.DATA / "networks.yaml")
    return {name: Profile(name, **row) for name, row in rows.items()}


def profile(spec: JobSpec) -> Profile | None:
    """The row by its name, or that of the fabric. Raises UserError for a name that no row has."""
    asked = spec.kubernetes.network.profile
    if asked == "none":
        return None
    if asked != "auto":
        if asked not in profiles():
            hint = yamldoc.suggest(asked, ["auto", "none", *profiles()])
            raise UserError(Problem(f"no network profile `{asked}` in the table", hint, (*AT, "profile")))
        return profiles()[asked]
    resources = spec.resources
    if not resources.fabric or not resources.gpus_per_node or resources.nodes == 1:
        return None
    name = facts.fabric(resources.fabric).name
    return next((row for row in profiles().values() if name in row.fabrics), None)


def attachment(spec: JobSpec) -> Attachment:
    """Resources and annotations of a pod. Raises UserError where the job does not say enough."""
    asked, row = spec.kubernetes.network, profile(spec)
    gpu = _gpu(spec)
    resources: dict[str, str] = {}
    count = asked.devices
    if row and row.resource:
        name = row.resource["name"]
        if name not in asked.resources:
            machine = spec.kubernetes.node_selector.get("node.kubernetes.io/instance-type", "")
            machine = machine.removeprefix("ml.")  # as SageMaker HyperPod names an instance type
            count = count or row.resource.get("instances", {}).get(machine)
            count = count or row.resource.get("by", {}).get(gpu, row.resource.get("other"))
            if count is None:
                message = f"how many {name} a node has is not known for {gpu or 'a GPU that is not named'}"
                hint = f"kubernetes.network.devices: N ({row.resource['why']}), or profile: none"
                raise UserError(Problem(message, hint, (*AT, "devices")))
            resources[name] = str(count)
    elif asked.devices:
        hint = "network.profile: NAME of `dslaunch presets --networks`, or resources: {rdma/hca: 8}"
        raise UserError(Problem("devices of which resource?", hint, (*AT, "devices")))
    resources |= {name: str(amount) for name, amount in asked.resources.items()}
    if asked.hugepages:
        resources["hugepages-2Mi"] = str(asked.hugepages)
    return Attachment(row, resources, _annotations(spec, row, gpu, count or 0))


def _gpu(spec: JobSpec) -> str:
    """A name that no table has is a problem of the plan's, told there."""
    try:
        return facts.gpu(spec.resources.gpu).name if spec.resources.gpu and spec.resources.gpus_per_node else ""
    except UserError:
        return ""


def _annotations(spec: JobSpec, row: Profile | None, gpu: str, count: int) -> dict[str, str]:
    asked = list(spec.kubernetes.network.multus)
    own = _networks(row, gpu, count)
    if MULTUS in spec.kubernetes.pod_annotations or GKE in spec.kubernetes.pod_annotations:  # the user's own
        main = {GKE_DEFAULT: "eth0"} if GKE in spec.kubernetes.pod_annotations else {}
        return {**(row.annotations if row else {}), **main}
    if row and row.how == "gke":
        if not asked and not own:
            return dict(row.annotations)
        leading = leads(spec, row)  # one in front of the profile's takes the interface that pods are else not given
        if asked and own and len(asked) != len(own) + leading:
            more = f", or one in front of them: gvnic-1, {', '.join(own)}" if row.first > 1 else ""
            message = f"{len(asked)} networks, and profile {row.name} has {len(own)} interfaces"
            raise UserError(Problem(message, ", ".join(own) + more, (*AT, "multus")))
        first = row.first - leading
        pairs = [("eth0", "default"), *((f"eth{first + n}", name) for n, name in enumerate(asked or own))]
        interfaces = [{"interfaceName": interface, "network": name} for interface, name in pairs]
        return {**row.annotations, GKE_DEFAULT: "eth0", GKE: json.dumps(interfaces)}
    found = dict(row.annotations) if row else {}
    if asked or own:
        found[MULTUS] = ", ".join(asked or own)
    return found


def _networks(row: Profile | None, gpu: str, count: int) -> list[str]:
    """The names of a profile's own."""
    if not row or not row.networks:
        return []
    if "each" in row.networks:
        return [row.networks["each"]] * count
    found: list[str] = row.networks.get("by", {}).get(gpu, row.networks.get("other", []))
    return found


def leads(spec: JobSpec, row: Profile | None) -> bool:
    """Whether `multus` names one network more than the profile, and in front: [gvnic-1, rdma-0, ...]."""
    own = _networks(row, _gpu(spec), 0)
    asked = len(spec.kubernetes.network.multus)
    return bool(row and row.how == "gke" and row.first > 1 and own and asked == len(own) + 1)


def interfaces(spec: JobSpec) -> str:
    """NCCL_SOCKET_IFNAME of a pod where its networks say it, "" where they do not."""
    row = profile(spec)
    return str(row.networks.get("leads", "")) if row and leads(spec, row) else ""


def problems(spec: JobSpec) -> Iterator[Problem]:
    asked, security = spec.kubernetes.network, spec.kubernetes.security
    for key in (MULTUS, GKE):
        if key in spec.kubernetes.pod_annotations and asked.multus:
            message = f"network.multus, and the annotation {key}, which it writes"
            yield Problem(message, "one of both", ("kubernetes", "pod_annotations", key))
    if len(set(asked.claims)) != len(asked.claims) or asked.claim_template in asked.claims:
        yield Problem("a claim stands there twice", "each template once", (*AT, "claims"))
    for name in asked.resources:
        if "/" not in name:
            yield Problem(f"resource {name} has no domain", "such as rdma/hca", (*AT, "resources", name))
    if asked.hugepages and not (spec.resources.cpus_per_node or spec.resources.memory):
        message = "huge pages without CPUs or memory beside them are refused by the API server"
        yield Problem(message, "resources.memory: 512G", (*AT, "hugepages"))
    try:
        row = attachment(spec).profile
    except UserError as error:
        yield from error.problems
        return
    if row and row.networks and asked.host_network:
        message = f"profile {row.name} gives a pod interfaces of its own, and host_network the node's"
        yield Problem(message, "one of both: network.profile: none, or no host_network", (*AT, "host_network"))
    granted = {
        "host_network": asked.host_network,
        "privileged": security.privileged,
        "allow_ipc_lock": security.allow_ipc_lock or security.privileged,
        "root": security.root,
    }
    missing = {name: why for name, why in (row.needs if row else {}).items() if not granted[name]}
    if row and missing:
        where = {name: f"network.{name}" if name == "host_network" else f"security.{name}" for name in missing}
        listed = "; ".join(f"kubernetes.{where[name]}: true ({why})" for name, why in missing.items())
        message = f"network profile {row.name} needs rights that the job does not give itself"
        at = ("resources", "fabric") if asked.profile == "auto" else (*AT, "profile")
        yield Problem(message, f"{listed}; or kubernetes.network.profile: none", at)


def notes(spec: JobSpec, variables: set[str]) -> Iterator[str]:
    """What a pod may lack. `variables`: names that are exported anyway."""
    asked, resources = spec.kubernetes.network, spec.resources
    row = profile(spec)
    granted = {"allow_ipc_lock": spec.kubernetes.security.allow_ipc_lock or spec.kubernetes.security.privileged,
               "claim_template": asked.claim_template or asked.claims, "claims": asked.claims}  # fmt: skip
    for name, why in (row.advises(_gpu(spec)) if row else {}).items():
        if not granted[name]:
            section = "network" if name in ("claim_template", "claims") else "security"
            more = "" if section == "network" or spec.kubernetes.security.root else ", with security.root"
            yield f"network profile {row.name if row else ''}: {why}: kubernetes.{section}.{name}{more}"
    many = resources.nodes > 1 and resources.gpus_per_node > 0 and resources.fabric
    given = asked.resources or asked.multus or asked.host_network or asked.claim_template or asked.claims
    if many and asked.profile == "auto" and row is None and not given:
        fabric = facts.fabric(str(resources.fabric)).name
        if fabric not in SLOW:
            yield (
                f"fabric {fabric} names no device that pods could ask for, and without one NCCL is on TCP: "
                "kubernetes.network.resources: {rdma/NAME: N} as `kubectl describe node` has it, or network.profile"
            )
    if asked.host_network and "NCCL_SOCKET_IFNAME" not in variables:
        yield (
            "host_network shows NCCL every interface of the node, bridges of containers too: "
            "set env.NCCL_SOCKET_IFNAME to the one between nodes"
        )


def port(name: str) -> int:
    """Of a job on its nodes' own network: two jobs on one node do not meet. demo has 29412 and 29413."""
    return FIRST_PORT + 2 * (int(hashlib.sha256(name.encode()).hexdigest(), 16) % JOBS)
