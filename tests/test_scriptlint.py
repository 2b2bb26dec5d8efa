"""dslaunch lint on batch and shell scripts: every rule by its example, and silence where nothing is wrong."""

# ruff: noqa: E501 - scripts and manifests stand here as people write them
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import facts, lint, plan, sarif, scriptlint, spec
from launcher.backends import slurm
from launcher.spec import words

ROOT = Path(__file__).parent.parent
DSLAUNCH = Path(sys.executable).parent / "dslaunch"
RULES = scriptlint.rules()
SCRIPTS = [rule for rule in RULES if not rule.startswith("K8S")]


def results(text, *, name="job.sh", **known):
    return lint.script(text, name=name, known=lint.Known(**known)).results


def found(text, **known):
    """Ids of what is more than a note."""
    return [one.rule for one in results(text, **known) if one.severity != "note"]


def everything(text, **known):
    return [one.rule for one in results(text, **known)]


# --- the table --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", SCRIPTS)
def test_the_bad_example_has_the_fault_alone_and_the_good_one_is_quiet(rule):
    row = RULES[rule]
    assert rule in everything(row["bad"])
    assert set(found(row["bad"])) <= {rule}
    assert rule not in everything(row["good"])
    assert found(row["good"]) == []


@pytest.mark.parametrize("rule", SCRIPTS)
def test_what_is_found_lies_in_the_file(rule):
    lines = RULES[rule]["bad"].splitlines()
    for one in results(RULES[rule]["bad"]):
        assert 1 <= one.line <= len(lines)
        assert 1 <= one.column <= len(lines[one.line - 1]) + 1
        assert one.end_column >= one.column
        assert one.message
        assert one.fix
        assert not one.fixable


@pytest.mark.parametrize("path", sorted(facts.DATA.glob("*rules.yaml")), ids=lambda path: path.name)
def test_no_text_of_a_row_ends_at_what_yaml_takes_for_a_comment(path):
    """`title: a word in an #SBATCH line` is `a word in an`."""
    words = re.compile(r"  (?:title|why|fix|source): [^\"'|>].* #")
    assert [line for line in path.read_text(encoding="utf-8").splitlines() if words.match(line)] == []


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_explained(rule):
    row, text = RULES[rule], lint.explained(lint.row(rule))
    assert text.startswith(f"{rule} {row['name']}: {row['title']}")
    assert row["severity"] in lint.SEVERITIES
    assert all(row[key] for key in ("why", "fix", "source"))
    assert row["source"] in " ".join(text.split())
    assert lint.row(row["name"]).id == rule
    assert "\n  bad\n" in text
    assert "\n  good\n" in text


def test_ids_are_in_order_and_names_are_one_each():
    for family in ("SLM", "LCH", "K8S"):
        ids = [rule for rule in RULES if rule.startswith(family)]
        assert ids == sorted(ids)
    names = [row.name for row in lint.rows().values()]
    assert len(names) == len(set(names))


# --- silence ----------------------------------------------------------------------------------------

