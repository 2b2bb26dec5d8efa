"""A pod's template as fields of a job file; what no field says stays in the object's own words."""

from __future__ import annotations

import copy
import json
import math
import posixpath
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar, Protocol

from launcher.backends.kubernetes import network, patch
from launcher.backends.kubernetes.network import Profile
from launcher.backends.kubernetes.pod import LOGS, MOUNT, SHM
from launcher.errors import Path
from launcher.imports import Kind, programs
from launcher.spec.check import NOT_YOUR_PREFIXES, NOT_YOURS, looks_secret
from launcher.spec.kubernetes import MapKey, PodField, PodVariable
from launcher.spec.words import DnsName, Label, LabelKey, Name, Token, Variable
from launcher.yamldoc import Matches

Object = dict[str, Any]
TRAINS = ("pytorch", "node", "trainer", "mpi", "worker", "main", "train", "training")  # names, the surest first
SLICES = {
    "kueue.x-k8s.io/podset-slice-required-topology": "slice_topology",
    "kueue.x-k8s.io/podset-slice-size": "slice_size",
    "kueue.x-k8s.io/podset-unconstrained-topology": "unconstrained",
}
TAS = {"kueue.x-k8s.io/podset-required-topology": True, "kueue.x-k8s.io/podset-preferred-topology": False}
NAMING = {  # what names something that is called otherwise now, or is no more
    "kubectl.kubernetes.io/default-container": "the container that trains is the pod's only one, or the first",
    **dict.fromkeys(["pod-group-name", "pod-group.scheduling.sigs.k8s.io", "scheduling.x-k8s.io/pod-group",
                     "scheduling.k8s.io/group-name", "scheduling.volcano.sh/group-name",
                     "pod-group.scheduling.sigs.k8s.io/name"],
                    "that PodGroup is not the one of the rendered pods"),
}  # fmt: skip
OPERATORS = re.compile(
    r"(training\.kubeflow\.org|jobset\.sigs\.k8s\.io|batch\.kubernetes\.io|trainer\.kubeflow\.org|volcano\.sh)/.*"
    r"|(job-name|controller-uid|batch\.volcano\.sh/.*|scheduling\.k8s\.io/group-name|pod-template-hash)"
    r"|app\.kubernetes\.io/(name|component|managed-by)|kueue\.x-k8s\.io/.*|scheduling\.x-k8s\.io/pod-group"
)
WAITS = re.compile(r"nslookup|getent|until\b|\bwait|nc -z|dig |ping -c|/dev/tcp|host \$|kubectl-delivery|ready")
OWN = re.compile(  # what an init container waits for where it waits for the pods of the job itself
    r"(?i)\b(MASTER|head|leader|launcher|worker)s?(\b|[-_])|\bJOB_COMPLETION_INDEX|hostfile|\bVC_|kubectl-delivery|peers?\b"
)
DOMAIN = re.compile(r"(?i)channel|imex|domain|nvl|mnnvl")  # names of a ComputeDomain's claim
WHOLES = {"configMapRef": "env_from", "secretRef": "secret_env_from"}
DAEMONS = ("tcpx-daemon", "tcpxo-daemon")
RESERVED = ("bundle", "checkpoints", "code", "code-secret", "shm")  # names of dslaunch's own volumes
# Which GPU a node selector's label, its value, or an instance type means; the sellers' documentation says so.
GPUS = (
    (r"h100-mega|a3-megagpu|a3-highgpu|p5\.48xlarge|ND96is.*H100|BM\.GPU\.H100|H100-80GB-HBM3|nvidia-h100-80gb|gd-8xh100"
     r"|H100_NVLINK", "h100-80gb"),
    (r"h200-141|a3-ultragpu|p5en?\.48xlarge|ND96is.*H200|BM\.GPU\.H200|NVIDIA-H200|gd-8xh200", "h200-141gb"),
    (r"gb300|a4x-maxgpu", "gb300-279gb"),
    (r"nvidia-gb200|a4x-|BM\.GPU\.GB200|gb200-4x|NVIDIA-GB200|p6e-gb200", "gb200-186gb"),
    (r"nvidia-b200|a4-highgpu|p6-b200|BM\.GPU\.B200|NVIDIA-B200|b200-8x", "b200-180gb"),
    (r"p4de\.24xlarge|a100-80gb|A100-SXM4-80GB|BM\.GPU\.A100|ND96am?sr_A100_v4|a2-ultragpu", "a100-80gb"),
    (r"p4d\.24xlarge|nvidia-tesla-a100|A100-SXM4-40GB|BM\.GPU4\.8|a2-(high|mega)gpu|ND96asr_v4", "a100-40gb"),
    (r"MI300X", "mi300x-192gb"),
    (r"p3dn\.|V100-SXM2-32GB", "v100-32gb"),
    (r"p3\.|V100-SXM2-16GB|nvidia-tesla-v100", "v100-16gb"),
    (r"g5\.|A10G", "a10g-24gb"),
    (r"g6e\.|L40S", "l40s-48gb"),
    (r"g6\.|nvidia-l4\b|NVIDIA-L4\b", "l4-24gb"),
)  # fmt: skip
GPU = re.compile(r"(nvidia\.com/(gpu|mig-.*|gpu\..*)|amd\.com/gpu|gpu\.intel\.com/.*|.*/vgpu|.*/gpu)\Z")
UNITS = {"": 1, "m": Fraction(1, 1000), **{unit: 10 ** (3 * at) for at, unit in enumerate("kMGTPE", 1)},
         **{f"{unit}i": 2 ** (10 * at) for at, unit in enumerate("KMGTPE", 1)}}  # fmt: skip


class Job(Protocol):
    """Where fields and notes go."""

    fields: dict[str, Any]

    def put(self, path: Path, value: Any, line: int = 0, what: str = "") -> None: ...
    def note(self, kind: Kind, message: str, line: int = 0) -> None: ...
    def fill(self, path: Path, message: str, line: int = 0) -> None: ...
    def drop(self, path: Path) -> None: ...


