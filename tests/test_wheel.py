"""The built wheel, alone in an empty environment: what a user installs has its data files with it."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_alone_helps_plans_and_renders_a_shipped_example(tmp_path):
    def run(*words: object, **options: object) -> str:
        done = subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=tmp_path, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT)
    (wheel,) = tmp_path.glob("dslaunch-*.whl")
    venv.create(tmp_path / "empty", with_pip=True)
    run(tmp_path / "empty/bin/python", "-m", "pip", "install", "--quiet", wheel)
    dslaunch = tmp_path / "empty/bin/dslaunch"
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}

    assert "dslaunch slurm job.yaml" in run(dslaunch, "--help", env=env)
    for example in ("slurm/llama-70b-8x8", "manifests/cpu-demo"):
        (tmp_path / "job.yaml").write_text(run(dslaunch, "init", "--example", example, env=env))
        assert json.loads(run(dslaunch, "plan", "job.yaml", "--json", env=env))["zero_stage"] == 3
        if example.startswith("slurm"):
            assert "#SBATCH --nodes=9" in run(dslaunch, "slurm", "job.yaml", "--dry-run", env=env)
        else:
            assert "kind: PyTorchJob" in run(dslaunch, "k8s", "job.yaml", env=env)
    assert json.loads(run(dslaunch, "schema", env=env))["title"] == "dslaunch job file"
    assert "torch" not in run(tmp_path / "empty/bin/python", "-m", "pip", "list", env=env).lower()
