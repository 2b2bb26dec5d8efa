"""The plan: everything decided about a job, and why. Pure: a JobSpec in, a Plan out."""

from __future__ import annotations

from dataclasses import dataclass
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


def make(spec: JobSpec, *, config_json: str | None = None) -> Plan:
    """Decide what the job file leaves open. Raises UserError with everything that cannot run.

    `config_json` is the text of the file that `model:` names, read by the caller.
    """
    return _Maker(spec, config_json).plan()


def uses_reference_trainer(spec: JobSpec) -> bool:
    return not (spec.train.script or spec.train.module or spec.train.command)


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
        if model is None or replicas is None or (self.resources.gpu and gpu is None):
            self._judge(
                dsconfig.make(
                    train,
                    batch=batches.Batch(1, 1, 1, 1),
                    stage=train.zero if train.zero != "auto" else 0,
                    precision="fp32",
                    recompute=False,
                    hidden=1024,
                    gpus=self.resources.gpus_per_node > 0,
                )
            )
            raise UserError(*self.problems)
        count = memory.parameters(model.shape)
        self.decide("model", f"{model.name}, {count:,} parameters", f"shape from {model.source}")
        per = self.resources.gpus_per_node
        unit = "GPUs" if per else "processes on CPU (gloo)"
        self.decide("ranks", spec.world, f"{self.resources.nodes} nodes x {spec.per_node} {unit}")
        precision = self._precision(gpu)
        fitting = self.gather(self._fit, model.shape, count, gpu, precision, replicas)
        stage, recompute, largest = fitting or (self._stages()[-1], False, 1)
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
            hidden=model.shape.hidden,
            gpus=per > 0,
        )
        self._judge(config)
        self._trainer(model.shape)
        if batch is not None and fitting is not None:
            self._check_raw(config, batch, stage=stage, precision=precision)
        if self.problems:
            raise UserError(*self.problems)
        assert batch is not None
        self.decide(
            "batch",
            batch.total,
            f"{batch.micro} per rank x {batch.accumulation} accumulation x {batch.replicas} data-parallel ranks"
            f" = {batch.total * train.seq_len:,} tokens per step",
        )
        self._say_optimizer(config)
        checkpoint_dir = train.checkpoint.dir or f"checkpoints/{spec.name}"
        every = f"every {train.checkpoint.every} steps" if train.checkpoint.every else "at the end"
        self.decide("checkpoint", checkpoint_dir, f"{every}, {train.checkpoint.keep} kept; relative to workdir")
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
                replicas=replicas,
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
        asked = self.spec.model
        if isinstance(asked, Shape):
            if asked.hidden % asked.heads and asked.head_dim is None:
                raise UserError(
                    Problem(
                        f"hidden {asked.hidden} is not a multiple of heads {asked.heads}",
                        hint=f"hidden: {-(-asked.hidden // asked.heads) * asked.heads}, or give head_dim",
                        at=("model", "hidden"),
                    )
                )
            if asked.kv_heads and asked.heads % asked.kv_heads:
                message = f"heads {asked.heads} is not a multiple of kv_heads {asked.kv_heads}"
                raise UserError(Problem(message, at=("model", "kv_heads")))
            return facts.Model("custom shape", asked, "the job file")
        return facts.model(asked, config_json=self.config_json)

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
        row = facts.optimizers().get(self.train.optimizer_section.type)
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
        if gpu is None:
            if self.resources.gpus_per_node and "auto" in (train.zero, train.micro_batch):
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
        micro = 1 if train.micro_batch == "auto" else train.micro_batch

        def at(stage: int, recompute: bool, micro: int) -> memory.Estimate:
            return self._estimate(
                shape, count, precision, stage=stage, recompute=recompute, micro=micro, replicas=replicas
            )

        for stage in stages:
            for recompute in recomputes:
                if at(stage, recompute, micro).fits(gpu.memory):
                    self._say_fit(stage, recompute, at(stage, recompute, micro), gpu, micro)
                    largest = micro
                    while train.micro_batch == "auto" and largest < LARGEST_MICRO:
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
                f"{memory.OVERHEAD_GIB:.0f} CUDA and NCCL) and {gpu.name} has {gpu.memory:.0f}",
                hint=self._cheaper(stages, micro),
                at=("train", "zero") if train.zero != "auto" else ("resources",),
            )
        )

    def _stages(self) -> tuple[int, ...]:
        """The stages worth trying: the optimizer's own, and what offload and pipeline leave."""
        row = facts.optimizers().get(self.train.optimizer_section.type)
        stages = row.zero if row else [0, 1, 2, 3]
        offload = self.train.offload
        if offload.parameters != "none" or offload.optimizer == "nvme":
            stages = [3]
        elif offload.optimizer != "none":
            stages = [stage for stage in stages if stage >= 1] or [1]
        if self.train.parallel.pipeline > 1:
            stages = [stage for stage in stages if stage < 2] or [1]
        return tuple(stages)

    def _cheaper(self, stages: tuple[int, ...], micro: int) -> str:
        ways = []
        if micro > 1:
            ways.append("micro_batch: 1")
        if self.train.activation_checkpointing is False:
            ways.append("activation_checkpointing: true")
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

    def _check_raw(self, config: dict[str, Any], batch: batches.Batch, *, stage: int, precision: str) -> None:
        """Raw keys may not contradict what was planned."""
        batch_hint = "use train.global_batch, micro_batch and gradient_accumulation"
        planned: tuple[tuple[tuple[str, ...], object, str], ...] = (
            (("train_batch_size",), batch.total, batch_hint),
            (("train_micro_batch_size_per_gpu",), batch.micro, batch_hint),
            (("gradient_accumulation_steps",), batch.accumulation, batch_hint),
            (("zero_optimization", "stage"), stage, "use train.zero"),
            (("optimizer", "type"), self.train.optimizer_section.type, "use train.optimizer"),
            (("bf16", "enabled"), precision == "bf16", "use train.precision"),
            (("bfloat16", "enabled"), precision == "bf16", "use train.precision"),
            (("fp16", "enabled"), precision == "fp16", "use train.precision"),
        )
        for path, value, hint in planned:
            found: Any = config
            for key in path:
                found = found.get(key, value) if isinstance(found, dict) else value
            if found != value:
                message = f"deepspeed.{'.'.join(path)} {found} contradicts the plan's {value}"
                self.problems.append(Problem(message, hint, ("train", "deepspeed", *path)))

    def _trainer(self, shape: Shape) -> None:
        """The reference trainer is a GPT without tensor or pipeline parallelism."""
        if not uses_reference_trainer(self.spec):
            return
        hint = "give train.script, module or command"
        if shape.kind != "decoder":
            message = f"the reference trainer trains decoders, and this model is an {shape.kind}"
            self.problems.append(Problem(message, hint, ("model",)))
        if self.train.parallel.tensor * self.train.parallel.pipeline > 1:
            message = "the reference trainer is data-parallel only"
            self.problems.append(Problem(message, hint, ("train", "parallel")))

    def _say_optimizer(self, config: dict[str, Any]) -> None:
        asked = self.train.optimizer_section
        params = config["optimizer"]["params"]
        row = facts.optimizers().get(config["optimizer"]["type"])
        if row and row.onebit:
            freeze = params.get("freeze_step") or params.get("var_freeze_step")
            why = f"plain Adam until step {freeze}, then compressed; needs cupy on the nodes"
        elif params.get("torch_adam"):
            why = "torch's own implementation: nothing to compile on the nodes"
        else:
            why = "from the job file" if asked != type(asked)() else "the usual choice"
        self.decide("optimizer", config["optimizer"]["type"], why)

    def _command(self, shape: Shape, recompute: bool, checkpoint_dir: str) -> tuple[str, ...]:
        train = self.train
        config = InBundle("ds_config.json")
        if train.command:
            return (*train.command, *((train.config_flag, config) if train.config_flag else ()))
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
