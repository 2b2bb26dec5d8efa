"""What looks after training: progress told and read, hangs, stragglers, and what a hang leaves behind."""

from __future__ import annotations

import ast
import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import test_node
import torch
from test_node import Node, until

import launcher
from launcher.bundle import LOOKS_AFTER
from launcher.checkpoints import Choice
from launcher.supervision import Fact, Refused, Told, evidence, fact, hang, memory, patterns, progress, report, resume
from launcher.supervision.overseer import Overseer, Settings, hang_of, once
from launcher.supervision.straggler import stragglers
from launcher.supervision.voucher import Voucher

HOOK = Path(launcher.__file__).parent / "node" / "hook"
ROWS = patterns.table()


# What a log tells


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.kind}-{row.program}-{n}" for n, row in enumerate(ROWS)])
def test_each_pattern_proves_itself_and_no_other_takes_its_line(row):
    taken = next(one for one in ROWS if one.word in row.sample and one.pattern.search(row.sample))
    assert taken is row
    reader = patterns.Reader("log")
    reader.line(row.sample)
    found = row.pattern.search(row.sample).groupdict()
    assert " ".join(f"{name}={value}" for name, value in found.items()) == row.gives
    assert reader.told.phase == (row.kind if row.kind not in ("step", "tick") else "training")
    assert reader.told.mark == (1 if row.kind in ("step", "tick") else -1)
    assert row.source


@pytest.mark.parametrize(
    "line",
    [
        "Loading checkpoint shards: 100%|##########| 2/2 [00:05<00:00,  2.71s/it]",
        "Map:  17%|#7        | 17/100 [00:01<00:05, 15.1 examples/s]",
        "saved step00000050",
        "{'eval_loss': 1.2, 'eval_runtime': 3.1}",
        "NCCL INFO Channel 01/32 : 0 1 2 3",
        "step: the next one is harder",
        "checkpoint every 500 steps",
    ],
)
def test_a_line_about_something_else_is_no_step(line):
    reader = patterns.Reader("log")
    reader.line(line)
    assert reader.told == Told()


def test_a_log_is_read_as_it_grows_and_only_its_end_when_it_grew_fast(tmp_path):
    log = tmp_path / "log"
    log.write_text("[batch=1/100]:\nof the attempt before\n")
    reader = patterns.Reader(str(log), start=log.stat().st_size)
    assert reader.read() is None
    with log.open("a") as file:
        file.write("\x1b[32m[batch=2/100]:\x1b[0m\r[batch=3/100]:\r[batch=4")
    assert reader.read().step == 3
    with log.open("a") as file:
        file.write("/100]:\n" + "x" * 10_000_000 + "\n[batch=99/100]:\n")
    assert (reader.read().step, reader.told.mark) == (99, 3)
    with log.open("a") as file:
        file.write("[batch=100/100]:\n")
    assert reader.read().phase == "ending"


def test_a_second_bar_before_the_first_is_full_is_an_evaluation():
    reader = patterns.Reader("log")
    for line, phase, step in [
        (" 50%|#####     | 50/100 [01:00<01:00,  1.2s/it]", "training", 50),
        (" 10%|#         | 1/10 [00:01<00:09,  1.0s/it]", "eval", 50),
        (" 90%|#########  | 9/10 [00:09<00:01,  1.0s/it]", "eval", 50),
        (" 51%|#####     | 51/100 [01:12<01:00,  1.2s/it]", "training", 51),
    ]:
        reader.line(line)
        assert (reader.told.phase, reader.told.step) == (phase, step)


# What a rank tells


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"step": 3, "phase": "eval", "doing": "barrier #1"}', Told(3, 3, "eval", doing="barrier #1", hooked=True)),
        ('{"step": 3}', Told(3, 3, "training", hooked=True)),
        ('{"step": null, "phase": "starting"}', Told(None, -1, "starting", hooked=True)),
        ('{"step": 3, "pha', None),
        ("[3]", None),
        ("\0" * 40, None),
    ],
)  # fmt: skip
def test_a_file_of_progress(text, told):
    assert progress(text.encode()) == told


def pulse(tmp_path: Path, program: str, **env: str) -> subprocess.CompletedProcess[str]:
    given = {name: value for name, value in os.environ.items() if name != "DSLAUNCH_PROGRESS"}
    given |= {"PYTHONPATH": str(HOOK), **env}
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=given, timeout=60)


def test_the_hook_does_nothing_outside_of_a_job(tmp_path):
    program = "import dslaunch_pulse as p\np.watch()\np.step(1, loss=2.0)\nwith p.phase('eval'): pass\nprint('fine')"
    assert pulse(tmp_path, program).stdout == "fine\n"
    assert pulse(tmp_path, program, DSLAUNCH_PROGRESS="/no/such/folder/file").stdout == "fine\n"


