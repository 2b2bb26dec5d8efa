"""What only Kubernetes is told."""

from dataclasses import field
from typing import Annotated, Any, Literal

from launcher.record import record
from launcher.spec.software import Secret
from launcher.spec.words import (
    Argument,
    Count,
    DnsName,
    FilePath,
    Image,
    Label,
    LabelKey,
    Name,
    Namespace,
    Quantity,
    Section,
    Text,
    Token,
    Variable,
    Whole,
)
from launcher.yamldoc import Help, Matches, Range

Annotations = Annotated[dict[LabelKey, Text], Help("annotations")]
Amount = Annotated[
    str,
    Matches(r"[0-9]+(\.[0-9]+)?([mkMGTPE]|[KMGTPE]i)?", "a Kubernetes quantity such as 500m (of a CPU) or 2Gi"),
]
PodField = Annotated[
    str,
    Matches(
        r"metadata\.(name|namespace|uid)|spec\.(nodeName|serviceAccountName)|status\.(hostIPs?|podIPs?)"
        r"|metadata\.(labels|annotations)\['[^'\x00-\x1f]+'\]"
        r"|(limits|requests)\.(cpu(/1m?)?|(memory|ephemeral-storage)(/1(k|[MGTPE]|[KMGTPE]i)?)?)",
        "a field that a pod can be told, such as status.podIP, metadata.labels['team'] or limits.memory/1Gi",
    ),
]
Limit = Annotated[
    str,
    Matches(r"none|[0-9]+(\.[0-9]+)?([mKMGTPE]|[KMGTPE]i)?", "a Kubernetes quantity such as 16 or 960Gi, or none"),
]
MapKey = Annotated[str, Matches(r"[-._a-zA-Z0-9]{1,253}", "a key of a ConfigMap or Secret")]
PodVariable = Annotated[
    str, Matches(r"[A-Za-z_.-][A-Za-z0-9_.-]*", "a variable's name as Kubernetes takes it: letters, digits and _.-")
]


@record
class Nfs(Section):
    server: Annotated[str, Matches(r"[A-Za-z0-9][A-Za-z0-9.:-]*", "a host")]
    path: FilePath


@record
class Csi(Section):
    driver: DnsName
    attributes: dict[str, Text] = field(default_factory=dict)
    secret: Annotated[DnsName | None, Help("nodePublishSecretRef")] = None
    fs_type: Token | None = None


@record
class Scratch(Section):
    """A volume of the pod's own: an emptyDir, or a claim made with it where a storage class is named."""

    size: Quantity | None = None
    memory: Annotated[bool, Help("in memory, counted as the pod's")] = False
    storage_class: Annotated[DnsName | None, Help("a generic ephemeral volume: local NVMe")] = None


@record
class Projection(Section):
    """Keys of a ConfigMap or a Secret, as one part of a volume."""

    config_map: DnsName | None = None
    secret: DnsName | None = None
    items: Annotated[dict[MapKey, FilePath], Help("these keys alone, at these paths; absent: all")] = field(
        default_factory=dict
    )
    optional: Annotated[bool, Help("pods start without it")] = False


@record
class Volume(Section):
    """One of claim, nfs, csi, host_path, scratch, config_map, secret, projected."""

    mount: Annotated[FilePath, Help("where it appears in the pod")]
    claim: Annotated[DnsName | None, Help("name of a PersistentVolumeClaim")] = None
    nfs: Nfs | None = None
    csi: Csi | None = None
    host_path: Annotated[FilePath | None, Help("a directory of the node: beyond Pod Security's baseline")] = None
    host_path_type: (
        Literal["Directory", "DirectoryOrCreate", "File", "Socket", "CharDevice", "BlockDevice"] | None
    ) = None
    scratch: Scratch | None = None
    config_map: DnsName | None = None
    secret: DnsName | None = None
    projected: Annotated[tuple[Projection, ...] | None, Help("several ConfigMaps and Secrets in one place")] = None
    items: Annotated[
        dict[MapKey, FilePath], Help("of config_map or secret: these keys alone, at these paths below the mount")
    ] = field(default_factory=dict)
    default_mode: Annotated[
        Annotated[str, Matches(r"0?[0-7]{3}", "a file's mode in octal, such as 0755")] | None,
        Help("of config_map's, secret's or projected files; absent: 0644, and 0440 of a secret"),
    ] = None
    optional: Annotated[bool, Help("of config_map or secret: pods start without it")] = False
    sub_path: FilePath | None = None
    read_only: bool = False
    propagation: Annotated[
        Literal["HostToContainer", "Bidirectional"] | None,
        Help("what the node mounts below it later is seen, too: an automounter's"),
    ] = None
    name: Annotated[Name | None, Help("of the volume in the pod; for sidecars and patches")] = None


