"""Secrets in scripts and manifests of others end nowhere, and texts that grow as they are read stay small."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
from click.testing import CliRunner

from launcher import cli, envlint, shell
from launcher.imports import Imported, Note, masked

HEAD = "#!/bin/bash\n#SBATCH --nodes=2\n#SBATCH --gpus-per-node=8\n"
# Built here, so that no file holds anything that looks like one.
BODY = "Ab1Cd2Ef3Gh4Ij5Kl6Mn7"
SHAPES = [
    "hf" + "_" + BODY, "sk" + "-" + BODY, "gh" + "p_" + BODY, "github" + "_pat_" + BODY, "gl" + "pat-" + BODY,
    "AK" + "IA" + "Q1W2E3R4T5Y6U7I8", "xox" + "b-" + BODY, "nv" + "api-" + BODY, "ey" + f"J{BODY}.ey" + f"J{BODY}.x1",
    "npm" + "_" + BODY + "x1Y2z3A4b5C6",
]  # fmt: skip
PLAIN = [f"{word}{number}Qw7Zx" for number, word in enumerate(["Harbor", "Nettle", "Copper", "Willow", "Bramble",
         "Lantern", "Orchard", "Thistle", "Marble", "Velvet"], 11)]  # fmt: skip
HEX = "0f1e2d3c4b5a6978" + "8796a5b4c3d2e1f001234567"

SCRIPT = f"""{HEAD}#SBATCH --comment={SHAPES[0]}
#SBATCH --weird={SHAPES[1]}
export HF_TOKEN={SHAPES[0]} MY_PAT={SHAPES[3]} GL={SHAPES[4]} SITE_ID={SHAPES[5]}
export DBPWD={PLAIN[0]}
export AUTH="Bearer {PLAIN[1]}"
export DATABASE=postgres://me:{PLAIN[2]}@db/x
export LONG_NAME="before {SHAPES[6]} behind"
wandb login --relogin {HEX}
git clone https://{SHAPES[2]}@github.com/a/b
git clone https://me:{PLAIN[3]}@gitlab.com/a/b
pip install --extra-index-url https://u:{PLAIN[4]}@pypi.example/simple y
curl -H "Authorization: Bearer {PLAIN[5]}" -u me:{PLAIN[6]} http://x
docker login -u me -p {PLAIN[7]} nvcr.io
echo {SHAPES[7]} | docker login --password-stdin nvcr.io
K={PLAIN[8]}
if [ "$X" = {SHAPES[8]} ]; then OPTS="--hub_token {SHAPES[9]}"; fi
cat > ds.json <<END
{{"api_key": "{PLAIN[9]}"}}
END
A1=$K
WANDB_API_KEY={HEX} srun --export=ALL,API_KEY={PLAIN[0]} python train.py --token $A1 --lr 1e-4 $OPTS
"""
MANIFEST = f"""apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata: {{name: x, annotations: {{note: {SHAPES[0]}, "{SHAPES[1]}": b}}}}
spec:
  pytorchReplicaSpecs:
    Worker:
      replicas: 2
      template:
        spec:
          containers:
          - name: pytorch
            image: a/b
            command: [bash, -c, "wandb login {HEX}; export T={SHAPES[2]}; git clone https://u:{PLAIN[0]}@x/y; \
curl -H \\"X-Api-Key: {PLAIN[1]}\\" http://x; torchrun t.py --token {PLAIN[2]} --lr 1e-4"]
            env:
            - {{name: A, value: {SHAPES[3]}}}
            - {{name: B, value: "{SHAPES[4]} and {SHAPES[5]}"}}
            - name: WANDB_API_KEY
              value: {PLAIN[3]}
            - {{value: {PLAIN[4]}, name: DB_PWD}}
            - {{name: URL, value: "postgres://u:{PLAIN[5]}@h/db"}}
            weird: {SHAPES[6]}
            resources: {{limits: {{nvidia.com/gpu: 8}}}}
          - {{name: beside, image: c/d, args: [--password, {PLAIN[6]}, "--api-key={PLAIN[7]}", {SHAPES[7]}],
             env: [{{name: C, value: {SHAPES[8]}}}]}}