def test_the_hook_tells_steps_and_phases(tmp_path):
    file = tmp_path / "progress"
    show = f"print(open({str(file)!r}).read().strip())"
    program = (
        f"import dslaunch_pulse as p\n{show}\np.step(7, loss=float('nan'))\n{show}\n"
        f"with p.phase('checkpoint'):\n    {show}\np.step(8, 1.5)\n{show}"
    )
    lines = pulse(tmp_path, program, DSLAUNCH_PROGRESS=str(file)).stdout.splitlines()
    told = [progress(line.encode()) for line in lines]
    assert [(one.step, one.phase) for one in told] == [
        (None, "starting"),
        (7, "training"),
        (7, "checkpoint"),
        (8, "training"),
    ]
    assert json.loads(lines[1])["loss"] is None
    assert json.loads(lines[3])["loss"] == 1.5


def test_a_worker_that_imports_the_same_modules_is_not_the_rank(tmp_path):
    file = tmp_path / "progress"
    program = (
        "import dslaunch_pulse as p, subprocess, sys\np.step(7)\n"
        "subprocess.run([sys.executable, '-c', 'import dslaunch_pulse as p; p.step(1)'], check=True)\n"
    )
    assert pulse(tmp_path, program, DSLAUNCH_PROGRESS=str(file)).returncode == 0
    assert progress(file.read_bytes()).step == 7


# Whether it hangs


def at(pace: hang.Pace, *notes: tuple[float, Told | None]) -> hang.Pace:
    for now, told in notes:
        pace.note(told, now)
    return pace


def hooked(step: int | None, phase: str = "training", **more: object) -> Told:
    return Told(step, -1 if step is None else step, phase, hooked=True, **more)


def steady(seconds: float, steps: int = 6, *, start: float = 0.0) -> hang.Pace:
    pace = hang.Pace(start)
    for number in range(1, steps + 1):
        pace.note(hooked(number), start + number * seconds)
    return pace


def look(pace: hang.Pace, until: float, told: Told | None, *, every: float = 1.0) -> hang.Pace:
    """A supervisor's looks, one a second, up to a moment."""
    while pace.looked + every <= until:
        pace.note(told, pace.looked + every)
    return pace


def stalled(pace: hang.Pace, now: float, *, floor: float = 20.0, first: float = 600.0) -> hang.Stall | None:
    return hang.stalled({0: pace}, now, floor=floor, first_step=first)


def test_no_step_for_ten_times_the_median_or_the_floor_is_a_hang():
    quick = look(steady(1.0), 26.0, hooked(6))
    assert stalled(quick, 26.0) is None
    look(quick, 27.0, hooked(6))
    assert stalled(quick, 27.0) == hang.Stall((0,), 6, 21.0, 20.0)
    slow = look(steady(5.0), 80.0, hooked(6))  # 10 x 5 s is more than the floor
    assert stalled(slow, 80.0) is None
    look(slow, 81.0, hooked(6))
    assert stalled(slow, 81.0) == hang.Stall((0,), 6, 51.0, 50.0)


@pytest.mark.parametrize("phase", ["checkpoint", "eval", "ending"])
def test_nobody_hangs_while_it_saves_evaluates_or_ends(phase):
    pace = look(steady(1.0), 2000.0, hooked(6, phase))
    assert stalled(pace, 2000.0) is None
    look(pace, 2019.0, hooked(6))
    assert stalled(pace, 2019.0) is None  # the time in between does not count
    look(pace, 2022.0, hooked(6))
    assert stalled(pace, 2022.0) is not None


def test_a_floor_of_zero_is_never():
    pace = look(steady(1.0), 9000.0, hooked(6))
    assert hang.stalled({0: pace}, 9000.0, floor=0.0, first_step=1.0) is None


def test_the_first_steps_have_a_limit_of_their_own():
    pace = look(hang.Pace(0.0), 599.0, hooked(None, "starting"))
    assert stalled(pace, 599.0) is None
    assert stalled(look(pace, 601.0, hooked(None, "starting")), 601.0) == hang.Stall((0,), None, 601.0, 600.0)
    compiling = look(steady(1.0, steps=2), 300.0, hooked(2))
    assert stalled(compiling, 300.0) is None


def test_a_program_that_says_nothing_never_hangs():
    pace = look(hang.Pace(0.0), 100_000.0, None, every=5.0)
    assert stalled(pace, 100_000.0, first=10.0) is None


def test_logs_count_only_when_all_fall_silent_and_a_hook_for_itself():
    silent = {0: hang.Pace(0.0), 1: hang.Pace(0.0)}
    for now in range(1, 7):
        for pace in silent.values():
            pace.note(Told(now, now, "training"), float(now))
    look(silent[0], 40.0, Told(6, 6, "training"))
    for now in range(7, 41):
        silent[1].note(Told(now, now, "training"), float(now))
    assert hang.stalled(silent, 40.0, floor=20.0, first_step=600.0) is None
    look(silent[1], 61.0, Told(40, 40, "training"))
    look(silent[0], 61.0, Told(6, 6, "training"))
    assert hang.stalled(silent, 61.0, floor=20.0, first_step=600.0).ranks == (0, 1)
    mixed = {0: look(steady(1.0), 27.0, hooked(6)), 1: steady(1.0, steps=27)}
    assert hang.stalled(mixed, 27.0, floor=20.0, first_step=600.0).ranks == (0,)


