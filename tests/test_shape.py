"""The shape of the code: which way imports point, what stays unloaded, what is never called."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import launcher
from launcher.bundle import LOOKS_AFTER

PACKAGE = Path(launcher.__file__).parent

# A module imports from the lines above its own, never from its own line or below.
LAYERS = [
    ["launcher", "launcher.errors", "launcher.record"],
    ["launcher.yamldoc", "launcher.jsondoc"],
    ["launcher.spec.words"],
    ["launcher.spec.given"],
    ["launcher.spec.train", "launcher.spec.software", "launcher.spec.slurm"],
    ["launcher.spec.kubernetes"],
    ["launcher.spec.services"],
    ["launcher.spec.machines", "launcher.spec.check"],
    ["launcher.spec.advice"],
    ["launcher.spec"],
    ["launcher.huggingface"],
    ["launcher.facts"],
    ["launcher.plan.shape", "launcher.plan.batch", "launcher.hostfile", "launcher.shell"],
    ["launcher.listed"],
    ["launcher.envlint"],
    ["launcher.nccl"],
    ["launcher.plan.setup"],
    ["launcher.plan.memory", "launcher.plan.step_time", "launcher.plan.checkpoint"],
    ["launcher.plan.search", "launcher.plan.dsconfig", "launcher.plan.rules", "launcher.plan.launchers"],
    ["launcher.plan.advice", "launcher.plan.unnamed"],
    ["launcher.plan"],
    ["launcher.sweep"],
    ["launcher.page"],
    ["launcher.charts"],
    ["launcher.report"],
    ["launcher.expected"],
    ["launcher.setting", "launcher.software"],
    ["launcher.bundle"],
    ["launcher.run"],
    ["launcher.runs.logs"],
    ["launcher.runs"],
    ["launcher.runs.submit", "launcher.runs.evidence", "launcher.remote"],
    ["launcher.backends"],
    [
        "launcher.backends.kubernetes.network",
        "launcher.backends.kubernetes.security",
        "launcher.backends.kubernetes.patch",
    ],
    ["launcher.backends.slurm.queue", "launcher.backends.kubernetes.pod"],
    ["launcher.backends.slurm.services", "launcher.backends.slurm.options"],
    ["launcher.backends.slurm.tasks"],
    ["launcher.backends.kubernetes.queueing"],
    ["launcher.backends.kubernetes.kinds"],
    ["launcher.backends.slurm.script", "launcher.backends.kubernetes.manifests"],
    ["launcher.backends.kubernetes.api"],
    ["launcher.backends.kubernetes.watch"],
    ["launcher.backends.kubernetes.output"],
    ["launcher.backends.slurm.array"],
    ["launcher.backends.slurm.controller", "launcher.backends.kubernetes.server"],
    ["launcher.backends.local", "launcher.backends.slurm", "launcher.backends.kubernetes"],
    ["launcher.snapshot"],
    ["launcher.launch"],
    ["launcher.runs.poll"],
    ["launcher.runs.view"],
    ["launcher.schema", "launcher.examples", "launcher.sites", "launcher.origins"],
    ["launcher.profile", "launcher.fields"],
    ["launcher.show"],
    ["launcher.verdicts", "launcher.diagnoses", "launcher.saves"],
    ["launcher.health"],
    ["launcher.launchlint"],
    ["launcher.scriptlint"],
    ["launcher.manifestlint"],
    ["launcher.lint"],
    ["launcher.sarif"],
    ["launcher.imports"],
    ["launcher.imports.masked", "launcher.imports.programs", "launcher.imports.deepspeed", "launcher.imports.write"],
    ["launcher.imports.draft", "launcher.imports.pods"],
    ["launcher.imports.variables", "launcher.imports.objects"],
    ["launcher.imports.options", "launcher.imports.groups"],
    ["launcher.imports.steps"],
    ["launcher.imports.training"],
    ["launcher.imports.sbatch"],
    ["launcher.imports.entrypoint"],
    ["launcher.imports.manifests"],
    ["launcher.imports.rendered"],
    ["launcher.probe"],
    ["launcher.screen"],
    ["launcher.cli_watch"],
    ["launcher.cli_runs"],
    ["launcher.cli"],
    ["launcher.__main__"],
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py")) if "gallery" not in path.parts}

# The same of what travels to the nodes. From above only types of the preflight and what is said about pods are used.
TRAVELS = [
    ["launcher.diagnose", "launcher.checkpoints", "launcher.supervision"],
    ["launcher.diagnose.tables", "launcher.diagnose.match", "launcher.diagnose.exits", "launcher.diagnose.flight"],
    ["launcher.diagnose.explain"],
    ["launcher.checkpoints.archive"],
    ["launcher.checkpoints.shards"],
    ["launcher.checkpoints.manifest"],
    ["launcher.checkpoints.layout"],
    ["launcher.checkpoints.choose", "launcher.checkpoints.vouch", "launcher.checkpoints.retention"],
    [name for name in SOURCES if name.startswith("launcher.supervision.") and not name.endswith(".overseer")],
    ["launcher.supervision.overseer"],
    ["launcher.preflight"],
    ["launcher.checks"],
    ["launcher.preflight.parity", "launcher.preflight.kernel", "launcher.preflight.nvidia"],
    ["launcher.preflight.pods"],
    ["launcher.preflight.decision", "launcher.preflight.tournament", "launcher.preflight.transport",
     "launcher.preflight.history", "launcher.preflight.nccl_tests"],
    ["launcher.preflight.speed", "launcher.preflight.bandwidth"],
    ["launcher.preflight.gemm"],
    [name for name in SOURCES if name.startswith("launcher.checks.")],
    ["launcher.preflight.worker"],
    ["launcher.preflight.agent"],
    ["launcher.preflight.coordinator"],
]  # fmt: skip
ABOVE = ("launcher.preflight", "launcher.preflight.pods", "launcher.checks", "launcher.supervision")
ROAD = {name: height for height, names in enumerate(TRAVELS) for name in names}


NODE = [name for name in SOURCES if name.startswith("launcher.node")]


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING`; imports inside functions count."""
    for child in ast.iter_child_nodes(node):
        test = child.test if isinstance(child, ast.If) else None
        if isinstance(test, ast.Name) and test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from statements(child)


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(SOURCES[name].read_text(encoding="utf-8"))