---
apiVersion: v1
kind: Secret
metadata: {{name: s}}
stringData:
  user: {PLAIN[8]}
  certificate: "{PLAIN[9]}"
"""


@pytest.mark.parametrize(("name", "text"), [("x.sbatch", SCRIPT), ("x.yaml", MANIFEST)])
def test_no_secret_leaves_the_file_it_stood_in(name, text, tmp_path):
    path, made = tmp_path / name, tmp_path / "job.yaml"
    path.write_text(text)
    result = CliRunner().invoke(cli.cli, ["import", str(path), "-o", str(made)])
    shown = CliRunner().invoke(cli.cli, ["import", str(path)])
    assert result.exit_code == shown.exit_code == 1, result.output  # something is left to say
    out = made.read_text() + result.output + result.stderr + shown.output + shown.stderr
    leaked = [one for one in [*SHAPES, *PLAIN, HEX] if one in out or one[:-4] in out]
    assert not leaked
    assert "MASKED" not in out
    assert "1e-4" in made.read_text()


def test_what_stood_there_is_said_in_its_place(tmp_path):
    path = tmp_path / "x.sbatch"
    path.write_text(SCRIPT)
    job = CliRunner().invoke(cli.cli, ["import", str(path)]).stdout
    assert f"comment: {masked.LEFT}  # FILL IN: a secret stood here" in job
    for name in ("HF_TOKEN", "MY_PAT", "GL", "DBPWD", "AUTH", "DATABASE", "WANDB_API_KEY", "API_KEY"):
        assert f"  {name}: {{from_env: {name}}}" in job


def test_a_key_block_is_hidden_line_by_line():
    lines = ["-----BEGIN RSA PRIVATE" + " KEY-----", BODY * 2, BODY[::-1] * 2, "-----END RSA PRIVATE" + " KEY-----"]
    text = "cat > key <<END\n" + "\n".join(lines) + "\nEND\n"
    told = masked.hidden(text)
    assert not any(line in told for line in lines)
    assert told.count("\n") == text.count("\n")


@pytest.mark.parametrize(
    "text",
    [
        "export HF_TOKEN=$(cat ~/.token) WANDB_API_KEY=$KEY API_KEY=<yours> TOKENIZER_PATH=/x/Llama3Tokenizer8B",
        "python t.py --pad_token endoftext --input_key prompt --label_key answer --max_token 4096 --use_wandb True",
        "wandb login $WANDB_API_KEY && huggingface-cli login --token $HF_TOKEN",
        "git clone https://$USER:$TOKEN@github.com/a/b; git clone ssh://git@github.com/a/b",
        "mkdir -p /scratch/long-enough-name && srun -p accelerated --task-prolog=/x/prolog123456",
        "tokenizer.pad_token=tokenizer.eos_token1234",
        "secretKeyRef: {name: wandb-secret-12, key: api-key-of-team1}",
    ],
)
def test_what_is_no_secret_stays(text):
    assert masked.hidden(text) == text


def test_a_secret_that_only_the_job_shows_is_taken_out_of_it():
    secret = PLAIN[0]
    made = Imported(
        {"env": {"DB_PASSWORD": secret, "A": "1"}, "train": {"args": ["--api-key", secret, "--lr", "1"]}},
        (Note("kept", f"{secret} -> somewhere"),),
        {("train", "args"): f"is it {secret}?"},
    )
    told = masked.finished(made)
    assert told.job == {
        "env": {"A": "1"},
        "secrets": {"DB_PASSWORD": {"from_env": "DB_PASSWORD"}},
        "train": {"args": ["--api-key", masked.LEFT, "--lr", "1"]},
    }
    assert told.notes[0].message == "*** -> somewhere"
    assert told.comments[("train", "args")] == "is it ***?"
    assert len(told.to_fill) == 1


# --- what grows -----------------------------------------------------------------------------------

DOUBLED = 'A=("${A[@]}" "${A[@]}")\n'
GROWING = {
    "array.sbatch": f'{HEAD}A=(1)\n{DOUBLED * 24}srun python t.py "${{A[@]}}"\n',
    "values.sbatch": f"{HEAD}A0=xxxxxxxxxx\n" + "".join(f"A{i + 1}=$A{i}$A{i}\n" for i in range(26))
    + "srun python t.py $A26\n",
    "appended.sbatch": f"{HEAD}A=x\n" + "A+=$A\n" * 40 + "B=(1)\n" + 'B+=("${B[@]}")\n' * 40
    + 'srun python t.py $A "${B[@]}"\n',
    "replaced.sbatch": f"{HEAD}A0=aaaa\n" + "".join(f"A{i + 1}=${{A{i}//a/aaaaaaaa}}\n" for i in range(20))
    + "srun python t.py $A20\n",
    "calls.sbatch": HEAD + 'f0() { echo "$@"; }\n'
    + "".join(f'f{i + 1}() {{ f{i} "$@"; f{i} "$@"; }}\n' for i in range(30)) + "f30 a\nsrun python t.py\n",
    "echoed.sbatch": f"{HEAD}A0=xxxxxxxxxx\n" + "".join(f"A{i + 1}=$(echo $A{i} $A{i})\n" for i in range(30))
    + "srun python t.py $A30\n",
}  # fmt: skip
POD = """apiVersion: batch/v1
kind: Job
metadata: {name: x}
spec:
  template:
    spec:
      containers:
      - name: a
        image: b/c
        command: COMMAND
        env: [ENV]
        resources: {limits: {nvidia.com/gpu: 8}}