def test_whoever_still_prints_is_alive_and_an_emptied_log_is_read_on(tmp_path):
    log = tmp_path / "log"
    reader, pace = patterns.Reader(str(log)), hang.Pace(0.0)
    for now in range(1, 2000):
        with log.open("a") as file:
            file.write(f"[batch={now}/900]:\n" if now < 7 else f"judging sample {now}\n")
        pace.note(reader.read(), float(now))
        assert stalled(pace, float(now)) is None
    assert set(pace.gaps) == {1.0}
    log.write_text("[batch=7/900]:\n")
    pace.note(reader.read(), 2000.0)
    assert pace.told.step == 7
    assert stalled(look(pace, 2019.0, reader.read()), 2019.0) is None
    assert stalled(look(pace, 30_000.0, reader.read()), 30_000.0) is not None


def test_a_job_that_was_suspended_as_a_whole_does_not_hang():
    pace = look(steady(1.0), 10.0, hooked(6))
    pace.note(hooked(6), 4000.0)  # scontrol suspend stops the supervisor as well
    assert stalled(pace, 4000.0) is None
    assert stalled(look(pace, 4018.0, hooked(6)), 4018.0) is not None


@pytest.mark.parametrize("jump", [300.0, -300.0])
def test_a_wall_clock_that_steps_by_five_minutes_changes_nothing(tmp_path, monkeypatch, jump):
    """Scenario 73: nothing here is counted by time.time() or compared with another host's clock."""
    over = overseer(tmp_path, floor=20.0)
    begin(tmp_path, over)
    monotonic, wall = 1000.0, 1_700_000_000.0
    monkeypatch.setattr(time, "time", lambda: wall)
    for number in range(1, 100):
        monotonic, wall = monotonic + 1, wall + 1
        if number == 50:
            wall += jump
        (tmp_path / "state/progress-00000").write_text(json.dumps({"step": number}))
        over.look(monotonic)
        over.watch(monotonic)
        over.beat(monotonic)
        assert over.hang is None
        assert over.suspected is None
    beat = json.loads((tmp_path / "logs/beat-0000.json").read_text())
    assert (beat["step"], beat["step_seconds"], beat["progress_age"]) == (99, 1.0, 0.0)


def overseer(tmp_path: Path, *, node: int = 0, nodes: int = 1, floor: float = 5.0, shared: bool = True) -> Overseer:
    state = tmp_path / ("state" if not node else f"state{node}")
    state.mkdir(exist_ok=True)
    (tmp_path / "logs").mkdir(exist_ok=True)
    said: list[str] = []
    over = Overseer(
        Settings(
            node,
            nodes,
            f"node-{node:04d}",
            f"host{node}",
            0,
            str(tmp_path / "logs"),
            shared,
            str(state),
            floor,
            600.0,
        ),
        said.append,
    )
    over.said = said  # type: ignore[attr-defined]
    return over


def begin(tmp_path: Path, over: Overseer, *, rank: int = 0, pid: int | None = None) -> None:
    log = tmp_path / "logs" / f"rank-{rank:05d}.log"
    log.touch()
    record = {"rank": rank, "pid": pid or os.getpid(), "log": str(log), "log_from": 0, "ended": None}
    (Path(over.settings.state) / f"rank-{rank:05d}.json").write_text(json.dumps(record))


# Who it was


def facts(*rows: tuple) -> list[Fact]:
    """(step, doing, letter) of ranks 0, 1, 2... on host0, host1..."""
    return [
        Fact(rank, rank, f"host{rank}", step, "training", doing, letter)
        for rank, (step, doing, letter) in enumerate(rows)
    ]


WAITS = "all_reduce #12"


@pytest.mark.parametrize(
    ("rows", "kind", "ranks", "words"),
    [
        (
            [(4, WAITS, "S"), (4, WAITS, "T"), (4, WAITS, "S")],
            "laggard",
            (1,),
            "rank 1 on host1 is stopped (state T)",
        ),
        ([(4, WAITS, "S"), (4, WAITS, ""), (4, WAITS, "S")], "dead", (1,), "has no process any more"),
        ([(5, WAITS, "S"), (4, "", "R"), (5, WAITS, "S")], "laggard", (1,), "is at step 4, others at 5"),
        ([(4, WAITS, "S"), (4, WAITS, "S"), (4, "", "D")], "laggard", (2,), "is in no collective"),
        ([(4, WAITS, "S"), (4, "all_reduce #11", "S"), (4, WAITS, "S")], "laggard", (1,), "only at all_reduce #11"),
        ([(4, WAITS, "S"), (4, "broadcast #12", "S"), (4, WAITS, "S")], "desync", (1,), "is in broadcast #12"),
        ([(4, WAITS, "S"), (4, WAITS, "S"), (4, WAITS, "S")], "all wait", (), "all 3 ranks wait in all_reduce #12"),
        ([(4, "", "S"), (4, "", "S")], "unknown", (), "2 ranks make no step"),
        ([(None, "", "S"), (None, "", "T")], "laggard", (1,), "is stopped"),
        # numbers of different groups are not compared
        ([(4, "send #3 of group 2", "S"), (4, WAITS, "S"), (4, WAITS, "S")], "unknown", (), "3 ranks make no step"),
    ],
)
def test_whom_the_others_wait_for(rows, kind, ranks, words):
    found = hang.verdict(facts(*rows), seconds=31.0, limit=30.0, silent={})
    assert (found.kind, found.ranks) == (kind, ranks)
    assert found.hosts == tuple(f"host{rank}" for rank in ranks)
    assert words in found.why
    assert found.collective == (WAITS if any(doing == WAITS for _, doing, _ in rows) else "")
    assert hang.verdict(reversed(facts(*rows)), seconds=31.0, limit=30.0, silent={}) == found


