"""Manifests as the API server would judge them, pods as they would run, and the client against a fake server."""

import base64
import contextlib
import copy
import functools
import hashlib
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import fake_kube
import k8s_schema
import pytest
import yaml

from launcher import bundle as bundles
from launcher import plan, preflight, runs, setting, spec, yamldoc
from launcher.backends import State, kubernetes
from launcher.backends.kubernetes import output, server
from launcher.errors import Unreachable, UserError
from launcher.preflight import pods as pods_module
from launcher.run import run

DSLAUNCH = Path(sys.executable).with_name("dslaunch")
DEMO = {
    "name": "demo",
    "model": "gpt-demo",
    "container": "ghcr.io/example/train:1",
    "train": {"global_batch": 16, "seq_len": 128, "steps": 60, "zero": 3},
    "resources": {"nodes": 2, "processes_per_node": 2, "cpus_per_node": 4, "memory": "8G"},
}
GPUS = {
    "nodes": 4,
    "processes_per_node": None,
    "cpus_per_node": None,
    "memory": None,
    "gpus_per_node": 8,
    "gpu": "h100-80gb",
    "fabric": "infiniband",
}
ODD = {
    "COMMA": "a,b=c",
    "QUOTES": 'it\'s "so"',
    "COMMAND": "$(id) `id` $HOME",
    "LINES": "one\ntwo\n",
    "RETURN": "a\rb\r\n",
    "TAB": "\tx\t",
    "UNICODE": "größe \U0001f600 \u2028 \ufeff",
    "CONTROL": "\x07\x1b[31m\x7f\x85",
    "EMPTY": "",
    "BACKSLASH": "\\n \\",
    "YES": "y",
    "NUMBER": "1e-5",
}


def over(*changes):
    """DEMO with sections laid over it: over({"resources": {"nodes": 1}})."""

    def lay(under, top):
        both = isinstance(under, dict) and isinstance(top, dict)
        return {**under, **{key: lay(under.get(key), value) for key, value in top.items()}} if both else top

    job = copy.deepcopy(DEMO)
    for change in changes:
        job = lay(job, change)
    return job


def make(*changes):
    return plan.make(spec.load(yamldoc.dump([over(*changes)]), name="job.yaml").spec)


JOBS = {
    "demo": {},
    "one-node": {"resources": {"nodes": 1}},
    "longest-name": {"name": "a" * 40, "resources": {"nodes": 2000}, "train": {"global_batch": "auto"}},
    "gpus": {"resources": GPUS, "train": {"global_batch": "auto"}},
    "megabytes": {"resources": {"memory": "64000"}},
    "kilobytes": {"resources": {"memory": "64000K", "cpus_per_node": None}},
    "deepspeed-launcher": {"train": {"launcher": "deepspeed"}},
    "script": {"train": {"script": "train.py", "args": ["--lr", "1e-5", "y", "0o14", "$(id)"], "workdir": "/src"}},
    "secrets": {"secrets": {"HF_TOKEN": {"secret": "hf", "key": "token"}, "WANDB_KEY": {"secret": "w", "key": "y"}}},
    "odd-environment": {"env": ODD},
    "everything": {
        "train": {"checkpoint": {"dir": "/ckpt/demo"}},
        "kubernetes": {
            "namespace": "ml",
            "queue": "team-a",
            "priority_class": "high",
            "service_account": "trainer",
            "image_pull_secrets": ["regcred"],
            "network": {"resources": {"rdma/hca": 8}},
            "shm": "64Gi",
            "node_selector": {"gpu": "y", "pool": "1e-5"},
            "exclude": ["node-7", "ip-10-0-0-1.ec2.internal"],
            "tolerations": [
                {"key": "nvidia.com/gpu", "effect": "NoSchedule"},
                {"key": "team", "operator": "Equal", "value": "08"},
            ],
            "volumes": [{"claim": "ckpt", "mount": "/ckpt"}, {"claim": "data", "mount": "/data", "read_only": True}],
            "security": {"run_as_user": 1000},
            "labels": {"y": "n", "team": "08", "app.kubernetes.io/part-of": "0o14"},
            "annotations": {"note": "+.5", "on": "5e-05", "long": "a\nb\n"},
        },
    },
}
PLANS = {name: make(change) for name, change in JOBS.items()}


def documents(name="demo"):
    return copy.deepcopy(kubernetes.manifests(PLANS[name]))


def pods(job):
    return [spec for _, spec in k8s_schema.pods(job)]


# --- what is printed ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANS)
def test_manifests_are_ones_that_a_strict_server_takes(name):
    assert k8s_schema.problems(documents(name)) == []


GALLERY = sorted((Path(__file__).parents[1] / "manifests").glob("*/manifests.yaml"))


@pytest.mark.parametrize("path", GALLERY, ids=lambda path: path.parent.name)
def test_the_gallery_is_what_a_strict_server_takes(path):
    documents = list(yaml.load_all(path.read_text(), Loader=k8s_schema.LOADER))
    older = "podTemplateOverrides" in documents[-1]["spec"]
    assert k8s_schema.problems(documents, trainer="2.1" if older else "2.2") == []


@pytest.fixture(scope="module")
def crd_schema():
    path = k8s_schema.crd()
    if path is None:
        pytest.skip("DSLAUNCH_CRD_DIR names no folder with kubeflow.org_pytorchjobs.yaml")
    return k8s_schema.crd_schema(path)


def test_manifests_fit_the_operators_own_crd(crd_schema):
    for name in PLANS:
        assert k8s_schema.crd_problems(documents(name)[-1], crd_schema) == [], name
    for path in GALLERY:
        for document in yaml.load_all(path.read_text(), Loader=k8s_schema.LOADER):
            found = k8s_schema.crd(document["kind"]) if document["kind"] in k8s_schema.CRDS else None
            # scheduler-plugins' group is not Volcano's; the Trainer of that folder is newer than 2.1's dialect
            if (
                found
                and "scheduling.x-k8s.io" not in document["apiVersion"]
                and "podTemplateOverrides" not in document["spec"]
            ):
                assert k8s_schema.crd_problems(document, k8s_schema.crd_schema(found)) == [], path


BAD = {
    "runPolicy.backOffLimit": "runPolicy: unknown field",
    "pod.imagePullSecret": "unknown field",
    "container.nodeSelector": "unknown field",
    "nprocPerNode=8": "is not str",
    "Master.replicas='1'": "is not int",
    "Master.replicas=2": "has to be 1",
    "Master.replicas gone": "has to be 1",
    "restartPolicy=Sometimes": "is not one of",
    "cleanPodPolicy=Everything": "is not one of",
    "name=ds.train": "metadata.name",
    "name=1demo": "metadata.name",
    "name too long": "more than 63",
    "namespace=a.b": "metadata.namespace",
    "label value": "metadata.labels",
    "replica type master": "unknown field `master`",
    "container name": "is called `pytorch`",
    "no image": "no image",
    "env value 1": "is not str",
    "env twice": "2 times",
    "env value and valueFrom": "value and valueFrom",
    "mount without volume": "no volume",
    "mount twice": "2 times",
    "gpu request": "has to be the limit",
    "gpu eight": "no quantity",
    "memory 128Megs": "no quantity",
    "request over limit": "over limit",
    "resource without domain": "no resource",
    "port 99999": "99999",
    "no containers": "missing",
    "toleration": "Exists with a value",
    "ConfigMap number": "is not str",
    "ConfigMap key": "key 'node/rank.py'",
    "ConfigMap gone": "no ConfigMap",
    "item gone": "has no node.sh",
    "two excluded at once": "with one name",
    "excluded by label": "with one name",
    "excluded with a slash": "no node's name",
    "message policy": "is not one of",
    "node's IP": "no field",
}