HEAD = 'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n'
PORT = "export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))\n"
CLEAN = {
    "torchrun per node, c10d": """#!/bin/bash
#SBATCH --job-name=llama
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --output=logs/%x-%j.out
set -euo pipefail
source /opt/venv/bin/activate
"""
    + HEAD
    + PORT
    + """export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
srun --kill-on-bad-exit=1 torchrun \\
    --nnodes "$SLURM_NNODES" --nproc-per-node 8 \\
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" \\
    train.py --config configs/8b.yaml
""",
    "a launcher in a variable, the rank escaped": """#!/bin/bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:a100:8
#SBATCH --cpus-per-task=40
#SBATCH --hint=nomultithread
set -x -e -o pipefail
GPUS_PER_NODE=8
NNODES=$SLURM_NNODES
"""
    + HEAD
    + """MASTER_PORT=$((10000 + SLURM_JOBID % 20000))
LAUNCHER="python -u -m torch.distributed.run --nproc_per_node $GPUS_PER_NODE --nnodes $NNODES \\
    --node_rank \\$SLURM_PROCID --master_addr $MASTER_ADDR --master_port $MASTER_PORT"
CMD="pretrain_gpt.py --tensor-model-parallel-size 4 --micro-batch-size 2 --global-batch-size 256"
SRUN_ARGS="--wait=60 --kill-on-bad-exit=1 --cpus-per-task=40"
srun $SRUN_ARGS --jobid $SLURM_JOB_ID bash -c "$LAUNCHER $CMD" 2>&1 | tee -a main_log.txt
""",
    "deepspeed from the first node, by a hostfile of this job": """#!/bin/bash
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
export TORCH_EXTENSIONS_DIR=/scratch/$USER/ext
hostfile=$SLURM_SUBMIT_DIR/hostfile.$SLURM_JOB_ID
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed 's/$/ slots=4/' > "$hostfile"
deepspeed --hostfile "$hostfile" --launcher pdsh train.py --deepspeed ds.json
""",
    "one task per GPU": """#!/bin/bash
#SBATCH -A project
#SBATCH -p booster
#SBATCH -N 8
#SBATCH --ntasks-per-node=4
#SBATCH --gres=gpu:4
#SBATCH --cpus-per-task=12
#SBATCH -t 06:00:00
#SBATCH --signal=B:USR2@120
set -e
module purge
module load CUDA PyTorch
"""
    + HEAD
    + PORT
    + """export CUDA_VISIBLE_DEVICES=0,1,2,3
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
trap 'touch stop; wait' USR2
srun --cpu-bind=none -K1 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec python train.py' &
wait $!
""",
    "accelerate": """#!/bin/bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
set -e
"""
    + HEAD
    + PORT
    + """srun -K1 bash -c 'accelerate launch --num_machines $SLURM_NNODES --num_processes 16 --machine_rank $SLURM_NODEID \\
    --main_process_ip $MASTER_ADDR --main_process_port $MASTER_PORT --mixed_precision bf16 train.py --batch_size 4'
""",
    "pyxis": """#!/bin/bash
#SBATCH --nodes=16
#SBATCH --exclusive
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --container-image=nvcr.io#nvidia/pytorch:25.01-py3
set -eo pipefail
"""
    + HEAD
    + PORT
    + """srun --kill-on-bad-exit=1 --mpi=pmix --container-image=nvcr.io#nvidia/pytorch:25.01-py3 \\
  --container-mounts=/lustre:/lustre,$PWD:/work --container-workdir=/work \\
  bash -c "python pretrain_gpt.py --tensor-model-parallel-size 8 --pipeline-model-parallel-size 2 \\
    --micro-batch-size 1 --global-batch-size 512"
""",
    "apptainer with a mask": """#!/bin/bash -e
#SBATCH --account=project_1
#SBATCH --partition=standard-g
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=7
#SBATCH --mem=480G
c=fe
mask="0x${c}000000000000,0x${c}00000000000000,0x${c}0000,0x${c}000000,0x${c},0x${c}00,0x${c}00000000,0x${c}0000000000"
"""
    + HEAD
    + PORT
    + """srun -K1 --cpus-per-task=7 --cpu-bind=mask_cpu:$mask singularity exec -B /scratch image.sif \\
  bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; python train.py'
""",
    "requeue itself": """#!/bin/bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --requeue
#SBATCH --time=4:00:00
#SBATCH --signal=B:USR1@180
"""
    + HEAD
    + PORT
    + """handler() {
  echo "time is nearly up"
  scontrol requeue "$SLURM_JOB_ID"
}
trap handler USR1
srun -K1 python train.py --resume-from latest &
pid=$!
wait $pid
rc=$?
exit $rc
""",
    "an array of single GPUs": """#!/bin/bash
#SBATCH --array=0-9%4
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --output=out/%A_%a.log
source ~/miniconda3/etc/profile.d/conda.sh
conda activate sweep
lrs=(1e-5 3e-5 1e-4)
python train.py --lr "${lrs[$SLURM_ARRAY_TASK_ID]}" --seed "$SLURM_ARRAY_TASK_ID"
""",
    "one node": """#!/usr/bin/env bash
#SBATCH --nodes=1
#SBATCH --gres=gpu:8
set -euo pipefail
nvidia-smi
torchrun --standalone --nproc-per-node=8 finetune.py --per_device_train_batch_size 2 2>&1 | tee log.txt
""",
    "no batch script at all": """#!/bin/bash
# start on every node: NODE_RANK=0 MASTER=host bash run.sh
NODE_RANK=${NODE_RANK:?}
torchrun --nnodes 2 --nproc_per_node 8 --node_rank "$NODE_RANK" --master_addr "$MASTER" --master_port "${PORT:-23000}" train.py
echo "node $NODE_RANK is done"
""",
    "a server on the last node": """#!/bin/bash
#SBATCH --nodes=3
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
set -e
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${hosts[0]}
srun --nodes=1 --ntasks=1 -w "${hosts[2]}" --overlap vllm serve model --port 8000 &
server=$!
srun -K1 --nodes=2 --ntasks=2 bash -c 'torchrun --nnodes 2 --nproc-per-node 8 --node-rank $SLURM_NODEID --master-addr $MASTER_ADDR train.py'
kill $server
""",
    "what submitit writes": """#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=4
#SBATCH --error=/logs/%j/%j_0_log.err
#SBATCH --gpus-per-node=8
#SBATCH --job-name=hello
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/logs/%j/%j_0_log.out
#SBATCH --signal=USR2@90
#SBATCH --time=3
#SBATCH --wckey=submitit

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --kill-on-bad-exit=1 --output /logs/%j/%j_%t_log.out --cpus-per-task=4 python -u -m submitit.core._submit /logs/%j
""",
    "a script that writes another": """#!/bin/bash
for lr in 1e-4 3e-4; do
cat > job-$lr.sh <<EOF
#!/bin/bash
#SBATCH --nodes=2
#SBATCH --job-name=lr-$lr
srun -K1 python train.py --lr $lr
EOF
sbatch job-$lr.sh
done
""",
}


