"""The plan: everything decided about a job, and why. Pure: a JobSpec in, a Plan out."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

from launcher import facts, nccl
from launcher.errors import Problem, UserError
from launcher.plan import batch as batches
from launcher.plan import checkpoint, dsconfig, launchers, memory, rules, search, step_time, unnamed
from launcher.plan import shape as shapes
from launcher.plan.setup import Alternative, Device, Estimate, Machine, Recompute, Setup, StepTime, Verdict
from launcher.record import record
from launcher.spec import JobSpec, Shape


class InBundle(str):
    """A path inside the bundle: node.sh writes it relative to itself."""


@record
class Decision:
    name: str
    value: str
    why: str


@record
class Plan:
    spec: JobSpec
    model: facts.Model | None  # None where nobody named it: then the next three are what the job file gives
    parameters: int | None
    batch: batches.Batch | None
    setup: Setup | None
    machine: Machine | None  # None on CPU, or where the GPU type is not named; then nothing below is known
    estimate: Estimate | None
    time: StepTime | None
    alternatives: tuple[Alternative, ...]  # the one taken first
    by_stage: tuple[tuple[str, Estimate, Verdict], ...]
    compression: tuple[str, ...]  # what each kind would gain, and where that flips
    saving: checkpoint.Advice | None
    save_every: int  # steps; 0 is only at the end
    config: dict[str, Any] | None  # None where the program gets none from here
    variables: nccl.Variables
    command: tuple[str, ...]  # one rank's argv
    checkpoint_dir: str
    decisions: tuple[Decision, ...]
    notes: tuple[str, ...]

    @property
    def reference_trainer(self) -> bool:
        return uses_reference_trainer(self.spec)

    @property
    def stage(self) -> int | None:
        """ZeRO's; None where nobody said whether the program uses it."""
        if self.setup:
            return self.setup.stage
        return None if self.spec.train.zero == "auto" else self.spec.train.zero

    @property
    def degrees(self) -> tuple[int, int]:
        """Tensor and pipeline."""
        if self.setup:
            return self.setup.tensor, self.setup.pipeline
        given = self.spec.train.parallel
        return (1 if given.tensor == "auto" else given.tensor), (1 if given.pipeline == "auto" else given.pipeline)

    @property
    def program(self) -> str:
        """What is trained, in a word: the model, or the program that brings it: `pretrain_gpt.py`."""
        train = self.spec.train
        if self.model:
            return self.model.name
        return train.script or train.module or " ".join(train.command or ())


BYTES = 256  # the reference trainer's tokens
POOR = 0.5  # a goodput that deserves a word
LOSS = 0.02  # of the goodput: less is not worth a word


def make(spec: JobSpec, *, config_json: str | None = None, others: bool = True, backend: str | None = None) -> Plan:
    """Decide what the job file leaves open. Raises UserError with everything that cannot run.

    `config_json` is the text of the file that `model:` names, read by the caller. Without `others` the ways not
    taken are weighed only as far as the choice needs them. `backend` is where the job goes, where the site does not
    say it.
    """
    made = _Maker(spec, config_json, others, backend or spec.site.backend).plan()
    return replace(made, notes=(*made.notes, *literals(spec)))


def literals(spec: JobSpec) -> list[str]:
    """Dollars that look as if somebody expected a shell: ["env.CACHE holds $USER as it is written: ..."]."""
    rows = [(f"env.{name}", [value]) for name, value in spec.env.items()]
    command = spec.train.command or ()
    if command[:1] not in (("bash",), ("sh",)):
        rows.append(("train.command", list(command)))
    rows.append(("train.args", list(spec.train.args)))
    found = [(where, match[0]) for where, words in rows for word in words if (match := DOLLAR.search(word))]
    homes = [(where, word[1:]) for where, words in rows for word in words if re.match(r"~(/|\Z)", word)]
    return [
        f"{where} begins with ~ as it is written, as nothing is expanded: "
        f"{{env: HOME{f', append: {rest}' if rest else ''}}} reads it where you submit"
        for where, rest in homes
    ] + [
        f"{where} holds {what} as it is written, as nothing is expanded: {{env: NAME}} reads a variable where you "
        "submit, {job: id} and {node: rank} one of the job"
        for where, what in found
    ]


DOLLAR = re.compile(r"\$([A-Za-z_]\w*|\{[^}]*\}?|\()")


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
        (asked.qkv_bias, "biases in attention"),
        (asked.qk_norm, "norms of queries and keys"),
        (asked.experts > 0, f"{asked.experts} experts"),
    )
    return [text for differs, text in rows if differs]


@record
class _Chosen:
    setup: Setup
    optimizer: str
    estimate: Estimate | None = None
    time: StepTime | None = None
    alternatives: tuple[Alternative, ...] = ()
    by_stage: tuple[tuple[str, Estimate, Verdict], ...] = ()
    compression: tuple[str, ...] = ()


NOWHERE = ("none", "none")
DERIVED = (("train_batch_size",), ("train_micro_batch_size_per_gpu",), ("gradient_accumulation_steps",))
STATES = ("weights", "optimizer states", "gradients")  # the parts of an estimate that are certain
RECOMPUTE: dict[bool | str, Recompute] = {False: "none", True: "full", "selective": "selective", "cpu": "cpu"}