def quantity(text: Any) -> Fraction | None:
    """quantity("1500Gi") is 1500 x 2^30; None for what is no Kubernetes quantity."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?|\.[0-9]+)([eE][0-9]+)?([kMGTPE]i?|Ki|m)?", str(text))
    if not match or (match[2] and match[3]):
        return None
    return Fraction(match[1] + (match[2] or "")) * Fraction(UNITS[match[3] or ""])


def memory(text: Any) -> str | None:
    """As a job file has it: 1500Gi is 1500G, 500G of 10^9 bytes is 476837M."""
    size = quantity(text)
    if size is None or size < 2**20:
        return None
    for unit, one in (("T", 2**40), ("G", 2**30), ("M", 2**20)):
        if size % one == 0:
            return f"{size // one}{unit}"
    return f"{size // 2**20}M"


def trains(pod: Mapping[str, Any]) -> Object:
    """The container that trains: by its name, else the one with GPUs, else the first."""
    boxes = [one for one in pod.get("containers") or () if isinstance(one, dict)]
    named = {one.get("name"): one for one in reversed(boxes)}
    for name in TRAINS[:3]:
        if name in named:
            return named[name]
    return next((one for one in boxes if gpus(one)[1]), boxes[0] if boxes else {})


def amounts(box: Mapping[str, Any]) -> Object:
    given = box.get("resources") or {}
    return {**_said(given.get("requests")), **_said(given.get("limits"))}


def _said(asked: Any) -> Object:
    """Without what has no amount: `cpu:` alone asks for nothing."""
    return {name: amount for name, amount in (asked or {}).items() if amount is not None}


def gpus(box: Mapping[str, Any]) -> tuple[str, Any]:
    """The resource that a GPU is, and how many, as it stands there."""
    given = amounts(box)
    found = [(name, count) for name, count in given.items() if GPU.match(name)]
    found = found or [(name, count) for name, count in given.items() if patch.is_gpu(name)]
    return found[0] if found else ("nvidia.com/gpu", 0)


def takes(kind: Any, text: Any) -> bool:
    """Whether a field of this kind takes a text: takes(Name, "worker")."""
    pattern = next(one for one in kind.__metadata__ if isinstance(one, Matches))
    return isinstance(text, str) and pattern.regex.fullmatch(text) is not None


class Pod:
    """Reads one template into a job. `rest` is what no field took: metadata and a spec, for the patch."""

    def __init__(self, job: Job, template: Mapping[str, Any], *, nodes: int, own: Mapping[str, str],
                 files: Mapping[str, Mapping[str, str]], kind: str, container: str,
                 runtime: str = "", called: tuple[str, ...] = ()) -> None:  # fmt: skip
        self.job, self.nodes, self.files = job, nodes, files
        template = copy.deepcopy(dict(template))
        self.metadata: Object = template.get("metadata") or {}
        self.pod: Object = template.get("spec") or {}
        self.box: Object = trains(self.pod)
        self.beside: list[Object] = [one for one in self.pod.pop("containers", None) or () if one is not self.box]
        self.own = dict(own)  # labels of the job, which its pods have too
        self.kind, self.container, self.runtime = kind, container, runtime
        self.called = called  # names of the object that the pods are of
        self.earlier: dict[str, set[str]] = {}  # by a variable: those before it, which Kubernetes puts into it
        self.rest_pod: Object = {}
        self.rest_box: Object = {}
        self.rest_first: list[Object] = []
        self.volumes: list[Object] = []  # rows of kubernetes.volumes
        self.exports: dict[str, str] = {}  # as written: $(NAME) is Kubernetes' own
        self.paths: dict[str, str] = {}  # files of ConfigMaps by where the pod has them
        self.profile: Profile | None = None
        self.fabric = ""
        self.gpus = 0
        self.cpus: int | None = None
        self.text = json.dumps(template, default=str)
        self.gone: set[str] = set()  # containers and volumes of which a note speaks as a whole

    # -- what is said

    def put(self, *path: str | int, value: Any, what: str = "") -> None:
        self.job.put(("kubernetes", *path), value)
        if what:
            self.job.note("carried", f"{what} -> kubernetes.{'.'.join(map(str, path))}")

    def out(self, message: str) -> None:
        self.job.note("left out", message)

    def read(self) -> None:
        self.resources()
        self.network()
        self.labels()
        self.who()
        self.rights()
        self.placing()
        self.mounts()
        self.neighbours()
        self.variables()
        self.others()

    @property
    def rest(self) -> Object:
        """Of the template, with the names that dslaunch's own has."""
        pod = dict(self.rest_pod)
        if self.rest_box:
            pod["containers"] = [{"name": self.container, **self.rest_box}]
        if self.rest_first:
            pod["initContainers"] = self.rest_first
        return {"spec": pod} if pod else {}

    # -- how much

    def resources(self) -> None:
        given, box = amounts(self.box), self.box.pop("resources", None) or {}
        limits, requests = _said(box.get("limits")), _said(box.get("requests"))
        for name in dict.fromkeys([*requests, *limits]):
            either = {**limits, **requests}[name]
            asked, limit = quantity(requests.get(name, either)), quantity(limits.get(name, either))
            typed = name in ("cpu", "memory")
            if typed and name in requests and (name not in limits or asked != limit):
                given[name] = requests[name]
                value = str(limits.get(name, "none"))
                self.put(f"{name}_limit", value=value, what=f"{name} {requests[name]}, limit {value}")
            elif name not in limits and "/" in name:
                self.job.note("carried", f"{name} {requests[name]} without a limit: of a device it is the request")
            elif name not in limits:
                self.out(f"{name} {requests[name]} without a limit: a pod here may use no more than it asks for")
            elif asked != limit:
                self.out(f"requests of {name} {requests[name]}: a pod here asks for its limit, {limits[name]}")
        name, count = gpus({"resources": {"limits": given}})
        given.pop(name, None)
        self.gpus = self.number(count, ("resources", "gpus_per_node"), name, 1)
        if name != "nvidia.com/gpu":
            self.put("gpu_resource", value=name, what=name)
        cores = quantity(given.pop("cpu", None))
        if cores is not None and cores >= 1:
            self.cpus = int(cores)
            self.job.put(("resources", "cpus_per_node"), int(cores))
            if cores != int(cores):
                self.out(f"a part of a core: {int(cores)} of cpu {float(cores):g}")
        elif cores is not None:
            self.out(f"cpu {amounts({'resources': box}).get('cpu')}: less than a core")
            self.job.drop(("kubernetes", "cpu_limit"))
        if (asked := given.pop("memory", None)) is not None:
            size = memory(asked)
            if size:
                self.job.put(("resources", "memory"), size)
            else:
                self.out(f"memory {asked}: not a size that is known before the template is filled in")
                self.job.drop(("kubernetes", "memory_limit"))
        if (disk := given.pop("ephemeral-storage", None)) is not None:
            self.put("ephemeral_storage", value=str(disk))
        if (pages := given.pop("hugepages-2Mi", None)) is not None:
            self.put("network", "hugepages", value=str(pages), what="hugepages-2Mi")
        self.devices = given
        claims = box.get("claims") or []
        rows = self.pod.pop("resourceClaims", None) or []
        whole_ones = {claim.get("name") for claim in claims if set(claim) == {"name"}}
        plain = [row for row in rows if row.get("resourceClaimTemplateName") and row.get("name") in whole_ones]
        names = list(dict.fromkeys(str(row["resourceClaimTemplateName"]) for row in plain))
        if plain and all(takes(DnsName, name) for name in names):
            channel = next((row for row in plain if DOMAIN.search(json.dumps(row))), None)
            channel = channel or (plain[0] if len(plain) == 1 else None)
            if channel:
                first = str(channel["resourceClaimTemplateName"])
                self.put("network", "claim_template", value=first, what="a resource claim")
                names.remove(first)
                self.imex = True
            if names:
                self.put("network", "claims", value=names, what="resource claims")
            gone = {row.get("name") for row in plain}
            rows = [row for row in rows if row not in plain]
            claims = [claim for claim in claims if claim.get("name") not in gone]
        if rows:
            self.rest_pod["resourceClaims"] = rows
        if claims:
            self.rest_box["resources"] = {"claims": claims}

    imex = False

    def number(self, value: Any, path: Path, what: str, other: int) -> int:
        """A count; one that a template has yet to fill in is the user's to say."""
        size = quantity(value)
        if size is not None and size == int(size):
            return int(size)
        self.job.fill(path, f"{what} is {value} there, which only filling in the template tells")
        return other

    # -- how it reaches the others

    def network(self) -> None:
        notes = self.metadata.get("annotations") or {}
        self.fabric = programs.fabric(self.spoken())[0]
        for name in list(self.devices):
            if name.startswith("networking.gke.io"):
                del self.devices[name]  # GKE adds them to what has the annotation
        row = self.known()
        hosted = bool(row and row.how == "gke" and self.pod.get("hostNetwork") is True)
        if row and hosted:
            why = f"hostNetwork: what pods have for {row.title} stays as the manifest has it"
            self.fabric = row.fabrics[0] if row.fabrics else self.fabric
            self.put("network", "profile", value="none", what=why)
            row = None
        if row and row.fabrics and not any(self.fabric == one for one in row.fabrics):
            self.fabric = row.fabrics[0]
        if self.imex and not row and re.search(r"(?i)gb[23]00|MNNVL|compute-?domain|imex", self.text):
            self.fabric = "nvl72"
        if not self.fabric and self.gpus and self.nodes > 1 and not self.runtime:
            self.guess(row)
        automatic = bool(self.fabric and self.gpus and self.nodes > 1)
        if row:
            if not (automatic and self.fabric in row.fabrics):
                self.put("network", "profile", value=row.name)
            self.profile = row
            self.job.note("carried", f"what pods need for {row.title} -> network profile {row.name}")
        elif automatic and not hosted and any(self.fabric in one.fabrics for one in network.profiles().values()
                                              if one.name != "compute-domain"):  # fmt: skip
            self.put("network", "profile", value="none", what=f"none of the devices of {self.fabric}")
        if row and row.resource and row.resource["name"] in self.devices:
            name = row.resource["name"]
            count = self.number(self.devices.pop(name), ("kubernetes", "network", "devices"), name, 1)
            self.put("network", "devices", value=count, what=name)
        for name, count in self.devices.items():
            if "/" in name:
                amount = self.number(count, ("kubernetes", "network", "resources", name), name, 1)
                self.put("network", "resources", name, value=str(amount), what=name)
            else:
                self.rest_box.setdefault("resources", {}).setdefault("limits", {})[name] = count
                self.rest_box["resources"].setdefault("requests", {})[name] = count
        self.attached(notes, row)
        if self.pod.pop("hostNetwork", None) is True:
            self.put("network", "host_network", value=True, what="hostNetwork")
            if self.pod.get("dnsPolicy") in ("ClusterFirstWithHostNet", "ClusterFirst"):
                self.pod.pop("dnsPolicy")
        if self.pod.get("dnsPolicy") in ("ClusterFirst",):
            self.pod.pop("dnsPolicy")
        if self.fabric:
            self.job.put(("resources", "fabric"), self.fabric)
        told = json.dumps([self.pod.get("nodeSelector"), self.pod.get("affinity")], default=str)
        told += " ".join(self.called) if self.imex else ""  # what such machines are often called by, and nowhere else
        kind = next((gpu for pattern, gpu in GPUS if re.search(pattern, told, re.IGNORECASE)), None)
        if kind and self.gpus:
            self.job.put(("resources", "gpu"), kind)

    def guess(self, row: Profile | None) -> None:
        """Of a manifest that speaks of no network, by what its pods ask for."""
        devices = [name for name in self.devices if re.search(r"rdma|hca|infiniband|hostdev|/ib|mlnx|roce", name)]
        if devices or row:
            self.fabric = "roce" if any("roce" in name for name in devices) else "infiniband"
            why = f"{', '.join(devices)} among its resources" if devices else "RDMA"
            self.job.note("carried", f"{why} -> resources.fabric: {self.fabric}")
        elif found := re.search(r"(?i)roce|rdma|infiniband|\bib\d*\b|hostdev|sriov", self.attached_by_name()):
            self.fabric = "roce" if found[0].lower() == "roce" else "infiniband"
            self.job.note("carried", f"networks called {found[0]} -> resources.fabric: {self.fabric}")
        elif self.metadata.get("annotations", {}).get(network.MULTUS) or self.pod.get("hostNetwork"):
            self.job.note("left out", "which fabric it is that the pods reach: resources.fabric says it")
        elif self.gpus >= 8 or (self.box.get("securityContext") or {}).get("privileged"):
            self.fabric = "ethernet"
            whose = f"pods of {self.gpus} GPUs" if self.gpus >= 8 else "privileged pods"
            self.job.fill(("resources", "fabric"), f"a guess: nothing in the manifest names a network, and {whose} "
                          "mostly reach a faster one; `dslaunch presets --fabrics` has their names")  # fmt: skip
        else:
            self.fabric = "ethernet"
            self.job.note("carried", "its pods ask for no device of a fabric -> resources.fabric: ethernet")

    def attached_by_name(self) -> str:
        """The networks that Multus attaches, as they are called."""
        return str((self.metadata.get("annotations") or {}).get(network.MULTUS, ""))

    def spoken(self) -> str:
        """Variables and commands, as lines in which words of a fabric are looked for."""
        rows = [f"{one.get('name')}={one.get('value')}" for one in self.box.get("env") or () if isinstance(one, dict)]
        rows += [str(word) for word in (*(self.box.get("command") or ()), *(self.box.get("args") or ()))]
        rows += [str((one.get("hostPath") or {}).get("path")) for one in self.pod.get("volumes") or ()]
        return "\n".join(rows)

    def known(self) -> Profile | None:
        """The profile whose devices, daemons or directories the pod has."""
        rows = network.profiles()
        words = " ".join([self.text, *(f"{one.get('name')} {one.get('image')}" for one in self.beside)])
        if "gpudirect-tcpxo" in words or "tcpxo-daemon" in words:
            return rows["gcp-tcpxo"]
        if "gpudirect-tcpx/" in words or "tcpx-daemon" in words:
            return rows["gcp-tcpx"]
        hosts = {str((one.get("hostPath") or {}).get("path")).rstrip("/") for one in self.pod.get("volumes") or ()}
        if "/home/kubernetes/bin/gib" in hosts:
            return rows["gcp-gib"]
        found = [row for row in rows.values() if row.resource and row.resource["name"] in self.devices]
        if len(found) > 1:  # rdma/ib is CoreWeave's and Azure's
            one = quantity(self.devices[found[0].resource["name"]]) == 1
            found = [row for row in found if (row.resource.get("other") == 1) is one]
        if found:
            return found[0]
        host = self.pod.get("hostNetwork") and (self.box.get("securityContext") or {}).get("privileged")
        oracle = self.fabric == "oci" or re.search(r"BM\.GPU|oci\.oraclecloud", words)
        if host and "/dev/infiniband" in hosts and oracle and self.gpus:
            return rows["oci"]
        return rows["compute-domain"] if self.imex and re.search(r"(?i)gb[23]00|MNNVL|imex", words) else None

    def attached(self, notes: Object, row: Profile | None) -> None:
        """Annotations that attach networks."""
        interfaces = notes.get(network.GKE)
        if interfaces is not None and row and row.how == "gke":
            given = [str(one["network"]) for one in _json(interfaces) if isinstance(one, dict) and "network" in one]
            names = [name for name in given if name != "default"]
            gpu = next((gpu for pattern, gpu in GPUS if re.search(pattern, self.text, re.IGNORECASE)), "")
            usual = row.networks.get("by", {}).get(gpu, row.networks.get("other", []))
            fewer = [name for name in names if name in usual]  # the second gVNIC is not a pod's
            leading = row.first > 1 and len(names) == len(usual) + 1  # the gVNIC, in front
            if leading or (names and not usual) or (names != usual and fewer != usual and len(names) == len(usual)):
                self.put("network", "multus", value=names, what="the networks of its interfaces")
            elif names != usual and fewer != usual:
                self.out(f"networks {', '.join(map(str, names))}: profile {row.name} attaches {', '.join(usual)}")
            notes.pop(network.GKE)
            notes.pop(network.GKE_DEFAULT, None)
            listed = f"annotations {network.GKE}, {network.GKE_DEFAULT}"
            self.job.note("carried", f"{listed}: network profile {row.name}")
        if row:
            for name in row.annotations:
                if notes.pop(name, None):
                    self.job.note("carried", f"annotation {name}: network profile {row.name}")
        if network.MULTUS in notes:
            names = _networks(str(notes[network.MULTUS]))
            if names and all(takes(Token, name) for name in names):
                notes.pop(network.MULTUS)
                each = row.networks.get("each") if row else None
                if not each or any(name != each for name in names):
                    self.put("network", "multus", value=names, what=f"Multus' networks, {network.MULTUS},")

    # -- names

    def labels(self) -> None:
        for section, field in (("labels", "pod_labels"), ("annotations", "pod_annotations")):
            for key, value in (self.metadata.get(section) or {}).items():
                value = _text(value)
                if section == "labels" and self.own.get(key) == value:
                    continue
                if key in NAMING:
                    self.out(f"{section[:-1]} {key} {value} of the pods: {NAMING[key]}")
                    continue
                if key in TAS and section == "annotations":
                    self.put("queue", "topology", value=value, what=key)
                    if not TAS[key]:
                        self.put("queue", "topology_required", value=False)
                elif key in SLICES and section == "annotations":
                    size = whole(value) if SLICES[key] == "slice_size" else None
                    self.put("queue", SLICES[key], value=size or (value == "true" or value), what=key)
                elif OPERATORS.fullmatch(key):
                    self.out(f"{section[:-1]} {key} {value} of the pods: the operator's own, or dslaunch's")
                elif takes(LabelKey, key) and (section == "annotations" or takes(Label, value)):
                    self.put(field, key, value=value)
                else:
                    self.out(f"{section[:-1]} {key} of the pods: {value!r} is none that Kubernetes takes")

    # -- who

    def who(self) -> None:
        pod, box = self.pod.pop("securityContext", None) or {}, self.box.pop("securityContext", None) or {}
        put, rest = self.put, {}
        user = box.pop("runAsUser", pod.pop("runAsUser", None))
        group = box.pop("runAsGroup", pod.pop("runAsGroup", None))
        not_root = box.pop("runAsNonRoot", pod.pop("runAsNonRoot", None))
        pod.pop("runAsUser", None), pod.pop("runAsGroup", None), pod.pop("runAsNonRoot", None)
        capabilities = box.pop("capabilities", None) or {}
        added = [str(name).removeprefix("CAP_") for name in capabilities.get("add") or ()]
        privileged = box.pop("privileged", None) is True
        if privileged:
            put("security", "privileged", value=True, what="privileged")
        if "IPC_LOCK" in added:
            put("security", "allow_ipc_lock", value=True, what="IPC_LOCK")
            added.remove("IPC_LOCK")
        if added:
            put("security", "capabilities", value=added, what="capabilities")
        needs = self.profile.needs if self.profile else {}
        if "allow_ipc_lock" in needs and not (privileged or "IPC_LOCK" in (capabilities.get("add") or ())):
            put("security", "allow_ipc_lock", value=True)
        rights = privileged or capabilities.get("add") or "root" in needs
        if user == 0 or (user is None and not_root is not True and rights):
            put("security", "root", value=True)
            why = "runAsUser: 0" if user == 0 else "rights are the root user's, and nothing said another"
            self.job.note("carried", f"{why} -> kubernetes.security.root")
            if user == 0:
                put("security", "run_as_user", value=0)
        elif user is not None:
            put("security", "run_as_user", value=user)
        elif not_root is not True and self.kind != "trainjob" and (why := self.roots()):
            put("security", "root", value=True)
            self.job.note("carried", f"{why}, and the image's user is whoever it is -> kubernetes.security.root")
        elif not_root is True and self.kind != "trainjob":
            put("security", "run_as_user", value="image", what="runAsNonRoot: the image's own user")
        elif self.kind != "trainjob":
            self.out("the image's user, mostly root: pods run as user 1000 here, and what only root may write to "
                     "fails; security.root: true is as it was, run_as_user: UID another")  # fmt: skip
        if group is not None:
            put("security", "run_as_group", value=group)
        if (volumes := pod.pop("fsGroup", None)) is not None:
            put("security", "fs_group", value=volumes)
        if groups := pod.pop("supplementalGroups", None):
            put("security", "supplemental_groups", value=groups, what="supplementalGroups")
        if pod.get("fsGroupChangePolicy") == "OnRootMismatch":
            pod.pop("fsGroupChangePolicy")
        profile = box.pop("seccompProfile", None) or pod.pop("seccompProfile", None) or {}
        pod.pop("seccompProfile", None)
        if profile.get("type") not in (None, "RuntimeDefault"):
            put(
                "security", "seccomp", value=profile.get("localhostProfile") or profile["type"], what="seccompProfile"
            )
        escalation = box.pop("allowPrivilegeEscalation", None)
        if escalation is True and not privileged and "SYS_ADMIN" not in added:
            self.out("allowPrivilegeEscalation: true: nothing that trains gains rights by it")
        if box.get("readOnlyRootFilesystem") is False:
            box.pop("readOnlyRootFilesystem")
        for name, left in (("pod", pod), ("box", box)):
            if left:
                rest[name] = left
        if "pod" in rest:
            self.rest_pod["securityContext"] = rest["pod"]
        if "box" in rest:
            self.rest_box["securityContext"] = rest["box"]
        if self.pod.pop("hostIPC", None) is True:
            put("security", "host_ipc", value=True, what="hostIPC")
        if self.pod.pop("hostPID", None) is True:
            put("security", "host_pid", value=True, what="hostPID")

    def roots(self) -> str:
        """Why pods that name no user are the root user's: what they write to is."""
        sources = {one.get("name"): one for one in self.pod.get("volumes") or () if isinstance(one, dict)}
        for mount in self.box.get("volumeMounts") or ():
            host = ((sources.get(mount.get("name")) or {}).get("hostPath") or {}).get("path")
            if host and mount.get("readOnly") is not True and not str(host).startswith(("/dev", "/sys", "/proc")):
                return f"hostPath {host} is written, which a node's root user owns"
        words = [*(self.box.get("command") or ()), *(self.box.get("args") or ())]
        words += [row.get("value") for row in self.box.get("env") or () if isinstance(row, dict)]
        words += [row.get("mountPath") for row in self.box.get("volumeMounts") or () if isinstance(row, dict)]
        found = re.search(r"(?<![\w.-])/root(/[\w./-]*)?(?![\w-])", "\n".join(map(str, [*words, self.spoken()])))
        return f"{found[0]} is the root user's" if found else ""

    def rights(self) -> None:
        names = {"priorityClassName": "priority_class", "runtimeClassName": "runtime_class"}
        for theirs, ours in names.items():
            if value := self.pod.pop(theirs, None):
                self.put(ours, value=value, what=theirs)
        account = self.pod.pop("serviceAccountName", None) or self.pod.pop("serviceAccount", None)
        self.pod.pop("serviceAccount", None)
        if account and account != "default":
            self.put("service_account", value=account, what="serviceAccountName")
        token = self.pod.pop("automountServiceAccountToken", None)
        if token is True and self.kind != "trainjob":
            self.put("service_account_token", value=True, what="automountServiceAccountToken")
        elif account and account != "default" and token is None and self.kind != "trainjob":
            # what speaks to the cloud as that account has its own token; Kubernetes' API is no rank's
            self.out("a token for Kubernetes' API: where ranks ask the API, kubernetes.service_account_token")
        secrets = [row.get("name") for row in self.pod.pop("imagePullSecrets", None) or ()]
        if secrets:
            self.put("image_pull_secrets", value=secrets, what="imagePullSecrets")
        grace = self.pod.pop("terminationGracePeriodSeconds", None)
        if isinstance(grace, int) and grace >= 30 and self.kind != "trainjob":
            self.put("grace", value=grace, what="terminationGracePeriodSeconds")
        elif grace is not None:
            self.out(f"terminationGracePeriodSeconds {grace}: pods get what saving takes")
        if policy := self.box.pop("imagePullPolicy", None):
            self.put("image_pull_policy", value=policy, what="imagePullPolicy")

    # -- where

    def placing(self) -> None:
        for key, value in (self.pod.pop("nodeSelector", None) or {}).items():
            self.put("node_selector", key, value=_text(value))
        rows = []
        for one in self.pod.pop("tolerations", None) or ():
            row = {"key": one.get("key"), "operator": one.get("operator") or "Equal",
                   "value": None if one.get("value") in (None, "") else _text(one["value"]),
                   "effect": one.get("effect") or None, "seconds": one.get("tolerationSeconds")}  # fmt: skip
            if row["operator"] == "Exists":
                row["value"] = None
            rows.append({name: value for name, value in row.items() if value is not None})
        if rows:
            self.put("tolerations", value=rows, what="tolerations")
        affinity = self.pod.pop("affinity", None) or {}
        left: Object = {}
        if node := affinity.get("nodeAffinity"):
            kept = self.node_affinity(node)
            left |= {"nodeAffinity": kept} if kept else {}
        terms: list[Object] = []
        for name, away in (("podAffinity", False), ("podAntiAffinity", True)):
            kept = self.pod_affinity(affinity.get(name) or {}, away, terms)
            left |= {name: kept} if kept else {}
        if terms:
            self.put("pod_affinity", value=terms, what="affinity to pods")
        if left:
            self.rest_pod["affinity"] = left
        if gates := [row.get("name") for row in self.pod.pop("schedulingGates", None) or ()]:
            self.put("scheduling_gates", value=gates, what="schedulingGates")
        self.spread()
        self.lookups()

    def lookups(self) -> None:
        """How the pod finds names: its DNS, and lines of /etc/hosts."""
        config, policy = self.pod.get("dnsConfig") or {}, self.pod.get("dnsPolicy")
        options = {str(one.get("name")): _text(one.get("value") or "") for one in config.get("options") or ()}
        row = {"policy": policy, "nameservers": config.get("nameservers"), "searches": config.get("searches"),
               "options": options}  # fmt: skip
        if row := {key: value for key, value in row.items() if value}:
            self.pod.pop("dnsConfig", None), self.pod.pop("dnsPolicy", None)
            self.put("dns", value=row, what=" and ".join(["dnsPolicy"] * bool(policy) + ["dnsConfig"] * bool(config)))
        hosts: dict[str, list[str]] = {}
        for one in self.pod.pop("hostAliases", None) or ():
            hosts.setdefault(str(one.get("ip")), []).extend(map(str, one.get("hostnames") or ()))
        if hosts:
            self.put("host_aliases", value=hosts, what="hostAliases")

    def node_affinity(self, given: Object) -> Object:
        rows: list[Object] = []
        left: Object = {}
        required = "requiredDuringSchedulingIgnoredDuringExecution"
        preferred = "preferredDuringSchedulingIgnoredDuringExecution"
        terms = (given.get(required) or {}).get("nodeSelectorTerms") or []
        if len(terms) == 1:
            fields = terms[0].get("matchFields") or []
            away = [row["values"][0] for row in fields if row.get("key") == "metadata.name"
                    and row.get("operator") == "NotIn" and len(row.get("values") or ()) == 1]  # fmt: skip
            if len(away) == len(fields):
                rows += [_expression(row) for row in terms[0].get("matchExpressions") or ()]
                if away:
                    self.put("exclude", value=away)
            else:
                left[required] = given[required]
        elif terms and all(set(term) == {"matchExpressions"} for term in terms):  # one of several is enough
            either = [[_expression(row) for row in term["matchExpressions"]] for term in terms]
            self.put("node_affinity_any", value=either, what="affinity to nodes, of which one term is enough")
        elif terms:
            left[required] = given[required]
        for one in given.get(preferred) or ():
            expressions = (one.get("preference") or {}).get("matchExpressions") or []
            if len(expressions) == 1 and not one["preference"].get("matchFields"):
                rows.append({**_expression(expressions[0]), "weight": one.get("weight", 1)})
            else:
                left.setdefault(preferred, []).append(one)
        if rows:
            self.put("node_affinity", value=rows, what="affinity to nodes")
        return left

    def pod_affinity(self, given: Object, away: bool, rows: list[Object]) -> Object:
        left: Object = {}
        for when, terms in given.items():
            if not when.endswith("DuringSchedulingIgnoredDuringExecution"):
                left[when] = terms
                continue
            for one in terms or ():
                term = one.get("podAffinityTerm") if when.startswith("preferred") else one
                row = self.pod_term(term or {}, away)
                if row is None:
                    left.setdefault(when, []).append(one)
                else:
                    rows.append({**row, **({"weight": one["weight"]} if when.startswith("preferred") else {})})
        return left

    def pod_term(self, term: Object, away: bool) -> Object | None:
        labels = self.selected(term.get("labelSelector"))
        if labels is None or set(term) - {"topologyKey", "labelSelector"}:
            return None
        ours = all(OPERATORS.fullmatch(key) or {**self.own, **(self.metadata.get("labels") or {})}.get(key) == value
                   for key, value in labels.items())  # fmt: skip
        row: Object = {"topology_key": term.get("topologyKey")}
        return {**row, **({} if ours else {"labels": labels}), **({"away": True} if away else {})}

    def selected(self, selector: Any) -> dict[str, str] | None:
        """Labels of a selector that takes single values; None for any other."""
        if not isinstance(selector, dict):
            return None
        found = {key: _text(value) for key, value in (selector.get("matchLabels") or {}).items()}
        for row in selector.get("matchExpressions") or ():
            if row.get("operator") != "In" or len(row.get("values") or ()) != 1:
                return None
            found[str(row["key"])] = _text(row["values"][0])
        return found

    def spread(self) -> None:
        rows, left = [], []
        for one in self.pod.pop("topologySpreadConstraints", None) or ():
            if set(one) <= {"topologyKey", "maxSkew", "whenUnsatisfiable", "labelSelector"}:
                row = {"topology_key": one.get("topologyKey"), "max_skew": one.get("maxSkew", 1)}
                if one.get("whenUnsatisfiable") == "ScheduleAnyway":
                    row["when_unsatisfiable"] = "ScheduleAnyway"
                rows.append(row)
            else:
                left.append(one)
        if rows:
            self.put("spread", value=rows, what="topologySpreadConstraints")
        if left:
            self.rest_pod["topologySpreadConstraints"] = left

    # -- volumes

    def mounts(self) -> None:
        sources = {one.get("name"): one for one in self.pod.pop("volumes", None) or () if isinstance(one, dict)}
        taken: dict[str, str] = {}
        mounts = [one for one in self.box.pop("volumeMounts", None) or () if isinstance(one, dict)]
        blocks = {one.get("name") for box in (self.box, *self.beside) for one in box.get("volumeDevices") or ()}
        for name in [name for name in sources if name in blocks]:  # a block device has no mount
            self.rest_pod.setdefault("volumes", []).append(sources.pop(name))
        hosts = self.hosts()
        for mount in mounts:
            source = sources.get(mount.get("name"))
            if source is None:
                self.out(f"a mount of {mount.get('name')}, which is no volume of the pod")
                continue
            where = posixpath.normpath(str(mount.get("mountPath")))
            path = str((source.get("hostPath") or {}).get("path", "")).rstrip("/")
            if path and hosts.get(where) == path:
                brings = f"network profile {self.profile and self.profile.name}"
                self.job.note("carried", f"hostPath {path} at {where}: {brings}")
                continue
            if path and any("socket" in name and path == row["host_path"].rstrip("/") for name, row in
                            (self.profile.volumes if self.profile else {}).items()):  # fmt: skip
                brings = f"network profile {self.profile and self.profile.name} mounts it where its own daemon looks"
                self.job.note("carried", f"hostPath {path} at {where}: {brings}")
                continue
            if where == SHM:
                self.shm(source)
                continue
            if where.startswith((MOUNT, LOGS)):
                self.out(f"a mount at {where}: dslaunch's own place")
                continue
            self.mount(mount, source, taken)
        brought = {self.profile.volumes[name]["host_path"] for name in self.profile.volumes} if self.profile else ()
        first = [*self.beside, *(self.pod.get("initContainers") or ())]
        others = {one.get("name"): one for box in first for one in box.get("volumeMounts") or ()}
        for name, source in sources.items():
            path = str((source.get("hostPath") or {}).get("path", "")).rstrip("/")
            if name in taken or any(one.get("name") == name for one in mounts) or path in brought:
                continue
            if name in others and not self.brought(next(box for box in first if others[name] in
                                                        (box.get("volumeMounts") or ()))):  # fmt: skip
                self.mount({**others[name], "name": name}, source, taken)
                self.job.note("carried", f"volume {name} of a container beside: the ranks have it, too")
            elif name not in others:
                self.out(f"volume {name}: no container mounts it")
                self.gone.add(str(name))
        if self.volumes:
            self.put("volumes", value=self.volumes)
        self.names = taken

    names: Mapping[str, str] = {}

    def hosts(self) -> dict[str, str]:
        """Directories of the node that the profile brings, by where the ranks have them."""
        row = self.profile
        if row is None:
            return {}
        return {path: row.volumes[name]["host_path"].rstrip("/") for path, name in
                row.ranks.get("mounts", {}).items()}  # fmt: skip

    def shm(self, source: Object) -> None:
        empty = source.get("emptyDir")
        if isinstance(empty, dict) and empty.get("sizeLimit"):
            self.put("shm", value=str(empty["sizeLimit"]), what="an emptyDir in memory")
        elif isinstance(empty, dict):
            self.put("shm", value="none", what="shared memory without a size")
        else:
            self.out("shared memory of the node: the pod has its own, of kubernetes.shm")

    def mount(self, mount: Object, source: Object, taken: dict[str, str]) -> None:
        name, where = str(mount["name"]), str(mount.get("mountPath"))
        row = self.source(source)
        extra = {key: value for key, value in mount.items()
                 if key not in ("name", "mountPath", "readOnly", "subPath", "mountPropagation")}  # fmt: skip
        again = name in taken
        if row is None or "subPathExpr" in extra or (again and "scratch" in row):
            called = name if name not in RESERVED else f"{name}-1"
            if not again:
                self.rest_pod.setdefault("volumes", []).append({**source, "name": called})
                taken[name] = called
            self.rest_box.setdefault("volumeMounts", []).append({**mount, "name": taken[name]})
            return
        called = name if takes(Name, name) and name not in RESERVED else f"volume-{len(self.volumes)}"
        while called in {*(one["name"] for one in self.volumes), *(self.profile.volumes if self.profile else ())}:
            called = f"{called[:36]}-{len(self.volumes)}"
        taken.setdefault(name, called)
        read_only = mount.get("readOnly") is True or row.pop("read_only", False)
        made = {"name": called, "mount": where, **row}
        if mount.get("subPath"):
            made["sub_path"] = mount["subPath"]
        if read_only:
            made["read_only"] = True
        if mount.get("mountPropagation") not in (None, "None"):
            made["propagation"] = mount["mountPropagation"]
        self.volumes.append(made)
        if extra:
            self.rest_box.setdefault("volumeMounts", []).append({"mountPath": where, **extra})
        map_ = str((source.get("configMap") or {}).get("name"))
        for key, text in (self.files.get(map_) or {}).items() if source.get("configMap") else ():
            items = {one.get("key"): one.get("path") for one in (source["configMap"].get("items") or ())}
            if mount.get("subPath") in (None, "", items.get(key, key)):
                below = "" if mount.get("subPath") else items.get(key, key)
                self.paths[posixpath.normpath(posixpath.join(where, below))] = text

    def source(self, source: Object) -> Object | None:
        """The row of a volume, without its mount; None for what no field says."""
        kind = next((key for key in source if key != "name"), "emptyDir")
        given = source.get(kind) or {}
        if kind == "persistentVolumeClaim":
            return {"claim": given.get("claimName"), **({"read_only": True} if given.get("readOnly") else {})}
        if kind == "nfs":
            only = {"read_only": True} if given.get("readOnly") else {}
            return {"nfs": {"server": given.get("server"), "path": given.get("path")}, **only}
        if kind == "csi":
            row = {"driver": given.get("driver"), "attributes": given.get("volumeAttributes"),
                   "secret": (given.get("nodePublishSecretRef") or {}).get("name"),
                   "fs_type": given.get("fsType")}  # fmt: skip
            only = {"read_only": True} if given.get("readOnly") else {}
            return {"csi": {key: value for key, value in row.items() if value}, **only}
        if kind == "hostPath":
            return {"host_path": given.get("path"),
                    **({"host_path_type": given["type"]} if given.get("type") else {})}  # fmt: skip
        if kind == "emptyDir":
            row = {"size": given.get("sizeLimit"), "memory": given.get("medium") == "Memory" or None}
            huge = str(given.get("medium", "")).startswith("HugePages")
            return None if huge else {"scratch": {key: value for key, value in row.items() if value}}
        if kind == "ephemeral":
            claim = (given.get("volumeClaimTemplate") or {}).get("spec") or {}
            size = ((claim.get("resources") or {}).get("requests") or {}).get("storage")
            simple = claim.get("accessModes") in (None, ["ReadWriteOnce"]) and claim.get("storageClassName") and size
            return {"scratch": {"size": str(size), "storage_class": claim["storageClassName"]}} if simple else None
        if kind == "projected":
            return self.projected(given)
        known = {"name", "secretName", "items", "defaultMode", "optional"}
        if kind in ("configMap", "secret") and not set(given) - known:
            made = self.keys(kind, given)
            return made if made is None or not given.get("optional") else {**made, "optional": True}
        return None

    def projected(self, given: Object) -> Object | None:
        """Several ConfigMaps and Secrets in one place; tokens and the pod's own fields stay as they are."""
        parts = []
        for source in given.get("sources") or ():
            kind, inner = next(iter(source.items())) if len(source) == 1 else ("", {})
            if kind not in ("configMap", "secret") or set(inner) - {"name", "items", "optional"}:
                return None
            row = self.keys(kind, {**inner, "secretName": inner.get("name")})
            if row is None:
                return None
            parts.append({**row, **({"optional": True} if inner.get("optional") else {})})
        made = self.keys("configMap", {"defaultMode": given.get("defaultMode")})
        return None if made is None or not parts else {"projected": parts, **{
            key: value for key, value in made.items() if key == "default_mode"}}  # fmt: skip

    def keys(self, kind: str, given: Object) -> Object | None:
        """The row of a ConfigMap's or Secret's volume."""
        ours, name = ("config_map", given.get("name")) if kind == "configMap" else ("secret", given.get("secretName"))
        row: Object = {ours: name}
        items = given.get("items") or ()
        if any(set(item) != {"key", "path"} or not takes(MapKey, item["key"]) for item in items):
            return None
        if items:
            row["items"] = {item["key"]: item["path"] for item in items}
        mode = given.get("defaultMode")
        if isinstance(mode, int) and mode != 0o644:
            if not 0 <= mode <= 0o777:
                return None
            row["default_mode"] = f"0{mode:03o}"
        return row

    # -- what runs beside

    def brought(self, box: Object) -> bool:
        """Whether the profile runs this container itself."""
        images = [row["image"].rpartition(":")[0] for row in self.profile.sidecars] if self.profile else []
        named = self.profile is not None and box.get("name") in DAEMONS
        return named or str(box.get("image")).rpartition(":")[0] in images

    def neighbours(self) -> None:
        rows = []
        for box in [*({**one, "init": True} for one in self.pod.pop("initContainers", None) or ()), *self.beside]:
            first = box.pop("init", False) and box.pop("restartPolicy", None) != "Always"
            box.pop("restartPolicy", None)
            name, words = str(box.get("name")), [*(box.get("command") or ()), *(box.get("args") or ())]
            if self.brought(box):
                brings = f"network profile {self.profile and self.profile.name}"
                self.job.note("carried", f"container {name}: {brings} has its own, in place of {box.get('image')}")
                self.gone.add(name)
                continue
            said = " ".join(map(str, words))
            copies = re.search(r"\b(cp|git|curl|wget|aws|gsutil|rsync|chown|chmod|sysctl|pip|mount|prlimit)\b", said)
            waits = first and WAITS.search(f"{name} {said}") and not copies
            if waits and (not words or OWN.search(f"{name} {said}") or self.names_pods(said)):
                image = box.get("image")
                self.out(f"init container {name}: it waits for the others, and dslaunch does; its image was {image}")
                self.gone.add(name)
                continue
            if self.kind == "trainjob":
                self.out(f"container {name}: a TrainJob's pods have those of its runtime")
                self.gone.add(name)
                continue
            rows.append(self.sidecar(box, first=bool(first)))
        if rows:
            self.put("sidecars", value=rows, what="containers beside the ranks")

    def names_pods(self, text: str) -> bool:
        """Whether a text names pods of the job itself: trainer-0.trainer."""
        return any(re.search(rf"(?<![\w.-]){re.escape(name)}-[\w-]*[0-9$]", text) for name in self.called)

    def sidecar(self, box: Object, *, first: bool) -> Object:
        name = str(box.pop("name", ""))
        row: Object = {"name": name if takes(Name, name) else f"sidecar-{len(name)}"}
        row["image"] = box.pop("image", None)
        for key in ("command", "args"):
            if words := box.pop(key, None):
                row[key] = [str(word) for word in words]
        left: list[Object] = []
        for one in box.pop("env", None) or ():
            value = one.get("value")
            if value is not None and looks_secret(str(one.get("name")), _text(value)):
                self.out(f"{one['name']} of container {name}: a secret's value; a volume with secret: brings it")
            elif value is not None or "valueFrom" not in one:
                row.setdefault("env", {})[one.get("name")] = _text(value if value is not None else "")
            elif not self.referred(one, row, name):
                left.append(one)
        mounts = {}
        for one in box.pop("volumeMounts", None) or ():
            called = self.names.get(one.get("name"))
            plain = set(one) <= {"name", "mountPath", "readOnly"} and called not in mounts
            if str(one.get("mountPath")) == SHM:
                called, plain = "shm", True
            typed = called == "shm" or any(volume["name"] == called for volume in self.volumes)
            if called and plain and typed:
                mounts[called] = one["mountPath"]
            elif called:
                box.setdefault("volumeMounts", []).append({**one, "name": called})
        if mounts:
            row["mounts"] = mounts
        row |= self.wholes(box, box)
        asked = box.pop("resources", None) or {}
        limits, requests = _said(asked.get("limits")), _said(asked.get("requests"))
        limits |= {key: value for key, value in requests.items() if "/" in key and key not in limits}
        fewer = {key: value for key, value in requests.items() if quantity(value) != quantity(limits.get(key))}
        for field, given in (("resources", limits), ("requests", fewer)):
            if given:
                row[field] = {key: str(value) for key, value in given.items()}
        rights = box.pop("securityContext", None) or {}
        if rights.pop("privileged", None) is True:
            row["privileged"] = True
            rights = {key: value for key, value in rights.items() if key not in ("runAsUser", "runAsNonRoot")}
        elif self.capable(rights):
            capabilities, user = rights.pop("capabilities", None) or {}, rights.pop("runAsUser", None)
            if added := [str(one).removeprefix("CAP_") for one in capabilities.get("add") or ()]:
                row["capabilities"] = added
                user = 0 if user is None else user  # they reach root alone
            if user is not None:
                row["run_as_user"] = user
            if user == 0 or rights.get("runAsNonRoot") is True:
                rights.pop("runAsNonRoot", None)
        if rights.get("allowPrivilegeEscalation") is not True or row.get("privileged"):
            rights.pop("allowPrivilegeEscalation", None)
        if rights:
            box["securityContext"] = rights
        if policy := box.pop("imagePullPolicy", None):
            row["image_pull_policy"] = policy
        for key in ("terminationMessagePath", "terminationMessagePolicy", "stdin", "tty", "ports"):
            if value := box.pop(key, None):
                self.out(f"{key} of container {name}, {json.dumps(value)}: nothing looks there")
        if left:
            box["env"] = left
        if box:
            self.rest_first.append({"name": row["name"], **box})
        return {**row, **({"init": True} if first else {})}

    def capable(self, rights: Object) -> bool:
        """Whether fields say what it adds to a container's rights, and which user it is."""
        capabilities, user = rights.get("capabilities") or {}, rights.get("runAsUser")
        plain = not set(capabilities) - {"add", "drop"} and capabilities.get("drop") in (None, [], ["ALL"])
        return plain and (user is None or isinstance(user, int)) and not (capabilities.get("add") and user)

    def referred(self, one: Object, row: Object, container: str) -> bool:
        """A sidecar's variable from elsewhere: a field of the pod, or a key of a Secret."""
        source, name = one.get("valueFrom") or {}, str(one.get("name"))
        path, ref = self.field(source, container), source.get("secretKeyRef")
        if path and takes(Variable, name):
            row.setdefault("env_fields", {})[name] = path
        elif ref and set(source) == {"secretKeyRef"} and takes(Variable, name):
            row.setdefault("secrets", {})[name] = _key("secret", ref)
        else:
            return False
        return True

    def field(self, source: Object, container: Any) -> str:
        """limits.memory/1Gi, status.podIP: the field that a container's variable is told; "" for no field's."""
        amount = source.get("resourceFieldRef") or {}
        divisor = str(amount.get("divisor", "0"))
        path = (source.get("fieldRef") or {}).get("fieldPath")
        if amount and amount.get("containerName", container) == container:
            path = f"{amount.get('resource')}{'' if divisor in ('0', '1') else '/' + divisor}"
        return str(path) if path and takes(PodField, path) else ""

    # -- variables

    def variables(self) -> None:
        given = [one for one in self.box.pop("env", None) or () if isinstance(one, dict)]
        before: set[str] = set()
        for one in given:
            name, source = str(one.get("name")), one.get("valueFrom")
            self.earlier[name] = set(before)
            before.add(name)
            if not takes(Variable, name):
                plain = not source and "$(" not in str(one.get("value"))
                if plain and takes(PodVariable, name) and self.kind != "trainjob":
                    value = _text(one.get("value") or "")
                    self.put("pod_env", name, value=value, what=f"{name}, which no shell exports")
                else:
                    self.rest_box.setdefault("env", []).append(one)
            elif not source:
                self.exports[name] = _text(one.get("value") if one.get("value") is not None else "")
            elif name in programs.RENDEZVOUS or name in NOT_YOURS or name.startswith(tuple(NOT_YOUR_PREFIXES)):
                self.out(f"{name}: {programs.RENDEZVOUS.get(name) or NOT_YOURS.get(name) or 'set by others'}")
            else:
                self.variable(name, one, source)
        for field, rows in self.wholes(self.box, self.rest_box).items():
            self.put(field, value=rows, what="envFrom")

    def wholes(self, box: Object, rest: Object) -> dict[str, list[Any]]:
        """env_from and secret_env_from of a container: names, and more where more is said; what is neither stays."""
        found: dict[str, list[Any]] = {}
        for one in box.pop("envFrom", None) or ():
            field = next((field for key, field in WHOLES.items() if one.get(key)), "")
            ref = one.get(next((key for key in WHOLES if one.get(key)), "")) or {}
            name, prefix = ref.get("name"), one.get("prefix")
            odd = set(ref) - {"name", "optional"} or (prefix and not takes(PodVariable, prefix))
            if odd or not takes(DnsName, name):
                rest.setdefault("envFrom", []).append(one)
                continue
            more = {**({"prefix": prefix} if prefix else {}), **({"optional": True} if ref.get("optional") else {})}
            found.setdefault(field, []).append({"name": name, **more} if more else name)
        return found

    def variable(self, name: str, one: Object, source: Object) -> None:
        if ref := source.get("secretKeyRef"):
            self.job.put(("secrets", name), _key("secret", ref))
            self.job.note("carried", f"{name} of Secret {ref.get('name')} -> secrets")
            return
        if ref := source.get("configMapKeyRef"):
            known = self.files.get(ref.get("name")) or {}
            if ref.get("key") in known:
                self.exports[name] = str(known[ref["key"]])
                self.job.note("carried", f"{name} of ConfigMap {ref['name']} beside it -> env")
                return
            self.put("env_keys", name, value=_key("config_map", ref), what=f"{name} of ConfigMap {ref.get('name')}")
            return
        if path := self.field(source, self.box.get("name")):
            self.put("env_fields", name, value=path, what=f"{name} of {path}")
            return
        self.rest_box.setdefault("env", []).append(one)

    # -- what else

    OURS: ClassVar[dict[str, str]] = {
        "ports": "the operator's port alone; a Service needs none of a container's",
        **dict.fromkeys(["terminationMessagePath", "terminationMessagePolicy"], "dslaunch writes its own last words"),
        **dict.fromkeys(["stdin", "stdinOnce", "tty"], "nobody types into a job"),
        "resizePolicy": "a job keeps the resources that it starts with",
        "readinessProbe": "whether ranks train is seen by their steps", "livenessProbe": "recover.hang looks closer",
        "startupProbe": "recover.first_step looks closer",
    }  # fmt: skip
    PODS: ClassVar[dict[str, str]] = {
        "restartPolicy": "recover.attempts starts ranks again",
        "enableServiceLinks": "pods have no variables of Services",
        "hostname": "the operator names pods", "subdomain": "the operator makes the Service",
        "setHostnameAsFQDN": "ranks meet at MASTER_ADDR, whatever a pod calls itself",
        "priority": "kubernetes.priority_class",
        "preemptionPolicy": "kubernetes.priority_class has its own",
        "nodeName": "the scheduler places pods; kubernetes.node_selector", "os": "Linux",
    }  # fmt: skip

    def others(self) -> None:
        for key in list(self.box):
            if key in self.OURS and (value := self.box.pop(key)):
                self.out(f"{key} {json.dumps(value, default=str)}: {self.OURS[key]}")
        for key in ("lifecycle",):
            if key in self.box:
                value = json.dumps(self.box.pop(key), default=str)
                why = "it would run beside dslaunch's own start and end; lines of setup, or a sidecar"
                self.out(f"{key} {value}: {why}")
        for key, value in self.box.items():
            if key not in ("name", "image", "command", "args", "workingDir"):
                self.rest_box[key] = value
        scheduler = self.pod.pop("schedulerName", None)
        if scheduler and scheduler != "default-scheduler" and takes(DnsName, scheduler):
            self.scheduler = str(scheduler)
        elif scheduler and scheduler != "default-scheduler":
            self.rest_pod["schedulerName"] = scheduler
        deadline = self.pod.pop("activeDeadlineSeconds", None)
        if whole(deadline) and self.kind != "trainjob":
            self.put("run_policy", "deadline", value=whole(deadline), what="activeDeadlineSeconds of the pods")
        elif deadline is not None:
            self.out(f"activeDeadlineSeconds {deadline} of the pods: kubernetes.run_policy.deadline")
        if self.pod.get("shareProcessNamespace") is False:
            del self.pod["shareProcessNamespace"]
        for key, value in self.pod.items():
            if key in self.PODS:
                if value not in (None, "", {}):
                    self.out(f"{key} {value}: {self.PODS[key]}")
            elif value not in (None, [], {}):
                self.rest_pod[key] = value

    scheduler = ""