@pytest.mark.parametrize("name", CLEAN)
def test_a_script_with_nothing_wrong_is_left_alone(name):
    assert [(one.rule, one.line, one.message) for one in results(CLEAN[name]) if one.severity != "note"] == []


OURS = sorted([*ROOT.glob("slurm/*/*.sbatch"), *ROOT.glob("slurm/*/*.sh"), *ROOT.glob("hostfiles/*/*.sh")])


@pytest.mark.slow
@pytest.mark.parametrize("path", OURS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_nothing_is_said_about_what_dslaunch_renders(path):
    text = path.read_text(encoding="utf-8")
    assert lint.kind(text, name=path.name) == "script"
    assert results(text, name=str(path)) == ()


@pytest.mark.parametrize("bind", ["closest", "single:1", "none"])
def test_a_gpu_each_is_said_by_the_plan_and_not_of_its_own_script(bind):
    job = f"""name: one
train: {{script: x.py, launcher: srun}}
resources: {{nodes: 2, gpus_per_node: 4, gpu: a100, fabric: infiniband, cpus_per_node: 64}}
slurm: {{time: 60, gpus_as: gpus-per-task, gpu_bind: '{bind}'}}
"""
    text = slurm.render(plan.make(spec.load(job, name="job.yaml").spec)).text("job.sbatch")
    assert "--gpus-per-task=1" in text
    assert results(text, name="job.sbatch") == ()


# --- cases ------------------------------------------------------------------------------------------

ONE = "#!/bin/bash\n#SBATCH --nodes=1\n"
TWO = "#!/bin/bash\n#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n#SBATCH --gpus-per-node=8\n"


def only(text, rule):
    return [one for one in results(text) if one.rule == rule]


def test_a_heterogeneous_job_is_judged_by_its_first_component():
    head = "#!/bin/bash\n#SBATCH --nodes=2 --nodelist=a[1-2] --time=1:00:00\n"
    more = "#SBATCH hetjob\n#SBATCH --nodes=1 --partition=cpu\n"
    assert not only(f"{head}{more}srun python train.py\n", "SLM006")
    assert only(f"{head.replace('1-2', '1-3')}{more}srun python train.py\n", "SLM006")


@pytest.mark.parametrize(
    ("line", "rule", "fix"),
    [
        ("#SBATCH --node=2", "SLM003", "did you mean --nodes?"),  # fits nodefile, nodelist and nodes
        ("#SBATCH --ntask-per-node=8", "SLM003", "did you mean --ntasks-per-node?"),
        ("#SBATCH --cpu-per-task=8", "SLM003", "did you mean --cpus-per-task?"),
        ("#SBATCH --kill-on-bad-exit=1", "SLM003", "srun --kill-on-bad-exit ..."),
        ("#SBATCH -K", "SLM003", "srun -K ..."),
        ("#SBATCH --mem=64 GB", "SLM004", ""),
        ("#SBATCH --job-name = train", "SLM004", ""),
        ("#SBATCH --output=logs/${SLURM_JOB_NAME}.out", "SLM001", ""),
        ("#SBATCH --time=`cat limit`", "SLM001", ""),
    ],
)
def test_lines_that_sbatch_refuses_or_misreads(line, rule, fix):
    one = only(f"#!/bin/bash\n{line}\npython train.py\n", rule)[0]
    assert (one.line, one.severity) == (2, "error")
    assert fix in one.fix


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ("--time=1h", "--time=1:00:00"),
        ("-t 2days", "--time=2-00"),
        ("--time=soon", "HH:MM:SS"),
        ("--mem=lots", "--mem=64G"),
        ("--mem-per-cpu=4.5G", "--mem-per-cpu=64G"),
    ],
)
def test_values_that_sbatch_cannot_read(line, fix):
    one = only(f"#!/bin/bash\n#SBATCH {line}\npython train.py\n", "SLM015")[0]
    assert (one.line, one.severity) == (2, "error")
    assert fix in one.fix


@pytest.mark.parametrize(
    "line", ["--time=2-00", "-t 90", "--time=UNLIMITED", "--mem=0", "--mem=900GB", "--mem=4g", "--tmp=1T"]
)
def test_values_that_sbatch_reads(line):
    assert not only(f"#!/bin/bash\n#SBATCH {line}\npython train.py\n", "SLM015")


@pytest.mark.parametrize("line", ["# SBATCH --mem=0", "#SBTACH -N 2", "#sbatch --nodes=2", " #SBATCH --nodes=2"])
def test_comments_that_look_like_lines_of_sbatch(line):
    one = only(f"#!/bin/bash\n{line}\npython train.py\n", "SLM016")[0]
    assert (one.line, one.severity) == (2, "note")
    assert one.fix.startswith("#SBATCH -")


@pytest.mark.parametrize(
    "line", ["##SBATCH --mem=0", "# batch -- of eight", "#SBATCH --mem=0", "# see sbatch(1)", "#PBS -l x"]
)
def test_comments_that_are_comments(line):
    assert not only(f"#!/bin/bash\n{line}\npython train.py\n", "SLM016")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("if [ 1 ; then\n  srun a\nfi\n", 2),
        ('srun a\nsrun python t.py --name "x\n', 3),
        ("for i in 1 2; do\n  a $i\n", 2),
    ],
)
def test_a_script_that_a_shell_cannot_read(text, line):
    assert only(f"#!/bin/bash\n{text}", "SLM068")[0].line == line