@record
class Toleration(Section):
    key: LabelKey | None = None
    operator: Literal["Exists", "Equal"] = "Exists"
    value: Label | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    seconds: Annotated[Whole | None, Help("tolerationSeconds, of NoExecute")] = None


@record
class NodeTerm(Section):
    key: LabelKey
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = "In"
    values: tuple[Label, ...] = ()
    weight: Annotated[Annotated[int, Range(1, 100)] | None, Help("preferred so much; absent: required")] = None


@record
class PodTerm(Section):
    """Pods of which kind have to be near, or away."""

    topology_key: LabelKey
    labels: Annotated[dict[LabelKey, Label], Help("of those pods; absent: the job's own")] = field(
        default_factory=dict
    )
    away: Annotated[bool, Help("anti-affinity")] = False
    weight: Annotated[Annotated[int, Range(1, 100)] | None, Help("preferred so much; absent: required")] = None


@record
class Spread(Section):
    topology_key: LabelKey
    max_skew: Count = 1
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"] = "DoNotSchedule"


@record
class Queueing(Section):
    """Kueue: which queue, at what priority, how close together."""

    name: Annotated[Label, Help("LocalQueue")]
    priority: Annotated[Label | None, Help("WorkloadPriorityClass")] = None
    topology: Annotated[LabelKey | None, Help("all pods below one node of this level: a rack")] = None
    topology_required: Annotated[bool, Help("else as close as it can be")] = True
    unconstrained: Annotated[bool, Help("anywhere, and still counted by topology-aware scheduling")] = False
    slice_topology: Annotated[LabelKey | None, Help("every slice_size pods below one node of this level")] = None
    slice_size: Count | None = None


@record
class Gang(Section):
    """All pods start together, or none."""

    by: Annotated[
        Literal["operator", "volcano", "coscheduling", "kai"],
        Help("operator: whichever the training operator was given; else a PodGroup of that scheduler's"),
    ] = "operator"
    queue: Annotated[Label | None, Help("Volcano's queue, or KAI's")] = None
    min_available: Annotated[Count | None, Help("absent: all pods")] = None
    timeout: Annotated[Count | None, Help("seconds to wait for all of them")] = None
    scheduler: Annotated[DnsName | None, Help("schedulerName, where it is not the usual one")] = None
    tier: Annotated[Count | None, Help("Volcano: all pods below one HyperNode of this tier at most: a rack")] = None
    tier_required: Annotated[bool, Help("else as close as it can be")] = True


@record
class Elastic(Section):
    """Between so many and so many pods; torchrun meets again at every change."""

    min: Count
    max: Count
    max_restarts: Whole = 0
    backend: Literal["c10d", "etcd", "etcd-v2"] = "c10d"
    endpoint: Annotated[
        Annotated[str, Matches(r"[A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]+)?", "host:port")] | None, Help("of etcd")
    ] = None
    autoscale: Annotated[
        dict[Literal["cpu", "memory"], Annotated[int, Range(1, 1000)]],
        Help("the operator's autoscaler adds pods above so many percent of what they request: {cpu: 90}"),
    ] = field(default_factory=dict)


@record
class RunPolicy(Section):
    clean_pods: Literal["Running", "All", "None"] | None = None
    ttl: Annotated[Whole | None, Help("seconds after which a finished job is removed")] = None
    deadline: Annotated[Count | None, Help("seconds; activeDeadlineSeconds")] = None
    backoff_limit: Annotated[
        Whole | None, Help("PyTorchJob: restarts that the operator counts; ours are recover.attempts")
    ] = None
    max_restarts: Annotated[Whole | None, Help("JobSet: restarts of the whole gang")] = None
    suspend: bool = False
    managed_by: LabelKey | None = None
    restart_policy: Literal["Never", "OnFailure", "Always", "ExitCode"] | None = None


@record
class Network(Section):
    """How pods reach the fabric. `profile: auto`: the fabric's own row brings resources, annotations, sidecars."""

    profile: Annotated[Token, Help("auto: by resources.fabric; none; or a name of `dslaunch presets --networks`")] = (
        "auto"
    )
    devices: Annotated[Count | None, Help("of the profile's resource, per pod; absent: the profile's")] = None
    resources: Annotated[dict[LabelKey, Quantity], Help("further extended resources: {rdma/hca: 8}")] = field(
        default_factory=dict
    )
    multus: Annotated[
        tuple[Token, ...], Help("networks to attach: [default/rdma-0, default/rdma-1]; on GKE the profile's own")
    ] = ()
    claim_template: Annotated[DnsName | None, Help("DRA: a ResourceClaimTemplate, of a ComputeDomain say")] = None
    claims: Annotated[
        tuple[DnsName, ...], Help("DRA: further ResourceClaimTemplates, of DRANET's network interfaces say")
    ] = ()
    host_network: Annotated[
        bool, Help("the node's own: beyond Pod Security's baseline; brings DNS policy and a port of the job's own")
    ] = False
    hugepages: Annotated[Quantity | None, Help("hugepages-2Mi")] = None


