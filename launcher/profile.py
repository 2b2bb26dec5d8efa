"""A site file from what a scheduler says of itself: each value with what it was concluded from. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher import facts, origins
from launcher.errors import Path


@dataclass(frozen=True)
class Item:
    """One value of the site file, or with `value` None what could not be concluded and what to look for."""

    path: Path
    value: Any
    why: str


@dataclass(frozen=True)
class Profile:
    items: tuple[Item, ...]
    remarks: tuple[str, ...]


# --- Slurm ----------------------------------------------------------------------------------------

COLUMNS = "Partition:64 ,Gres:128 ,CPUs:12 ,Memory:16 ,Nodes:8 ,Features:256"
PROGRAMS = "apptainer singularity shifter module"
# What a login node is asked, none of which needs a job. `bash -lc` is a login shell: modules are a function of it.
SLURM = {
    "config": ("scontrol", "show", "config"),
    "partitions": ("scontrol", "--oneliner", "show", "partition"),
    "nodes": ("sinfo", "--noheader", "--exact", f"--Format={COLUMNS}"),
    "accounts": ("sacctmgr", "--noheader", "--parsable2", "show", "assoc", "format=Account,QOS,DefaultQOS"),
    "srun": ("srun", "--help"),
    "programs": ("bash", "-lc", f"for p in {PROGRAMS}; do type -t $p >/dev/null && echo $p; done"),
}  # fmt: skip


@dataclass(frozen=True)
class _Shape:
    """Nodes of a partition that look alike."""

    partition: str
    default: bool
    gpus: int
    gpu_type: str
    cpus: int
    memory: int  # MB
    count: int
    features: tuple[str, ...]


def slurm(said: Mapping[str, str], *, partition: str | None = None, login: str | None = None) -> Profile:
    """`said`: the output of each of SLURM; a command that gave none is not concluded from."""
    items, remarks = [Item(("site", "backend"), "slurm", "asked for")], []
    items += [Item(("slurm", "login"), login, "asked for")] if login else []
    config = dict(re.findall(r"(?m)^(\w+)\s*= (.*?)\s*$", said.get("config", "")))
    if version := re.match(r"\d\d\.\d\d(\.\d+)?", config.get("SLURM_VERSION", "")):
        items.append(Item(("slurm", "version"), version[0], "scontrol show config"))
    else:
        items.append(Item(("slurm", "version"), None, "scontrol show config gave no SLURM_VERSION"))
    shapes = _shapes(said.get("nodes", ""))
    chosen = _chosen(shapes, partition)
    if partition and not chosen:
        remarks.append(f"sinfo knows no partition {partition}")
    if chosen:
        items += _of_partition(chosen, config, asked=bool(partition))
        remarks += [_described(shape) for shape in shapes if shape is not chosen]
    else:
        items.append(Item(("slurm", "partition"), None, "sinfo shows none"))
    items += _account(said.get("accounts", ""))
    items += _limits(said.get("partitions", ""), chosen.partition if chosen else "", remarks)
    items += _software(said, remarks)
    if config.get("TopologyPlugin") == "topology/block":
        remarks.append("topology/block: slurm.segment keeps nodes of one block together")
    if config.get("MpiDefault", "none") != "none":
        remarks.append(f"MpiDefault is {config['MpiDefault']}: slurm.mpi: none where ranks need no MPI")
    return Profile(tuple(items), tuple(remarks))


def _shapes(text: str) -> list[_Shape]:
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) < 5 or not all(word.rstrip("+").isdigit() for word in words[2:5]):
            continue
        gpu = re.search(r"gpu:(?:([A-Za-z0-9_.-]+):)?(\d+)", words[1])
        features = tuple(words[5].split(",")) if len(words) > 5 and words[5] != "(null)" else ()
        found.append(
            _Shape(
                words[0].rstrip("*"), words[0].endswith("*"),
                int(gpu[2]) if gpu else 0, (gpu[1] or "") if gpu else "",
                int(words[2]), int(words[3].rstrip("+")), int(words[4]), features,
            )
        )  # fmt: skip
    return found


def _chosen(shapes: Sequence[_Shape], partition: str | None) -> _Shape | None:
    """The partition asked for; else the one with most GPUs, the default before others."""
    able = [shape for shape in shapes if partition in (None, shape.partition)]
    return max(able, key=lambda shape: (shape.gpus > 0, shape.default, shape.gpus * shape.count), default=None)


def _of_partition(shape: _Shape, config: Mapping[str, str], *, asked: bool) -> list[Item]:
    why = f"sinfo: {_described(shape)}"
    items = [Item(("slurm", "partition"), shape.partition, "asked for" if asked else why)]
    select = config.get("SelectType", "not known")
    way = "gpus-per-node" if "cons_tres" in select else "gres"
    items.append(
        Item(("slurm", "gpus_as"), way, f"SelectType is {select}")
        if shape.gpus
        else Item(("slurm", "gpus_as"), None, "no GPUs in this partition")
    )  # fmt: skip
    if shape.gpu_type:
        items.append(Item(("slurm", "gpu_type"), shape.gpu_type, f"gres gpu:{shape.gpu_type}:{shape.gpus}"))
    items.append(Item(("resources", "gpus_per_node"), shape.gpus, why))
    if shape.gpus:
        named = [gpu for gpu in facts.gpus().values() if shape.gpu_type.lower() in (gpu.name, *gpu.aliases)]
        items.append(
            Item(("resources", "gpu"), named[0].name, f"gres calls it {shape.gpu_type}")
            if named
            else Item(("resources", "gpu"), None, "gres does not say its memory; dslaunch probe --nodes 1 looks")
        )
    items.append(Item(("resources", "cpus_per_node"), shape.cpus, why))
    items.append(Item(("resources", "memory"), f"{shape.memory * 95 // 100}M", f"95 % of {shape.memory} MB"))
    items.append(Item(("resources", "fabric"), None, "only a node sees it: dslaunch probe --nodes 1"))
    return items


def _described(shape: _Shape) -> str:
    gpus = f" and {shape.gpus} {shape.gpu_type or 'GPUs'}" if shape.gpus else ""
    features = f" ({', '.join(shape.features)})" if shape.features else ""
    return f"partition {shape.partition}: {shape.count} nodes of {shape.cpus} CPUs, {shape.memory} MB{gpus}{features}"


def _account(text: str) -> list[Item]:
    rows = [line.split("|") for line in text.splitlines() if line.count("|") >= 2]
    accounts = sorted({row[0] for row in rows if row[0]})
    if len(accounts) == 1:
        return [Item(("slurm", "account"), accounts[0], "the only one that sacctmgr knows of you")]
    if accounts:
        return [Item(("slurm", "account"), None, f"one of {', '.join(accounts[:10])}")]
    return [Item(("slurm", "account"), None, "sacctmgr says nothing: there may be no accounting")]


def _limits(text: str, partition: str, remarks: list[str]) -> list[Item]:
    for line in text.splitlines():
        said = dict(word.split("=", 1) for word in line.split() if "=" in word)
        if said.get("PartitionName") != partition:
            continue
        if said.get("MaxTime", "UNLIMITED") not in ("UNLIMITED", "INFINITE"):
            remarks.append(f"partition {partition} ends jobs after {said['MaxTime']}")
        if said.get("OverSubscribe") == "EXCLUSIVE":
            return [Item(("slurm", "exclusive"), True, f"partition {partition} gives whole nodes")]
    return []


def _software(said: Mapping[str, str], remarks: list[str]) -> list[Item]:
    help_text, programs = said.get("srun", ""), set(said.get("programs", "").split())
    if "--container-image" in help_text:
        runtime, why = "pyxis", "srun has --container-image"
    elif "--environment" in help_text:
        runtime, why = "edf", "srun has --environment"
    else:
        runtime = next((name for name in ("apptainer", "singularity", "shifter") if name in programs), "")
        why = f"{runtime} is on the PATH of this host"
    if "module" in programs:
        remarks.append("environment modules are here: `modules:` loads them")
    return [Item(("container", "runtime"), runtime, why)] if runtime else []


# --- Kubernetes -----------------------------------------------------------------------------------

# What the API server is asked: path by name. {} is the namespace. Each may be forbidden.
KUBERNETES = {
    "version": "/version",
    "groups": "/apis",
    "trainer": "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/trainjobs.trainer.kubeflow.org",
    "nodes": "/api/v1/nodes",
    "namespace": "/api/v1/namespaces/{}",
    "queues": "/apis/kueue.x-k8s.io/v1beta1/namespaces/{}/localqueues",
    "claims": "/api/v1/namespaces/{}/persistentvolumeclaims",
}
KINDS = (
    ("kubeflow.org", "pytorchjob"),
    ("trainer.kubeflow.org", "trainjob"),
    ("jobset.x-k8s.io", "jobset"),
)  # the first that is there
PRODUCT = "nvidia.com/gpu.product"


def kubernetes(said: Mapping[str, Any], *, namespace: str) -> Profile:
    """`said`: the JSON of each of KUBERNETES, without what was not answered."""
    items = [
        Item(("site", "backend"), "kubernetes", "asked for"),
        Item(("kubernetes", "namespace"), namespace, "asked for"),
    ]
    remarks: list[str] = [
        f"not answered: {KUBERNETES[name].format(namespace)}" for name in KUBERNETES if name not in said
    ]
    groups = {row["name"] for row in said.get("groups", {}).get("groups", ())}
    there = [(group, kind) for group, kind in KINDS if group in groups]
    if there:
        items.append(Item(("kubernetes", "kind"), there[0][1], f"the cluster serves {there[0][0]}"))
        remarks += [f"{kind} is there as well: the cluster serves {group}" for group, kind in there[1:]]
    else:
        items.append(Item(("kubernetes", "kind"), None, "neither Kubeflow nor JobSet is installed"))
    if "trainer" in said:
        text = str(said["trainer"])
        items.append(
            Item(
                ("kubernetes", "trainer"), "2.2" if "runtimePatches" in text else "2.1", "the fields of its TrainJob"
            )
        )
    queues = [row["metadata"]["name"] for row in said.get("queues", {}).get("items", ())]
    if len(queues) == 1:
        items.append(Item(("kubernetes", "queue"), queues[0], "the only LocalQueue here"))
    elif queues:
        items.append(Item(("kubernetes", "queue"), None, f"one of the LocalQueues {', '.join(sorted(queues))}"))
    if "scheduling.volcano.sh" in groups:
        remarks.append("Volcano is installed: kubernetes.gang: {by: volcano}")
    if "k8s.cni.cncf.io" in groups:
        remarks.append("Multus is installed: kubernetes.network.multus attaches its networks")
    items += _nodes(said.get("nodes", {}).get("items", ()), remarks)
    level = said.get("namespace", {}).get("metadata", {}).get("labels", {}).get("pod-security.kubernetes.io/enforce")
    if level:
        remarks.append(f"namespace {namespace} enforces Pod Security {level}")
    claims = [row["metadata"]["name"] for row in said.get("claims", {}).get("items", ())]
    if claims:
        remarks.append(
            f"claims: {', '.join(sorted(claims))}; kubernetes.volumes: [{{claim: {sorted(claims)[0]}, mount: /data}}]"
        )
    return Profile(tuple(items), tuple(remarks))


def _nodes(nodes: Sequence[Mapping[str, Any]], remarks: list[str]) -> list[Item]:
    """From the kind of node with GPUs that there is most of."""
    kinds: Counter[tuple[str, int, tuple[tuple[str, str], ...]]] = Counter()
    taints: dict[str, set[tuple[str, str]]] = {}
    sizes: dict[str, Mapping[str, str]] = {}
    for node in nodes:
        amounts = node.get("status", {}).get("allocatable", {})
        gpus = int(amounts.get("nvidia.com/gpu", amounts.get("amd.com/gpu", 0)))
        if not gpus:
            continue
        product = node["metadata"].get("labels", {}).get(PRODUCT, "")
        extra = tuple(
            sorted(
                (name, value)
                for name, value in amounts.items()
                if "/" in name and not name.endswith("/gpu") and str(value) != "0"
            )
        )
        kinds[(product, gpus, extra)] += 1
        sizes[product] = amounts
        rows = node.get("spec", {}).get("taints", ())
        taints.setdefault(product, set()).update(
            (row["key"], row["effect"]) for row in rows if row["effect"] != "PreferNoSchedule"
        )
    if not kinds:
        return [Item(("resources", "gpus_per_node"), None, "no node shows GPUs, or nodes may not be listed")]
    (product, gpus, extra), count = kinds.most_common(1)[0]
    why = f"{count} nodes of {product or 'an unnamed kind'}"
    items = [Item(("resources", "gpus_per_node"), gpus, why)]
    words = product.lower().replace("nvidia-", "")
    named = [
        gpu for gpu in facts.gpus().values() if product and any(word == words for word in (gpu.name, *gpu.aliases))
    ]
    close = [
        gpu
        for gpu in facts.gpus().values()
        if product and gpu.name.split("-")[0] in words and gpu.name.split("-")[-1] in words
    ]
    if named or close:
        items.append(Item(("resources", "gpu"), (named or close)[0].name, f"label {PRODUCT}={product}"))
    else:
        items.append(Item(("resources", "gpu"), None, f"{PRODUCT} is {product or 'not set'}"))
    if product:
        items.append(Item(("kubernetes", "node_selector"), {PRODUCT: product}, why))
    if extra:
        items.append(
            Item(
                ("kubernetes", "network"),
                {"resources": dict(extra)},
                f"allocatable on them, all of it: {count} nodes",
            )
        )
    own = sorted(taints.get(product, ()))
    if own:
        rows = [{"key": key, "operator": "Exists", "effect": effect} for key, effect in own]
        items.append(Item(("kubernetes", "tolerations"), rows, "taints of these nodes"))
    items.append(
        Item(("resources", "fabric"), None, "only a pod sees it: by the instance type, `dslaunch presets --fabrics`")
    )
    remarks += [
        f"{n} other nodes: {other or 'unnamed'} with {g} GPUs" for (other, g, _), n in kinds.most_common()[1:]
    ]
    return items


# --- telling --------------------------------------------------------------------------------------


def text(profile: Profile, *, head: str) -> str:
    """The site file, ready to be written; what was not concluded stands in it as a comment."""
    known = sorted(
        (item for item in profile.items if item.value is not None), key=lambda item: item.path[0] != "site"
    )
    order = {name: index for index, name in enumerate(dict.fromkeys(item.path[0] for item in known))}
    rows = [(item.path, item.value, _plain(item.why)) for item in sorted(known, key=lambda item: order[item.path[0]])]
    lines = [f"# {head}", origins.text(rows, origin=True).rstrip("\n")]
    lines += [
        f"# {'.'.join(map(str, item.path))}: not concluded; {item.why}"
        for item in profile.items
        if item.value is None
    ]
    lines += [f"# {remark}" for remark in profile.remarks]
    return "".join(f"{_plain(line)}\n" if line.startswith("#") else f"{line}\n" for line in lines)


def _plain(line: str) -> str:
    """One line without control characters, whatever a cluster calls its things."""
    return "".join(c if c.isprintable() else " " for c in " ".join(line.split()))