def test_nothing_is_said_of_who_starts_what_where_the_shell_makes_no_sense():
    text = "#!/bin/bash\n#SBATCH --nodes=2\nif [ 1 ; then\nsrun -K1 torchrun --nnodes=2 t.py\n"
    assert only(text, "SLM068")
    assert not only(text, "SLM013")


def test_a_function_around_srun_starts_a_step_on_every_node():
    head = "#!/bin/bash\n#SBATCH --nodes=4 --ntasks-per-node=1\n"
    line = 'run torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "$HEAD:21000" train.py\n'
    assert not only(f'{head}run() {{ srun -K1 "$@"; }}\n{line}', "SLM013")
    assert only(f'{head}run() {{ time "$@"; }}\n{line}', "SLM013")


@pytest.mark.parametrize(
    "line",
    ["--part=gpu", "--ntasks-per-nod=2", "--tasks-per-node=2", "-N2 -n 16", "--nodes 2 # two", "--uenv=pytorch/v2.6",
     "--container-image=a.sqsh", "--comment='a $5 run'", "--our-own-plugin=7", "-J%j", "hetjob", "packjob"],
)  # fmt: skip
def test_lines_that_sbatch_takes(line):
    assert not {"SLM001", "SLM003", "SLM004"} & set(found(f"#!/bin/bash\n#SBATCH {line}\npython train.py\n"))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:30", 5430), ("1:00:00", 3600), ("1-12", 129600), ("2-00:30:00", 174600), ("1-0:5", 86700),
     ("infinite", None), ("", None)],
)  # fmt: skip
def test_times_of_slurm(text, seconds):
    assert words.seconds(text) == seconds


def test_a_rank_of_the_batch_shell_is_fatal_to_static_and_harmless_to_c10d():
    static = TWO + "srun -K1 torchrun --nnodes 2 --nproc-per-node 8 --node-rank $SLURM_NODEID --master-addr $H t.py\n"
    dynamic = (
        TWO
        + "srun -K1 torchrun --nnodes 2 --nproc-per-node 8 --node-rank $SLURM_NODEID --rdzv-backend c10d --rdzv-endpoint $H t.py\n"
    )
    assert only(static, "SLM010")[0].severity == "error"
    assert only(dynamic, "SLM010")[0].severity == "note"


@pytest.mark.parametrize(
    "body",
    [
        'CMD="train.py --node_rank $SLURM_PROCID"\nsrun -K1 bash -c "python $CMD"\n',
        "export NODE_RANK=$SLURM_NODEID\nsrun -K1 python train.py\n",
        "srun -K1 bash <<EOF\npython train.py --rank $SLURM_PROCID\nEOF\n",
        "srun -K1 --export=ALL,RANK=$SLURM_PROCID python train.py\n",
    ],
)
def test_ranks_that_the_batch_shell_puts_in(body):
    assert "SLM010" in found(TWO + body)


@pytest.mark.parametrize(
    "body",
    [
        'CMD="train.py --node_rank \\$SLURM_PROCID"\nsrun -K1 bash -c "python $CMD"\n',
        "srun -K1 bash <<'EOF'\npython train.py --rank $SLURM_PROCID\nEOF\n",
        "srun -K1 bash <<EOF\npython train.py --rank \\$SLURM_PROCID\nEOF\n",
        "srun -n1 -N1 echo $SLURM_PROCID\n",
        'if [ "$SLURM_PROCID" = 0 ]; then echo first; fi\nsrun -K1 python train.py\n',
    ],
)
def test_ranks_that_are_fine(body):
    assert "SLM010" not in found(TWO + body)


@pytest.mark.parametrize(
    ("body", "rule"),
    [
        ("srun -K1 mpirun -np 16 python train.py\n", "SLM012"),
        ("srun -K1 deepspeed --num_gpus 8 train.py\n", "SLM012"),
        ("srun -N1 -n1 deepspeed --hostfile hosts.$SLURM_JOB_ID train.py\n", ""),
        ("srun -K1 bash -c 'deepspeed --no_ssh --node_rank $SLURM_NODEID --hostfile h.$SLURM_JOB_ID train.py'\n", ""),
        ("accelerate launch --num_machines 2 --num_processes 16 --machine_rank 0 train.py\n", "SLM013"),
        ("deepspeed train.py\n", "SLM013"),
        (
            "RUN='srun -K1'\n$RUN torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint $H:1234 t.py\n",
            "",
        ),
        ("pip install deepspeed torchrun\nwhich torchrun\n", ""),
        (
            "for h in $HOSTS; do ssh $h torchrun --nnodes 2 --nproc-per-node 8 --node-rank 1 --master-addr $H t.py & done; wait\n",
            "",
        ),
    ],
)
def test_who_starts_what_how_often(body, rule):
    several = {"SLM011", "SLM012", "SLM013"}
    assert several & set(found(TWO + body)) == ({rule} if rule else set())