def spoil(what, config_map, code, job):
    """One mistake in good manifests."""
    policy, specs = job["spec"]["runPolicy"], job["spec"]["pytorchReplicaSpecs"]
    pod = specs["Worker"]["template"]["spec"] = copy.deepcopy(specs["Worker"]["template"]["spec"])
    box = pod["containers"][0]
    limits, requests = box["resources"]["limits"], box["resources"]["requests"]
    first = box["env"][0]

    def excluded(key, *names):
        term = {"matchFields": [{"key": key, "operator": "NotIn", "values": list(names)}]}
        required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
        pod.update(affinity={"nodeAffinity": required})

    changes = {
        "runPolicy.backOffLimit": lambda: policy.update(backOffLimit=1),
        "pod.imagePullSecret": lambda: pod.update(imagePullSecret="x"),
        "container.nodeSelector": lambda: box.update(nodeSelector={}),
        "nprocPerNode=8": lambda: job["spec"].update(nprocPerNode=8),
        "Master.replicas='1'": lambda: specs["Master"].update(replicas="1"),
        "Master.replicas=2": lambda: specs["Master"].update(replicas=2),
        "Master.replicas gone": lambda: specs["Master"].pop("replicas"),
        "restartPolicy=Sometimes": lambda: specs["Worker"].update(restartPolicy="Sometimes"),
        "cleanPodPolicy=Everything": lambda: policy.update(cleanPodPolicy="Everything"),
        "name=ds.train": lambda: job["metadata"].update(name="ds.train"),
        "name=1demo": lambda: job["metadata"].update(name="1demo"),
        "name too long": lambda: job["metadata"].update(name="a" * 55),
        "namespace=a.b": lambda: job["metadata"].update(namespace="a.b"),
        "label value": lambda: job["metadata"]["labels"].update(team="a b"),
        "replica type master": lambda: specs.update(master=specs.pop("Master")),
        "container name": lambda: box.update(name="main"),
        "no image": lambda: box.pop("image"),
        "env value 1": lambda: first.update(value=1),
        "env twice": lambda: box["env"].append(dict(first)),
        "env value and valueFrom": lambda: first.update(valueFrom={"secretKeyRef": {"name": "a", "key": "b"}}),
        "mount without volume": lambda: box["volumeMounts"][0].update(name="gone"),
        "mount twice": lambda: box["volumeMounts"].append(dict(box["volumeMounts"][0])),
        "gpu request": lambda: (limits.update({"nvidia.com/gpu": "8"}), requests.update({"nvidia.com/gpu": "4"})),
        "gpu eight": lambda: limits.update({"nvidia.com/gpu": "eight"}),
        "memory 128Megs": lambda: limits.update(memory="128Megs"),
        "request over limit": lambda: requests.update(memory="16Gi"),
        "resource without domain": lambda: limits.update(gpu="8"),
        "port 99999": lambda: box["ports"][0].update(containerPort=99999),
        "no containers": lambda: pod.pop("containers"),
        "toleration": lambda: pod.update(tolerations=[{"key": "a", "operator": "Exists", "value": "b"}]),
        "ConfigMap number": lambda: config_map["data"].update(steps=60),
        "ConfigMap key": lambda: config_map["data"].update({"node/rank.py": ""}),
        "ConfigMap gone": lambda: config_map["metadata"].update(name="other"),
        "item gone": lambda: config_map["data"].pop("node.sh"),
        "two excluded at once": lambda: excluded("metadata.name", "a", "b"),
        "excluded by label": lambda: excluded("kubernetes.io/hostname", "a"),
        "excluded with a slash": lambda: excluded("metadata.name", "a/1"),
        "message policy": lambda: box.update(terminationMessagePolicy="Always"),
        "node's IP": lambda: first.update(valueFrom={"fieldRef": {"fieldPath": "spec.nodeIP"}}) or first.pop("value"),
    }
    changes[what]()
    return [config_map, code, job]


@pytest.mark.parametrize("what", BAD)
def test_the_validator_sees_a_bad_manifest(what):
    found = k8s_schema.problems(spoil(what, *documents()))
    assert found
    assert all(BAD[what] in line for line in found), found


def test_the_crd_sees_what_it_can(crd_schema):
    for what in (
        "runPolicy.backOffLimit",
        "pod.imagePullSecret",
        "nprocPerNode=8",
        "Master.replicas='1'",
        "gpu eight",
    ):
        assert k8s_schema.crd_problems(spoil(what, *documents())[-1], crd_schema), what


def test_the_pods_ask_for_what_training_needs():
    *config_maps, job = documents("gpus")
    assert job["spec"]["runPolicy"] == {"cleanPodPolicy": "Running", "schedulingPolicy": {"minAvailable": 4}}
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert [(kind, row["replicas"], row["restartPolicy"]) for kind, row in replicas.items()] == [
        ("Master", 1, "Never"),
        ("Worker", 3, "Never"),
    ]
    for pod in pods(job):
        resources = pod["containers"][0]["resources"]
        assert resources["requests"] == resources["limits"] == {"nvidia.com/gpu": "8"}
        assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}} in pod["volumes"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["containers"][0]["ports"] == [{"name": "pytorchjob-port", "containerPort": 23456}]
    assert f"--grace {kubernetes.GRACE - 20} " in config_maps[0]["data"]["node.sh"]


def test_a_pod_has_the_time_that_its_checkpoint_takes():
    """1.5 x 200 + 60 = 360 s and a step from SIGTERM to the end, 20 of them the supervisor's."""
    small = PLANS["gpus"]
    made = replace(small, saving=replace(small.saving, write_seconds=200.0))
    assert made.time.seconds < 1
    *config_maps, manifest = kubernetes.manifests(made)
    assert {pod["terminationGracePeriodSeconds"] for pod in pods(manifest)} == {361}
    assert "--grace 341 " in config_maps[0]["data"]["node.sh"]


def test_one_node_is_a_master_alone():
    assert list(documents("one-node")[-1]["spec"]["pytorchReplicaSpecs"]) == ["Master"]


@pytest.mark.parametrize(
    ("asked", "memory"), [("8G", "8Gi"), ("64000", "64000Mi"), ("64000K", "64000Ki"), ("2T", "2Ti"), ("0", None)]
)
def test_memory_means_what_it_means_on_slurm(asked, memory):
    job = kubernetes.manifests(make({"resources": {"memory": asked}}))[-1]
    assert pods(job)[0]["containers"][0]["resources"]["limits"].get("memory") == memory


def test_secrets_are_references_and_never_values():
    text = kubernetes.render(PLANS["secrets"]).text(kubernetes.ENTRY)
    env = pods(k8s_schema.documents(text)[-1])[0]["containers"][0]["env"]
    assert {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}} in env
    assert "kind: Secret" not in text