def _key(kind: str, ref: Object) -> Object:
    """{"secret": "hf", "key": "token"} of a reference, and whether it may be missing."""
    return {kind: ref.get("name"), "key": ref.get("key"), **({"optional": True} if ref.get("optional") else {})}


def _text(value: Any) -> str:
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _expression(row: Object) -> Object:
    values = [_text(value) for value in row.get("values") or ()]
    return {"key": row.get("key"), "operator": row.get("operator"), **({"values": values} if values else {})}


def _json(text: Any) -> list[Any]:
    try:
        found = json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return []
    return found if isinstance(found, list) else []


def _networks(text: str) -> list[str]:
    """Multus takes names behind commas, or JSON."""
    rows = _json(text)
    if not rows:
        return [name.strip() for name in text.split(",") if name.strip()]
    names = []
    for row in rows:
        if set(row) - {"name", "namespace", "interface"}:
            return []
        place = f"{row['namespace']}/" if row.get("namespace") else ""
        names.append(place + str(row.get("name")) + (f"@{row['interface']}" if row.get("interface") else ""))
    return names


def whole(value: Any) -> int | None:
    """A count of YAML's, or of text; None for a hole in a template."""
    size = quantity(value) if value is not None and not isinstance(value, bool) else None
    return None if size is None else math.floor(size)