def test_a_host_that_no_longer_answers_is_named_before_its_ranks_are_missed():
    found = hang.verdict(facts((4, WAITS, "S")), seconds=31.0, limit=30.0, silent={"host9": (8, 9)})
    assert (found.kind, found.ranks, found.hosts) == ("dead", (8, 9), ("host9",))
    assert found.why == "host9 with ranks 8, 9 no longer answers"


def test_one_verdict_however_many_write_it(tmp_path):
    path = tmp_path / "verdict.json"
    once(str(path), {"step": 1})
    once(str(path), {"step": 2})
    assert json.loads(path.read_text()) == {"step": 1}
    assert [one.name for one in tmp_path.iterdir()] == ["verdict.json"]


def nodes(tmp_path: Path, count: int) -> list[Overseer]:
    overs = [overseer(tmp_path, node=number, nodes=count) for number in range(count)]
    for number, over in enumerate(overs):
        begin(tmp_path, over, rank=number)
    return overs


def tick(overs: list[Overseer], now: float, *rows: dict) -> None:
    for number, over in enumerate(overs):
        with contextlib.suppress(IndexError):
            Path(over.settings.state, f"progress-{number:05d}").write_text(json.dumps(rows[number]))
        over.look(now)
        over.beat(now)


def test_one_verdict_also_where_files_cannot_be_linked(tmp_path, monkeypatch):
    def link(*_):
        raise OSError(errno.ENOTSUP, "no links here")

    monkeypatch.setattr(os, "link", link)
    path = tmp_path / "verdict.json"
    once(str(path), {"step": 1})
    once(str(path), {"step": 2})
    assert json.loads(path.read_text()) == {"step": 1}
    assert [one.name for one in tmp_path.iterdir()] == ["verdict.json"]


@pytest.mark.slow
def test_with_one_supervisor_a_rank_they_agree_on_one_node_too(tmp_path):
    states = [overseer(tmp_path, node=number, nodes=2) for number in (0, 1)]
    overs = [
        Overseer(replace(over.settings, node=0, name=f"node-0000-{number:02d}"), over.say)
        for number, over in enumerate(states)
    ]
    assert [over.settings.first for over in overs] == [True, False]
    for rank, over in enumerate(overs):
        begin(tmp_path, over, rank=rank)
        (Path(over.settings.state) / f"progress-{rank:05d}").write_text('{"step": 9, "steps": 9}')
    for now in (1000.0, 1004.0, 1008.0):  # looks are less than 10 s apart
        for over in overs:
            over.look(now)
            over.beat(now)
    overs[1].watch(1008.0)
    assert overs[1].hang is None  # rank 0's supervisor has to say so
    threads = [threading.Thread(target=over.watch, args=(1008.0,)) for over in overs]
    for thread in threads:
        thread.start()
        until(lambda: (tmp_path / "logs/hang-0/collect").exists())
    for thread in threads:
        thread.join(60)
    assert overs[0].hang == overs[1].hang
    assert overs[0].hang.step == 9
    assert "2 ranks" in overs[0].hang.why


def test_a_mistake_of_ours_leaves_the_beat_going(tmp_path, monkeypatch, capsys):
    def compare(now):
        raise KeyError("host")

    over = overseer(tmp_path)
    begin(tmp_path, over)
    over.compare = compare
    monkeypatch.setattr("launcher.supervision.overseer.BEAT", 0.1)
    monkeypatch.setattr("launcher.supervision.overseer.LOOK", 0.1)
    over.start()
    beat = tmp_path / "logs/beat-0000.json"
    until(lambda: beat.exists() and json.loads(beat.read_text())["note"])
    assert over.is_alive()
    over.stop()
    assert json.loads(beat.read_text())["note"] == "KeyError: 'host'"
    assert capsys.readouterr().err.count("Traceback") == 1


def test_while_one_rank_anywhere_saves_no_node_hangs_and_a_suspicion_is_taken_back(tmp_path):
    overs = nodes(tmp_path, 2)
    for number in range(1, 8):
        tick(overs, float(number), {"step": number}, {"step": number})
    for number in range(8, 30):  # rank 1 waits for rank 0, which saves
        tick(overs, float(number), {"step": 7, "phase": "checkpoint"}, {"step": 7})
        for over in reversed(overs):
            over.watch(float(number))
    assert (tmp_path / "logs/hang-0/suspect-node-0001").exists()
    assert not (tmp_path / "logs/hang-0/collect").exists()
    for now, step in ((30.0, 7), (33.0, 7), (34.0, 8), (35.0, 9)):  # saved; the next step takes its time
        tick(overs, now, {"step": step}, {"step": step})
        for over in overs:
            over.watch(now)
        assert not (tmp_path / "logs/hang-0/collect").exists()
    assert not (tmp_path / "logs/hang-0").exists()
    assert [over.hang for over in overs] == [None, None]


