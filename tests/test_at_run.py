"""What a job knows only while it runs stands in its arguments as `{job: id}`, and as a variable in its scripts."""

from __future__ import annotations

import json
import subprocess

import pytest

from launcher import bundle, origins, plan, schema, show, spec
from launcher.backends import kubernetes, local, slurm
from launcher.errors import UserError
from launcher.spec.words import at_run, of_service, written

JOB = """\
name: rt
train:
  command: [python, x.py, --id, {job: id, prepend: "run 1-", append: ".log"}, --host, {host: reward-server}]
env: {CACHE: {node: rank, prepend: /tmp/cache-}, WHERE: {node: name}}
services: [{name: reward-server, command: [serve, {port: reward-server}]}]
resources: {nodes: 2, processes_per_node: 1}
"""


def load(text: str = JOB, **more: str) -> spec.Document:
    return spec.load(text, name="job.yaml", environ=more)


def test_the_scripts_have_variables_where_the_job_file_has_names():
    bundled = slurm.render(plan.make(load().spec))
    node = bundled.text("node.sh")
    assert """--id 'run 1-'"$DSLAUNCH_JOB_ID".log --host "$DSLAUNCH_HOST_REWARD_SERVER\"""" in node
    assert 'export CACHE=/tmp/cache-"$NODE_RANK"' in node
    assert 'export WHERE="$DSLAUNCH_NODE_NAME"' in node
    assert node.index("export DSLAUNCH_JOB_ID=") < node.index("export CACHE=")
    assert 'exec serve "$DSLAUNCH_PORT_REWARD_SERVER"' in bundled.text("service-reward-server.sh")
    assert "\ue000" not in "".join(file.text for file in bundled.files if file.path != bundle.ASKED)


def test_a_job_that_asks_for_nothing_gets_no_variables():
    text = slurm.render(plan.make(load("name: rt\ntrain: {command: [x]}\n").spec)).text("node.sh")
    assert "DSLAUNCH_JOB_ID" not in text
    assert "DSLAUNCH_NODE_NAME" not in text


@pytest.mark.parametrize("text", ["", "a b", "'", "$(id)", "`id`", "ü\n", "-x"])
def test_bash_gives_the_value_and_leaves_the_rest_as_it_is(text):
    word = bundle.quote(f"{text}{at_run('V')}{text}")
    done = subprocess.run(["bash", "-c", f"printf %s {word}"], env={"V": "1 '2"}, capture_output=True, text=True)
    assert done.stdout == f"{text}1 '2{text}"


def test_the_job_that_is_kept_says_it_as_the_job_file_did():
    document = load()
    kept = json.loads(slurm.render(plan.make(document.spec)).text(bundle.ASKED))
    assert kept["train"]["command"][3] == {"job": "id", "prepend": "run 1-", "append": ".log"}
    assert load(json.dumps(kept)).spec == document.spec
    assert load(origins.text(origins.rows(document), origin=False)).spec == document.spec


@pytest.mark.parametrize(
    "variable", ["DSLAUNCH_JOB_ID", "NODE_RANK", "PATH", "SLURM_TMPDIR", of_service("port", "a-b")]
)
def test_every_name_comes_back(variable):
    ((key, name), *_) = written(at_run(variable)).items()
    text = f"name: x\ntrain: {{command: [{{{key}: {name}}}]}}\nservices: [{{name: a-b, command: [x]}}]\n"
    assert load(text).spec.train.command == (at_run(variable),)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {command: [x, {job: number}]}", "job.yaml:2:28: job has no number"),
        ("train: {command: [x, {host: nobody}]}", "job.yaml:2:29: host has no nobody"),
        ("env: {A: {node: LOCAL_RANK}}", "job.yaml:2:17: node has no LOCAL_RANK"),
        ("env: {A: {node: HF_TOKEN}}", "job.yaml:2:17: node has no HF_TOKEN"),
        ("env: {A: {node: path}}", "job.yaml:2:17: node has no path"),
        ("env: {A: {env: NOT_SET, prepend: {job: id}}}", "job.yaml:2:16: the environment has no variable NOT_SET"),
        ("env: {A: {job: id, append: {env: NOT_SET}}}", "job.yaml:2:34: the environment has no variable NOT_SET"),
        ("env: {A: {job: id, append: {host: nobody}}}", "job.yaml:2:35: host has no nobody"),
        ("env: {A: {job: id, append: {a: b}}}", "expected text, found a section"),
        ("mkdir: ['']", "job.yaml:2:9: a directory needs a name"),
        ("train: {command: [x], workdir: {job: id}}", "found a section"),
        ("slurm: {partition: {node: name}}", "found a section"),
        ("kubernetes: {annotations: {a/b: {job: id}}}", "an annotation is written before"),
    ],
)
def test_where_it_cannot_be_known_it_is_refused(text, says):
    with pytest.raises(UserError) as caught:
        load(f"name: x\n{text}\n")
    assert says in "".join(map(str, caught.value.problems))


