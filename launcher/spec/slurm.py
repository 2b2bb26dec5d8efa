"""What only Slurm is told. Fields that name how a site wants a thing asked for belong into its site file."""

from dataclasses import field
from typing import Annotated, Literal

from launcher.record import record
from launcher.spec.words import Auto, Constraint, Count, FilePath, Line, Nodes, Section, Time, Token, Whole
from launcher.yamldoc import Help, Matches, Range

Option = Annotated[str, Matches(r"[A-Za-z0-9_.,:@%+/=&|*()\[\]-]+", "text without spaces or quotes")]
# As sbatch reads a time (23.11): no capitals, a clock behind a date and not before it.
_CLOCK = r"([01]?[0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9])?(am|pm)?"
_DATE = (
    r"([0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])|(0?[1-9]|1[0-2])[/.](0?[1-9]|[12][0-9]|3[01])([/.][0-9]{2})?"
    r"|(0[1-9]|1[0-2])(0[1-9]|[12][0-9]|3[01])([0-9]{2})?)"
)
Moment = Annotated[
    str,
    Matches(
        r"now([+-][0-9]+((second|minute|hour|day|week)s?)?)?|midnight|noon|fika|teatime|today|tomorrow"
        rf"|{_CLOCK}|{_DATE}([T-]{_CLOCK})?",
        "a time as sbatch takes it: 2026-12-01T08:00, 16:00, now+2hours, tomorrow, noon or 12/31",
    ),
]
Disk = Annotated[str, Matches(r"[0-9]+([KMGTkmgt][Bb]?)?", "a Slurm size such as 500G")]
License = Annotated[
    str, Matches(r"[A-Za-z][A-Za-z0-9_.,:@%+/=-]*", "a license such as scratch or cfs:2: a letter comes first")
]