"""
ROWS = ", ".join(
    ["{name: A0, value: xxxxxxxx}", *(f"{{name: A{i + 1}, value: '$(A{i})$(A{i})'}}" for i in range(30))]
)
LINES = "".join(f"          {line}\n" for line in ["A=(1)", *[DOUBLED.strip()] * 24, "torchrun t.py ${A[@]}"])
GROWING |= {
    "references.yaml": POD.replace("COMMAND", "[python, t.py, $(A30)]").replace("ENV", ROWS),
    "nested.yaml": POD.replace("COMMAND", f"\n        - bash\n        - -c\n        - |\n{LINES}").replace("ENV", ""),
    "merged.yaml": "apiVersion: batch/v1\nkind: Job\nm0: &m0 {a: 1}\n"
    + "".join(f"m{i + 1}: &m{i + 1} {{<<: [*m{i}, *m{i}]}}\n" for i in range(26)),
    "deep.yaml": "apiVersion: batch/v1\nkind: Job\nspec: " + "[" * 20_000 + "]" * 20_000 + "\n",
    "itself.yaml": "apiVersion: batch/v1\nkind: Job\nspec: &a [*a]\n",
}  # fmt: skip
LIMITS = (300 << 20, 4)  # bytes of memory, seconds of a processor that others use too: about 1 is the start alone


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["lint", "import"])
@pytest.mark.parametrize("name", GROWING)
def test_what_doubles_with_each_line_ends_at_once(name, verb, tmp_path):
    path = tmp_path / name
    path.write_text(GROWING[name])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = (
        "import resource, sys; from launcher.__main__ import main\n"
        f"resource.setrlimit(resource.RLIMIT_CPU, ({LIMITS[1]}, {LIMITS[1]}))\n"
        "try: main()\n"
        # not ru_maxrss, which begins with that of whoever started it
        "finally: print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, verb, str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode in (0, 1, 2), done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert int(done.stderr.split()[-1]) << 10 < LIMITS[0]
    assert after.ru_utime - before.ru_utime < LIMITS[1]
    assert len(done.stdout) + len(done.stderr) < 1 << 20


def test_a_value_that_became_too_long_keeps_its_name():
    script = shell.read("A=" + "x" * 40_000 + "\nB=$A$A\nC=$B$B\npython $A $B")
    assert [word.partial[:5] for word in script.commands[-1].argv] == ["pytho", "xxxxx", "${B}"]
    assert shell.read("A=($(seq 1 4000))\nB=(${A[@]} ${A[@]})\nx ${B[@]}").commands[-1].argv[1].left == ("B",)


def test_the_word_behind_an_equal_one_is_its_own():
    found = envlint.read("mpirun -genv NCCL_DEBUG INFO -genv NCCL_DEBUG WARN python t.py", name="x.sh")
    assert [(one.name, one.value) for one in found] == [("NCCL_DEBUG", "INFO"), ("NCCL_DEBUG", "WARN")]