@pytest.mark.parametrize(
    ("body", "rule", "said"),
    [
        ("srun accelerate launch --use_deepspeed --deepspeed_hostfile h --num_machines 2 t.py\n", "SLM012", True),
        (
            "srun accelerate launch --use_deepspeed --deepspeed_multinode_launcher standard --deepspeed_hostfile h "
            "--num_machines 2 --num_processes 16 --machine_rank $SLURM_NODEID --main_process_ip $H t.py\n",
            "SLM012",
            False,
        ),
        ("srun -n 16 --ntasks-per-node=8 torchrun --nnodes=16 --nproc_per_node=1 --rdzv-endpoint=$H:1 t.py\n", "LCH004",
         False),
        ("srun -n 2 --ntasks-per-node=1 torchrun --nnodes=16 --nproc_per_node=1 --rdzv-endpoint=$H:1 t.py\n", "LCH004",
         True),
    ],
)  # fmt: skip
def test_who_starts_the_ranks_is_seen(body, rule, said):
    assert (rule in found(TWO + body)) is said


def test_a_pipe_inside_what_srun_starts_hides_the_code_as_well():
    assert "SLM041" in found(TWO + "srun -K1 bash -c 'torchrun --nproc-per-node 8 t.py | tee log'\n")
    assert "SLM041" not in found(
        TWO + "srun -K1 bash -c 'set -o pipefail; torchrun --nproc-per-node 8 t.py | tee log'\n"
    )
    assert "SLM041" not in found(TWO + "srun -K1 hostname | sort\n")


LOOP = "for ((i=1; i<2; i++)); do srun -K1 --nodelist=${N[$i]} --ntasks=1 %s --node_rank $i --master_addr $H t.py & done; wait\n"


@pytest.mark.parametrize(
    ("body", "rules"),
    [
        (LOOP % "composer --world_size $((SLURM_NNODES*8)) --nproc 8", set()),
        (LOOP % "composer --world_size 8 --nproc 8", set()),  # the other node does something else
        (LOOP % "composer --world_size 32 --nproc 8", {"LCH005"}),
        (LOOP % "torchrun --nnodes 2 --nproc_per_node 8", set()),
        (LOOP % "torchrun --nnodes 3 --nproc_per_node 8", {"LCH004"}),
        (LOOP.replace("$H", "localhost") % "torchrun --nnodes 2 --nproc_per_node 8", {"LCH006"}),
        (
            "srun -K1 -N1 -n1 torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint $H t.py\n",
            {"LCH004"},
        ),
        ("for i in a b; do srun -N1 -n1 torchrun --standalone --nproc-per-node 8 t.py --lr $i & done; wait\n", set()),
        (
            "for i in a b; do srun -N1 -n1 torchrun --standalone --nproc-per-node 8 t.py --tensor-model-parallel-size 3 & done; wait\n",
            {"LCH008"},
        ),
    ],
)
def test_one_step_per_node_is_a_part_of_the_job(body, rules):
    assert {one for one in found(TWO + body) if one.startswith("LCH")} == rules


@pytest.mark.parametrize(
    ("body", "severity"),
    [
        ("srun -K1 torchrun --nnodes 2 --nproc-per-node 8 --node-rank 0 --master-addr $H t.py\n", "error"),
        ("srun -K1 bash -c 'torchrun --nnodes 2 --nproc-per-node 8 --node-rank 1 --master-addr $H t.py'\n", "error"),
        (
            "srun -K1 accelerate launch --num_machines 2 --num_processes 16 --machine_rank 0 --main_process_ip $H t.py\n",
            "error",
        ),
        (
            "srun -K1 torchrun --nnodes 2 --nproc-per-node 8 --node-rank 0 --rdzv-backend c10d --rdzv-endpoint $H t.py\n",
            "note",
        ),
        (
            "srun -K1 bash -c 'torchrun --nnodes 2 --nproc-per-node 8 --node-rank $SLURM_NODEID --master-addr $H t.py'\n",
            "",
        ),
        ("srun -K1 -N1 -n1 -w a torchrun --nnodes 2 --nproc-per-node 8 --node-rank 0 --master-addr $H t.py\n", ""),
        (
            "srun -K1 bash -c 'if [ $SLURM_NODEID = 0 ]; then torchrun --nnodes 2 --nproc-per-node 8 --node-rank 0 --master-addr $H t.py;"
            " else torchrun --nnodes 2 --nproc-per-node 8 --node-rank 1 --master-addr $H t.py; fi'\n",
            "",
        ),
    ],
)
def test_a_rank_in_figures_is_the_same_on_every_node(body, severity):
    assert [one.severity for one in only(TWO + body, "LCH014")] == ([severity] if severity else [])