@pytest.mark.parametrize("name", PLANS)
def test_names_fit_with_every_suffix(name):
    *config_maps, job = documents(name)
    workers = job["spec"]["pytorchReplicaSpecs"].get("Worker", {"replicas": 1})["replicas"]
    for suffix in ("", "-master-0", f"-worker-{workers - 1}", "-worker-99999"):
        assert len(job["metadata"]["name"] + suffix) <= 63
    assert all(len(config_map["metadata"]["name"]) <= 63 for config_map in config_maps)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"container": None}, "need an image"),
        ({"train": {"launcher": "srun"}}, "needs Slurm"),
        ({"train": {"command": ["mpirun", "t"], "launcher": "job"}}, "neither srun nor ssh to each other"),
        ({"resources": {"spares": 1}}, "no spare pods"),
        ({"modules": ["cuda/12.4"]}, "no environment modules"),
        ({"train": {"workdir": "src"}}, "workdir src is relative"),
        ({"venv": ".venv"}, "venv .venv is relative"),
        ({"secrets": {"HF_TOKEN": {"from_env": "HF_TOKEN"}}}, "no Kubernetes Secret"),
        ({"container": {"image": "a/b", "mounts": ["/data:/data"]}}, "are for Slurm"),
        ({"name": "7b"}, "begins with a digit"),
        ({"kubernetes": {"volumes": [{"claim": "a", "mount": "data"}]}}, "absolute path"),
        ({"kubernetes": {"volumes": [{"claim": "a", "mount": "/a"}, {"claim": "b", "mount": "/a/"}]}}, "mount of a"),
        ({"kubernetes": {"volumes": [{"claim": "a", "mount": "/opt/dslaunch"}]}}, "has the scripts"),
        ({"kubernetes": {"volumes": [{"claim": "a", "mount": "/dev/shm"}]}}, "shared memory"),
        ({"kubernetes": {"gpu_resource": "gpu"}}, "no domain"),
        ({"kubernetes": {"tolerations": [{"key": "a", "value": "b"}]}}, "takes no value"),
        ({"kubernetes": {"tolerations": [{"operator": "Equal", "value": "b"}]}}, "needs a key"),
        (
            {
                "train": {"checkpoint": {"dir": "/a/b/c"}},
                "kubernetes": {"volumes": [{"claim": "a", "mount": "/a/b", "read_only": True}]},
            },
            "read-only",
        ),
    ],
)
def test_what_cannot_run_in_pods_is_refused(change, words):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        kubernetes.render(make(change))
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].at


@pytest.mark.parametrize(
    ("train", "noted"),
    [
        ({"checkpoint": {"dir": "/ckpt/x"}}, False),
        ({"checkpoint": {"dir": "x"}, "workdir": "/ckpt"}, False),
        ({"checkpoint": {"dir": "/ckpt-2/x"}}, True),
        ({"checkpoint": {"dir": "/ckpt/../x"}}, True),
        ({}, True),
    ],
)
def test_checkpoints_that_end_with_the_pods_are_noted(train, noted):
    made = make({"train": train, "kubernetes": {"volumes": [{"claim": "c", "mount": "/ckpt"}]}})
    assert bool(kubernetes.notes(made)) is noted


# --- as text --------------------------------------------------------------------------------------

# What some reader of YAML (1.1, 1.2, Kubernetes' own) takes for something other than text.
MISREAD = re.compile(
    r"[-+.]*[0-9].*|[-+]?\.?(inf|nan)|y|n|yes|no|on|off|true|false|null|none|~|<<|=|", re.IGNORECASE | re.DOTALL
)


class Suspicious(yaml.SafeLoader):
    """Every scalar without quotes that any reader could misread is no text here."""


def _scalar(loader, node):
    if node.style is None and MISREAD.fullmatch(node.value):
        return json.loads(node.value)  # a number, true or false; anything else fails
    return node.value


Suspicious.yaml_implicit_resolvers = {}
Suspicious.add_constructor("tag:yaml.org,2002:str", _scalar)


@pytest.mark.slow
@pytest.mark.parametrize("loader", [yaml.SafeLoader, Suspicious])
@pytest.mark.parametrize("name", PLANS)
def test_every_reader_reads_the_same(name, loader):
    text = kubernetes.render(PLANS[name]).text(kubernetes.ENTRY)
    assert list(yaml.load_all(text, Loader=loader)) == documents(name)


TRAPS = "y n Y N yes No ON off true Null ~ 1e8 1E3 1e+5 1e-5 5e-05 .5e3 0.1e1 0e0 0o14 08 010 +.5 .inf .NaN".split()
TRAPS += "NaN 0x1F 1_000 12:30:45 2026-01-01 - -- --- ... = << ? : # @a `a %a &a *a !a |a >a [a {a ]a a:b".split()
TRAPS += [
    "",
    " ",
    "a ",
    " a",
    "a: b",
    "a #b",
    "- a",
    "'",
    '"',
    "a\tb",
    "a\rb",
    "\x85",
    "\u2028",
    "\ufeff",
    "\U0001f600",
]
TRAPS += [
    "a\nb",
    "a\n",
    "\na",
    " a\nb",
    "a \nb",
    "a\n\n",
    "a\n ",
    "\t\nb",
    "é\n\U0001f600",
    "#a\nb",
    "---\na",
    "%a\nb",
]


def test_the_suspicious_reader_can_complain():
    assert yaml.load("lr: 1e-5", Loader=Suspicious) == {"lr": 1e-5}
    for text in ("name: y", "mode: 0o14", "day: 08", "x: +.5"):
        with pytest.raises(ValueError, match=r"Expecting value|Extra data"):
            yaml.load(text, Loader=Suspicious)


def test_text_stays_text_as_key_and_as_value():
    value = {"values": TRAPS, "keys": {text: 1 for text in TRAPS if len(text) < 100}, "numbers": [0, 1, -7, True]}
    text = yamldoc.dump([value])
    assert yaml.safe_load(text) == value
    assert yaml.load(text, Loader=Suspicious) == value


@pytest.mark.slow
def test_the_same_job_is_the_same_bytes(tmp_path):
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps(over(JOBS["everything"])))
    found = {
        subprocess.run(
            [DSLAUNCH, "k8s", job], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("0", "1", "7")
    }
    assert found == {kubernetes.render(make(JOBS["everything"])).text(kubernetes.ENTRY).encode()}


def test_a_changed_job_has_another_digest():
    def digest(*change):
        return kubernetes.manifests(make(*change))[-1]["metadata"]["annotations"][kubernetes.DIGEST]

    assert digest() == digest()
    changes = [{"env": {"A": "1"}}, {"train": {"steps": 61}}, {"resources": {"nodes": 4}}]
    changes += [{"kubernetes": {"gang": False}}, {"kubernetes": {"queue": "q"}}]
    assert len({digest(), *map(digest, changes)}) == 1 + len(changes)


def test_printing_needs_no_client_library(tmp_path):
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps(DEMO))
    code = "import sys; from launcher.cli import cli; cli.main(['k8s', sys.argv[1]], standalone_mode=False)"
    code += "; sys.exit('kubernetes' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, job], stdout=subprocess.DEVNULL, check=False).returncode == 0


# --- as the pods run it ---------------------------------------------------------------------------


def lay_out(text, folder):
    """What the kubelet makes of the printed ConfigMaps, and the container's command for that place."""
    *config_maps, job = k8s_schema.documents(text)
    box, volume = pods(job)[0]["containers"][0], pods(job)[0]["volumes"][0]
    box = job["spec"].get("trainer", box)
    stored = {one["metadata"]["name"]: one for one in config_maps}
    for source in volume["projected"]["sources"]:
        one = stored[source["configMap"]["name"]]
        data = {key: value.encode() for key, value in one.get("data", {}).items()}
        data |= {key: base64.b64decode(value) for key, value in one.get("binaryData", {}).items()}
        for item in source["configMap"]["items"]:
            path = folder / item["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data[item["key"]])
    places = {kubernetes.MOUNT: str(folder), kubernetes.HERE: f"{folder}-here"}
    return [
        functools.reduce(lambda text, row: text.replace(*row), places.items(), word) for word in box["command"]
    ], box


def archived(config_maps):
    """Path -> text of what travels in the archive."""
    parts = [value for one in config_maps for value in one.get("binaryData", {}).values()]
    with zipfile.ZipFile(io.BytesIO(b"".join(map(base64.b64decode, parts)))) as archive:
        return {f"node/code/{name}": archive.read(name).decode() for name in archive.namelist()}


def test_variables_reach_the_ranks_byte_for_byte(tmp_path):
    text = kubernetes.render(PLANS["odd-environment"]).text(kubernetes.ENTRY)
    command, _ = lay_out(text, tmp_path / "mount")
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "python3"
    fake.write_text("#!/bin/sh\nexec env -0\n")
    fake.chmod(0o755)
    env = {
        "PATH": f"{fake.parent}:{os.environ['PATH']}",
        "RANK": "1",
        "HOME": "/nowhere",
        "DSLAUNCH_LOGS": str(tmp_path),
    }
    out = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, check=True).stdout
    found = dict(row.split("=", 1) for row in out.decode().split("\0")[:-1])
    assert {name: found[name] for name in ODD} == ODD
    assert found["NODE_RANK"] == "1"
    assert found["HOME"] == "/tmp"