def test_a_variable_of_here_may_stand_in_the_middle():
    document = load("name: x\ntrain: {workdir: {env: USER, prepend: /scratch/, append: /runs}}\n", USER="ada")
    assert document.spec.train.workdir == "/scratch/ada/runs"


def test_pods_and_this_machine_know_their_own():
    text = "name: rt\ntrain: {command: [x, {job: id}]}\nresources: {nodes: 2, processes_per_node: 1}\n"
    here = local.render(plan.make(load(text).spec)).text("node.sh")
    assert 'export DSLAUNCH_JOB_ID="${SLURM_JOB_ID:-${here##*/}}"' in here
    pods = kubernetes.render(plan.make(load(text + "container: i\n").spec)).text(kubernetes.ENTRY)
    assert 'export DSLAUNCH_JOB_ID="${SLURM_JOB_ID:-rt}"' in pods


def test_the_local_disk_is_made_where_something_asks_for_it():
    text = "name: rt\ntrain: {command: [x, {node: local, append: /d}]}\n"
    node = slurm.render(plan.make(load(text).spec)).text("node.sh")
    assert 'x "$DSLAUNCH_LOCAL"/d' in node
    assert node.index('mkdir -p -- "$DSLAUNCH_LOCAL"') < node.index('"$DSLAUNCH_LOCAL"/d')
    other = plan.make(load("name: rt\ntrain: {command: [x]}\n").spec)
    assert "DSLAUNCH_LOCAL" not in slurm.render(other).text("node.sh")


def test_a_dollar_that_nobody_expands_is_pointed_at():
    text = "name: x\nenv: {A: /tmp/$USER}\ntrain: {command: [x, '${B}/y', 'cost $5']}\n"
    notes = [note for note in plan.make(load(text).spec).notes if "as it is written" in note]
    assert [note.split(" as it")[0] for note in notes] == ["env.A holds $USER", "train.command holds ${B}"]
    assert not plan.literals(load("name: x\ntrain: {command: [bash, -c, 'echo $A']}\n").spec)


def test_a_plan_shows_it_as_a_variable():
    document = load()
    assert "run 1-$DSLAUNCH_JOB_ID.log" in show.plan(plan.make(document.spec), document)


def test_the_editors_schema_takes_it():
    text = json.dumps(schema.job())
    assert all(f'"{key}"' in text for key in ("prepend", "FromJob"))


SEVERAL = """\
name: rt
train: {command: [x, {job: id, prepend: {env: SCRATCH, append: /o-}, append: {node: HOSTNAME, prepend: "-"}}]}
env:
  PATH: {node: PATH, prepend: "/opt/x/bin:"}
  CACHE: {env: SCRATCH, prepend: {path: tmp, append: /}, append: {job: id, prepend: /}}
paths: {tmp: /tmp}
resources: {nodes: 2, processes_per_node: 1}
"""


def test_variables_of_a_node_and_several_in_one_text():
    document = load(SEVERAL, SCRATCH="/s")
    node = slurm.render(plan.make(document.spec)).text("node.sh")
    assert 'x /s/o-"$DSLAUNCH_JOB_ID"-"$HOSTNAME"' in node
    assert 'export PATH=/opt/x/bin:"$PATH"' in node
    assert 'export CACHE=/tmp//s/"$DSLAUNCH_JOB_ID"' in node
    kept = json.loads(slurm.render(plan.make(document.spec)).text(bundle.ASKED))
    assert kept["env"]["PATH"] == {"node": "PATH", "prepend": "/opt/x/bin:"}
    assert load(json.dumps(kept)).spec == document.spec
    assert load(origins.text(origins.rows(document), origin=False), SCRATCH="/s").spec == document.spec


def test_a_pod_has_nothing_of_slurm():
    text = "name: rt\ntrain: {command: [x, {node: SLURM_TMPDIR}]}\nresources: {nodes: 2, processes_per_node: 1}\n"
    with pytest.raises(UserError) as caught:
        kubernetes.render(plan.make(load(text + "container: i\n").spec))
    assert "a pod has no SLURM_TMPDIR" in str(caught.value.problems[0])