@record
class Slurm(Section):
    partition: Annotated[Token | None, Help("one or several, a,b")] = None
    account: Token | None = None
    qos: Token | None = None
    reservation: Token | None = None
    constraint: Constraint | None = None
    licenses: Annotated[tuple[License, ...], Help("[scratch, cfs:2]")] = ()
    wckey: Token | None = None
    comment: Annotated[Option | None, Help("stands before the run's own token")] = None
    time: Annotated[Time, Help("wall time; the job is warned before it ends")] = "1:00:00"
    time_min: Annotated[Time | None, Help("less is taken too, when that starts sooner")] = None
    begin: Annotated[Moment | None, Help("not before: 2026-12-01T08:00, now+1hour")] = None
    deadline: Annotated[Moment | None, Help("not if it cannot end by then")] = None
    nice: Annotated[Annotated[int, Range(-2147483645, 2147483645)] | None, Help("lowers the priority")] = None
    dependency: Annotated[Option | None, Help("afterok:123, beside the run's own singleton")] = None

    nodelist: Annotated[Nodes | None, Help("exactly these nodes")] = None
    nodefile: Annotated[FilePath | None, Help("a file with the names of exactly these nodes")] = None
    exclude: Annotated[Nodes | None, Help("never these nodes")] = None
    exclude_file: Annotated[FilePath | None, Help("a file with the names of nodes to avoid, one a line")] = None
    exclusive: Annotated[
        bool | Literal["user", "mcs", "topo"], Help("whole nodes; user: shared with own jobs alone")
    ] = False
    oversubscribe: bool = False
    overcommit: Annotated[bool, Help("more tasks than CPUs")] = False
    contiguous: bool = False
    spread: Annotated[bool, Help("--spread-job")] = False
    switches: Annotated[
        Annotated[str, Matches(r"[0-9]+(@[0-9:-]+)?", "a number of switches, and how long to wait: 1@4:00:00")]
        | None,
        Help("at most so many leaf switches"),
    ] = None
    segment: Annotated[Count | None, Help("nodes of one block, with topology/block: NVL72")] = None
    network: Annotated[Option | None, Help("--network: single_node_vni, instances=4")] = None

    gpus_as: Annotated[
        Literal["gpus-per-node", "gres", "gpus-per-task", "gpus", "none"],
        Help("how this site wants GPUs asked for; none: the partition gives whole nodes"),
    ] = "gpus-per-node"
    gpu_type: Annotated[Token | None, Help("the type as Slurm's gres names it")] = None
    gres: Annotated[tuple[Token, ...], Help("further generic resources: [nvme:1]")] = ()
    cpus_as: Annotated[
        Literal["cpus-per-task", "cpus-per-gpu", "none"], Help("how this site wants CPUs asked for")
    ] = "cpus-per-task"
    memory_as: Annotated[
        Literal["mem", "mem-per-gpu", "mem-per-cpu"], Help("how this site wants memory asked for")
    ] = "mem"
    tmp: Annotated[Disk | None, Help("local disk of a node: 500G")] = None
    ntasks_per_socket: Count | None = None
    hint: Literal["nomultithread", "multithread", "compute_bound", "memory_bound"] | None = None
    threads_per_core: Count | None = None
    core_spec: Annotated[Whole | None, Help("cores of a node kept for the system: 0 on Frontier takes all")] = None
    distribution: Annotated[Option | None, Help("block:cyclic")] = None
    cpu_bind: Annotated[Option | None, Help("none, cores, verbose,mask_cpu:0xff,0xff00")] = None
    mem_bind: Annotated[Option | None, Help("local")] = None
    gpu_bind: Annotated[Option | None, Help("none, closest, single:1, map_gpu:0,1,2,3")] = None
    accel_bind: Annotated[Annotated[str, Matches(r"[gmnv]+", "letters of g, m, n, v")] | None, Help("g, gn")] = None
    mpi: Annotated[Token | None, Help("none, pmi2, pmix: what srun offers to the tasks")] = None
    bcast: Annotated[
        dict[FilePath, FilePath],
        Help("files that sbcast copies to every node's own disk first: {env.tar.zst: /tmp/env.tar.zst}"),
    ] = field(default_factory=dict)

    warn_before_end: Annotated[
        int, Range(0, 65535), Help("seconds before the end at which ranks get SIGUSR2 and save")
    ] = 180
    requeue: Annotated[
        bool | Auto,
        Help("back to the queue after node failure, preemption and time limit; auto: not after the time limit"),
    ] = "auto"
    kill_on_bad_exit: Annotated[bool, Help("one rank fails, Slurm ends the others")] = True
    wait_all_nodes: Annotated[bool, Help("start once every node is up: clouds that boot them")] = False
    mail_user: Annotated[
        Annotated[str, Matches(r"[A-Za-z0-9._+-]+@[A-Za-z0-9.-]+", "a mail address")] | None, Help("who hears")
    ] = None
    mail_type: Token | None = None
    address_suffix: Annotated[
        Annotated[str, Matches(r"[A-Za-z0-9.-]+", "what is put behind a node's name")] | None,
        Help("of the name that leads over the fast network: i on JSC's machines"),
    ] = None
    version: Annotated[
        Annotated[str, Matches(r"[0-9]{2}\.[0-9]{2}(\.[0-9]+)?", "a version such as 23.11")] | None,
        Help("of this site's Slurm; options it does not have are refused"),
    ] = None
    login: Annotated[
        Annotated[str, Matches(r"([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9][A-Za-z0-9.-]*", "user@host")] | None,
        Help("submit there over ssh; user@host, or a name of ssh's own config"),
    ] = None
    login_dir: Annotated[FilePath | None, Help("where run directories live there; absolute")] = None
    sbatch: Annotated[
        dict[Annotated[str, Matches(r"[a-z][a-z-]*", "a long sbatch option without its dashes")], bool | Option],
        Help("any other long sbatch option: {power: high}"),
    ] = field(default_factory=dict)
    srun: Annotated[tuple[Line, ...], Help("further arguments of srun")] = ()
    plugin_options: Annotated[
        tuple[Annotated[str, Matches(r"[a-z][a-z0-9-]*", "a long option without its dashes")], ...],
        Help("further options that plugins of this site bring, for `sbatch` and `srun`: [ear-policy]"),
    ] = ()

    @property
    def binds_gpus(self) -> bool:
        """Whether each task may see fewer GPUs than its node has, as with verbose,single:1."""
        kinds = [part.partition(":")[0] for part in (self.gpu_bind or "").split(",")]
        return any(kind in ("closest", "single", "per_task", "map_gpu", "mask_gpu") for kind in kinds)

    @property
    def names_files(self) -> bool:
        """Whether lists of nodes are still to be read."""
        return bool(self.nodefile or self.exclude_file)