@record
class Security(Section):
    """The default is admitted by the restricted profile; each of these goes beyond it, and is said."""

    run_as_user: Annotated[
        Whole | Literal["image"] | None, Help("uid in the pod; absent: 1000, whatever the image says; image: its own")
    ] = None
    run_as_group: Whole | None = None
    fs_group: Whole | None = None
    supplemental_groups: Annotated[tuple[Whole, ...], Help("further groups, of a shared file system say")] = ()
    root: Annotated[bool, Help("the image's user may be root: beyond the restricted profile")] = False
    allow_ipc_lock: Annotated[bool, Help("IPC_LOCK for RDMA: violates baseline and restricted")] = False
    capabilities: Annotated[tuple[Token, ...], Help("further ones, such as SYS_PTRACE")] = ()
    privileged: bool = False
    host_ipc: bool = False
    host_pid: Annotated[bool, Help("the node's processes: beyond Pod Security's baseline")] = False
    seccomp: Annotated[Token | None, Help("RuntimeDefault; Unconfined; a Localhost profile's path")] = None


@record
class EnvFrom(Section):
    """A ConfigMap or Secret whose keys become variables, where more than its name is to say."""

    name: DnsName
    prefix: Annotated[PodVariable | None, Help("in front of each variable's name")] = None
    optional: Annotated[bool, Help("pods start without it")] = False


@record
class Dns(Section):
    """How pods look up names, where the cluster's own way is not enough."""

    policy: Annotated[
        Literal["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"] | None,
        Help("absent: the cluster's; None: what stands here alone"),
    ] = None
    nameservers: Annotated[
        tuple[Annotated[str, Matches(r"[0-9a-fA-F.:]+", "an address")], ...], Help("3 at most")
    ] = ()
    searches: tuple[DnsName, ...] = ()
    options: Annotated[dict[Token, Text], Help("{ndots: 2}; an empty value is none")] = field(default_factory=dict)


@record
class Sidecar(Section):
    name: Name
    image: Image
    command: tuple[Argument, ...] = ()
    args: tuple[Argument, ...] = ()
    env: dict[Variable, Text] = field(default_factory=dict)
    mounts: Annotated[dict[Name, FilePath], Help("by the volume's name")] = field(default_factory=dict)
    resources: Annotated[dict[LabelKey, Amount], Help("requests and limits alike")] = field(default_factory=dict)
    requests: Annotated[dict[LabelKey, Amount], Help("where they are less, or nothing limits")] = field(
        default_factory=dict
    )
    init: Annotated[bool, Help("runs, and ends, before the ranks start")] = False
    privileged: bool = False
    env_fields: Annotated[dict[Variable, PodField], Help("as kubernetes.env_fields")] = field(default_factory=dict)
    secrets: Annotated[dict[Variable, Secret], Help("as secrets: {secret: NAME, key: KEY}")] = field(
        default_factory=dict
    )
    env_from: Annotated[tuple[DnsName | EnvFrom, ...], Help("as kubernetes.env_from")] = ()
    secret_env_from: Annotated[tuple[DnsName | EnvFrom, ...], Help("as kubernetes.secret_env_from")] = ()
    capabilities: Annotated[tuple[Token, ...], Help("added, such as NET_ADMIN; they reach root alone")] = ()
    run_as_user: Annotated[Whole | None, Help("absent: the pod's; 0 is root, beyond the restricted profile")] = None
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None


@record
class Initializer(Section):
    """What a TrainJob's runtime downloads before the ranks start, where it has a step for it."""

    uri: Annotated[str, Matches(r"[a-z0-9]+://\S+", "an address such as hf://org/name or s3://bucket/path")]
    secret: Annotated[DnsName | None, Help("Secret with the credentials, each of its keys a variable")] = None
    env: dict[Variable, Text] = field(default_factory=dict)


@record
class MapValue(Section):
    config_map: DnsName
    key: MapKey
    optional: Annotated[bool, Help("pods start without it")] = False