def test_scripts_round_trip_through_the_config_map():
    made = PLANS["odd-environment"]
    *config_maps, _ = k8s_schema.documents(kubernetes.render(made).text(kubernetes.ENTRY))
    data = archived(config_maps) | config_maps[0]["data"]
    flags = [f"--grace {kubernetes.grace(made) - 20}"]
    for file in bundles.common(made, None, flags=flags, submitted_from=False):
        key = file.path if file.path.startswith("node/code/") else file.path.replace("/", ".")
        assert data[key] == file.text


def own_address():
    """An address of this machine that is not loopback, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.200", 9))  # sends nothing
            return sock.getsockname()[0]
        except OSError:
            return None


def start(tmp_path, text, more):
    """A process for each pod, with what the operator gives it, and in `more` the downward API."""
    address = own_address()
    if not address or address.startswith("127."):
        pytest.skip("this machine has no address but loopback, and a pod's master is elsewhere")
    with socket.socket() as sock:
        sock.bind((address, 0))
        port = sock.getsockname()[1]
    started = []
    for index, extra in enumerate(more):
        mount = tmp_path / f"mount-{index}"
        command, box = lay_out(text, mount)
        archive, *more_parts = sorted((mount / "node").glob("code.zip.*"))
        with zipfile.ZipFile(io.BytesIO(b"".join(part.read_bytes() for part in (archive, *more_parts)))) as old:
            code = {name: old.read(name) for name in old.namelist()}
        if "launcher/preflight/pods.py" in code:  # the kubelet makes this file, and mounts it there
            end = tmp_path / f"termination-{index}"
            end.touch()
            before = code["launcher/preflight/pods.py"]
            code["launcher/preflight/pods.py"] = before.replace(pods_module.TERMINATION_LOG.encode(), bytes(end))
            assert code["launcher/preflight/pods.py"] != before
            for part in more_parts:
                part.unlink()
            with zipfile.ZipFile(archive, "w") as new:
                for name, text_of_it in code.items():
                    new.writestr(name, text_of_it)
        env = {row["name"]: row["value"] for row in box["env"] if "value" in row}
        env |= {"DSLAUNCH_LOGS": str(tmp_path / f"logs-{index}"), "DSLAUNCH_CACHE": str(tmp_path / "cache")}
        env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}
        # as the operator sets them: RANK is the node's, WORLD_SIZE counts its nprocPerNode
        env |= {"PYTHONUNBUFFERED": "1", "MASTER_ADDR": address, "MASTER_PORT": str(port), "RANK": str(index)}
        env |= {"WORLD_SIZE": "4", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "2", "PET_NODE_RANK": str(index)}
        env |= {"PET_MASTER_ADDR": address, "PET_MASTER_PORT": str(port), **extra}
        with (tmp_path / f"log-{index}").open("wb") as log:
            started.append(
                subprocess.Popen(
                    command, env=env, cwd=tmp_path, start_new_session=True, stdout=log, stderr=subprocess.STDOUT
                )
            )
    return started


def finish(tmp_path, started):
    """Their exit codes, output and termination messages, once all are over."""
    try:
        codes = [process.wait(timeout=150) for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    said = [(tmp_path / f"log-{index}").read_text() for index in range(len(started))]
    ends = [tmp_path / f"termination-{index}" for index in range(len(started))]
    return codes, said, [end.read_text() if end.exists() else "" for end in ends]


SHOW = 'echo "here is $RANK of $WORLD_SIZE, $LOCAL_RANK on $GROUP_RANK, master $MASTER_ADDR:$MASTER_PORT"'
FIRST = {"train": {"command": ["bash", "-c", SHOW]}, "preflight": {"run": True, "stages": ["inventory", "pairs"]}}


@pytest.mark.slow
@pytest.mark.parametrize("checked", [False, True], ids=["", "preflight"])
def test_two_pods_are_one_world_of_four_ranks(tmp_path, checked):
    made = make(FIRST if checked else {"train": FIRST["train"]})
    node = {"DSLAUNCH_NODE": "node-7"} if checked else {}  # both on one node
    started = start(tmp_path, kubernetes.render(made).text(kubernetes.ENTRY), [node, node])
    codes, said, ends = finish(tmp_path, started)
    assert codes == [0, 0], said
    assert ends == ["", ""]
    assert ("dslaunch preflight: 2 nodes are ready (exit code 0)\n" in said[0]) is checked, said
    for index, text in enumerate(said):
        for local in range(2):
            rank = 2 * index + local
            line = f"[rank {rank}] here is {rank} of 4, {local} on {index}, master "
            assert line in text, said
    if checked:
        verdict = json.loads((tmp_path / "logs-0" / "preflight" / "verdict.json").read_text())
        assert verdict["nodes"] in (["node-7", "node-7/1"], ["node-7/0", "node-7"])  # whoever comes first
        assert [len(row) for row in verdict["matrix"]["cells"]] == [2, 2]


@pytest.mark.slow
def test_pods_end_with_the_verdicts_code_and_say_why(tmp_path):
    made = make(FIRST, {"kubernetes": {"exclude": ["node-3"]}})
    more = [{"DSLAUNCH_NODE": f"node-{7 + index}", "NCCL_ALGO": word} for index, word in enumerate(("Ring", "Tree"))]
    started = start(tmp_path, kubernetes.render(made).text(kubernetes.ENTRY), more)
    started[0].wait(timeout=120)
    assert started[1].poll() is None  # the first node's is over first: the operator then deletes the others
    codes, said, ends = finish(tmp_path, started)
    assert codes == [preflight.DIFFERS] * 2, said
    for end, text in zip(ends, said, strict=True):
        assert end.startswith("preflight: nothing starts: "), ends
        assert "(exit code 21)" in end
        assert "NCCL_ALGO" in end
        assert "here is" not in text


@pytest.mark.slow
def test_a_pod_without_a_coordinator_could_not_be_checked(tmp_path):
    made = make({"preflight": {"run": True, "join_timeout": 5}})
    text = kubernetes.render(made).text(kubernetes.ENTRY)
    (gone,) = start(tmp_path, text, [{"DSLAUNCH_NODE": "node-7"}])
    gone.terminate()  # what `kubectl delete` does
    assert gone.wait(timeout=60) in (143, -signal.SIGTERM)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(gone.pid, signal.SIGKILL)  # the kernel's part, when a pod's first process ends
    started = start(tmp_path, text, [{"DSLAUNCH_NODE": "node-8", "RANK": "1"}])
    codes, said, ends = finish(tmp_path, started)
    assert codes == [preflight.COULD_NOT], said
    assert "preflight: node-8 cannot reach the coordinator within 5 s" in ends[0]


ALONE = {"container": "ghcr.io/example/train:1", "preflight": {"stages": ["inventory"]}, "resources": {"nodes": 2}}


def alone(**more):
    """What `dslaunch preflight --nodes 2 --on k8s` has: no train section."""
    text = yamldoc.dump([{"name": "demo", "model": "gpt-demo", **ALONE, **more}])
    return spec.load(text, name="--nodes").spec


@pytest.mark.slow
def test_a_preflight_of_its_own_tells_its_verdict_through_the_log(api, tmp_path):
    job = alone()
    bundle = kubernetes.preflight(job, None)
    started = start(tmp_path, bundle.text(bundle.entry), [{"DSLAUNCH_NODE": f"node-{index}"} for index in (7, 8)])
    codes, said, _ = finish(tmp_path, started)
    assert codes == [0, 0], said
    assert submitted(tmp_path, bundle, job) == "lab/demo-preflight"
    api.objects[CHECK]["status"] = conditions("Created", "Succeeded")
    api.logs["demo-preflight-master-0"] = [said[0].encode()]
    checked = replace(record(tmp_path), job="lab/demo-preflight")
    heard = list(kubernetes.events(checked, run))
    assert heard[0] == {"event": "state", "detail": "succeeded: is Succeeded"}
    assert [one["event"] for one in heard if one["event"] != "finding"] == [
        "state", "joined", "joined", "stage", "checked", "verdict",
    ]  # fmt: skip
    verdict = preflight.from_json(preflight.Verdict, kubernetes.verdict(checked, run))
    assert (verdict.code, set(verdict.train)) == (0, {"node-7", "node-8"})
    api.logs.clear()  # the pods are deleted, and the run directory has it
    assert kubernetes.verdict(checked, run) == preflight.to_json(verdict)


# --- the preflight, as values -------------------------------------------------------------------------


def test_pods_check_themselves_first_where_a_job_has_several_with_gpus():
    config_map, *_, job = documents("gpus")
    files = config_map["data"]
    assert 'bash "$here/preflight.sh"' in files["node.sh"]
    env = pods(job)[0]["containers"][0]["env"]
    assert {"name": "DSLAUNCH_NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}} in env
    told = json.loads(files["preflight.json"])
    assert (told["nodes"], told["gpus"], told["join_timeout"], told["late"]) == (
        4,
        8,
        kubernetes.JOIN,
        kubernetes.JOIN,
    )
    assert [key for key in documents()[0]["data"] if "preflight" in key] == []


def test_the_archive_holds_what_other_backends_carry_as_files():
    made = PLANS["gpus"]
    files = bundles.common(made, setting.make(made.spec, made), flags=["--grace 100"], submitted_from=False)
    config_map, *more, _ = documents("gpus")
    found = archived(more)
    assert "node/code/launcher/checks/gpus.py" in found
    assert "node/code/launcher/data/xids.tsv" in found
    assert len(found) + len(config_map["data"]) == len(files)
    assert found.items() <= {file.path: file.text for file in files}.items()


def as_kubectl_applies(document):
    """Bytes of the annotation in which it keeps what was applied; annotations may have 262,144."""
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    return len(re.sub("[<>&]", r"\\u003c", text).encode())


def test_kubectl_apply_can_write_down_what_it_applied():
    assert max(as_kubectl_applies(document) for document in documents("gpus")) < 262_144
    with pytest.raises(UserError, match="`kubectl apply` takes 260,000 in a ConfigMap"):
        kubernetes.render(make({"env": {"A": "<" * 50_000}}))
    small = kubernetes.manifests(make({"env": {"A": "x" * 20_000}}))
    assert max(map(as_kubectl_applies, small)) < 262_144


@pytest.mark.parametrize("nodes", [1, 2, 5000])
def test_the_manifests_of_a_preflight_are_ones_that_a_strict_server_takes(nodes):
    job = alone(resources={"nodes": nodes}, name="a" * 40, kubernetes={"exclude": ["node-7"], "namespace": "ml"})
    bundle = kubernetes.preflight(job, None)
    *config_maps, found = k8s_schema.documents(bundle.text(bundle.entry))
    assert k8s_schema.problems([*config_maps, found]) == []
    assert found["metadata"]["name"] == "a" * 40 + "-preflight"
    assert len(f"{found['metadata']['name']}-worker-{nodes - 2}") <= 63
    assert found["spec"]["runPolicy"]["cleanPodPolicy"] == "None"  # a pod that fails ends nobody else's
    told = json.loads(bundle.text("preflight.json"))
    assert (told["left_out"], told["name"]) == (["node-7"], found["metadata"]["name"])
    assert not {"node.sh", "secrets"} & set(config_maps[0]["data"])


def test_the_manifests_of_a_preflight_fit_the_operators_own_crd(crd_schema):
    bundle = kubernetes.preflight(alone(kubernetes={"exclude": ["node-7"]}), None)
    *_, found = k8s_schema.documents(bundle.text(bundle.entry))
    assert k8s_schema.crd_problems(found, crd_schema) == []


def test_a_preflight_needs_an_image():
    with pytest.raises(UserError, match="pods need an image"):
        kubernetes.preflight(alone(container=None), None)


@pytest.mark.parametrize(("name", "found"), [("demo", "demo-preflight"), ("preflight", "preflight")])
def test_a_preflight_has_a_name_of_its_own(name, found):
    assert kubernetes.checking(name) == found


@pytest.mark.parametrize(("asked", "given"), [(None, kubernetes.JOIN), (60, 60), (1800, 1800)])
def test_pods_wait_for_each_others_images(asked, given):
    stages = {"stages": ["inventory"], **({"join_timeout": asked} if asked else {})}
    told = json.loads(kubernetes.preflight(alone(preflight=stages), None).text("preflight.json"))
    assert (told["join_timeout"], told["late"]) == (given, given)


def test_excluded_nodes_are_told_to_the_scheduler_by_name():
    affinity = {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [
                    {
                        "matchFields": [
                            {"key": "metadata.name", "operator": "NotIn", "values": ["node-7"]},
                            {"key": "metadata.name", "operator": "NotIn", "values": ["ip-10-0-0-1.ec2.internal"]},
                        ]
                    }
                ]
            }
        }
    }
    for pod in pods(documents("everything")[-1]):
        assert pod["affinity"] == affinity
        assert pod["nodeSelector"] == {"gpu": "y", "pool": "1e-5"}
    assert all("affinity" not in pod for pod in pods(documents()[-1]))


def test_the_key_that_is_named_is_one_that_a_job_file_takes():
    told = preflight.Setting(left_out=("node-3", "node-7"))
    words = pods_module.again(["node-7/2", "node-9", "pod demo-worker-4", "node-9/3"], told)
    assert words == "to go on without node-7, node-9: --set kubernetes.exclude='[node-3,node-7,node-9]'"
    override = shlex.split(words)[-1]
    job = spec.load(yamldoc.dump([over()]), name="job.yaml", overrides=[override]).spec
    assert job.kubernetes.exclude == ("node-3", "node-7", "node-9")
    assert pods_module.again(["pod demo-worker-4"], told) == ""


def test_a_pods_last_words_begin_with_the_verdict_and_its_own_findings(tmp_path, monkeypatch):
    found = [
        preflight.Finding("gpus", "exclude", "GPU 3 fell off the bus", node="node-7", fix="reboot it"),
        preflight.Finding("pairs", "warn", "slow", node="node-8/1", peer="node-9"),
        preflight.Finding("clock", "note", "fine", node="node-9"),
    ]
    verdict = preflight.Verdict(20, "nothing starts: x", (), ("node-7",), tuple(found), ())
    words = pods_module.last_words(verdict, preflight.Setting(), {"node-8", "node-8/1"})
    assert words == [
        "preflight: nothing starts: x (exit code 20)",
        "to go on without node-7: --set kubernetes.exclude='[node-7]'",
        "warn node-8/1 -> node-9: slow",
        "exclude node-7: GPU 3 fell off the bus; reboot it",
    ]
    monkeypatch.setattr(pods_module, "TERMINATION_LOG", str(tmp_path / "log"))
    pods_module.tell(words)
    assert not (tmp_path / "log").exists()  # no pod
    (tmp_path / "log").touch()
    pods_module.tell(["ä" * 4096])
    assert (tmp_path / "log").stat().st_size == 4096


# --- the API server -------------------------------------------------------------------------------


@pytest.fixture
def api(tmp_path, monkeypatch):
    with fake_kube.serving(tmp_path, monkeypatch) as server:
        yield server


JOB = "/apis/kubeflow.org/v1/namespaces/lab/pytorchjobs/demo"
CHECK = f"{JOB}-preflight"


def stored(config_map):
    """Under which name a ConfigMap is created: two jobs of one name have maps of their own."""
    content = json.dumps([config_map.get("data"), config_map.get("binaryData")], sort_keys=True)
    name = f"{config_map['metadata']['name']}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
    return f"/api/v1/namespaces/lab/configmaps/{name}"


MAP = stored(documents()[0])
FORBIDDEN = {"kind": "Status", "message": "pytorchjobs.kubeflow.org is forbidden: User cannot create", "code": 403}


def record(folder):
    return runs.Record("demo-1", folder, "kubernetes", "lab/demo", "demo", 60, {"per_node": 2})


def submit(folder, made=PLANS["demo"]):
    """As the command line does: what is written there is what is created."""
    return submitted(folder, kubernetes.render(made), made.spec)


def submitted(folder, bundle, job):
    (folder / bundle.entry).write_text(bundle.text(bundle.entry))
    return kubernetes.submit(folder, job, run)


def conditions(*types):
    return {"conditions": [{"type": word, "status": "True", "message": f"is {word}"} for word in types]}


@pytest.mark.slow
def test_the_config_map_comes_first_and_fields_are_checked(api, tmp_path):
    assert submit(tmp_path) == "lab/demo"
    posts = [(path, query) for method, path, query in api.asked if method == "POST" and "dryRun" not in query]
    assert [path for path, _ in posts] == [MAP.rpartition("/")[0]] * 2 + [JOB.rpartition("/")[0]]
    assert all("fieldValidation=Strict" in query for _, query in posts)
    config_map, _, job = documents()
    assert api.objects[MAP]["data"] == config_map["data"]
    created = copy.deepcopy(api.objects[JOB])
    for one in (created, *(row["template"] for row in created["spec"]["pytorchReplicaSpecs"].values())):
        assert one["metadata"]["annotations"].pop(kubernetes.RUN) == tmp_path.name  # for which run it was made
    for row in created["spec"]["pytorchReplicaSpecs"].values():
        del row["template"]["metadata"]["annotations"]
        for source in row["template"]["spec"]["volumes"][0]["projected"]["sources"]:
            source["configMap"]["name"] = source["configMap"]["name"].rpartition("-")[0]
    assert created["spec"] == job["spec"]
    assert api.objects[MAP]["metadata"]["ownerReferences"][0]["uid"] == "uid-3"  # goes when the job goes
    assert (tmp_path / kubernetes.UID).read_text() == "uid-3"


def test_the_job_files_namespace_wins(api, tmp_path):
    assert submit(tmp_path, make({"kubernetes": {"namespace": "ml"}})) == "ml/demo"


def test_a_job_that_is_there_already_is_adopted(api, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    submit(tmp_path / "a")
    api.objects[JOB]["status"] = conditions("Created", "Running")
    assert submit(tmp_path / "b") == "lab/demo"
    assert (tmp_path / "b" / kubernetes.UID).read_text() == "uid-3"


def test_a_409_with_the_same_digest_is_adopted(api, tmp_path):
    """Somebody else's try, or ours whose answer was lost, came between the look and the creation."""
    job = documents()[-1]
    job["metadata"]["uid"] = "early"
    api.script["GET", "/pytorchjobs/demo"] = [(404, {"message": "not found"}), (200, job)]
    api.script["POST", "/pytorchjobs"] = (409, {"message": "already exists"})
    assert submit(tmp_path) == "lab/demo"


