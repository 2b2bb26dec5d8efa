"""The preflight from end to end: coordinator and agents as processes, and on a real Slurm of four nodes."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import namespaces
import pytest

from launcher.checks import memory
from launcher.preflight import (
    COULD_NOT,
    OK,
    OK_WITHOUT,
    START,
    TOO_FEW,
    Setting,
    Verdict,
    coordinator,
    from_json,
    to_json,
)

ROOT = Path(__file__).parents[1]


class Processes:
    """A coordinator and agents on this machine, without a job around them."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        self.folder, self.setting = folder, setting
        self.names = [f"n{index}" for index in range(setting.nodes + setting.spares)]
        (folder / "preflight.json").write_text(json.dumps(to_json(setting)))
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.env = {
            **os.environ,
            "XDG_STATE_HOME": str(folder / "state"),
            "DSLAUNCH_PREFLIGHT_TOKEN": secrets.token_hex(8),
            "DS_ACCELERATOR": "cpu",
        }
        self.children: list[subprocess.Popen[bytes]] = []
        self.judge = self.start(
            "coordinator", "--port", str(self.port), "--setting", "preflight.json", "--out", "out",
            "--names", ",".join(self.names),
        )  # fmt: skip

    def start(self, module: str, *arguments: str, **env: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", START, str(ROOT), f"preflight.{module}", *arguments]
        with (self.folder / "errors").open("ab") as errors:
            child = subprocess.Popen(
                command, cwd=self.folder, env={**self.env, **env}, stderr=errors, start_new_session=True
            )
        self.children.append(child)
        return child

    def agent(self, index: int, **env: str) -> subprocess.Popen[bytes]:
        return self.start(
            "agent", "--setting", "preflight.json", "--connect", f"127.0.0.1:{self.port}",
            "--name", self.names[index], "--index", str(index), "--logs", "logs", **env,
        )  # fmt: skip

    def events(self) -> list[dict]:
        path = self.folder / "out" / "progress.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def until(self, seen: Callable[[dict], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not any(map(seen, self.events())):
            assert time.monotonic() < deadline, (self.events(), (self.folder / "errors").read_text())
            time.sleep(0.05)

    def verdict(self, seconds: float = 120) -> Verdict:
        code = self.judge.wait(seconds)
        found = from_json(Verdict, json.loads((self.folder / "out" / "verdict.json").read_text()))
        assert code == found.code == int((self.folder / "out" / "code").read_text())
        return found

    def end(self) -> None:
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


@pytest.fixture
def processes(tmp_path) -> Iterator[Callable[..., Processes]]:
    started: list[Processes] = []

    def make(**setting: object) -> Processes:
        told = {"seconds": 0.2, "join_timeout": 30, "silence": 8.0, **setting}
        started.append(Processes(tmp_path, Setting(**told)))
        return started[-1]

    yield make
    for one in started:
        one.end()


def excluded(verdict: Verdict) -> dict[str, str]:
    return {one.node: one.what for one in verdict.findings if one.level == "exclude"}


@pytest.mark.slow
def test_a_killed_agent_is_named_and_its_spare_steps_in(processes):
    all_of_them = processes(nodes=2, spares=1, stages=("host",))
    agents = [all_of_them.agent(index) for index in range(3)]
    all_of_them.until(lambda event: event["event"] == "stage")
    os.killpg(agents[1].pid, signal.SIGKILL)
    verdict = all_of_them.verdict()
    assert (verdict.code, verdict.train) == (OK_WITHOUT, ("n0", "n2"))
    assert "killed" in excluded(verdict)["n1"]
    assert [agent.wait(10) for agent in agents] == [OK_WITHOUT, -signal.SIGKILL, OK_WITHOUT]


@pytest.mark.slow
def test_a_stopped_agent_is_named_within_the_time_out(processes):
    all_of_them = processes(nodes=3, stages=("inventory",))
    agents = [all_of_them.agent(index) for index in range(3)]
    all_of_them.until(lambda event: event["event"] == "stage")
    os.kill(agents[2].pid, signal.SIGSTOP)
    stopped = time.monotonic()
    verdict = all_of_them.verdict()
    assert time.monotonic() - stopped < 60
    assert (verdict.code, verdict.excluded) == (TOO_FEW, ("n2",))
    assert "stopped, or the node hangs" in excluded(verdict)["n2"]


@pytest.mark.slow
def test_an_agent_that_stops_between_two_rounds_of_pairs_is_told_from_its_partner(processes):
    all_of_them = processes(nodes=3, spares=1, stages=("pairs", "whole"), round_timeout=20)
    agents = [all_of_them.agent(index) for index in range(4)]
    all_of_them.until(lambda event: event["event"] == "round", 120)
    os.kill(agents[3].pid, signal.SIGSTOP)
    verdict = all_of_them.verdict(240)
    assert (verdict.code, verdict.excluded, verdict.train) == (OK_WITHOUT, ("n3",), ("n0", "n1", "n2"))
    assert verdict.bandwidth > 0
    assert {curve.op for curve in verdict.curves} >= {"all_reduce", "all_gather"}


@pytest.mark.slow
def test_a_node_that_never_reports_is_named(processes):
    all_of_them = processes(nodes=2, stages=("host",), join_timeout=3)
    agent = all_of_them.agent(0)
    verdict = all_of_them.verdict()
    assert (verdict.code, verdict.excluded) == (TOO_FEW, ("n1",))
    assert "did not report" in excluded(verdict)["n1"]
    assert agent.wait(10) == TOO_FEW


@pytest.mark.slow
def test_an_agent_without_the_jobs_token_takes_no_part(processes):
    all_of_them = processes(nodes=1, stages=("host",))
    stranger = all_of_them.agent(0, DSLAUNCH_PREFLIGHT_TOKEN="wrong")
    assert stranger.wait(20) == COULD_NOT
    all_of_them.agent(0)
    assert all_of_them.verdict().code == OK


@pytest.mark.slow
def test_a_coordinator_that_is_told_to_stop_says_so_and_is_no_pass(processes):
    all_of_them = processes(nodes=2, stages=("host",))
    agent = all_of_them.agent(0)
    all_of_them.until(lambda event: event["event"] == "joined")
    all_of_them.judge.send_signal(signal.SIGTERM)
    verdict = all_of_them.verdict()
    assert (verdict.code, verdict.train) == (COULD_NOT, ())
    assert "SIGTERM" in verdict.headline
    assert agent.wait(10) == COULD_NOT


@pytest.mark.slow
def test_a_coordinator_that_hangs_for_a_while_blames_nobody(processes):
    all_of_them = processes(nodes=3, stages=("host",), join_timeout=60, late=60)
    agents = [all_of_them.agent(index) for index in range(2)]
    all_of_them.until(lambda event: event.get("count") == 2)
    all_of_them.judge.send_signal(signal.SIGSTOP)
    time.sleep(10)
    all_of_them.judge.send_signal(signal.SIGCONT)
    agents.append(all_of_them.agent(2))
    verdict = all_of_them.verdict()
    assert (verdict.code, verdict.excluded) == (OK, ())
    assert [agent.wait(10) for agent in agents] == [OK] * 3
    assert not (all_of_them.folder / "state").exists()


@pytest.mark.slow
def test_agents_end_when_the_coordinator_says_no_word_any_more(processes):
    all_of_them = processes(nodes=2, stages=("host",))
    agent = all_of_them.agent(0)
    all_of_them.until(lambda event: event["event"] == "joined")
    all_of_them.judge.send_signal(signal.SIGSTOP)
    assert agent.wait(120) == COULD_NOT


@pytest.mark.slow
@pytest.mark.parametrize(
    "nonsense", [b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"index": "x"}\n', b"\x00" * 100_000 + b"\n"]
)
def test_a_stranger_may_say_what_he_likes(processes, nonsense):
    all_of_them = processes(nodes=1, stages=("host",))
    deadline = time.monotonic() + 20
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", all_of_them.port), 2) as stranger:
            stranger.sendall(nonsense)
            break
        assert time.monotonic() < deadline
        time.sleep(0.1)
    all_of_them.agent(0)
    assert all_of_them.verdict().code == OK


def test_a_check_that_stumbles_is_unknown_and_the_others_go_on(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    judge = coordinator.Coordinator(Setting(nodes=1), ["a"], str(tmp_path / "out"), "")
    monkeypatch.setattr(memory, "judge", lambda found, setting: found["b"])
    judge.judge("memory", {"a": {"skipped": "here"}})
    judge.judge("filesystems", {"a": {"unknown": "no /proc"}})
    assert [(one.check, one.level) for one in judge.findings] == [("memory", "unknown"), ("filesystems", "unknown")]
    assert "KeyError" in judge.findings[0].what


@pytest.mark.slow
def test_a_first_node_whose_own_name_means_loopback_is_no_bad_node(tmp_path):
    """As Debian has it: node 0 finds its name at 127.0.1.1, the others find its address on the network."""
    if reason := namespaces.why_not():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    setting = Setting(nodes=3, stages=("pairs",), seconds=0.2, join_timeout=60)
    (tmp_path / "preflight.json").write_text(json.dumps(to_json(setting)))
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "XDG_STATE_HOME": str(tmp_path)}
    started: list[subprocess.Popen[bytes]] = []

    def start(net: namespaces.Namespaces, node: int, *argv: str) -> subprocess.Popen[bytes]:
        command = net.inside(
            node,
            [
                sys.executable,
                "-c",
                START,
                str(ROOT),
                f"preflight.{argv[0]}",
                *argv[1:],
                "--setting",
                "preflight.json",
            ],
        )
        started.append(subprocess.Popen(command, cwd=tmp_path, env=env, start_new_session=True))
        return started[-1]

    with namespaces.Namespaces(3) as net:
        try:
            judge = start(net, 0, "coordinator", "--port", "29411", "--out", "out", "--names", "n0,n1,n2")
            for node in range(3):
                address = net.address(0) if node else "127.0.0.1"
                start(net, node, "agent", "--connect", f"{address}:29411", "--name", f"n{node}", "--index", str(node))
            assert judge.wait(180) == OK
        finally:
            for child in started:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()


LOST = ROOT / "launcher" / "node" / "lost.py"


@pytest.mark.parametrize(
    ("failed", "code", "excluded", "said"),
    [
        ({"n1": "no activate"}, 20, ["n1"], "n1: no activate"),
        ({"n1": "no activate", "n2": "no activate"}, 30, [], "n1: no activate; n2: no activate"),
        ({}, 30, [], "n1, which judges, hangs or went away"),
    ],
)
def test_a_preflight_without_a_verdict_gets_one_from_what_nodes_left(tmp_path, failed, code, excluded, said):
    for node, why in failed.items():
        (tmp_path / f"failed-{node}").write_text(f"{why}\n")
    done = subprocess.run([sys.executable, LOST, tmp_path, "n1", "n2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    verdict = from_json(Verdict, json.loads((tmp_path / "verdict.json").read_text()))
    assert (verdict.code, list(verdict.excluded), verdict.train) == (code, excluded, ())
    assert said in verdict.headline
    assert (tmp_path / "code").read_text() == f"{code}\n"
    assert (tmp_path / "exclude").read_text() == "".join(f"{node}\n" for node in excluded)


@pytest.mark.slow
def test_a_local_preflight_that_is_interrupted_leaves_no_process(tmp_path):
    dslaunch = Path(sys.executable).with_name("dslaunch")
    argv = [dslaunch, "preflight", "--nodes", "2", "--on", "local", "--stages", "inventory"]
    child = subprocess.Popen(
        argv, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ, "HOME": str(tmp_path)}
    )
    for line in child.stderr:
        if line.startswith("inventory"):
            break
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 130
    deadline = time.monotonic() + 30
    while left := [path for path in Path("/proc").glob("[0-9]*") if str(tmp_path) in command_line(path)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def command_line(process: Path) -> str:
    with contextlib.suppress(OSError):
        return (process / "cmdline").read_bytes().decode(errors="replace")
    return ""
