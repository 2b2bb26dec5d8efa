"""The plan: everything decided about a job, and why. Pure: a JobSpec in, a Plan out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from launcher import facts, nccl
from launcher.errors import Problem, UserError
from launcher.plan import batch as batches
from launcher.plan import dsconfig, memory, rules
from launcher.spec import JobSpec, Shape


class InBundle(str):
    """A path inside the bundle: node.sh writes it relative to itself."""


@dataclass(frozen=True)
class Decision:
    name: str
    value: str
    why: str


@dataclass(frozen=True)
class Plan:
    spec: JobSpec
    model: facts.Model
    parameters: int
    batch: batches.Batch
    stage: int
    precision: str
    recompute: bool
    estimate: memory.Estimate | None  # GiB per GPU; None on CPU
    config: dict[str, Any]
    variables: nccl.Variables
    command: tuple[str, ...]  # one rank's argv
    checkpoint_dir: str
    decisions: tuple[Decision, ...]
    notes: tuple[str, ...]

    @property
    def reference_trainer(self) -> bool:
        return uses_reference_trainer(self.spec)


# What the choices below are made on when the job file leaves them open.
LARGEST_MICRO = 64
CPU_MICRO = 1
LARGE_FOR_CPU = 100_000_000  # parameters; more than that and the GPUs were forgotten
BYTES = 256  # the reference trainer's tokens
HOST_ROOM = 1.5  # DeepSpeed's own factor for the buffers of offload (runtime/zero/stage3.py)


def make(spec: JobSpec, *, config_json: str | None = None) -> Plan:
    """Decide what the job file leaves open. Raises UserError with everything that cannot run.

    `config_json` is the text of the file that `model:` names, read by the caller.
    """
    return _Maker(spec, config_json).plan()


def uses_reference_trainer(spec: JobSpec) -> bool:
    return not (spec.train.script or spec.train.module or spec.train.command)


def _differences(asked: Shape) -> list[str]:
    """What of an architecture a plain GPT leaves out: ["kv_heads 8", "ffn 28672", "gated", "no biases"].

    Untied embeddings and learned positions are not among them: they are what a shape without a word about
    either gets, and change no layer.
    """
    rows = (
        (asked.kv_heads not in (None, asked.heads), f"kv_heads {asked.kv_heads}"),
        (asked.head_dim not in (None, asked.hidden // asked.heads), f"head_dim {asked.head_dim}"),
        (asked.ffn not in (None, 4 * asked.hidden), f"ffn {asked.ffn}"),
        (asked.gated, "gated"),
        (not asked.biases, "no biases"),
    )
    return [text for differs, text in rows if differs]


class _Maker:
    def __init__(self, spec: JobSpec, config_json: str | None) -> None:
        self.spec, self.train, self.resources = spec, spec.train, spec.resources
        self.config_json = config_json
        self.problems: list[Problem] = []
        self.decisions: list[Decision] = []
        self.notes: list[str] = []

    def decide(self, name: str, value: object, why: str) -> None:
        self.decisions.append(Decision(name, str(value), why))

    def gather(self, part: Any, *args: Any, **kwargs: Any) -> Any:
        """Run one part; keep its problems and go on, so that all are reported at once."""
        try:
            return part(*args, **kwargs)
        except UserError as error:
            self.problems += error.problems
            return None

    def plan(self) -> Plan:
        spec, train = self.spec, self.train
        model = self.gather(self._model)
        gpu = self.gather(facts.gpu, self.resources.gpu) if self.resources.gpu else None
        replicas = self.gather(self._replicas)
        variables = self.gather(nccl.variables, spec)
        self._fields()
        count = memory.parameters(model.shape) if model else 0
        unit = "GPUs" if self.resources.gpus_per_node else "processes on CPU (gloo)"
        self.decide("ranks", spec.world, f"{self.resources.nodes} nodes x {spec.per_node} {unit}")
        precision = self._precision(gpu)
        fitting = batch = None
        if model and replicas and (gpu or not self.resources.gpu):
            fitting = self.gather(self._fit, model.shape, count, gpu, precision, replicas)
        if model:
            self._host(count, precision)
        stage, recompute, largest = fitting or (self._fallback_stage(), False, 1)
        if replicas:
            batch = self.gather(
                batches.solve,
                train.global_batch,
                train.micro_batch,
                train.gradient_accumulation,
                replicas=replicas,
                largest_micro=largest,
            )
        config = dsconfig.make(
            train,
            batch=batch or batches.Batch(1, 1, 1, 1),
            stage=stage,
            precision=precision,
            recompute=recompute,
            hidden=model.shape.hidden if model else 1024,
            gpus=self.resources.gpus_per_node > 0,
        )
        self._judge(config)
        self._check_raw(config, batch if fitting else None, stage=stage if fitting else None, precision=precision)
        self._check_params()
        if self.problems:
            raise UserError(*self.problems)
        assert model is not None
        assert batch is not None
        self.decide(
            "batch",
            batch.total,
            f"{batch.micro} per rank x {batch.accumulation} accumulation x {batch.replicas} data-parallel ranks"
            f" = {batch.total * train.seq_len:,} tokens per step",
        )
        self._say_optimizer(config)
        checkpoint_dir = train.checkpoint.dir or f"checkpoints/{spec.name}"
        self._say_checkpoint(checkpoint_dir)
        self._say_what_the_program_must_do(recompute)
        for variable in variables.rows:
            self.decide(variable.name, variable.value, variable.why)
        estimate = (
            self._estimate(
                model.shape,
                count,
                precision,
                stage=stage,
                recompute=recompute,
                micro=batch.micro,
                replicas=batch.replicas,
            )
            if gpu
            else None
        )
        return Plan(
            spec=spec,
            model=model,
            parameters=count,
            batch=batch,
            stage=stage,
            precision=precision,
            recompute=recompute,
            estimate=estimate,
            config=config,
            variables=variables,
            command=self._command(model.shape, recompute, checkpoint_dir),
            checkpoint_dir=checkpoint_dir,
            decisions=tuple(self.decisions),
            notes=(*variables.notes, *self.notes),
        )

    def _model(self) -> facts.Model:
        """What is trained: the model asked for, or the reference trainer's GPT of its dimensions."""
        asked = self.spec.model
        if isinstance(asked, Shape):
            model = facts.Model("custom shape", asked, "the job file")
        else:
            model = facts.model(asked, config_json=self.config_json)
        self._divides(model)
        if uses_reference_trainer(self.spec):
            return self._trained(model)
        self.decide(
            "model", f"{model.name}, {memory.parameters(model.shape):,} parameters", f"shape from {model.source}"
        )
        return model

    def _divides(self, model: facts.Model) -> None:
        shape = model.shape
        if shape.hidden % shape.heads and (shape.head_dim is None or uses_reference_trainer(self.spec)):
            self.problems.append(
                Problem(
                    f"hidden {shape.hidden} is not a multiple of heads {shape.heads}",
                    hint=f"hidden: {-(-shape.hidden // shape.heads) * shape.heads}"
                    + ("" if uses_reference_trainer(self.spec) else ", or give head_dim"),
                    at=("model", "hidden"),
                )
            )
        if shape.kv_heads and shape.heads % shape.kv_heads:
            message = f"heads {shape.heads} is not a multiple of kv_heads {shape.kv_heads}"
            self.problems.append(Problem(message, at=("model", "kv_heads")))

    def _fields(self) -> None:
        """Fields that cannot stand together, or would be left out without a word."""
        train, asked = self.train, self.train.optimizer_section
        row = facts.optimizer(asked.type)
        if asked.freeze_step is not None and row and not row.onebit:
            self.problems.append(
                Problem(
                    f"freeze_step {asked.freeze_step} belongs to the 1-bit optimizers, and {asked.type} is none",
                    hint="leave it out",
                    at=("train", "optimizer", "freeze_step"),
                )
            )
        warmup = train.lr_schedule.warmup_steps
        if warmup >= train.steps:
            self.problems.append(
                Problem(
                    f"warmup_steps {warmup} and the run has {train.steps}: the learning rate never leaves the ramp",
                    hint=f"warmup_steps: {train.steps // 20}",
                    at=("train", "lr_schedule", "warmup_steps"),
                )
            )
        offload = train.offload
        if offload.nvme_path and "nvme" not in (offload.optimizer, offload.parameters):
            self.problems.append(
                Problem(
                    f"nvme_path {offload.nvme_path} is named and nothing is offloaded to nvme",
                    hint="optimizer: nvme, or leave nvme_path out",
                    at=("train", "offload", "nvme_path"),
                )
            )

    def _host(self, count: int, precision: str) -> None:
        """What is offloaded has to fit the hosts."""
        offload, row = self.train.offload, facts.optimizer(self.train.optimizer_section.type)
        per = memory.host_bytes(
            low_precision=precision != "fp32",
            optimizer=row.state if row else 8,
            offload_optimizer=offload.optimizer == "cpu",
            offload_parameters=offload.parameters == "cpu",
        )
        if not per:
            return
        nodes, asked = self.resources.nodes, self.resources.memory or "0"
        need = count * per / nodes / memory.GIB
        sum_of = f"{per} bytes for each of {count:,} parameters over {nodes} node{'s' if nodes > 1 else ''}"
        if asked != "0" and need > memory.host_gib(asked):
            self.problems.append(
                Problem(
                    f"offload needs {need:.0f} GiB of host memory per node ({sum_of}), buffers aside, and memory "
                    f"{asked} is {memory.host_gib(asked):.0f}",
                    hint=f"memory: {int(need * HOST_ROOM) + 1}G, or more nodes",
                    at=("resources", "memory"),
                )
            )
        self.decide("host memory", f"{need:.0f} GiB per node", f"offloaded: {sum_of}; buffers come on top")

    def _replicas(self) -> int:
        parallel = self.train.parallel
        inner = parallel.tensor * parallel.pipeline
        if self.spec.world % inner:
            raise UserError(
                Problem(
                    f"tensor {parallel.tensor} x pipeline {parallel.pipeline} = {inner} does not divide "
                    f"{self.spec.world} ranks",
                    hint=f"{self.resources.nodes} nodes x {self.spec.per_node} ranks have to be a multiple of it",
                    at=("train", "parallel"),
                )
            )
        return self.spec.world // inner

    def _precision(self, gpu: facts.Gpu | None) -> str:
        asked = self.train.precision
        if asked != "auto":
            if asked == "bf16" and gpu and not gpu.bf16:
                self.problems.append(
                    Problem(f"{gpu.name} has no bf16", hint="precision: fp16", at=("train", "precision"))
                )
            self.decide("precision", asked, "from the job file")
            return asked
        if not self.resources.gpus_per_node:
            self.decide("precision", "fp32", "CPU: fp32 is as fast and needs no care")
            return "fp32"
        if gpu is None:
            if self.resources.gpu:  # named, but in no table: that is said already
                return "bf16"
            self.problems.append(
                Problem(
                    "precision is auto and the GPU type is not named",
                    hint="resources.gpu, or train.precision",
                    at=("resources", "gpus_per_node"),
                )
            )
            return "bf16"
        choice = "bf16" if gpu.bf16 else "fp16"
        why = "needs no loss scaling" if gpu.bf16 else f"{gpu.name} has no bf16"
        self.decide("precision", choice, why)
        return choice

    def _estimate(
        self,
        shape: Shape,
        count: int,
        precision: str,
        *,
        stage: int,
        recompute: bool,
        micro: int,
        replicas: int,
    ) -> memory.Estimate:
        row = facts.optimizer(self.train.optimizer_section.type)
        low = precision != "fp32"
        inner = self.train.parallel.tensor * self.train.parallel.pipeline
        return memory.Estimate(
            states=memory.model_states(
                count / inner,
                stage=stage,
                gpus=replicas,
                low_precision=low,
                optimizer=row.state if row else 8,
                offload_optimizer=self.train.offload.optimizer != "none",
                offload_parameters=self.train.offload.parameters != "none",
            ),
            activations=memory.activations(
                shape, micro=micro, seq_len=self.train.seq_len, recompute=recompute, low_precision=low
            )
            / inner,
            gathered=memory.live_parameters(shape, count / inner, stage=stage, low_precision=low),
        )

    def _fit(
        self, shape: Shape, count: int, gpu: facts.Gpu | None, precision: str, replicas: int
    ) -> tuple[int, bool, int]:
        """(stage, recompute, largest micro-batch that fits), the lowest stage first."""
        train = self.train
        given = batches.given_micro(
            train.global_batch, train.micro_batch, train.gradient_accumulation, replicas=replicas
        )
        if gpu is None:
            if self.resources.gpus_per_node and (train.zero == "auto" or given is None):
                raise UserError(
                    Problem(
                        "the GPU type is not named, so nobody can tell what fits",
                        hint="resources.gpu, or give train.zero and train.micro_batch",
                        at=("resources", "gpus_per_node"),
                    )
                )
            stage = self._stages()[0] if train.zero == "auto" else train.zero
            why = "from the job file" if train.zero != "auto" else "memory is no limit here, and it sends the least"
            self.decide("zero stage", stage, why)
            recompute = train.activation_checkpointing is True
            self.decide("activation checkpointing", recompute, "from the job file" if recompute else "not asked for")
            return stage, recompute, CPU_MICRO
        stages = (train.zero,) if train.zero != "auto" else self._stages()
        asked = train.activation_checkpointing
        recomputes = (False, True) if asked == "auto" else (asked,)
        micro = given or 1

        def at(stage: int, recompute: bool, micro: int) -> memory.Estimate:
            return self._estimate(
                shape, count, precision, stage=stage, recompute=recompute, micro=micro, replicas=replicas
            )

        for stage in stages:
            for recompute in recomputes:
                if at(stage, recompute, micro).fits(gpu.memory):
                    self._say_fit(stage, recompute, at(stage, recompute, micro), gpu, micro)
                    largest = micro
                    while given is None and largest < LARGEST_MICRO:
                        if not at(stage, recompute, largest * 2).fits(gpu.memory):
                            break
                        largest *= 2
                    return stage, recompute, largest
        best = min(
            (at(stage, recompute, micro) for stage in stages for recompute in recomputes),
            key=lambda e: e.total,
        )
        raise UserError(
            Problem(
                f"does not fit: about {best.total:.0f} GiB per GPU ({best.states:.0f} model states, "
                f"{best.activations:.0f} activations, {best.gathered:.0f} gathered weights, "
                f"{memory.OVERHEAD_GIB:.0f} CUDA and NCCL) at micro-batch {micro}, and {gpu.name} has "
                f"{gpu.memory:.0f}",
                hint=self._cheaper(stages, micro, best),
                at=("train", "gradient_accumulation")
                if train.micro_batch == "auto" and micro > 1
                else ("train", "zero")
                if train.zero != "auto"
                else ("resources",),
            )
        )

    def _stages(self) -> tuple[int, ...]:
        """The stages worth trying: the optimizer's own, and what offload and pipeline leave."""
        row = facts.optimizer(self.train.optimizer_section.type)
        stages = rules.stages(row, self.train.deepspeed) if row else [0, 1, 2, 3]
        offload = self.train.offload
        if offload.parameters != "none" or offload.optimizer == "nvme":
            stages = [3]
        elif offload.optimizer != "none":
            stages = [stage for stage in stages if stage >= 1] or [1]
        if self.train.parallel.pipeline > 1:
            stages = [stage for stage in stages if stage < 2] or [1]
        return tuple(stages)

    def _fallback_stage(self) -> int:
        """For judging the rest when nobody can tell what fits."""
        return self._stages()[-1] if self.train.zero == "auto" else self.train.zero

    def _cheaper(self, stages: tuple[int, ...], micro: int, estimate: memory.Estimate) -> str:
        """What makes it fit, cheapest first: what shrinks activations where those are the larger part."""
        ways = []
        accumulation = self.train.gradient_accumulation
        if micro > 1 and self.train.micro_batch == "auto" and accumulation != "auto":
            ways.append(f"gradient_accumulation: {accumulation * micro} (micro-batch 1)")
        elif micro > 1:
            ways.append("micro_batch: 1")
        if self.train.activation_checkpointing is False:
            ways.append("activation_checkpointing: true")
        if estimate.activations > estimate.states:
            ways.append("a shorter seq_len")
        else:
            if max(stages) < 3:
                ways.append("zero: 3 (with AdamW)")
            if self.train.offload.optimizer == "none":
                ways.append("offload.optimizer: cpu")
            ways.append("more nodes")
        return ", then ".join(ways)

    def _say_fit(self, stage: int, recompute: bool, estimate: memory.Estimate, gpu: facts.Gpu, micro: int) -> None:
        size = f"about {estimate.total:.0f} of {gpu.memory:.0f} GiB per GPU at micro-batch {micro}"
        why = "from the job file" if self.train.zero != "auto" else "the lowest stage that fits"
        self.decide("zero stage", stage, f"{why}; {size}")
        if self.train.activation_checkpointing != "auto":
            why = "from the job file"
        else:
            why = "does not fit without" if recompute else "fits without, which is a third faster"
        self.decide("activation checkpointing", recompute, why)

    def _judge(self, config: dict[str, Any]) -> None:
        situation = rules.Situation(
            config=config,
            gpus=self.resources.gpus_per_node > 0,
            world=self.spec.world,
            pipeline=self.train.parallel.pipeline,
            steps=self.train.steps,
            deepspeed=self.spec.environment.deepspeed or "",
        )
        problems, notes = rules.judge(situation)
        self.problems += problems
        self.notes += notes

    def _check_raw(
        self, config: dict[str, Any], batch: batches.Batch | None, *, stage: int | None, precision: str
    ) -> None:
        """Raw keys may not contradict what was planned, as far as it could be."""
        batch_hint = "use train.global_batch, micro_batch and gradient_accumulation"
        planned: list[tuple[tuple[str, ...], object, str]] = [
            (("optimizer", "type"), self.train.optimizer_section.type, "use train.optimizer"),
        ]
        if any(decision.name == "precision" for decision in self.decisions):
            planned += [
                (("bf16", "enabled"), precision == "bf16", "use train.precision"),
                (("bfloat16", "enabled"), precision == "bf16", "use train.precision"),
                (("fp16", "enabled"), precision == "fp16", "use train.precision"),
            ]
        if batch:
            planned += [
                (("train_batch_size",), batch.total, batch_hint),
                (("train_micro_batch_size_per_gpu",), batch.micro, batch_hint),
                (("gradient_accumulation_steps",), batch.accumulation, batch_hint),
            ]
        if stage is not None:
            planned.append((("zero_optimization", "stage"), stage, "use train.zero"))
        for path, value, hint in planned:
            found: Any = config
            for key in path:
                found = found.get(key, value) if isinstance(found, dict) else value
            if found != value:
                message = f"deepspeed.{'.'.join(path)} {found} contradicts the plan's {value}"
                self.problems.append(Problem(message, hint, ("train", "deepspeed", *path)))

    def _check_params(self) -> None:
        """What has a field under train.optimizer may not say something else under params."""
        asked = self.train.optimizer_section
        freeze = "var_freeze_step" if asked.type == "ZeroOneAdam" else "freeze_step"
        given = {
            "lr": ("lr", asked.lr),
            "betas": ("betas", None if asked.betas is None else list(asked.betas)),
            "eps": ("eps", asked.eps),
            "weight_decay": ("weight_decay", asked.weight_decay),
            freeze: ("freeze_step", asked.freeze_step),
        }
        raw = self.train.deepspeed.get("optimizer")
        places: tuple[tuple[tuple[str, ...], Any], ...] = (
            (("train", "optimizer", "params"), asked.params),
            (("train", "deepspeed", "optimizer", "params"), raw.get("params") if isinstance(raw, dict) else None),
        )
        for at, params in places:
            for key, (name, value) in given.items() if isinstance(params, dict) else ():
                if value is not None and key in params and params[key] != value:
                    message = f"{'.'.join((*at[1:], key))} {params[key]} contradicts train.optimizer.{name} {value}"
                    self.problems.append(Problem(message, f"use train.optimizer.{name} alone", (*at, key)))

    def _trained(self, model: facts.Model) -> facts.Model:
        """The reference trainer's model: a GPT without tensor or pipeline parallelism."""
        asked, train = model.shape, self.train
        hint = "give train.script, module or command"
        if asked.kind != "decoder":
            message = f"the reference trainer trains decoders, and this model is an {asked.kind}"
            self.problems.append(Problem(message, hint, ("model",)))
        elif asked.vocab < BYTES:
            message = f"vocab {asked.vocab} is less than the {BYTES} bytes that the reference trainer reads"
            self.problems.append(Problem(message, f"vocab: {BYTES}, or {hint}", ("model", "vocab")))
        if train.parallel.tensor * train.parallel.pipeline > 1:
            message = "the reference trainer is data-parallel only"
            self.problems.append(Problem(message, hint, ("train", "parallel")))
        if train.config_flag:
            message = f"config_flag {train.config_flag} without a program: the reference trainer has its own flag"
            self.problems.append(Problem(message, f"leave it out, or {hint}", ("train", "config_flag")))
        shape = Shape(
            layers=asked.layers,
            hidden=asked.hidden,
            heads=asked.heads,
            vocab=asked.vocab,
            positions=train.seq_len,
            tied=False,
            biases=True,
        )
        count = f"{memory.parameters(shape):,} parameters"
        size = f"{shape.layers} layers of {shape.hidden}, {shape.heads} heads, {shape.vocab} tokens"
        self.decide(
            "model",
            f"{model.name}, {count}",
            f"the reference trainer's GPT: {size}, {shape.positions} positions; from {model.source}",
        )
        lost = _differences(asked)
        if lost:
            self.notes.append(
                f"the reference trainer trains a plain GPT of {size} ({count}), not {model.name} itself "
                f"({', '.join(lost)}); {hint} for that"
            )
        return replace(model, shape=shape)

    def _say_optimizer(self, config: dict[str, Any]) -> None:
        asked = self.train.optimizer_section
        params = config["optimizer"]["params"]
        row = facts.optimizer(config["optimizer"]["type"])
        if row and row.onebit:
            freeze = params.get("freeze_step") or params.get("var_freeze_step")
            why = f"plain Adam until step {freeze}, then compressed; needs cupy on the nodes"
        elif params.get("torch_adam"):
            why = "torch's own implementation: nothing to compile on the nodes"
        else:
            why = "from the job file" if asked != type(asked)() else "the usual choice"
        self.decide("optimizer", config["optimizer"]["type"], why)

    def _say_checkpoint(self, directory: str) -> None:
        asked = self.train.checkpoint
        every = f"every {asked.every} steps" if asked.every else "at the end"
        why = f"{every}, {asked.keep} kept; relative to workdir"
        if not uses_reference_trainer(self.spec):
            why = (
                f"asked for {why}. Your program has to do it: DSLAUNCH_CHECKPOINT_DIR, DSLAUNCH_CHECKPOINT_EVERY and "
                "DSLAUNCH_CHECKPOINT_KEEP tell it"
            )
        self.decide("checkpoint", directory, why)

    def _say_what_the_program_must_do(self, recompute: bool) -> None:
        if uses_reference_trainer(self.spec):
            return
        if recompute:
            self.notes.append(
                "activation checkpointing is up to your program: DeepSpeed's section alone recomputes nothing, and "
                "the estimate counts on it; model.gradient_checkpointing_enable() for a Hugging Face model"
            )

    def _command(self, shape: Shape, recompute: bool, checkpoint_dir: str) -> tuple[str, ...]:
        train = self.train
        config = InBundle("ds_config.json")
        if train.command:
            flagged = train.config_flag not in (None, "none")
            return (*train.command, *((str(train.config_flag), config) if flagged else ()))
        if uses_reference_trainer(self.spec):
            command = [
                "python3",
                "-u",
                InBundle("node/train_gpt.py"),
                "--deepspeed_config",
                config,
                "--steps",
                train.steps,
                "--seq-len",
                train.seq_len,
                "--layers",
                shape.layers,
                "--hidden",
                shape.hidden,
                "--heads",
                shape.heads,
                "--vocab",
                shape.vocab,
                "--checkpoint-dir",
                checkpoint_dir,
                "--checkpoint-every",
                train.checkpoint.every,
                "--checkpoint-keep",
                train.checkpoint.keep,
            ]
            if recompute:
                command.append("--activation-checkpointing")
            return tuple(part if isinstance(part, str) else str(part) for part in (*command, *train.args))
        program = ("-m", train.module) if train.module else (str(train.script),)
        flag = train.config_flag or "--deepspeed_config"
        tail = () if flag == "none" else (flag, config)
        return ("python3", "-u", *(str(part) for part in program), *train.args, *tail)