@pytest.mark.parametrize("late", [False, True])
def test_a_job_with_another_digest_is_named(api, tmp_path, late):
    job = kubernetes.manifests(make({"train": {"steps": 61}}))[-1]
    if late:
        api.script["GET", "/pytorchjobs/demo"] = [(404, {"message": "not found"}), (200, job)]
        api.script["POST", "/pytorchjobs"] = (409, {"message": "already exists"})
    else:
        api.objects[JOB] = job
    with pytest.raises(UserError, match="another PyTorchJob `demo`") as caught:
        submit(tmp_path)
    assert not isinstance(caught.value, Unreachable)
    assert "kubectl delete pytorchjob demo -n lab" in caught.value.problems[0].hint


@pytest.mark.slow
def test_a_job_that_is_over_is_not_adopted(api, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    submit(tmp_path / "a")
    api.objects[JOB]["status"] = conditions("Created", "Failed")
    with pytest.raises(UserError, match="it is over: failed"):
        submit(tmp_path / "b")
    assert submit(tmp_path / "a") == "lab/demo"  # its own: what became of it is another question


def test_what_an_earlier_run_left_is_replaced(api, tmp_path):
    api.objects[MAP] = {**documents()[0], "data": {}}
    submit(tmp_path)
    assert "node.sh" in api.objects[MAP]["data"]


def test_a_config_map_of_somebody_else_is_left_alone(api, tmp_path):
    api.objects[MAP] = {"metadata": {"name": MAP.rpartition("/")[2]}, "data": {"theirs": "1"}}
    with pytest.raises(UserError, match="that is not ours"):
        submit(tmp_path)
    assert api.objects[MAP]["data"] == {"theirs": "1"}


def test_a_refusal_says_the_servers_words_and_leaves_nothing(api, tmp_path):
    api.script["POST", "/pytorchjobs"] = (403, FORBIDDEN)
    with pytest.raises(UserError, match=r"refuses \(403\): pytorchjobs.kubeflow.org is forbidden") as caught:
        submit(tmp_path)
    assert not isinstance(caught.value, Unreachable)
    assert api.objects == {}


def test_a_cluster_without_the_operator_is_said(api, tmp_path):
    api.script["POST", "/pytorchjobs"] = (404, "404 page not found\n")
    with pytest.raises(UserError, match="no PyTorchJob kubeflow") as caught:
        submit(tmp_path)
    assert "crd" in caught.value.problems[0].hint


SILENT = [(500, {"message": "etcd is away"}), (503, "no backend"), (429, {"message": "slow down"}), (0, "")]


@pytest.mark.parametrize("reply", SILENT, ids=lambda reply: str(reply[0]))
def test_no_answer_is_neither_yes_nor_no(api, tmp_path, reply):
    api.script["GET", "/pytorchjobs/demo"] = reply
    with pytest.raises(Unreachable, match="did not answer"):
        submit(tmp_path)
    assert kubernetes.state(record(tmp_path), run).state is State.UNKNOWN
    for ask in (lambda: list(kubernetes.logs(record(tmp_path), rank=None, follow=False, run=run)),
                lambda: kubernetes.cancel(record(tmp_path), run)):  # fmt: skip
        with pytest.raises(Unreachable):
            ask()


def test_an_unanswered_creation_keeps_what_the_job_needs(api, tmp_path):
    api.script["POST", "/pytorchjobs"] = [(201, {}), (500, {"message": "timeout"})]  # a dry run, and the real one
    with pytest.raises(Unreachable):
        submit(tmp_path)
    assert MAP in api.objects


def test_a_refused_connection_is_no_answer(tmp_path, monkeypatch, capfd):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        fake_kube.configure(tmp_path, monkeypatch, sock.getsockname()[1])
        with pytest.raises(Unreachable):
            submit(tmp_path)
        assert kubernetes.state(record(tmp_path), run).state is State.UNKNOWN
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("status", "state"),
    [
        ({}, State.UNKNOWN),
        (conditions(), State.UNKNOWN),
        (conditions("Created"), State.PENDING),
        (conditions("Created", "Running"), State.RUNNING),
        (conditions("Created", "Restarting"), State.RUNNING),
        (conditions("Created", "Suspended"), State.PENDING),
        (conditions("Created", "Succeeded"), State.COMPLETED),
        (conditions("Created", "Failed"), State.FAILED),
        (conditions("Created", "Sleeping"), State.UNKNOWN),
        ({"conditions": [{"type": "Failed", "status": "False"}]}, State.UNKNOWN),
        (
            {"conditions": [{"type": "Created", "status": "True"}, {"type": "Running", "status": "False"}]},
            State.PENDING,
        ),
    ],
)
def test_conditions_become_states(api, tmp_path, status, state):
    api.objects[JOB] = {**documents()[-1], "status": status}
    found = kubernetes.state(record(tmp_path), run)
    assert found.state is state
    assert found.code == {State.COMPLETED: 0, State.FAILED: 1}.get(state)