def test_a_rank_of_the_batch_shell_does_not_matter_to_accelerate_over_c10d():
    line = "srun -K1 accelerate launch --num_machines 2 --num_processes 16 --machine_rank $SLURM_PROCID --main_process_ip $H"
    assert [one.severity for one in only(TWO + f"{line} --rdzv_backend c10d t.py\n", "SLM010")] == ["note"]
    assert [one.severity for one in only(TWO + f"{line} --rdzv_backend static t.py\n", "SLM010")] == ["error"]


@pytest.mark.parametrize(
    ("nodes", "test", "branch", "said"),
    [
        (2, "$SLURM_JOB_NUM_NODES -gt 1", "else", False),
        (2, "$SLURM_NNODES -eq 1", "then", False),
        (2, "$SLURM_NNODES -ge 2", "then", True),
        (2, "$SLURM_NNODES -eq 2", "then", True),
        (2, "$SLURM_NNODES -gt 2", "else", True),
        (2, "-n $FEW", "else", True),
    ],
)
def test_a_branch_that_this_many_nodes_never_take_is_not_judged(nodes, test, branch, said):
    body = "export MASTER_ADDR=localhost\n  torchrun --nproc_per_node 8 t.py\n"
    both = {"then": "true\n", "else": "true\n", branch: body}
    text = (
        TWO.replace("nodes=2", f"nodes={nodes}")
        + f"set -e\nif [ {test} ]; then\n{both['then']}else\n{both['else']}fi\n"
    )
    assert {"SLM013", "LCH006"} & set(found(text)) == ({"SLM013", "LCH006"} if said else set())


def test_a_secret_in_a_branch_that_is_never_taken_is_still_one():
    text = (
        TWO
        + "if [ $SLURM_NNODES -gt 1 ]; then\ntrue\nelse\nwandb login 0123456789abcdef0123456789abcdef01234567\nfi\n"
    )
    assert "LCH010" in found(text)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("srun -K1 python deepy.py train.py c.yml\n", True),
        ("srun -K1 bash -c 'cd /neox; python ./deepy.py train.py c.yml'\n", True),
        ("srun -N1 -n1 python deepy.py train.py c.yml\n", False),
        ("python deepy.py train.py c.yml\n", False),
        ("srun -K1 python train.py deepy.yml\n", False),
    ],
)
def test_deepy_is_a_launcher_of_the_whole_job(body, said):
    assert ("SLM012" in found(TWO + body)) is said


def test_a_hostfile_is_said_once_whoever_writes_to_it():
    pipe = (
        TWO
        + "export TORCH_EXTENSIONS_DIR=/s\nscontrol show hostnames $SLURM_JOB_NODELIST | %s > %s\ndeepspeed --hostfile h t.py\n"
    )
    awk, loop = """awk '{print $1" slots=8"}'""", 'while read -r line; do echo "$line slots=8"; done'
    for writer in (awk, loop):
        assert len(only(pipe % (writer, "hostfile"), "SLM063")) == 1
        assert only(pipe % (writer, "hostfile.$SLURM_JOB_ID"), "SLM063") == []
    twice = (pipe % (awk, "hostfile")).replace("deepspeed", "echo b slots=8 > a.hosts\ndeepspeed")
    assert len(only(twice, "SLM063")) == 2


@pytest.mark.parametrize(
    ("bind", "tasks", "said"),
    [
        ("mask_cpu:ff,ff00,ff0000,ff000000", 1, "the rest of it is not used"),
        ("mask_cpu:ff,ff00", 4, "tasks share what it names"),
        ("v,map_cpu=0,8", 4, "tasks share what it names"),
        ("verbose,map_cpu:0,8,16,24", 4, ""),
        ("mask_cpu:0xff*2,0xff00*2", 4, ""),
        ("mask_cpu:$MASKS", 4, ""),
        ("cores", 4, ""),
        ("none", 1, ""),
    ],
)
def test_a_list_of_cpus_has_an_entry_for_each_task_of_a_node(bind, tasks, said):
    text = TWO.replace("ntasks-per-node=1", f"ntasks-per-node={tasks}")
    messages = [one.message for one in only(text + f"srun -K1 --cpu-bind={bind} python t.py\n", "SLM051")]
    assert [message.rpartition(": ")[2] for message in messages] == ([said] if said else [])
    through = only(text + f'BIND="--cpu-bind={bind}"\nsrun -K1 $BIND python t.py\n', "SLM051")
    assert [one.message for one in through] == messages


