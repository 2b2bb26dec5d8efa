"""Command lines of launchers as other people write them, judged: how many ranks, on which nodes, with which batch.

`read` finds the launcher in a command; `judge` compares what it says with the nodes and GPUs around it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from posixpath import basename

from launcher.errors import UserError
from launcher.plan import batch
from launcher.spec.check import SECRET_NAME, SECRET_VALUE


@dataclass(frozen=True)
class Word:
    """One word of a command. Lines and columns count from 1."""

    text: str
    line: int = 0
    column: int = 0
    known: bool = True  # False where only running the script would tell

    @property
    def number(self) -> int | None:
        return int(self.text) if self.known and re.fullmatch(r"[0-9]{1,9}", self.text) else None


@dataclass(frozen=True)
class Found:
    """One row of a table, found at one place; `severity` where it is milder here than in general."""

    rule: str
    message: str
    line: int
    column: int
    fix: str = ""
    severity: str = ""
    end: int = 0  # the column after it


@dataclass(frozen=True)
class Launch:
    """torchrun --nnodes 2 train.py --lr 1: kind torchrun, options {nnodes: 2}, arguments [--lr, 1]."""

    kind: str  # torchrun, deepspeed, accelerate, mpi, composer, deepspeed-node
    word: Word
    options: Mapping[str, Word]
    arguments: tuple[Word, ...]  # of the program, itself first
    open: bool = False  # holds words that only running the script would tell, so nothing is known to be absent

    def option(self, *names: str) -> Word | None:
        return next((self.options[name] for name in names if name in self.options), None)


@dataclass(frozen=True)
class Around:
    """What a command runs in, as far as it is known."""

    nodes: int | None = None
    gpus: int | None = None  # per node
    env: Mapping[str, str] = field(default_factory=dict)  # PET_*, MASTER_ADDR and the like that somebody sets
    given: bool = False  # somebody else (an operator) says node rank and endpoint in PET_*

    @property
    def world(self) -> int | None:
        return self.nodes * self.gpus if self.nodes and self.gpus else None


# What takes a value, so that the word after it is not the program.
TORCHRUN = frozenset(
    """nnodes nproc_per_node rdzv_backend rdzv_endpoint rdzv_id rdzv_conf max_restarts monitor_interval
    start_method role log_dir redirects tee local_ranks_filter node_rank master_addr master_port local_addr
    logs_specs numa_binding signals_to_handle event_log_handler duplicate_stdout_filters
    duplicate_stderr_filters nproc shutdown_timeout r t""".split()
)
DEEPSPEED = frozenset(
    """hostfile include exclude num_nodes min_elastic_nodes max_elastic_nodes num_gpus num_accelerators
    master_port master_addr launcher launcher_args autotuning module_dir log_level
    bind_core_list ssh_port venv_script world_info node_rank enable_each_rank_log procs_per_node H i e""".split()
)
ACCELERATE = frozenset(
    """config_file num_processes num_machines machine_rank main_process_ip main_process_port rdzv_backend
    rdzv_conf max_restarts monitor_interval role mixed_precision num_cpu_threads_per_process dynamo_backend
    dynamo_mode gpu_ids tee log_dir training_script deepspeed_config_file deepspeed_hostfile
    deepspeed_exclusion_filter deepspeed_inclusion_filter deepspeed_multinode_launcher zero_stage
    offload_optimizer_device offload_param_device offload_optimizer_nvme_path offload_param_nvme_path
    gradient_accumulation_steps gradient_clipping zero3_init_flag zero3_save_16bit_model
    deepspeed_moe_layer_cls_names fsdp_offload_params fsdp_min_num_params fsdp_sharding_strategy
    fsdp_auto_wrap_policy fsdp_transformer_layer_cls_to_wrap fsdp_backward_prefetch fsdp_state_dict_type
    fsdp_forward_prefetch fsdp_use_orig_params fsdp_cpu_ram_efficient_loading fsdp_sync_module_states
    fsdp_version fsdp_reshard_after_forward fsdp_activation_checkpointing
    megatron_lm_tp_degree megatron_lm_pp_degree env t vm main_training_function fsdp_backward_prefetch_policy
    megatron_lm_num_micro_batches megatron_lm_sequence_parallelism megatron_lm_recompute_activations
    megatron_lm_use_distributed_optimizer megatron_lm_gradient_clipping fp8_backend fp8_margin fp8_interval
    fp8_format fp8_amax_history_len fp8_amax_compute_algo fp8_override_linear_precision fp8_opt_level
    aws_access_key_id aws_secret_access_key mpirun_hostfile mpirun_ccl parallelism_config_dp_replicate_size
    parallelism_config_dp_shard_size parallelism_config_tp_size parallelism_config_cp_size
    parallelism_config_cp_comm_strategy""".split()
)
COMPOSER = frozenset(
    """nproc n world_size base_rank node_rank master_addr master_port run_directory stdout stderr timeout""".split()
)
VALUES = {
    "torchrun": TORCHRUN, "deepspeed": DEEPSPEED, "deepspeed-node": DEEPSPEED | {"save_pid"},
    "accelerate": ACCELERATE, "composer": COMPOSER,
}  # fmt: skip
MPI_FLAGS = {  # of mpirun, which has hundreds of others
    "allow_run_as_root", "oversubscribe", "tag_output", "version", "help", "quiet", "q", "verbose", "v",
    "report_bindings",
}  # fmt: skip
NAMES = {
    "torchrun": "torchrun",
    "deepspeed": "deepspeed",
    "deepspeed.pt": "deepspeed",
    "mpirun": "mpi",
    "mpiexec": "mpi",
    "mpiexec.hydra": "mpi",
    "orterun": "mpi",
    "composer": "composer",
    "accelerate-launch": "accelerate",
}
MODULES = {
    "torch.distributed.run": "torchrun",
    "torch.distributed.launch": "torchrun",
    "torch.distributed.elastic.launcher": "torchrun",
    "accelerate.commands.launch": "accelerate",
    "deepspeed.launcher": "deepspeed",
    "deepspeed.launcher.runner": "deepspeed",
    "deepspeed.launcher.launch": "deepspeed-node",
    "composer.cli.launcher": "composer",
}
# Their arguments are words about launchers, not launches.
TALK = {
    "pip", "pip3", "conda", "mamba", "micromamba", "echo", "printf", "which", "command", "ls", "cd", "git", "apt",
    "apt-get", "module", "ml", "cp", "mv", "rm", "mkdir", "source", ".", "cat", "grep", "pkill", "killall", "type",
    "[", "[[", "test", "trap", "tail", "head", "find", "spack", "tar", "hash", "alias", "unset", "ps", "sed", "awk",
}  # fmt: skip
ASSIGNMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\+?=.*", re.DOTALL)


def read(words: Sequence[Word]) -> Launch | None:
    """The first launcher in a command; what stands before it (srun, apptainer exec, env A=1) is passed over."""
    first = next((word for word in words if not ASSIGNMENT.fullmatch(word.text)), None)
    if first is None or basename(first.text) in TALK:
        return None
    for at, word in enumerate(words):
        if at and words[at - 1].text in ("install", "-J", "--job-name", "-n", "conda", "activate"):
            continue
        name = basename(word.text) if word.text == basename(word.text) or "/bin/" in word.text else ""
        kind = NAMES.get(name)
        after = at + 1
        if word.text == "-m" and at + 1 < len(words):
            kind, after = MODULES.get(words[at + 1].text), at + 2
        if name == "accelerate" and at + 1 < len(words):
            kind, after = ("accelerate" if words[at + 1].text == "launch" else None), at + 2
        if kind:
            return _options(kind, word, words[after:])
    return None


def _options(kind: str, word: Word, words: Sequence[Word]) -> Launch:
    options: dict[str, Word] = {}
    at, opened = 0, False
    while at < len(words):
        here = words[at]
        if here.text.startswith("-") and len(here.text) > 1:
            name, equals, value = here.text.lstrip("-").partition("=")
            name = name.replace("-", "_")
            at += 1
            if equals:
                options[name] = Word(value, here.line, here.column, here.known)
            elif at >= len(words) or name not in VALUES.get(kind, {name} - MPI_FLAGS):
                options[name] = Word("", here.line, here.column)
            else:
                options[name] = words[at]
                at += 1
        elif not here.known and re.match(r"[$`\"]", here.text) and "/" not in here.text and ".py" not in here.text:
            opened = True
            at += 1
        else:
            break
    return Launch(kind, word, options, tuple(words[at:]), opened)


def flags(words: Iterable[Word]) -> dict[str, Word]:
    """--lr 1 --bf16 --x=2 as {lr: 1, bf16: "", x: 2}; dots and dashes become underscores."""
    found: dict[str, Word] = {}
    name = ""
    for word in words:
        if re.match(r"--?[A-Za-z]", word.text) or (not name and re.fullmatch(r"[a-z][\w.]*=[^=]*", word.text)):
            key, equals, value = word.text.lstrip("-").partition("=")
            key = re.sub(r"[-.]", "_", key)
            found[key] = Word(value, word.line, word.column, word.known)
            name = "" if equals else key
        elif name:
            found[name] = word
            name = ""
    return found


# --- judging ----------------------------------------------------------------------------------------

LOCAL = re.compile(r"(tcp://)?(localhost|127\.[0-9.]+|\[?::1\]?|0\.0\.0\.0)(:.*)?", re.IGNORECASE)
NPROC = ("nproc_per_node", "nproc")
ENDPOINT = ("rdzv_endpoint", "rdzv_conf_endpoint")


def judge(launch: Launch, around: Around) -> Iterator[Found]:
    yield from _ranks(launch, around)
    if (around.nodes or 1) > 1:
        yield from _meeting(launch, around)
    yield from _ports(launch)
    yield from arithmetic(launch.arguments, around)


def _at(word: Word, rule: str, message: str, fix: str = "", severity: str = "") -> Found:
    return Found(rule, message, word.line, word.column, fix, severity, word.column + len(word.text))


def _ranks(launch: Launch, around: Around) -> Iterator[Found]:
    nodes, gpus, world = around.nodes, around.gpus, around.world
    per_node = launch.option(*NPROC) if launch.kind == "torchrun" else launch.option("num_gpus")
    if launch.kind == "composer":
        per_node = launch.option("n", "nproc")
    count = per_node.number if per_node else None
    if per_node and gpus and count is not None:
        if count > gpus:
            message = f"{count} ranks on a node that has {gpus} GPU{'s' if gpus > 1 else ''}"
            yield _at(per_node, "LCH001", message, f"{gpus}")
        elif count < gpus:
            yield _at(per_node, "LCH002", f"{count} ranks on a node that has {gpus} GPUs", f"{gpus}")
    told = per_node or launch.open or around.given or "PET_NPROC_PER_NODE" in around.env
    if launch.kind == "torchrun" and not told and gpus and gpus > 1:
        message = f"torchrun starts one rank per node unless told otherwise, and the node has {gpus} GPUs"
        yield _at(launch.word, "LCH003", message, f"--nproc-per-node {gpus}")
    names = {"torchrun": ("nnodes",), "deepspeed": ("num_nodes",), "deepspeed-node": ()}
    said = launch.option(*names.get(launch.kind, ("num_machines", "nnodes")))
    if said and nodes and said.known:
        span = re.fullmatch(r"([0-9]{1,6})(?::([0-9]{1,6}))?", said.text)
        low, high = (int(span[1]), int(span[2] or span[1])) if span else (nodes, nodes)
        if not low <= nodes <= high:
            message = f"it waits for {said.text} node{'s' if high > 1 else ''}, and there {_are(nodes)}"
            yield _at(said, "LCH004", message, f"{nodes}")
    processes = launch.option("num_processes") if launch.kind == "accelerate" else launch.option("world_size")
    if processes and world and processes.number not in (None, world):
        message = f"{processes.text} processes where {nodes} x {gpus} GPUs are {world}"
        yield _at(processes, "LCH005", message, f"{world}")


def _are(nodes: int) -> str:
    return "is 1" if nodes == 1 else f"are {nodes}"


def _meeting(launch: Launch, around: Around) -> Iterator[Found]:
    address = launch.option("master_addr", "main_process_ip", *ENDPOINT)
    if address and LOCAL.fullmatch(address.text):
        message = f"every node looks for the first rank at {address.text}, which is itself"
        yield _at(address, "LCH006", message)
    if "standalone" in launch.options:
        message = f"--standalone on {around.nodes} nodes is {around.nodes} jobs of one node each"
        yield _at(launch.options["standalone"], "LCH007", message)
    if launch.kind == "accelerate" and not launch.open and launch.option("num_machines"):
        said = launch.option("machine_rank", "rdzv_backend", "config_file", "deepspeed_hostfile")
        if said is None:
            message = "without --machine_rank every node takes itself for machine 0"
            yield _at(launch.word, "LCH014", message, "--machine_rank, or --rdzv_backend c10d")
        return
    if launch.kind != "torchrun" or launch.open or around.given or "standalone" in launch.options:
        return
    backend = launch.option("rdzv_backend")
    several = launch.option("nnodes") or "PET_NNODES" in around.env
    if not several:  # one job per node, which whoever starts it may want, but for one that is told of the others
        said = launch.option("node_rank", "master_addr", *ENDPOINT)
        if said and not LOCAL.fullmatch(said.text):
            message = f"without --nnodes it waits for 1 node, and there {_are(around.nodes or 1)}"
            yield _at(launch.word, "LCH004", message, f"--nnodes {around.nodes}")
        return
    pets = {name for name in around.env if name.startswith("PET_")}
    static = backend is None or backend.text == "static"
    if static and not launch.option("node_rank") and not pets & {"PET_NODE_RANK", "PET_RDZV_BACKEND"}:
        message = "without --node-rank or --rdzv-backend c10d every node takes itself for node 0"
        yield _at(launch.word, "LCH014", message)
    elif not static and not launch.option(*ENDPOINT) and "PET_RDZV_ENDPOINT" not in pets:
        yield _at(launch.word, "LCH015", "without --rdzv-endpoint every node waits at its own localhost")


PORTS = ("master_port", "main_process_port")


def _ports(launch: Launch) -> Iterator[Found]:
    said = launch.option(*PORTS)
    if said:
        yield from port(said.text, said)
    endpoint = launch.option(*ENDPOINT)
    if endpoint and (match := re.search(r":([0-9]+)$", endpoint.text)):
        yield from port(match[1], endpoint)


def port(text: str, at: Word, *, alone: bool = False) -> Iterator[Found]:
    """A port that is written down. With `alone` nothing else can be on the node."""
    if not re.fullmatch(r"[0-9]{1,6}", text) or text == "0":
        return
    number = int(text)
    if number < 1024 or number > 65535:
        yield _at(
            at,
            "LCH013",
            f"port {number}: below 1024 is for root, above 65535 there is none",
            "a port of 10000 to 32767",
        )
    elif 32768 <= number <= 60999:
        message = f"port {number} lies where Linux takes ports for outgoing connections"
        yield _at(at, "LCH013", message, "a port of 10000 to 32767", "warning")
    else:
        severity = "note" if alone else ""
        yield _at(at, "LCH012", f"port {number} is the same for every job", "", severity)


# The words that frameworks have for one thing, underscores for dashes and dots.
TENSOR = ("tensor_model_parallel_size", "parallelism_tensor_parallel_degree", "model_parallel_size")
PIPELINE = ("pipeline_model_parallel_size", "parallelism_pipeline_parallel_degree", "pipe_parallel_size")
CONTEXT = ("context_parallel_size", "parallelism_context_parallel_degree")
TOTAL = ("global_batch_size", "train_batch_size", "training_global_batch_size")
MICRO = (
    "micro_batch_size",
    "train_micro_batch_size_per_gpu",
    "micro_train_batch_size",
    "training_local_batch_size",
)
PASSES = ("gradient_accumulation_steps",)


def arithmetic(words: Iterable[Word], around: Around) -> Iterator[Found]:
    """Degrees of parallelism that do not divide the ranks, and batches that do not divide by the replicas."""
    world = around.world
    if not world:
        return
    said = flags(words)

    def first(names: tuple[str, ...]) -> Word | None:
        return next((said[name] for name in names if name in said), None)

    degrees = [word for word in (first(TENSOR), first(PIPELINE), first(CONTEXT)) if word is not None]
    if any(word.number is None and word.text != "-1" for word in degrees):
        return
    product = 1
    for word in degrees:
        product *= max(word.number or 1, 1)
    ranks = f"{around.nodes} x {around.gpus} = {world} ranks"
    if world % product:
        shape = " x ".join(word.text for word in degrees)
        message = f"tensor x pipeline x context parallelism {shape} = {product} does not divide {ranks}"
        yield _at(degrees[0], "LCH008", message, f"degrees whose product divides {world}")
        return
    total, micro, passes = first(TOTAL), first(MICRO), first(PASSES)
    if total is None or micro is None or not total.number or not micro.number:
        return
    replicas = world // product
    accumulation = passes.number if passes and passes.number else None
    if "micro_train_batch_size" in said or "training_local_batch_size" in said:
        accumulation = None  # these frameworks derive it
    try:
        batch.solve(total.number, micro.number, accumulation or "auto", replicas=replicas)
    except UserError as error:
        message = f"{total.text} samples a step, {micro.text} per replica, and {replicas} replicas ({ranks}"
        message += f", {product} to a replica)" if product > 1 else ")"
        yield _at(total, "LCH009", message, error.problems[0].hint or error.problems[0].message)


# --- secrets ----------------------------------------------------------------------------------------

PLACEHOLDER = re.compile(
    r"|.*[<>{}$`…].*|\**|x+|X+|(?i:.*(your|placeholder|change_?me|example|redacted|dummy|todo|insert|none|fake|replace).*)|\.+|-+",
    re.DOTALL,
)
NOT_SECRET = re.compile(r"(?i:.*(TOKENIZER|TOKENS|TOKEN_ID|MAX_TOKEN|_FILE|_PATH|_NAME|_DIR).*)")
LOGIN = {"wandb", "huggingface-cli", "hf", "comet", "mlflow"}
SECRET_FLAGS = re.compile(
    r"--((hf|hub|huggingface|wandb|comet|openai)[-_])?(token|api[-_]?token|api[-_]?key|(?<=[a-z][-_])key|password)(=(.*))?",
    re.DOTALL,
)


def assigned_secret(name: str, value: str | None) -> bool:
    """WANDB_API_KEY=0f3... is one; WANDB_API_KEY=$KEY, =<your key> and TOKENIZER_PATH=/x are not."""
    if value is None or PLACEHOLDER.fullmatch(value):
        return False
    if SECRET_VALUE.regex.fullmatch(value):
        return True
    named = SECRET_NAME.regex.fullmatch(name) and not NOT_SECRET.fullmatch(name)
    return bool(named) and not value.isdigit() and "/" not in value and value.lower() not in ("true", "false")


def secrets(words: Sequence[Word]) -> Iterator[Found]:
    """`wandb login KEY`, --token hf_...: in plain text, or at least for everybody in ps."""
    plain = "is a secret in plain text"
    names = [basename(word.text) for word in words]
    for at, word in enumerate(words):
        value: Word | None = None
        match = SECRET_FLAGS.fullmatch(word.text)
        if match and match[4]:
            value = Word(match[5], word.line, word.column, word.known)
        elif match and at + 1 < len(words):
            value = words[at + 1]
        elif names[at] == "login" and at and names[at - 1] in LOGIN and at + 1 < len(words):
            rest = [one for one in words[at + 1 :] if not one.text.startswith("-")]
            before = words[at + 1].text
            value = rest[0] if rest and not before.startswith(("--host", "--token", "--key")) else None
        elif SECRET_VALUE.regex.fullmatch(word.text) and not ASSIGNMENT.fullmatch(word.text):
            value = word
        if value is None or not value.text or value.text.startswith("-"):
            continue
        if value.known and not PLACEHOLDER.fullmatch(value.text) and (len(value.text) >= 8):
            yield _at(
                value,
                "LCH010",
                f"what stands after {words[at - 1].text if value is word else word.text.partition('=')[0]} {plain}",
            )
            return
        if not value.known and re.search(r"\$", value.text):
            yield _at(
                value, "LCH011", f"{value.text} is on the command line, which ps shows to everybody on the node"
            )
            return