def ended(name, code, at, message=None):
    end = {"exitCode": code, "finishedAt": f"2026-01-01T00:00:{at:02}Z", "reason": "Error", "message": message}
    row = {"name": "pytorch", "image": "i", "imageID": "i", "ready": False, "restartCount": 0}
    return {"metadata": {"name": name}, "status": {"containerStatuses": [{**row, "state": {"terminated": end}}]}}


SAYS = "preflight: nothing starts: node-7: GPU 3 (exit code 20)\nto go on without node-7: ..."


@pytest.mark.parametrize(
    ("pods", "code", "words"),
    [
        (
            [ended("demo-master-0", 20, 5, SAYS), ended("demo-worker-0", 143, 1)],
            20,
            "ended with 20: preflight",
        ),
        ([ended("demo-master-0", 1, 5), ended("demo-worker-0", 70, 1)], 70, "demo-worker-0 ended with 70: Error"),
        ([ended("demo-worker-0", 137, 1)], 137, "demo-worker-0 ended with 137"),
        ([ended("demo-master-0", 0, 5)], 1, "is Failed"),
        ([], 1, "is Failed"),
        (None, 1, "is Failed"),
    ],
)
def test_a_failed_job_says_which_pod_failed_first_and_why(api, tmp_path, pods, code, words):
    api.objects[JOB] = {**documents()[-1], "status": conditions("Created", "Failed")}
    reply = (403, {"message": "pods is forbidden"}) if pods is None else (200, {"kind": "PodList", "items": pods})
    api.script["GET", "/namespaces/lab/pods"] = reply
    found = kubernetes.state(record(tmp_path), run)
    assert (found.state, found.code) == (State.FAILED, code)
    assert words in found.detail
    assert "\n" not in found.detail