@record
class Kubernetes(Section):
    kind: Annotated[Literal["pytorchjob", "trainjob", "jobset"], Help("which object")] = "pytorchjob"
    trainer: Annotated[
        Annotated[str, Matches(r"2\.[0-9]+", "2.0, 2.1, 2.2")],
        Help("Kubeflow Trainer installed, for a trainjob: up to 2.1 podTemplateOverrides, from 2.2 runtimePatches"),
    ] = "2.2"
    runtime: Annotated[DnsName, Help("trainjob: the ClusterTrainingRuntime it refers to")] = "torch-distributed"
    runtime_kind: Literal["ClusterTrainingRuntime", "TrainingRuntime"] = "ClusterTrainingRuntime"
    dataset: Annotated[Initializer | None, Help("trainjob: downloaded by the runtime's dataset-initializer")] = None
    weights: Annotated[Initializer | None, Help("trainjob: downloaded by the runtime's model-initializer")] = None
    namespace: Namespace | None = None
    queue: Annotated[Queueing | Label | None, Help("Kueue's LocalQueue, or a section")] = None
    gang: Annotated[Gang | bool, Help("all pods start together: needs an operator with a gang scheduler")] = True
    elastic: Annotated[Elastic | None, Help("pytorchjob: elasticPolicy")] = None
    run_policy: RunPolicy = field(default_factory=RunPolicy)
    priority_class: DnsName | None = None
    service_account: DnsName | None = None
    service_account_token: Annotated[bool, Help("mounted; ranks do not need it")] = False
    image_pull_secrets: tuple[DnsName, ...] = ()
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    runtime_class: DnsName | None = None
    gpu_resource: Annotated[
        LabelKey | None, Help("the resource that a GPU is; absent: nvidia.com/gpu, amd.com/gpu for AMD's")
    ] = None
    network: Network = field(default_factory=Network)
    shm: Annotated[
        Quantity | Literal["none"], Help("size of /dev/shm, in memory; none: no limit but the pod's and the node's")
    ] = "16Gi"
    ephemeral_storage: Quantity | None = None
    cpu_limit: Annotated[
        Limit | None, Help("absent: as requested (resources.cpus_per_node); none: no limit, so that none throttles")
    ] = None
    memory_limit: Annotated[Limit | None, Help("absent: as requested (resources.memory); none: no limit")] = None
    node_selector: dict[LabelKey, Label] = field(default_factory=dict)
    node_affinity: tuple[NodeTerm, ...] = ()
    node_affinity_any: Annotated[
        tuple[tuple[NodeTerm, ...], ...],
        Help("lists of which one has to hold, beside node_affinity: [[{key: a, values: [b]}], [{key: c}]]"),
    ] = ()
    pod_affinity: tuple[PodTerm, ...] = ()
    spread: tuple[Spread, ...] = ()
    exclude: Annotated[tuple[DnsName, ...], Help("never these nodes, by name")] = ()
    tolerations: tuple[Toleration, ...] = ()
    scheduling_gates: Annotated[
        tuple[LabelKey, ...], Help("pods wait until somebody removes them: GKE's topology scheduler, say")
    ] = ()
    dns: Dns | None = None
    host_aliases: Annotated[
        dict[Annotated[str, Matches(r"[0-9a-fA-F.:]+", "an address")], tuple[DnsName, ...]],
        Help("lines of /etc/hosts: {10.0.0.3: [registry.local]}"),
    ] = field(default_factory=dict)
    volumes: tuple[Volume, ...] = ()
    sidecars: tuple[Sidecar, ...] = ()
    env_from: Annotated[
        tuple[DnsName | EnvFrom, ...],
        Help("ConfigMaps whose keys become variables: names, or {name, prefix, optional}"),
    ] = ()
    secret_env_from: Annotated[
        tuple[DnsName | EnvFrom, ...], Help("Secrets whose keys become variables, said so too")
    ] = ()
    env_fields: Annotated[dict[Variable, PodField], Help("the pod's own fields: {POD_IP: status.podIP}")] = field(
        default_factory=dict
    )
    env_keys: Annotated[dict[Variable, MapValue], Help("keys of ConfigMaps: {A: {config_map: settings, key: a}}")] = (
        field(default_factory=dict)
    )
    pod_env: Annotated[
        dict[PodVariable, Text], Help("variables whose names no shell can export: {a.b: c}; others belong in env")
    ] = field(default_factory=dict)
    security: Security = field(default_factory=Security)
    grace: Annotated[Whole | None, Help("seconds between SIGTERM and the end; absent: what saving takes")] = None
    labels: Annotated[dict[LabelKey, Label], Help("of the job and its pods")] = field(default_factory=dict)
    annotations: Annotated[dict[LabelKey, Text], Help("of the job")] = field(default_factory=dict)
    pod_labels: dict[LabelKey, Label] = field(default_factory=dict)
    pod_annotations: dict[LabelKey, Text] = field(default_factory=dict)
    pod_patch: Annotated[
        dict[str, Any] | None,
        Help("laid over the template of every pod, by strategic merge: {spec: {dnsConfig: {...}}}"),
    ] = None
    patch: Annotated[
        dict[str, Any] | FilePath | None,
        Help("laid over the job object last, by Kubernetes' strategic merge: a section, or a YAML file"),
    ] = None