@pytest.mark.parametrize(
    ("options", "rank", "said"),
    [
        ("--gpus-per-task=1", "LOCAL_RANK=$SLURM_LOCALID", True),
        ("--gpus-per-task=a100:1 --gpu-bind=closest", "LOCAL_RANK=$SLURM_LOCALID", True),
        ("--gpu-bind=single:1", "LOCAL_RANK=$SLURM_LOCALID", True),
        ("--gpus-per-task=1", "ARGS=--local_rank=$SLURM_LOCALID", True),
        ("--gpus-per-task=1", "LOCAL_RANK=0", False),
        ("--gpus-per-task=1 --gpu-bind=none", "LOCAL_RANK=$SLURM_LOCALID", False),
        ("--gpu-bind=closest", "LOCAL_RANK=$SLURM_LOCALID", False),
        ("--gpus-per-node=8", "LOCAL_RANK=$SLURM_LOCALID", False),
    ],
)
def test_a_gpu_each_and_the_number_of_another(options, rank, said):
    text = TWO.replace("ntasks-per-node=1", "ntasks-per-node=8")
    got = only(text + f"srun -K1 {options} bash -c 'RANK=$SLURM_PROCID {rank} python t.py'\n", "SLM007")
    assert [one.severity for one in got] == (["note"] if said else [])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("ARGS=$PWD/t.py --load x\npython $ARGS\n", True),
        ("ARGS=$PWD/t.py ${MORE}\npython $ARGS\n", True),
        ("MORE='--lr 1'\nARGS=$PWD/t.py $MORE\npython $ARGS\n", True),
        ("MORE=(--lr 1)\nARGS=t.py ${MORE}\npython $ARGS\n", True),
        ("srun -K1 bash -c 'ARGS=t.py --load x; python $ARGS'\n", True),
        ('ARGS="$PWD/t.py $MORE"\npython $ARGS\n', False),
        ("CUDA_VISIBLE_DEVICES=0 $CMD --a\n", False),
        ("CUDA_VISIBLE_DEVICES= $CMD --a\n", False),
        ("PORT=1\nPORT=2 $CMD --a\necho $PORT\n", False),
        ("A=1 B=2 python t.py --load $A\n", False),
        ("A=1 $CMD --load $AB\n", False),
        ("IFS=, read -r a b <<< $X\n", False),
    ],
)
def test_an_assignment_that_runs_its_second_word(body, said):
    assert ("SLM067" in found(ONE + body)) is said


@pytest.mark.parametrize(
    ("tail", "rules"),
    [
        ("srun -K1 python t.py; touch done; code=$?; exit $code\n", {"SLM042"}),
        ("srun -K1 python t.py\ntouch done\necho end\ncode=$?\nexit $code\n", {"SLM042"}),
        ("set -o pipefail\nsrun -K1 python t.py | tee log\ndate\ncode=$?\nexit $code\n", {"SLM042"}),
        ("srun -K1 python t.py; code=$?; touch done; exit $code\n", set()),
        ("srun -K1 python t.py; code=$?; touch done; touched=$?; exit $code\n", set()),
        ("set -e\nsrun -K1 python t.py; touch done; code=$?; exit $code\n", set()),
        ("srun -K1 python t.py; code=$?; echo ended with $code\n", {"SLM042"}),
        ("srun -K1 python t.py; code=$?\nif [ $code -ne 0 ]; then echo exit $code; fi\ndate\n", {"SLM042"}),
        ("srun -K1 python t.py; code=$?\nif [ $code -ne 0 ]; then exit $code; fi\ndate\n", set()),
        ("srun -K1 python t.py\nrm -rf /tmp/x\n", {"SLM042"}),
        ("srun -K1 python t.py\nexit 0\n", {"SLM043"}),
        ("srun -K1 python t.py; exit 0\n", {"SLM043"}),
        ("srun -K1 python t.py || echo failed\n", {"SLM043"}),
        ("srun -K1 python t.py &\nwait\n", {"SLM042"}),
        ("srun -K1 python t.py &\npid=$!\nwait $pid\nexit $?\n", set()),
        ("srun -K1 python t.py\nexit $?\n", set()),
        ("srun -K1 python t.py || exit 1\n", set()),
        ("if ! srun -K1 python t.py; then exit 1; fi\necho done\n", set()),
        ("set -e\nsrun -K1 python t.py\necho done\n", set()),
    ],
)
def test_whose_exit_code_the_job_gets(tail, rules):
    assert {"SLM042", "SLM043", "SLM044"} & set(found(TWO + tail)) == rules


def test_a_deepspeed_config_in_a_heredoc_is_judged_where_it_stands():
    text = TWO + (
        "cat > ds.json <<EOF\n{\n"
        '  "train_batch_size": 100,\n  "train_micro_batch_size_per_gpu": 4,\n  "zero_optimization": {"stage": 2}\n}\nEOF\n'
        "srun -K1 python train.py\n"
    )
    batch = [one for one in results(text) if one.severity == "error"]
    assert [one.line for one in batch] == [7]
    assert "16" in batch[0].message


def test_variables_are_judged_as_by_lint_env():
    text = (
        TWO
        + "export NCCL_ASYNC_ERROR_HANDLING=1\nexport CUDA_LAUNCH_BLOCKING=1\nsrun -K1 --export=ALL,NCCL_IB_HCA=mlx5_0,mlx5_1 python t.py\n"
    )
    assert {"ENV004", "ENV036"} <= {one.rule for one in results(text)}
    assert any("CUDA_LAUNCH_BLOCKING" in one.message for one in results(text))