def test_a_job_that_is_gone_is_unknown(api, tmp_path):
    found = kubernetes.state(record(tmp_path), run)
    assert found.state is State.UNKNOWN
    assert "no PyTorchJob demo in lab" in found.detail


def test_a_later_job_of_that_name_is_not_this_run(api, tmp_path):
    submit(tmp_path)
    api.objects[JOB]["metadata"]["uid"] = "later"
    assert kubernetes.state(record(tmp_path), run).state is State.UNKNOWN
    with pytest.raises(UserError, match="another run"):
        kubernetes.cancel(record(tmp_path), run)
    assert JOB in api.objects


def test_logs_come_from_the_pod_of_the_rank(api, tmp_path):
    api.objects[JOB] = {**documents()[-1], "status": conditions("Created", "Succeeded")}
    master = [
        ("05", b"dslaunch: starting\n"),
        ("07", b"[rank 0] step 1\n"),
        ("08", b"[rank 1] step \x1b[1m1\n"),
        ("09", b"the end"),
    ]
    worker = [("06", b"[rank 2] here\n"), ("10.5", b"[rank 20] there\n"), ("10.45", b"[rank 3] x\r\n")]
    api.logs = {
        pod: [(f"2026-01-01T00:00:{at}Z", line) for at, line in lines]
        for pod, lines in (("demo-master-0", master), ("demo-worker-0", sorted(worker)))
    }

    def logs(rank, follow=False):
        return list(kubernetes.logs(record(tmp_path), rank=rank, follow=follow, run=run))

    assert logs(None) == [
        "dslaunch: starting", "[rank 2] here", "[rank 0] step 1", "[rank 1] step 1", "the end",
        "[rank 3] x", "[rank 20] there",
    ]  # fmt: skip
    assert logs(None, follow=True) == logs(None)
    assert logs(0) == ["step 1"]
    assert logs(1) == ["step 1"]
    assert logs(2) == ["here"]
    assert logs(3) == ["x"]
    with pytest.raises(UserError, match="no rank 4: the job has 0 to 3"):
        logs(4)


@pytest.mark.slow
def test_logs_of_a_pod_that_is_not_there_yet(api, tmp_path, monkeypatch):
    api.put(JOB, {**documents()[-1], "status": conditions("Created")})
    waiting = (400, {"message": "container pytorch is waiting to start: ContainerCreating"})
    api.script["GET", "/log"] = [waiting] * 6
    with pytest.raises(UserError, match="ContainerCreating"):
        list(kubernetes.logs(record(tmp_path), rank=None, follow=False, run=run))
    monkeypatch.setattr(output, "AGAIN", 0.1)
    api.logs["demo-master-0"] = [("2026-01-01T00:00:01Z", b"up\n"), ("2026-01-01T00:00:02Z", b"")]
    heard = kubernetes.logs(record(tmp_path), rank=0, follow=True, run=run)
    api.logs["demo-master-0"].insert(1, ("2026-01-01T00:00:01Z", b"[rank 0] one\n"))
    assert next(heard) == "one"
    api.put(JOB, {**documents()[-1], "status": conditions("Created", "Succeeded")})
    assert list(heard) == []


def test_cancel_deletes_both_and_tolerates_that_they_are_gone(api, tmp_path):
    submit(tmp_path)
    kubernetes.cancel(record(tmp_path), run)
    assert api.objects == {}
    kubernetes.cancel(record(tmp_path), run)
    assert kubernetes.state(record(tmp_path), run).state is State.CANCELLED


def test_a_job_with_a_preflight_brings_its_config_map_and_leaves_none(api, tmp_path):
    submit(tmp_path, PLANS["gpus"])
    assert set(api.objects) == {JOB, *map(stored, documents("gpus")[:-1])}
    kubernetes.cancel(record(tmp_path), run)
    assert api.objects == {}
    api.script["POST", "/pytorchjobs"] = (403, FORBIDDEN)
    with pytest.raises(UserError, match="forbidden"):
        submit(tmp_path, PLANS["gpus"])
    assert api.objects == {}


@pytest.mark.slow
def test_nodes_are_checked_again_where_an_earlier_preflight_is_over(api, tmp_path):
    bundle, job = kubernetes.preflight(alone(), None), alone()
    for name in "abc":
        (tmp_path / name).mkdir()
    submitted(tmp_path / "a", bundle, job)
    first = api.objects[CHECK]["metadata"]["uid"]
    api.objects[CHECK]["status"] = conditions("Created", "Running")
    assert submitted(tmp_path / "b", bundle, job) == "lab/demo-preflight"  # ours, and still at it
    assert (tmp_path / "b" / kubernetes.UID).read_text() == first
    other = kubernetes.preflight(alone(resources={"nodes": 3}), None)
    with pytest.raises(UserError, match="another PyTorchJob `demo-preflight`"):
        submitted(tmp_path / "c", other, job)
    api.objects[CHECK]["status"] = conditions("Created", "Running", "Failed")
    submitted(tmp_path / "c", other, job)
    assert (tmp_path / "c" / kubernetes.UID).read_text() != first
    assert ("DELETE", CHECK, "propagationPolicy=Foreground") in api.asked


EVENTS = [{"event": "joined", "node": f"node-{number}", "count": number, "of": 2} for number in (1, 2)]