def test_the_beat_says_what_the_contract_says(tmp_path):
    over = overseer(tmp_path)
    begin(tmp_path, over)
    over.look(0.0)
    for number in range(1, 4):
        tick([over], number * 2.0, {"step": number, "busy": 0.9, "doing": WAITS})
    beat = json.loads((tmp_path / "logs/beat-0000.json").read_text())
    assert abs(beat.pop("time") - time.time()) < 60
    assert beat == {
        "node": 0,
        "host": "host0",
        "attempt": 0,
        "phase": "training",
        "step": 3,
        "step_seconds": 2.0,
        "progress_age": 0.0,
        "ranks": {"0": {"step": 3, "phase": "training", "busy": 0.9, "least": None, "age": 0.0, "doing": WAITS}},
        "oom_kills": 0 if memory.count() else None,
        "note": "",
    }


# Stragglers


@pytest.mark.parametrize(
    ("busy", "slow"),
    [
        ({0: (1.0, 0.9), 1: (1.0, 0.9), 2: (1.3, 1.2)}, {2: 1.3}),
        ({0: (1.0, 0.9), 1: (1.0, 0.9), 2: (1.3, 1.05)}, {}),  # one of its 20 steps was as quick as the others'
        ({0: (1.0, 0.9), 1: (1.0, 0.9), 2: (1.3, None)}, {}),  # not 20 steps yet
        ({0: (1.0, 0.9), 1: (1.05, 1.0), 2: (0.95, 0.9)}, {}),
        ({0: (2.0, 2.0)}, {}),
        ({0: (None, None), 1: (None, None)}, {}),  # NCCL waits on the GPU: nothing is known
    ],
)
def test_a_straggler_is_slow_in_each_of_twenty_steps(busy, slow):
    assert stragglers(busy) == pytest.approx(slow)


TRAINS = """
import os, time
import dslaunch_pulse, torch, torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()
dslaunch_pulse.watch()
stop = torch.zeros(1)
for step in range(1, 2000):
    time.sleep(0.15 if rank == 2 else 0.05)  # the slow one really takes longer, the others wait for it
    stop[0] = float(rank == 0 and os.path.exists("enough"))
    dist.all_reduce(stop)
    dslaunch_pulse.step(step)
    if stop.item():
        break
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_slow_rank_is_named_once_with_its_host(tmp_path):
    """Scenario 64, with three real ranks on gloo."""
    flags = ("--same-host", "--shared-logs", "--hang", "60")
    node = Node(tmp_path, launcher="torchrun", per_node=3, flags=flags, env={"OMP_NUM_THREADS": "1"})
    process = node.start(sys.executable, "-c", TRAINS)
    beat = node.logs / "beat-0000.json"
    until(lambda: beat.exists() and "slower" in json.loads(beat.read_text())["note"], seconds=60)
    first = json.loads(beat.read_text())
    until(lambda: json.loads(beat.read_text())["time"] > first["time"])  # another comparison
    note = json.loads(beat.read_text())["note"]
    (tmp_path / "enough").touch()
    assert process.wait(60) == 0
    assert note.startswith(f"rank 2 on {os.uname().nodename} is ")
    assert note.endswith("x slower than the median for 20 steps")
    assert 1.5 < float(note.split(" is ")[1].split("x")[0]) < 4
    assert node.err.count("slower than the median") == 1


# What is collected

STANDS = """
import sys, time, threading
import dslaunch_pulse
dslaunch_pulse.step(3)
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
def load_batch():
    print("loading", flush=True)
    time.sleep(60)