@cache
def imports(name: str) -> frozenset[str]:
    found: set[str] = set()
    for node in statements(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            module = node.module or ""
            for alias in node.names:
                full = f"{module}.{alias.name}"
                found.add(full if full in SOURCES else module)
    return frozenset(found)


def ours(name: str) -> set[str]:
    return {found for found in imports(name) if found.split(".")[0] == "launcher"}


def test_every_module_has_a_layer():
    assert set(SOURCES) - set(NODE) == set(HEIGHT) | set(ROAD)


@pytest.mark.parametrize("name", sorted(HEIGHT))
def test_imports_point_up_the_page(name):
    for found in ours(name):
        if found in NODE:
            assert found == "launcher.node.journal", name  # jobs write it as well
        elif found in ROAD:
            assert found in ABOVE or found.startswith(("launcher.diagnose", "launcher.checkpoints")), name
        else:
            assert HEIGHT[found] < HEIGHT[name], f"{name} imports {found}"


@pytest.mark.parametrize("name", sorted(ROAD))
def test_a_preflight_needs_the_standard_library_and_torch(name):
    for found in ours(name):
        assert ROAD[found] < ROAD[name], f"{name} imports {found}"
    outside = {found.split(".")[0] for found in imports(name)} - {*sys.stdlib_module_names, "launcher"}
    assert outside <= ({"torch"} if name in ("launcher.preflight.bandwidth", "launcher.preflight.gemm") else set())


@pytest.mark.parametrize("name", NODE)
def test_what_travels_to_the_nodes_needs_nothing_of_ours(name):
    looks_after = {
        "launcher.node.supervise": tuple(f"launcher.{package}" for package in LOOKS_AFTER),
        "launcher.node.train_gpt": ("launcher.checkpoints",),
    }
    packages = looks_after.get(name, ())
    assert all(packages and (found == "launcher" or found.startswith(packages)) for found in ours(name))
    neighbours = {"launcher", "journal", "port", "recover"}
    outside = {found.split(".")[0] for found in imports(name)} - {*sys.stdlib_module_names, *neighbours}
    assert outside <= ({"torch", "deepspeed", "dslaunch_pulse"} if name == "launcher.node.train_gpt" else set())


def test_backends_do_not_know_each_other():
    for name in SOURCES:
        if name.startswith("launcher.backends."):
            others = {found for found in ours(name) if found.startswith("launcher.backends.")}
            assert {found.split(".")[2] for found in others} <= {name.split(".")[2]}


# Facts and decisions are values; what touches the machine is named here and nowhere else.
PURE = ["launcher.errors", "launcher.spec", "launcher.nccl", "launcher.show", "launcher.schema"]
PURE += ["launcher.setting", "launcher.software", "launcher.expected", "launcher.verdicts", "launcher.health"]
PURE += ["launcher.envlint"]
PURE += ["launcher.preflight", "launcher.preflight.decision", "launcher.preflight.tournament"]
PURE += ["launcher.preflight.speed", "launcher.preflight.transport", "launcher.preflight.parity"]
PURE += [name for name in SOURCES if name.startswith("launcher.plan")]
MACHINE = {
    "os",
    "subprocess",
    "socket",
    "time",
    "random",
    "secrets",
    "shutil",
    "tempfile",
    "logging",
    "pathlib",
    "sys",
}


@pytest.mark.parametrize("name", PURE)
def test_a_pure_module_does_not_touch_the_machine(name):
    seeded = {"random"} if name == "launcher.preflight.tournament" else set()  # its order of pairs, by a given seed
    assert not imports(name) & (MACHINE - seeded)


def test_one_module_starts_processes():
    assert {name for name in HEIGHT if "subprocess" in imports(name)} == {"launcher.run"}


HEAVY = ["torch", "deepspeed", "kubernetes", "submitit", "pydantic", "yaml", "jsonschema", "numpy", "rich"]
COMMANDS = [["--help"], ["--version"], ["-h"], ["plan", "--help"], ["slurm", "--help"], ["k8s", "--help"], []]


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_asking_for_help_loads_nothing_heavy(argv):
    code = (
        "import sys; sys.argv = ['dslaunch', *sys.argv[1:]]\n"
        "from launcher.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_ctrl_c_while_modules_load_leaves_no_traceback():
    code = (
        "import sys\n"
        "class Keyboard:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'launcher.cli': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Keyboard())\n"
        "sys.argv = ['dslaunch', 'runs']\n"
        "from launcher.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_printing_manifests_loads_no_client_library(tmp_path):
    job = tmp_path / "job.yaml"
    job.write_text("name: demo\nmodel: gpt-demo\ncontainer: a/b:1\n")
    code = (
        "import sys; sys.argv = ['dslaunch', 'k8s', sys.argv[1]]\n"
        "from launcher.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, 'kubernetes' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(job)], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr.splitlines()[-1] == "0 False"
    assert "kind: PyTorchJob" in done.stdout


@cache
def calls(name: str) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree(name)) if isinstance(node, ast.Call)]


FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "pickle.load", "pickle.loads", "torch.load", "marshal.loads", "shelve.open", "input",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_nothing_runs_text_as_code(name):
    for called, node in calls(name):
        assert called not in FORBIDDEN, f"{name}:{node.lineno}: {called}"
        assert not any(keyword.arg == "shell" for keyword in node.keywords), f"{name}:{node.lineno}: shell="


def test_only_the_edge_prints_and_exits():
    for name in HEIGHT:
        if name in ("launcher.cli", "launcher.cli_runs", "launcher.cli_watch", "launcher.__main__"):
            continue
        assert not [
            node.lineno for called, node in calls(name) if called in ("print", "sys.exit", "exit", "click.echo")
        ]