def _gib(value: float) -> str:
    """1,192 and 4; 0.0098 of what rounds to nothing."""
    return f"{value:,.0f}" if value >= 1 else f"{value:.2g}"


def _pays(flip: float | None) -> str:
    if flip is None:
        return f"reaches {step_time.GAIN:g}x at no bandwidth"
    return f"pays ({step_time.GAIN:g}x) " + ("at any bandwidth" if flip == math.inf else f"below {flip:,.3g} GB/s")


def powers(most: int) -> tuple[int, ...]:
    """powers(8) is 1, 2, 4, 8."""
    return tuple(1 << i for i in range(most.bit_length()))


class _Maker:
    def __init__(self, spec: JobSpec, config_json: str | None, others: bool, backend: str | None) -> None:
        self.spec, self.train, self.resources = spec, spec.train, spec.resources
        self.backend = backend
        self.config_json, self.others = config_json, others
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
        if spec.model is None:
            return self._unnamed()
        model = self.gather(self._model)
        gpu = self.gather(facts.gpu, self.resources.gpu) if self.resources.gpu else None
        whole = self.gather(self._divides_the_world)
        variables = self.gather(nccl.variables, spec, pods=self.backend == "kubernetes")
        self._fields()
        count = shapes.parameters(model.shape) if model else 0
        self._say_ranks()
        precision = self._precision(gpu)
        base = self._base(model.shape if model else Shape(layers=1, hidden=1024, heads=8), precision)
        machine = self.gather(self._machine, gpu) if gpu else None
        chosen = None
        if model and whole:
            if machine:
                chosen = self.gather(self._search, base, machine)
            elif not self.resources.gpu:
                chosen = self.gather(self._without_a_table, base)
        if whole and not chosen and not any(problem.at == batches.AT for problem in self.problems):
            self.gather(self._batch, base)
        setup = chosen.setup if chosen else self._fallback(base)
        batch = batches.Batch(setup.samples, setup.micro, setup.accumulation, setup.replicas)
        config = dsconfig.make(
            train,
            setup,
            batch=batch,
            optimizer_type=chosen.optimizer if chosen else train.optimizer_section.type,
            gpus=self.resources.gpus_per_node > 0,
        )
        self._judge(config, setup, divided=bool(whole))
        self._check_raw(setup if chosen else None, precision=precision)
        self._check_params()
        saving = self._saving(chosen) if chosen else None
        if self.problems:
            raise UserError(*self.problems)
        assert model is not None
        assert chosen is not None
        self.decide(
            "batch",
            batch.total,
            f"{batch.micro} per rank x {batch.accumulation} accumulation x {batch.replicas} data-parallel ranks"
            f" = {batch.total * train.seq_len:,} tokens per step",
        )
        self._say_optimizer(config, chosen)
        checkpoint_dir = train.checkpoint.dir or f"checkpoints/{spec.name}"
        save_every = self._save_every(saving)
        self._say_checkpoint(checkpoint_dir, save_every)
        self._say_what_the_program_must_do(setup)
        for variable in variables.rows:
            self.decide(variable.name, variable.value, variable.why)
        return Plan(
            spec=spec,
            model=model,
            parameters=count,
            batch=batch,
            setup=setup,
            machine=machine,
            estimate=chosen.estimate,
            time=chosen.time,
            alternatives=chosen.alternatives,
            by_stage=chosen.by_stage,
            compression=chosen.compression,
            saving=saving,
            save_every=save_every,
            config=config,
            variables=variables,
            command=(*train.prefix, *self._command(model.shape, setup, checkpoint_dir, save_every)),
            checkpoint_dir=checkpoint_dir,
            decisions=tuple(self.decisions),
            notes=(*variables.notes, *self.notes),
        )

    def _unnamed(self) -> Plan:
        """Nothing is predicted, and everything else works: launch, preflight, environment, recovery."""
        spec, train = self.spec, self.train
        gpu = self.gather(facts.gpu, self.resources.gpu) if self.resources.gpu else None
        whole = self.gather(self._divides_the_world)
        variables = self.gather(nccl.variables, spec, pods=self.backend == "kubernetes")
        self._fields()
        self.problems += unnamed.problems(spec)
        self._say_ranks()
        machine = self.gather(self._machine, gpu) if gpu and self.resources.gpus_per_node else None
        batch = self.gather(self._given_batch) if whole else None
        config = None
        if unnamed.wants_config(spec):
            typed = unnamed.config(spec, batch)
            self.problems += unnamed.contradictions(typed, train.deepspeed)
            self._check_params()
            config = dsconfig.laid_over(typed, train.deepspeed)
            if whole:
                self._judge(config)
        if self.problems:
            raise UserError(*self.problems)
        if batch:
            ranks = f"{batch.replicas} data-parallel ranks"
            product = f"{batch.micro} per rank x {batch.accumulation} accumulation x {ranks}"
            self.decide("batch", batch.total, f"{product}; your program has to be told the same")
        checkpoint_dir = train.checkpoint.dir or f"checkpoints/{spec.name}"
        save_every = self._save_every(None)
        self._say_checkpoint(checkpoint_dir, save_every)
        for variable in variables.rows:
            self.decide(variable.name, variable.value, variable.why)
        self.notes.append(
            "the model is not named, so neither memory nor time is predicted, and what fits is up to you; "
            + unnamed.NAME_IT
        )
        return Plan(
            spec=spec,
            model=None,
            parameters=None,
            batch=batch,
            setup=None,
            machine=machine,
            estimate=None,
            time=None,
            alternatives=(),
            by_stage=(),
            compression=(),
            saving=None,
            save_every=save_every,
            config=config,
            variables=variables,
            command=(*self.train.prefix, *self._program(handed=config is not None)),
            checkpoint_dir=checkpoint_dir,
            decisions=tuple(self.decisions),
            notes=(*variables.notes, *self.notes),
        )

    def _given_batch(self) -> batches.Batch | None:
        """The numbers of the job file, checked against each other; None where it has none."""
        train, parallel = self.train, self.train.parallel
        asked = (train.global_batch, train.micro_batch, train.gradient_accumulation)
        if asked == ("auto", "auto", "auto") or asked[:2] == ("auto", "auto"):
            return None
        degrees = (parallel.tensor, parallel.pipeline, parallel.sequence)
        inner = math.prod(degree for degree in degrees if degree != "auto")
        return batches.solve(*asked, replicas=self.spec.world // inner)

    def _say_ranks(self) -> None:
        unit = "GPUs" if self.resources.gpus_per_node else "processes on CPU (gloo)"
        self.decide("ranks", self.spec.world, f"{self.resources.nodes} nodes x {self.spec.per_node} {unit}")
        if self.train.visible_gpus == "own":
            self.decide("visible GPUs", "own", "a rank sees its own GPU as number 0, and LOCAL_RANK is 0 for it")
        if self.train.numa != "none":
            numa = self.train.numa
            why = "the node that each rank's GPU hangs on" if numa == "auto" else "of the local ranks, in this order"
            self.decide("NUMA nodes", numa if isinstance(numa, str) else ", ".join(map(str, numa)), why)
        self.notes += launchers.notes(self.spec)

    def _model(self) -> facts.Model:
        """What is trained: the model asked for, or the reference trainer's GPT of its dimensions."""
        asked = self.spec.model
        assert asked is not None
        if isinstance(asked, Shape):
            model = facts.Model("custom shape", asked, "the job file")
        else:
            model = facts.model(asked, config_json=self.config_json)
        self._divides(model)
        if uses_reference_trainer(self.spec):
            return self._trained(model)
        self.decide(
            "model", f"{model.name}, {shapes.parameters(model.shape):,} parameters", f"shape from {model.source}"
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

        for name in ("tensor", "sequence"):
            degree = getattr(self.train.parallel, name)
            if isinstance(degree, int) and shape.heads % degree:
                able = [str(n) for n in range(1, min(shape.heads, self.spec.world) + 1) if shape.heads % n == 0]
                message = f"{name} {degree} does not divide {shape.heads} attention heads"
                hint = f"one of {', '.join(able)}"
                self.problems.append(Problem(message, hint, ("train", "parallel", name)))
        if shape.experts and shape.experts_per_token > shape.experts:
            message = f"experts_per_token {shape.experts_per_token} of {shape.experts} experts"
            self.problems.append(Problem(message, at=("model", "experts_per_token")))

    def _fields(self) -> None:
        """Fields that cannot stand together, or would be left out without a word."""
        train, asked = self.train, self.train.optimizer_section
        self.problems += launchers.problems(self.spec)
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
        if self.spec.steps and warmup >= train.steps:
            self.problems.append(
                Problem(
                    f"warmup_steps {warmup} and the run has {train.steps}: the learning rate never leaves the ramp",
                    hint=f"warmup_steps: {train.steps // 20}",
                    at=("train", "lr_schedule", "warmup_steps"),
                )
            )
        offload = train.offload
        places = {offload.optimizer, offload.parameters}
        if offload.nvme_path and not (places & {"nvme", "auto"} if self.resources.gpu else "nvme" in places):
            self.problems.append(
                Problem(
                    f"nvme_path {offload.nvme_path} is named and nothing is offloaded to nvme",
                    hint="optimizer: nvme, or leave nvme_path out",
                    at=("train", "offload", "nvme_path"),
                )
            )

    def _divides_the_world(self) -> bool:
        parallel = self.train.parallel
        rows = [("tensor", parallel.tensor), ("pipeline", parallel.pipeline), ("sequence", parallel.sequence)]
        given = [(name, degree) for name, degree in rows if isinstance(degree, int)]
        inner = math.prod(degree for _, degree in given)
        if self.spec.world % inner:
            shown = [(name, degree) for name, degree in given if degree > 1 or name != "sequence"]
            raise UserError(
                Problem(
                    f"{' x '.join(f'{name} {degree}' for name, degree in shown)} = {inner} does not divide "
                    f"{self.spec.world} ranks",
                    hint=f"{self.resources.nodes} nodes x {self.spec.per_node} ranks have to be a multiple of it",
                    at=("train", "parallel"),
                )
            )
        return True

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

    def _base(self, shape: Shape, precision: str) -> Setup:
        """What the job file says; the rest is for the search."""
        train, parallel = self.train, self.train.parallel
        row = facts.optimizer(train.optimizer_section.type)
        raw = self.train.deepspeed
        setup = Setup(
            shape=shape,
            seq_len=train.seq_len,
            world=self.spec.world,
            per_node=self.spec.per_node,
            precision=precision,
            tensor=1 if parallel.tensor == "auto" else parallel.tensor,
            pipeline=1 if parallel.pipeline == "auto" else parallel.pipeline,
            virtual=parallel.virtual,
            sequence=parallel.sequence,
            split_hidden=parallel.split_hidden,
            optimizer_state=row.state if row else 8,
            attention=self._attention(shape),
            lora=train.lora,
            onebit=self._warm_share(row),
        )
        return dsconfig.read(raw, dsconfig.with_buckets(setup))

    def _attention(self, shape: Shape) -> str:
        """T5 adds a position bias to the scores, which its implementations compute in full."""
        if self.train.attention != "auto":
            return self.train.attention
        return "eager" if shape.kind == "encoder-decoder" else "flash"

    def _warm_share(self, row: facts.OptimizerRow | None) -> float:
        freeze = self.train.optimizer_section.freeze_step
        return min(1.0, freeze / self.train.steps) if row and row.onebit and freeze else 1.0

    def _machine(self, gpu: facts.Gpu) -> Machine:
        fabric = facts.fabric(self.resources.fabric) if self.resources.fabric else None
        rate, measured, why = step_time.bandwidth(self.resources, gpu, fabric)
        if self.resources.nodes > 1:
            self.decide("network", f"{rate:,.0f} GB/s per node", why)
        return Machine(
            gpu=gpu,
            node=rate,
            measured=measured,
            latency=fabric.latency if fabric else Machine.latency,
            host_gib=memory.host_gib(self.resources.memory or "0"),
            nvme_gib=memory.host_gib(self.resources.nvme or "0"),
            cpus=self.resources.cpus_per_node or 0,
        )

    def _space(self) -> search.Space:
        train, parallel = self.train, self.train.parallel
        asked = train.activation_checkpointing
        recomputes: tuple[Recompute, ...] = ("none", "full") if asked == "auto" else (RECOMPUTE[asked],)
        return search.Space(
            stages=self._stages(),
            recomputes=recomputes,
            places=self._places(),
            tensors=powers(self.spec.per_node) if parallel.tensor == "auto" else (parallel.tensor,),
            pipelines=powers(self.spec.world) if parallel.pipeline == "auto" else (parallel.pipeline,),
            total=train.global_batch,
            micro=train.micro_batch,
            accumulation=train.gradient_accumulation,
        )

    def _places(self) -> tuple[tuple[Device, Device], ...]:
        """Where optimizer states and parameters may live. Left open, the host counts only when its size is known."""
        offload, raw = self.train.offload, self._raw_offload()
        host = memory.host_gib(self.resources.memory or "0") > 0
        found: list[tuple[Device, ...]] = []
        for asked, key in ((offload.optimizer, "offload_optimizer"), (offload.parameters, "offload_param")):
            if key in raw:
                found.append((raw[key],))
            elif asked != "auto":
                found.append((asked,))
            else:
                found.append(("none", *(("cpu",) if host else ()), *(("nvme",) if offload.nvme_path else ())))
        optimizers, weights = found
        pairs = [(a, b) for a in optimizers for b in weights]
        # weights leave the GPU after the optimizer's states, unless the job file says otherwise
        return tuple((a, b) for a, b in pairs if b == "none" or a != "none" or len(weights) == 1)

    def _raw_offload(self) -> dict[str, Device]:
        """What the job file's raw DeepSpeed keys offload, and where to."""
        zero = self.train.deepspeed.get("zero_optimization")
        found: dict[str, Device] = {}
        for key in ("offload_optimizer", "offload_param"):
            section = zero.get(key) if isinstance(zero, dict) else None
            device = section.get("device") if isinstance(section, dict) else None
            if device in ("none", "cpu", "nvme"):
                found[key] = device
        return found

    def _search(self, base: Setup, machine: Machine) -> _Chosen:
        """The best of what the job file leaves open. Raises UserError when nothing fits."""
        space = self._space()
        weighed = search.weigh(search.setups(base, space), machine)
        if not weighed:  # stage, offload and pipeline cannot stand together: the rules say why
            setup = self._fallback(base)
            weighed = search.weigh([setup], machine)
        plain = search.best(weighed, machine)
        if plain is None:
            raise UserError(self._does_not_fit(weighed, machine))
        taken, optimizer, compression = self._compress(plain, weighed, machine)
        said = self._say_taken(taken, plain, weighed, space, machine)
        if taken is not plain:
            self.decide("compression", search.name(taken.setup), f"{plain.per_token / taken.per_token:.2f}x faster")
        elif compression and self.train.compression != "none":
            self.decide("compression", "none", compression[0])
        others: list[search.Weighed] = []
        if self.others:
            others = search.weigh(search.setups(base, self._wider(space, taken.setup)), machine)
        return _Chosen(
            setup=taken.setup,
            estimate=taken.estimate,
            time=taken.time,
            alternatives=search.alternatives(
                others, taken, space, machine, said=said, compression=self._may_compress(machine)
            ),
            by_stage=search.by_stage(taken.setup, machine) if self.others else (),
            compression=compression,
            optimizer=optimizer,
        )

    def _may_compress(self, machine: Machine) -> bool:
        """Only a bandwidth that was measured decides."""
        return machine.measured and self.train.compression != "none"

    def _wider(self, space: search.Space, taken: Setup) -> search.Space:
        """What could be chosen if the job file said less, at the same batch: worth showing beside the taken."""
        row = facts.optimizer(self.train.optimizer_section.type)
        stages = rules.stages(row, self.train.deepspeed) if row else [0, 1, 2, 3]
        places: tuple[tuple[Device, Device], ...] = (("none", "none"), ("cpu", "none"), ("cpu", "cpu"))
        if self._raw_offload():
            places = space.places
        elif self.train.offload.nvme_path:
            places += (("nvme", "none"), ("nvme", "cpu"), ("nvme", "nvme"))
        return replace(
            space,
            stages=tuple(stages),
            recomputes=tuple(dict.fromkeys((*space.recomputes, "none", "full"))),
            places=places,
            total=taken.samples,
            micro="auto",
            accumulation="auto",
        )

    def _compress(
        self, plain: search.Timed, weighed: list[search.Weighed], machine: Machine
    ) -> tuple[search.Timed, str, tuple[str, ...]]:
        """Send less where it pays for sure: (the way taken then, its optimizer, what every kind would gain)."""
        optimizer = self.train.optimizer_section.type
        if not (self.others or self._may_compress(machine)):
            return plain, optimizer, ()
        best, lines = plain, []
        for kind in search.compressed(weighed, plain, machine, flips=self.others):
            hindrance = self._hindrance(kind, machine)
            said = f"{kind.row.name}: {kind.gain:.2f}x at {machine.node:,.3g} GB/s per node; {_pays(kind.flip)}"
            lines.append(f"{said}; {hindrance}" if hindrance else said)
            if not hindrance and kind.way.per_token < best.per_token:
                best = kind.way
                if best.setup.onebit < 1:
                    optimizer = "OneBitAdam"
        return best, optimizer, tuple(lines)

    def _hindrance(self, kind: search.Compressed, machine: Machine) -> str:
        """Why a way that sends less is not taken; empty when it is."""
        row, way = kind.row, kind.way
        train, version = self.train, self.spec.environment.deepspeed or ""
        kept = facts.optimizer(train.optimizer_section.type)
        adam = kept is not None and kept.name in ("Adam", "AdamW")
        onebit = row.setup.onebit < 1
        old = version and facts.version(version) <= facts.version(rules.NEWEST_ONEBIT)
        reasons = (
            (way.verdict != "fits", f"does not fit: {search.short(way.estimate, machine)}"),
            (kind.gain < step_time.GAIN, "not worth it here"),
            (train.compression == "none", "train.compression: none"),
            (row.lossy and train.compression != "lossy", "changes the numbers: train.compression: lossy allows it"),
            (onebit and not adam, "Adam and AdamW only"),
            (onebit and way.setup.precision != "fp16", "tried in fp16 only: train.precision: fp16"),
            (onebit and not old, f"needs DeepSpeed {rules.NEWEST_ONEBIT}: environment.deepspeed"),
            (not machine.measured, "the bandwidth is assumed: resources.bandwidth takes what a preflight measured"),
        )
        return next((why for hinders, why in reasons if hinders), "")

    def _say_taken(
        self,
        taken: search.Timed,
        plain: search.Timed,
        weighed: list[search.Weighed],
        space: search.Space,
        machine: Machine,
    ) -> str:
        """Decisions and notes about the way taken; why it is this one."""
        setup, estimate, time, gpu = taken.setup, taken.estimate, taken.time, machine.gpu
        size = f"{estimate.total:.0f} of {gpu.memory:.0f} GiB per GPU at micro-batch {setup.micro}"
        said = search.why(plain, weighed, machine) if taken is plain else "the fastest that fits, sending less"
        self.decide("zero stage", setup.stage, f"{said if len(space.stages) > 1 else 'from the job file'}; {size}")
        if self.train.parallel.tensor == "auto" or self.train.parallel.pipeline == "auto":
            degrees = f"tensor {setup.tensor} x pipeline {setup.pipeline}"
            reads = "your program reads DSLAUNCH_TENSOR_PARALLEL and DSLAUNCH_PIPELINE_PARALLEL"
            self.decide("parallel", degrees, f"{said}; {reads}")
        if setup.offload_optimizer != "none" or setup.offload_parameters != "none":
            where = f"optimizer {setup.offload_optimizer}, parameters {setup.offload_parameters}"
            why = "from the job file"
            if len(space.places) > 1:
                on_gpu = [w for w in weighed if (w.setup.offload_optimizer, w.setup.offload_parameters) == NOWHERE]
                why = search.why_not_without(plain, on_gpu, machine)
            self.decide("offload", where, why)
            if "cpu" in (setup.offload_optimizer, setup.offload_parameters) and not machine.host_gib:
                need = f"{estimate.host_total:,.0f} GiB of host memory per node"
                self.notes.append(f"{need} are needed, and resources.memory does not say what there is")
        if len(space.recomputes) == 1:
            why = "from the job file"
        elif setup.recompute == "none":
            why = "fits without"
        else:
            kept = [way for way in weighed if way.setup.recompute == "none"]
            why = search.why_not_without(plain, kept, machine)
        self.decide("activation checkpointing", setup.recompute, why)
        if estimate.host_total >= 1:
            why = "; ".join(f"{part.value:.0f} {part.name}" for part in estimate.host)
            self.decide("host memory", f"{estimate.host_total:.0f} GiB per node", why)
        if taken.verdict == "tight":
            roomier = "".join(f", or {way}" for way in self._ways(setup, machine)[:1])
            self.notes.append(
                f"memory is tight: {estimate.low:.0f} to {estimate.high:.0f} GiB per GPU are likely, and "
                f"{gpu.name} has {gpu.memory:.0f}; run a few steps before the long run{roomier}"
            )
        self.notes += time.notes
        self.decide(
            "step time",
            f"{time.seconds:.3g} s",
            f"predicted, within {time.error:.0%}: {time.tokens_per_s_per_gpu:,.0f} tokens/s per GPU, "
            f"{time.mfu:.0%} of the GPU's peak",
        )
        return said

    def _does_not_fit(self, weighed: list[search.Weighed], machine: Machine) -> Problem:
        gpu = machine.gpu
        least = search.smallest(weighed, machine)
        estimate, setup = least.estimate, least.setup
        on_gpu = estimate.low > gpu.memory * memory.USABLE
        at = (
            ("resources", "memory")
            if not on_gpu
            else ("train", "gradient_accumulation")
            if self.train.micro_batch == "auto" and setup.micro > 1
            else ("train", "zero")
            if self.train.zero != "auto"
            else ("resources",)
        )
        shown = estimate.gpu if on_gpu else (*estimate.host, *estimate.nvme)
        parts = ", ".join(f"{part.value:,.0f} {part.name}" for part in shown if part.value >= 0.5)
        return Problem(
            f"does not fit: {search.short(estimate, machine)} with {search.name(setup)} ({parts})",
            hint="; or ".join(self._ways(setup, machine)) or "a GPU with more memory, or a smaller model",
            at=at,
        )

    def _ways(self, setup: Setup, machine: Machine) -> list[str]:
        """What would make it fit, as lines of the job file, with what a GPU (and the host) would hold then."""
        found = []
        total = self.train.global_batch
        ways = memory.ways_to_fit(
            setup,
            machine.gpu,
            host_gib=machine.host_gib,
            nvme_gib=machine.nvme_gib,
            total=None if total == "auto" else total,
        )
        for text, after, estimate in [*ways[:3], *ways[3:][-1:]]:  # the last is the one that asks for less
            host = f" and {estimate.host_total:,.0f} on the host" if after.offload_optimizer == "cpu" else ""
            more = after.world > setup.world and not self.resources.fabric
            found.append(f"{text}{', resources.fabric' if more else ''} ({estimate.total:.0f} GiB{host})")
        return found

    def _without_a_table(self, base: Setup) -> _Chosen:
        """CPU, or a GPU that nobody named: memory and time are unknown, and only what is asked for is done."""
        train = self.train
        if self.resources.gpus_per_node and (train.zero == "auto" or not self._micro_is_given(base)):
            raise UserError(
                Problem(
                    "the GPU type is not named, so nobody can tell what fits",
                    hint="resources.gpu, or give train.zero and train.micro_batch",
                    at=("resources", "gpus_per_node"),
                )
            )
        batch = self._batch(base)
        setup = replace(self._fallback(base, first=True), micro=batch.micro, accumulation=batch.accumulation)
        setup = self._within_the_host(setup)
        why = "from the job file" if train.zero != "auto" else "it sends the least, of what the hosts have room for"
        if train.zero == "auto" and not self.resources.memory:
            why = "it sends the least; resources.memory would say what there is room for"
        self.decide("zero stage", setup.stage, why)
        asked = "from the job file" if setup.recompute != "none" else "not asked for"
        self.decide("activation checkpointing", setup.recompute, asked)
        return _Chosen(setup=setup, optimizer=train.optimizer_section.type)

    def _within_the_host(self, setup: Setup) -> Setup:
        """On CPU the lowest stage that the hosts' memory holds, where its size is known."""
        have = memory.host_gib(self.resources.memory or "0")
        if self.resources.gpus_per_node or not have:
            return setup
        ways = [replace(setup, stage=stage) for stage in self._stages()]
        needs = [
            sum(part.value for part in memory.estimate(way).gpu if part.name in STATES) * setup.per_node
            for way in ways
        ]
        for way, need in zip(ways, needs, strict=True):
            if need <= have:
                return way
        need, said = min(needs), self.resources.memory or ""
        megabytes = said.isdigit() and memory.host_gib(f"{said}G") >= need
        raise UserError(
            Problem(
                f"does not fit: the model states of {setup.per_node} processes are {_gib(need)} GiB per node, "
                f"and memory {said} is {_gib(have)}",
                hint=f"memory: {said}G; without a unit Slurm reads megabytes" if megabytes
                else f"memory: {int(need) + 1}G, or more nodes with zero: 3",
                at=("resources", "memory"),
            )
        )  # fmt: skip

    def _batch(self, base: Setup) -> batches.Batch:
        train = self.train
        return batches.solve(
            train.global_batch, train.micro_batch, train.gradient_accumulation, replicas=base.replicas
        )

    def _micro_is_given(self, base: Setup) -> bool:
        train = self.train
        given = batches.given_micro(
            train.global_batch, train.micro_batch, train.gradient_accumulation, replicas=base.replicas
        )
        return given is not None

    def _fallback(self, base: Setup, *, first: bool = False) -> Setup:
        """The job file's own words and the simplest of the rest: for CPU, and for judging what cannot be planned."""
        space = self._space()
        optimizer, weights = space.places[0]
        stages = [s for s in space.stages if search.possible(s, base.pipeline, optimizer, weights)] or space.stages
        return replace(
            base,
            stage=stages[0 if first else -1],
            offload_optimizer=optimizer,
            offload_parameters=weights,
            recompute=space.recomputes[0],
        )

    def _saving(self, chosen: _Chosen) -> checkpoint.Advice | None:
        """How often to save, from what that costs and how often nodes fail; refused where the end comes too soon."""
        if not chosen.time:
            return None
        resources, asked = self.resources, self.train.checkpoint
        advice = checkpoint.advise(
            chosen.setup,
            nodes=resources.nodes,
            write_gb_per_s=resources.storage,
            node_mttf_days=resources.node_mttf,
            step_seconds=chosen.time.seconds,
            # pods get as long as saving takes: kubernetes.grace
            warn_before_end=None if self.backend == "kubernetes" else self.spec.slurm.warn_before_end,
        )
        self.problems += [advice.problem] if advice.problem else []
        self.notes += advice.notes
        self.decide("checkpoint interval", f"{advice.steps:,} steps", advice.why)
        if advice.goodput < POOR:
            self.notes.append(
                f"only {advice.goodput:.1%} of the time would be training that counts: a checkpoint takes "
                f"{checkpoint.clock(advice.write_seconds)}, and a failure comes every {advice.mttf_hours:.1f} h; "
                "faster storage (resources.storage), or fewer nodes"
            )
        if asked.every != "auto" and asked.every and advice.steps:
            seconds = asked.every * chosen.time.seconds
            kept = checkpoint.goodput(
                seconds, write=advice.write_seconds, restart=advice.restart_seconds, mttf=advice.mttf_hours * 3600
            )
            if kept < advice.goodput - LOSS:
                self.notes.append(
                    f"checkpoint.every {asked.every} is {checkpoint.clock(seconds)}: {kept:.1%} of the time would be "
                    f"training that counts, and {advice.goodput:.1%} with every {advice.steps:,}"
                )
        return advice

    def _stages(self) -> tuple[int, ...]:
        """The stages worth trying: the job file's, or the optimizer's own."""
        if self.train.zero != "auto":
            return (self.train.zero,)
        row = facts.optimizer(self.train.optimizer_section.type)
        stages = rules.stages(row, self.train.deepspeed) if row else [0, 1, 2, 3]
        optimizer, weights = self._places()[0]
        pipeline = self.train.parallel.pipeline
        narrowed = [
            s for s in stages if search.possible(s, 1 if pipeline == "auto" else pipeline, optimizer, weights)
        ]
        # what an explicit offload needs, though the optimizer refuses it: the rules say so
        return tuple(narrowed) or ((3,) if weights != "none" or optimizer == "nvme" else (1,))

    def _judge(self, config: dict[str, Any], setup: Setup | None = None, *, divided: bool = True) -> None:
        """What DeepSpeed says of the config; not of batch sizes over ranks that nothing divides."""
        parallel = self.train.parallel
        given = [n for n in (parallel.tensor, parallel.pipeline, parallel.sequence) if isinstance(n, int)]
        pipeline = 1 if parallel.pipeline == "auto" else parallel.pipeline
        situation = rules.Situation(
            config=config,
            gpus=self.resources.gpus_per_node > 0,
            world=self.spec.world,
            per_node=self.spec.per_node,
            pipeline=setup.pipeline if setup else pipeline,
            replicas=setup.replicas if setup else self.spec.world // math.prod(given),
            steps=self.spec.steps or None,
            deepspeed=self.spec.environment.deepspeed or "",
            trainer="hf" if setup is None and unnamed.fills_in(config) else "plain",
        )
        for found in rules.judge(situation):
            if not divided and found.path[:1] in DERIVED:
                continue
            message, hint = f"{found.message} [{found.rule}]", found.job_fix or found.fix
            if found.severity == "error":
                at = rules.job_path(found.path, self.train.deepspeed)
                self.problems.append(Problem(message, hint, at))
            else:
                self.notes.append(f"{message}; {hint}" if hint else message)

    def _check_raw(self, setup: Setup | None, *, precision: str) -> None:
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
        if setup:
            planned += [
                (("train_batch_size",), setup.samples, batch_hint),
                (("train_micro_batch_size_per_gpu",), setup.micro, batch_hint),
                (("gradient_accumulation_steps",), setup.accumulation, batch_hint),
                (("zero_optimization", "stage"), setup.stage, "use train.zero"),
            ]
        raw, typed = self._raw_offload(), self.train.offload
        for key, name, asked in (
            ("offload_optimizer", "optimizer", typed.optimizer),
            ("offload_param", "parameters", typed.parameters),
        ):
            if asked != "auto" and raw.get(key, asked) != asked:
                message = f"deepspeed.zero_optimization.{key} {raw[key]} contradicts train.offload.{name} {asked}"
                at = ("train", "deepspeed", "zero_optimization", key)
                self.problems.append(Problem(message, f"use train.offload.{name} alone", at))
        for path, value, hint in planned:
            found: Any = self.train.deepspeed
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
        if isinstance(raw, dict) and not isinstance(raw.get("params", {}), dict):
            message = f"optimizer.params is a section with keys, not `{raw['params']!r}`: no learning rate is left"
            self.problems.append(Problem(message, "leave it out", ("train", "deepspeed", "optimizer", "params")))
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
        if train.parallel != type(train.parallel)():
            message = "the reference trainer is data-parallel only"
            self.problems.append(Problem(message, hint, ("train", "parallel")))
        for name, wrong in (
            ("lora", train.lora is not None),
            ("attention", train.attention == "eager"),
            ("activation_checkpointing", train.activation_checkpointing in ("selective", "cpu")),
        ):
            if wrong:
                message = (
                    "the reference trainer trains all weights, with fused attention, and recomputes whole layers"
                )
                self.problems.append(Problem(message, hint, ("train", name)))
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
        count = f"{shapes.parameters(shape):,} parameters"
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

    def _say_optimizer(self, config: dict[str, Any], chosen: _Chosen) -> None:
        asked = self.train.optimizer_section
        params = config["optimizer"]["params"]
        row = facts.optimizer(config["optimizer"]["type"])
        if chosen.optimizer != asked.type:
            why = f"sends less: {chosen.compression[0]}; needs cupy on the nodes"
        elif row and row.onebit:
            freeze = params.get("freeze_step") or params.get("var_freeze_step")
            why = f"plain Adam until step {freeze}, then compressed; needs cupy on the nodes"
        elif params.get("torch_adam"):
            why = "torch's own implementation: nothing to compile on the nodes"
        else:
            why = "from the job file" if asked != type(asked)() else "the usual choice"
        self.decide("optimizer", config["optimizer"]["type"], why)

    def _save_every(self, saving: checkpoint.Advice | None) -> int:
        asked, steps = self.train.checkpoint.every, self.spec.steps
        if asked != "auto":
            return asked
        return min(saving.steps, steps) if saving and saving.steps else max(1, steps // 10)

    def _say_checkpoint(self, directory: str, save_every: int) -> None:
        asked = self.train.checkpoint
        every = f"every {save_every:,} steps" if save_every else "at the end"
        why = f"{every}, {asked.keep} kept" + ("" if directory.startswith("/") else "; relative to workdir")
        if not uses_reference_trainer(self.spec):
            why = (
                f"asked for {why}. Your program has to do it: DSLAUNCH_CHECKPOINT_DIR, DSLAUNCH_CHECKPOINT_EVERY and "
                "DSLAUNCH_CHECKPOINT_KEEP tell it"
            )
        self.decide("checkpoint", directory, why)

    def _say_what_the_program_must_do(self, setup: Setup) -> None:
        if uses_reference_trainer(self.spec):
            return
        if setup.recompute != "none":
            self.notes.append(
                "activation checkpointing is up to your program: DeepSpeed's section alone recomputes nothing, and "
                "the estimate counts on it; model.gradient_checkpointing_enable() for a Hugging Face model"
            )

    def _command(self, shape: Shape, setup: Setup, checkpoint_dir: str, save_every: int) -> tuple[str, ...]:
        train = self.train
        config = InBundle("ds_config.json")
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
                save_every,
                "--checkpoint-keep",
                train.checkpoint.keep,
            ]
            if setup.recompute != "none":
                command.append("--activation-checkpointing")
            return tuple(part if isinstance(part, str) else str(part) for part in (*command, *train.args))
        return self._program(handed=True)

    def _program(self, *, handed: bool) -> tuple[str, ...]:
        """The user's own argv, with the DeepSpeed config behind it where one is handed over."""
        train, config = self.train, InBundle("ds_config.json")
        if train.command:
            flagged = handed and train.config_flag not in (None, "none")
            return (*train.command, *((str(train.config_flag), config) if flagged else ()))
        program = ("-m", train.module) if train.module else (str(train.script),)
        flag = train.config_flag or ("none" if launchers.takes_config(self.spec) else "--deepspeed_config")
        tail = (flag, config) if handed and flag != "none" else ()
        return ("python3", "-u", *(str(part) for part in program), *train.args, *tail)