load_batch()
"""


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["py-spy", "faulthandler"])
def test_stacks_of_a_rank_by_py_spy_or_by_itself(tmp_path, monkeypatch, tool):
    if tool == "faulthandler":
        monkeypatch.setattr(evidence, "py_spy", list)
    else:
        assert evidence.py_spy(), "py-spy is one of the development requirements"
    file, log = tmp_path / "progress", tmp_path / "log"
    env = {**os.environ, "PYTHONPATH": str(HOOK), "DSLAUNCH_PROGRESS": str(file)}
    with log.open("wb") as out, subprocess.Popen([sys.executable, "-c", STANDS], env=env, stdout=out) as process:
        try:
            until(lambda: "loading" in log.read_text())
            one = evidence.Rank(3, process.pid, str(log), 0, str(file), progress(file.read_bytes()))
            begun = time.monotonic()
            (found,) = evidence.collect([one], node=1, name="node-0001", host="h1", folder=str(tmp_path / "hang"))
            took = time.monotonic() - begun
        finally:
            process.kill()
    assert (found.rank, found.step, found.letter, found.doing) == (3, 3, "S", "")
    assert found.frame.startswith("load_batch (")
    assert took < evidence.SECONDS
    kept = json.loads((tmp_path / "hang/rank-00003.json").read_text())
    assert fact(kept) == found
    assert (kept["lines"], kept["pid"], int(kept["threads"]) >= 2) == (["loading"], process.pid, True)
    assert "load_batch" in (tmp_path / "hang/rank-00003.stacks").read_text()


@pytest.mark.slow
def test_a_command_that_does_not_end_is_left_behind(tmp_path):
    begun = time.monotonic()
    assert "timed out" in evidence.ask(["sleep", "60"], str(tmp_path / "out"), 0.5)
    assert time.monotonic() - begun < 10
    assert "No such file" in evidence.ask(["no-such-command"], str(tmp_path / "out"), 1)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (
            'Thread 0x00007f01 (most recent call first):\n  File "/usr/lib/threading.py", line 9 in wait\n\n'
            'Current thread 0x00007f02 (most recent call first):\n  File "/job/dslaunch_pulse.py", line 200 in wait\n'
            '  File "/v/torch/distributed/distributed_c10d.py", line 2810 in all_reduce\n'
            '  File "/v/torch/distributed/c10d_logger.py", line 83 in wrapper\n'
            '  File "/job/train.py", line 31 in step\n',
            ("all_reduce", "step (job/train.py:31)"),
        ),
        (
            'Thread 7 (idle): "MainThread"\n    wait (dslaunch_pulse.py:208)\n'
            "    all_reduce (torch/distributed/distributed_c10d.py:3252)\n    train (/job/src/train.py:7)\n"
            'Thread 8 (idle): "Thread-1"\n    sleep (x.py:1)\n',
            ("all_reduce", "train (src/train.py:7)"),
        ),
        ('Thread 7 (active): "MainThread"\n    read (/data/loader.py:3)\n', ("", "read (data/loader.py:3)")),
        ("Error: Permission Denied: Try running again with elevated permissions", ("", "")),
    ],
)
def test_where_a_stack_is(text, place):
    assert evidence.place(evidence.frames(text)) == place


# Memory


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (
            "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n",
            [
                "R/system.slice/slurmstepd.scope/job_7/step_0/user/task_0/memory.events",
                "R/system.slice/slurmstepd.scope/job_7/step_0/user/memory.events",
                "R/system.slice/slurmstepd.scope/job_7/step_0/memory.events",
                "R/system.slice/slurmstepd.scope/job_7/memory.events",
                "R/system.slice/slurmstepd.scope/memory.events",
                "R/memory.events",
            ],
        ),
        (
            "9:memory:/slurm/uid_0/job_7/step_0\n0::/\n",
            [
                "R/memory/slurm/uid_0/job_7/step_0/memory.oom_control",
                "R/memory/slurm/uid_0/job_7/memory.oom_control",
                "R/memory/slurm/uid_0/memory.oom_control",
                "R/memory/memory.oom_control",
                "R/memory.events",
            ],
        ),
    ],
)
def test_where_the_kernel_counts_what_it_killed(groups, expected):
    assert memory.files(groups, "R") == expected


def test_what_the_limit_killed_is_what_the_counter_grew_by(tmp_path):
    assert memory.killed("low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n") == 2
    assert memory.killed("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n") == 1
    assert memory.grown({"a": 1, "b": 4}, {"a": 3, "b": 4, "c": 9}) == 2
    assert memory.killed("oom_kill_disable 0\nunder_oom 0\n") is None
    assert memory.grown({}, {}) is None


# The kernel's log


def test_what_the_kernel_said_before_and_about_memory_is_not_ours():
    text = "[  10.5] NVRM: Xid 79 yesterday\n[ 200.1] NVRM: Xid 79 now\n[ 201.0] oom-kill:constraint\nno stamp\n"
    assert report.recent(text, 100.0) == "[ 200.1] NVRM: Xid 79 now\n"


# The checkpoint to go on from


def gate(tmp_path: Path, *, first: bool, logs: bool = True) -> str:
    (tmp_path / "logs").mkdir(exist_ok=True)
    return resume.gate(
        str(tmp_path / "ckpt"),
        config=str(tmp_path / "ds_config.json") if (tmp_path / "ds_config.json").exists() else "",
        first=first,
        logs=str(tmp_path / "logs") if logs else None,
        attempt=2,
        run=resume.Run(world=2, stage=1, model_parallel=1, fresh=False),
        say=lambda text: None,
        pause=lambda seconds, doing: None,
    )


def test_node_0_says_that_nothing_was_saved_yet_and_the_others_read_it(tmp_path):
    assert gate(tmp_path, first=True) == ""
    said = json.loads((tmp_path / "logs/resume-2.json").read_text())
    assert (said["action"], said["resume"]) == ("start", "")
    assert gate(tmp_path, first=False) == ""
    assert gate(tmp_path, first=False, logs=False) == ""


def test_only_damaged_checkpoints_are_refused_by_all_nodes(tmp_path):
    tag = tmp_path / "ckpt" / "global_step10"
    tag.mkdir(parents=True)
    (tag / "mp_rank_00_model_states.pt").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(Refused, match="global_step10"):
        gate(tmp_path, first=True)
    with pytest.raises(Refused, match=r"node 0 refuses: .*global_step10"):
        gate(tmp_path, first=False)


def test_deepspeeds_config_says_whether_the_checkpoint_is_universal(tmp_path):
    config = tmp_path / "ds_config.json"
    before = {"train_batch_size": 8, "checkpoint": {"tag_validation": "Fail"}}
    config.write_text(json.dumps(before))
    resume.configure(str(config), Choice("universal"))
    assert json.loads(config.read_text())["checkpoint"] == {"tag_validation": "Fail", "load_universal": True}
    resume.configure(str(config), Choice("load"))
    assert json.loads(config.read_text()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["ds_config.json"]


def test_a_program_that_writes_no_manifest_is_vouched_for(tmp_path):
    shutil.copytree(real_checkpoint(tmp_path), tmp_path / "ckpt" / "global_step7")
    (tmp_path / "ckpt" / "global_step9").mkdir()  # a save that has only begun
    voucher = Voucher(str(tmp_path / "ckpt"), every=60.0)
    voucher.start()
    assert not (tmp_path / "ckpt" / "global_step7" / "complete.json").exists()
    voucher.finish(60.0)
    said = json.loads((tmp_path / "ckpt" / "global_step7" / "complete.json").read_text())
    assert (said["step"], said["world_size"]) == (7, 1)
    assert not (tmp_path / "ckpt" / "global_step9" / "complete.json").exists()


def real_checkpoint(tmp_path: Path) -> Path:
    """The files of a stage 1 save by one rank, as torch writes them."""
    folder = tmp_path / "written"
    folder.mkdir()
    state = {"dp_world_size": 1, "global_steps": 7, "ds_version": "0.19.8"}
    torch.save(state, folder / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {"zero_stage": 1}}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return folder


def test_a_node_0_that_says_nothing_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "SILENCE", 0.0)
    with pytest.raises(Refused, match="node 0 has not said") as refused:
        gate(tmp_path, first=False)
    assert refused.value.code == 69


def test_a_job_that_was_suspended_while_it_chose_a_checkpoint_goes_on_waiting(tmp_path, monkeypatch):
    now, waited = [1000.0], []

    def pause(seconds, doing):
        waited.append(doing)
        now[0] += 3600.0 if len(waited) == 3 else seconds
        if len(waited) == 6:
            (tmp_path / "resume-0.json").write_text('{"action": "start", "resume": ""}')

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    assert resume.awaited(str(tmp_path), 0, pause)["action"] == "start"


PACKAGE = Path(launcher.__file__).parent
TRAVELS = [path for name in LOOKS_AFTER for path in sorted(PACKAGE.glob(f"{name}/*.py"))]
TRAVELS += [HOOK / "dslaunch_pulse.py", *(HOOK.parent / f"{name}.py" for name in ("supervise", "rank", "train_gpt"))]
BATCH_HOST = [HOOK.parent / f"{name}.py" for name in ("journal", "recover", "services", "port", "lost", "pod")]
NEW = {"removeprefix", "removesuffix", "lcm", "pairwise", "is_relative_to", "randbytes", "strict"}  # since 3.9
NEWER = {"capture_output", "fromisoformat", "time_ns", "nullcontext", "getcallargs"}  # since 3.7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "version"), [*((path, (3, 8)) for path in TRAVELS), *((path, (3, 6)) for path in BATCH_HOST)]
)  # fmt: skip
def test_what_travels_can_be_read_by_an_older_python(path, version):
    """Its syntax, its names, and what is evaluated: `Callable[...]` of collections.abc came with 3.9."""
    tree = ast.parse(path.read_text(), feature_version=version)
    plain = {"dict", "list", "tuple", "set", "frozenset", "type", "deque", "Counter", "Popen"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "collections.abc":
            plain |= {alias.name for alias in node.names}
    assert version == (3, 8) or not any(getattr(node, "module", "") == "__future__" for node in ast.walk(tree))
    for node in ast.walk(tree):  # annotations are never evaluated there, nor is what only mypy sees
        if isinstance(node, (ast.AnnAssign, ast.arg)) and version == (3, 8):
            node.annotation = ast.Constant(None)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and version == (3, 8):
            node.returns = None
        elif isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript):
            assert getattr(node.value, "id", "") not in plain, f"line {node.lineno}"
        names = {getattr(node, "attr", ""), getattr(node, "arg", "") if isinstance(node, ast.keyword) else ""}
        assert not names & (NEW if version == (3, 8) else NEW | NEWER), f"line {node.lineno}"


# Two real nodes


STOPS_STEPPING = """
import time
import dslaunch_pulse
def load_batch(step): time.sleep(600 if step == 6 else 0.05)
for step in range(1, 9):
    load_batch(step)
    dslaunch_pulse.step(step)