@pytest.mark.parametrize(
    ("line", "secret"),
    [
        ("export HF_TOKEN=hf_" + "a" * 30, True),
        ("wandb login " + "0f" * 20, True),
        ("huggingface-cli login --token hf_" + "b" * 30, True),
        ("python t.py --wandb_key " + "0f" * 20, True),
        ("python t.py --hub_token " + "0f" * 20, True),
        ("srun --export=ALL,WANDB_API_KEY=" + "0f" * 20 + " -K1 python t.py", True),
        ("export HF_TOKEN=<your token>", False),
        ("export HF_TOKEN=your_token_here", False),
        ("export HF_TOKEN=$(cat ~/.token)", False),
        ("export TOKENIZERS_PARALLELISM=false", False),
        ("export TOKENIZER_PATH=/models/tok", False),
        ("wandb login", False),
        ("wandb login --relogin", False),
        ("python t.py --token-dropout 0.1", False),
    ],
)
def test_secrets(line, secret):
    assert ("LCH010" in found(f"#!/bin/bash\n{line}\n")) is secret


@pytest.mark.parametrize(
    ("port", "severity"), [("80", "error"), ("70000", "error"), ("40000", "warning"), ("29500", "note"), ("0", "")]
)
def test_ports(port, severity):
    got = [
        one.severity
        for one in results(TWO + f"export MASTER_PORT={port}\nsrun -K1 python t.py\n")
        if one.rule in ("LCH012", "LCH013")
    ]
    assert got == ([severity] if severity else [])


@pytest.mark.parametrize(("size", "wrong"), [("16", False), ("2", False), ("8", True), ("$SLURM_NTASKS", False)])
def test_a_world_size_in_figures(size, wrong):
    assert ("LCH005" in found(TWO + f"export WORLD_SIZE={size}\nsrun -K1 python t.py\n")) is wrong


def test_nodes_and_gpus_can_be_given_where_the_header_says_nothing():
    text = "#!/bin/bash\n#SBATCH --time=1:00:00\n#SBATCH --signal=USR1@60\nexport MASTER_ADDR=localhost\nsrun -K1 python t.py\n"
    assert "LCH006" not in found(text)
    assert "LCH006" in found(text, nodes=2)


@pytest.mark.parametrize(
    ("text", "name", "kind"),
    [
        ("#!/bin/bash\nls\n", "x", "script"),
        ("#SBATCH -N1\nls\n", "x", "script"),
        ("ls\n", "x.sh", "script"),
        ("#!/usr/bin/env -S bash -e\n", "x", "script"),
        ("#!/usr/bin/env python\n#SBATCH -N 2\nprint()\n", "run.py", "script"),
        ("{}", "x", "deepspeed"),
        ("name: a\nmodel: b\n", "job.yaml", "job"),
        ("name: a\nrun: |\n  #SBATCH -N1\n", "job.yaml", "job"),
        ("apiVersion: v1\nkind: Pod\n", "a.yaml", "manifest"),
        ('{"apiVersion": "v1", "kind": "Pod"}', "a.json", "manifest"),
        ("#!/bin/bash\ncat <<EOF\napiVersion: v1\nkind: Pod\nEOF\n", "a.sh", "script"),
    ],
)
def test_what_a_file_is(text, name, kind):
    assert lint.kind(text, name=name) == kind


@pytest.mark.slow
def test_the_command_line(tmp_path):
    path = tmp_path / "job.sbatch"
    path.write_text(RULES["SLM040"]["bad"])

    def run(*words):
        return subprocess.run(
            [DSLAUNCH, "lint", *words], capture_output=True, text=True, check=False, env={**os.environ}
        )

    said = run(str(path))
    assert said.returncode == 0
    assert f"{path}:3:1: warning SLM040" in said.stdout
    assert "batch script" in said.stderr
    assert run("--strict", str(path)).returncode == 1
    answer = json.loads(run("--json", str(path)).stdout)[0]
    assert (answer["kind"], answer["results"][0]["rule"]) == ("batch script", "SLM040")
    mended = run("--fix", str(path))
    assert "lint changes DeepSpeed configs only" in mended.stderr
    assert path.read_text() == RULES["SLM040"]["bad"]


def test_sarif_has_the_rules_and_the_places():
    report = lint.script(RULES["SLM010"]["bad"], name="job.sh")
    log = sarif.log([report])["runs"][0]
    assert [rule["id"] for rule in log["tool"]["driver"]["rules"]] == sorted({one.rule for one in report.results})
    assert all(one["locations"][0]["physicalLocation"]["region"]["startLine"] >= 1 for one in log["results"])


@pytest.mark.slow
@given(
    st.text(alphabet=st.sampled_from(list("#!/binsh$SLURM_{}()'\"`|&;\\\n \t=-KNntorchrun0189<>EOF")), max_size=300)
)
@settings(max_examples=60, deadline=None)
def test_no_text_makes_a_traceback(text):
    lint.script("#!/bin/bash\n#SBATCH --nodes=2\n" + text, name="x.sh")
    lint.script(text, name="x.sh")


@pytest.mark.slow
def test_a_long_script_is_quick():
    text = TWO + "export A=1\nsrun -K1 python train.py --a $A --b 'c d'\n" * 1500
    begin = time.process_time()
    results(text)
    assert time.process_time() - begin < 20