def test_progress_is_told_as_the_log_grows_and_once(api, tmp_path, monkeypatch):
    checked = replace(record(tmp_path), job="lab/demo-preflight")
    monkeypatch.setattr(server.time, "sleep", lambda seconds: None)
    submitted(tmp_path, kubernetes.preflight(alone(), None), alone())
    lines = [f"{pods_module.PROGRESS}{json.dumps(event)}\n".encode() for event in EVENTS]
    heard = kubernetes.events(checked, run)
    assert next(heard)["event"] == "state"
    assert next(heard)["event"] == "state"  # no pod yet
    api.logs["demo-preflight-master-0"] = [b"pip: done\n", lines[0], lines[1][:20]]
    assert next(heard) == EVENTS[0]
    api.script["GET", "/pytorchjobs/"] = [(500, {"message": "etcd is away"})] * 3
    assert "etcd is away" in next(heard)["detail"]
    del api.script["GET", "/pytorchjobs/"]
    verdict = preflight.to_json(preflight.Verdict(0, "2 nodes are ready", ("node-1",), (), (), ("node-1",)))
    end = f"{pods_module.VERDICT}{json.dumps(verdict)}\n".encode()
    api.logs["demo-preflight-master-0"] = [b"pip: done\n", *lines, b"dslaunch preflight: fine\n", end]
    assert [event for event in heard if event["event"] != "state"] == [EVENTS[1]]
    assert kubernetes.verdict(checked, run) == verdict


@pytest.mark.parametrize("status", ["gone", "failed"])
def test_a_preflight_that_ends_without_a_verdict_has_none(api, tmp_path, status):
    checked = replace(record(tmp_path), job="lab/demo-preflight")
    if status == "failed":
        submitted(tmp_path, kubernetes.preflight(alone(), None), alone())
        api.objects[CHECK]["status"] = conditions("Created", "Failed")
        api.logs["demo-preflight-master-0"] = [f"{pods_module.VERDICT}{{cut".encode()]
    heard = list(kubernetes.events(checked, run))
    assert [event["event"] for event in heard] == ["state"]
    assert kubernetes.verdict(checked, run) is None


def test_nodes_are_cordoned_with_the_reason(api):
    api.objects = {
        f"/api/v1/nodes/{name}": {"metadata": {"name": name, "annotations": {"a": "b"}}, "spec": {"podCIDR": "x"}}
        for name in ("node-7", "node-8", "node-9")
    }
    api.script["PATCH", "nodes/node-8"] = (403, {"message": 'nodes "node-8" is forbidden: User cannot patch'})
    api.script["PATCH", "nodes/node-9"] = (500, {"message": "etcd is away"})
    reasons = {"node-7": "GPU 3", "node-7/1": "slow", "node-8": "slow", "node-9": "slow", "pod demo-worker-4": "late"}
    said = kubernetes.drain(reasons, run)
    del api.objects["/api/v1/nodes/node-7"]["metadata"]["resourceVersion"]
    assert api.objects["/api/v1/nodes/node-7"] == {
        "metadata": {"name": "node-7", "annotations": {"a": "b", kubernetes.REASON: "dslaunch preflight: GPU 3"}},
        "spec": {"podCIDR": "x", "unschedulable": True},
    }
    assert "unschedulable" not in api.objects["/api/v1/nodes/node-8"]["spec"]
    assert [sentence.partition(" ")[0] for sentence in said] == ["pod", "node-8", "node-9"]
    assert 'refuses (403): nodes "node-8" is forbidden' in said[1]
    assert "did not answer (500): etcd is away" in said[2]


# --- through the command line ---------------------------------------------------------------------


def dslaunch(*words, cwd):
    return subprocess.run([DSLAUNCH, *words], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.slow
def test_a_run_from_apply_to_cancel(api, tmp_path):
    (tmp_path / "job.yaml").write_text(json.dumps(DEMO))
    applied = dslaunch("k8s", "job.yaml", "--apply", cwd=tmp_path)
    assert (applied.returncode, applied.stdout.count("\n")) == (0, 1), applied.stderr
    name = applied.stdout.strip()
    api.objects[JOB]["status"] = conditions("Created", "Running")
    status = dslaunch("status", name, "--json", cwd=tmp_path)
    assert (status.returncode, json.loads(status.stdout)["state"]) == (0, "running")
    api.logs["demo-worker-0"] = [b"[rank 3] step 1\n"]
    assert dslaunch("logs", name, "--rank", "3", cwd=tmp_path).stdout == "step 1\n"
    assert dslaunch("cancel", name, cwd=tmp_path).returncode == 0
    assert api.objects == {}
    assert dslaunch("status", name, cwd=tmp_path).returncode == 1


@pytest.mark.parametrize(
    ("reply", "code"),
    [((403, FORBIDDEN), 2), pytest.param((500, {"message": "etcd is away"}), 8, marks=pytest.mark.slow)],
)
def test_exit_codes_tell_refused_from_unanswered(api, tmp_path, reply, code):
    (tmp_path / "job.yaml").write_text(json.dumps(DEMO))
    api.script["POST", "/pytorchjobs"] = reply
    found = dslaunch("k8s", "job.yaml", "--apply", cwd=tmp_path)
    assert (found.returncode, found.stdout) == (code, "")
    assert reply[1]["message"] in found.stderr
    assert bool(list(tmp_path.glob("dslaunch-runs/*"))) is (code == 8)


@pytest.mark.slow
def test_no_cluster_at_all_is_said(tmp_path, monkeypatch):
    (tmp_path / "job.yaml").write_text(json.dumps(DEMO))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    found = dslaunch("k8s", "job.yaml", "--apply", cwd=tmp_path)
    assert (found.returncode, found.stdout) == (2, "")
    assert "no Kubernetes cluster is configured" in found.stderr


@pytest.mark.slow
def test_nodes_are_checked_from_the_command_line(api, tmp_path):
    bad = preflight.Finding("gpus", "exclude", "GPU 3 fell off the bus", node="node-7")
    why = "nothing starts: 2 nodes train, 1 is healthy"
    verdict = preflight.Verdict(preflight.TOO_FEW, why, (), ("node-7",), (bad,), ("node-7", "node-8"))
    lines = [pods_module.PROGRESS + json.dumps(event) for event in EVENTS]
    lines.append(pods_module.VERDICT + json.dumps(preflight.to_json(verdict)))
    api.logs["demo-preflight-master-0"] = ["".join(f"{line}\n" for line in lines).encode()]
    api.objects["/api/v1/nodes/node-7"] = {"metadata": {"name": "node-7"}, "spec": {}}
    (tmp_path / "job.yaml").write_text(json.dumps(DEMO))
    found = dslaunch("preflight", "job.yaml", "--on", "k8s", "--drain", "--json", cwd=tmp_path)
    assert found.returncode == preflight.TOO_FEW, found.stderr
    assert json.loads(found.stdout) == preflight.to_json(verdict)
    assert "node-2 reports (2 of 2)" in found.stderr
    assert api.objects["/api/v1/nodes/node-7"]["spec"] == {"unschedulable": True}
    assert CHECK in api.objects


@pytest.mark.slow
def test_a_preflight_of_nothing_but_its_options_needs_an_image(api, tmp_path):
    words = ("preflight", "--nodes", "2", "--on", "k8s")
    found = dslaunch(*words, cwd=tmp_path)
    assert (found.returncode, found.stdout) == (2, "")
    assert "pods need an image" in found.stderr
    verdict = preflight.Verdict(0, "2 nodes are ready", ("a", "b"), (), (), ("a", "b"))
    text = f"{pods_module.VERDICT}{json.dumps(preflight.to_json(verdict))}\n"
    api.logs["preflight-master-0"] = [text.encode()]
    assert dslaunch(*words, "--set", "container=a/b:1", cwd=tmp_path).returncode == 0