"""


@pytest.mark.slow
def test_a_rank_without_torch_hangs_too_and_ends_with_124(tmp_path):
    node = Node(tmp_path, flags=("--hang", "2"), env={"DSLAUNCH_ATTEMPT": "3"})
    assert node.python(STOPS_STEPPING) == 124
    word = json.loads((node.logs / "node-0000-00.json").read_text())
    assert (word["code"], word["attempt"], word["step"], word["first_failure"]) == (124, 3, 5, None)
    assert (word["hang"]["step"], word["hang"]["kind"], word["hang"]["limit"]) == (5, "unknown", 2.0)
    assert "in load_batch (<string>:4)" in word["hang"]["why"]
    assert word["diagnosis"]["code"] == 124
    assert (node.logs / "first-failure-3").read_text() == "124\n"
    assert "load_batch" in (node.logs / "hang-3/rank-00000.stacks").read_text()
    assert node.left() == []


@pytest.mark.slow
def test_a_long_save_and_a_finished_run_are_no_hang(tmp_path):
    node = Node(tmp_path, flags=("--hang", "1", "--steps", "5"))
    program = (
        "import dslaunch_pulse as p, time\n"
        "for n in range(1, 6): p.step(n); time.sleep(0.1)\n"
        "with p.phase('checkpoint'): time.sleep(2.5)\n"
        "time.sleep(2.5)  # the last step is done: whatever comes now is no step\n"
    )
    assert node.python(program) == 0
    assert not (node.logs / "hang-0").exists()
    assert json.loads((node.logs / "beat-0000-00.json").read_text())["phase"] == "ending"


@pytest.mark.slow
def test_it_runs_from_the_zip_that_pods_have(tmp_path, monkeypatch):
    """Nothing of this checkout is on the path: supervise.py, rank.py and code.zip are all there is."""
    place = tmp_path / "node"
    place.mkdir()
    for name in ("supervise.py", "rank.py"):
        (place / name).write_text((HOOK.parent / name).read_text())
    package = Path(launcher.__file__).parent
    files = [package / "__init__.py", HOOK / "dslaunch_pulse.py", *package.glob("data/*.tsv")]
    files += [path for name in LOOKS_AFTER for path in package.glob(f"{name}/*.py")]
    with zipfile.ZipFile(place / "code.zip", "w") as file:
        for path in files:
            file.write(path, f"launcher/{path.relative_to(package)}")
    monkeypatch.setattr(test_node, "SUPERVISE", place / "supervise.py")
    node = Node(tmp_path, flags=("--hang", "9"), env={"DSLAUNCH_CHECKPOINT_DIR": str(tmp_path / "ckpt")})
    program = "import dslaunch_pulse, os\ndslaunch_pulse.step(4)\nos.environ['DSLAUNCH_RESUME']\n"
    assert node.python(program + "print(dslaunch_pulse.__file__)\nraise SystemExit(3)") == 3
    assert "/hook/dslaunch_pulse.py" in node.out
    word = json.loads((node.logs / "node-0000-00.json").read_text())
    assert (word["step"], word["hang"], word["oom_kills"]) == (4, None, 0 if memory.count() else None)
    assert word["diagnosis"] is not None


@pytest.mark.slow
def test_a_rank_that_stands_still_outside_of_collectives_is_named_and_all_end(tmp_path):
    """Scenario 63 with plain processes on gloo; rank 1 waits for data that never comes."""
    nodes = 2
    program = TRAINS.replace("time.sleep(0.15 if rank == 2 else 0.05)", "load_batch(rank, step)").replace(
        "import os, time",
        "import os, time\ndef load_batch(rank, step): time.sleep(600 if (rank, step) == (1, 20) else 0.05)",
    )
    flags = ("--same-host", "--shared-logs", "--hang", "4")
    each = [
        Node(tmp_path, launcher="torchrun", nodes=nodes, rank=number, flags=flags, env={"OMP_NUM_THREADS": "1"})
        for number in range(nodes)
    ]
    for one in each:
        one.mark = each[0].mark
    processes = [one.start(sys.executable, "-c", program) for one in each]
    assert [process.wait(150) for process in processes] == [124] * nodes
    verdict = json.loads((tmp_path / "logs/hang-0/verdict.json").read_text())
    for number in range(nodes):
        word = json.loads((tmp_path / f"logs/node-{number:04d}.json").read_text())
        assert (word["code"], word["hang"]["ranks"], word["hang"]["kind"]) == (124, [1], "laggard")
        assert hang_of(word["hang"]) == hang_of(verdict)
        assert word["step"] == 19
        assert word["hang"]["collective"].startswith("all_reduce #2")
        assert "in load_batch (" in word["hang"]["why"]
    assert (tmp_path / "logs/first-failure-0").read_text() == "124\n"
    assert each[0].left() == []


def test_the_hook_costs_less_than_five_microseconds_a_collective(tmp_path):
    """Two notes a collective, the call and the wait; the best of 20 rounds, as this machine is shared."""
    program = """
import time, types
import dslaunch_pulse as p
group = types.SimpleNamespace(group_name="0")
call, wait = p._noted(lambda self: None, p._pulse, "all_reduce"), p._noted(lambda self: None, p._pulse)
best = 1e9
for _ in range(20):
    begun = time.perf_counter()
    for _ in range(2000): call(group); wait(group)
    best = min(best, (time.perf_counter() - begun) / 2000)
print(best * 1e6)
"""
    done = pulse(tmp_path, program, DSLAUNCH_PROGRESS=str(tmp_path / "progress"))
    assert float(done.stdout) < 5, done
