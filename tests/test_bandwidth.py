import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import namespaces
import pytest

from launcher.preflight import bandwidth, from_json, transport

EVERY = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "sendrecv")


class Workers:
    """Worker processes that a test talks to; `wrap` puts the one of a rank on a node."""

    def __init__(self, count, *, nic="lo", wrap=lambda rank, argv: argv):
        self.nic, self.wrap = nic, wrap
        self.lines = {}
        self.children = {}
        for rank in range(count):
            self.start(rank)
        self.ready = [self.hear(rank) for rank in range(count)]

    def start(self, rank):
        argv = [sys.executable, "-m", "launcher.preflight.worker", "--local-rank", str(rank), "--backend", "gloo"]
        env = {**os.environ, "GLOO_SOCKET_IFNAME": self.nic, "OMP_NUM_THREADS": "1"}
        child = subprocess.Popen(
            self.wrap(rank, argv), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env
        )
        lines = queue.Queue()
        threading.Thread(target=lambda: [lines.put(line) for line in child.stdout], daemon=True).start()
        self.children[rank], self.lines[rank] = child, lines

    def say(self, rank, /, **command):
        self.children[rank].stdin.write(json.dumps(command).encode() + b"\n")
        self.children[rank].stdin.flush()

    def hear(self, rank, seconds=60):
        return json.loads(self.lines[rank].get(timeout=seconds))

    def host(self, size, address="127.0.0.1"):
        self.say(0, id=1, do="host", address=address, size=size)
        return self.hear(0)["port"]

    def join(self, ranks, measures, *, size=None, timeout=30, address="127.0.0.1"):
        size = size or len(ranks)
        port = self.host(size, address)
        where = {"address": address, "port": port, "size": size, "timeout": timeout}
        for rank in ranks:
            self.say(rank, id=2, do="group", rank=rank, measure=measures, **where)

    def group(self, ranks, measures, **options):
        self.join(ranks, measures, **options)
        return [self.hear(rank) for rank in ranks]

    def stop(self):
        for child in self.children.values():
            child.kill()
            child.wait()


@pytest.fixture(scope="module")
def workers():
    started = Workers(4)
    yield started
    started.stop()


def one(op, size, seconds=0.2, **more):
    rails = {"from": [0], "to": [1]} if op == "sendrecv" else {}
    return {"op": op, "bytes": size, "seconds": seconds, "check": True, **rails, **more}


# --- what follows from times, without any


@pytest.mark.parametrize(
    ("op", "n", "factor"),
    [
        ("all_reduce", 2, 1.0),
        ("all_reduce", 8, 1.75),
        ("all_reduce", 64, 1.96875),
        ("all_gather", 2, 0.5),
        ("all_gather", 8, 0.875),
        ("reduce_scatter", 8, 0.875),
        ("all_to_all", 16, 0.9375),
        ("sendrecv", 2, 1.0),
        ("sendrecv", 16, 1.0),
    ],
)
def test_bus_bandwidth_is_that_of_nccl_tests(op, n, factor):
    assert bandwidth.busbw_factor(op, n) == factor


def test_figures_are_the_slowest_ranks():
    found = bandwidth.figures("all_reduce", 400_000_000, {}, [0.08, 0.1, 0.09, 0.08])
    assert (found["algbw"], found["busbw"], found["slowest_rank"]) == (pytest.approx(4), pytest.approx(6), 1)


def test_rails_count_as_many_times_the_slowest_and_only_where_data_arrives():
    found = bandwidth.figures("sendrecv", 10**9, {0: 2, 1: 3}, [9.0, 9.0, 0.02, 0.025], lanes=2)
    assert found["per_rail"] == [pytest.approx(50), pytest.approx(40)]
    assert (found["algbw"], found["busbw"], found["slowest_rank"]) == (pytest.approx(40), pytest.approx(80), 3)
    assert found["slow_rail"] == {"rail": 1, "rate": pytest.approx(40), "others": pytest.approx(50)}


@pytest.mark.parametrize(
    ("rates", "slow"),
    [([], None), ([3.0], None), ([44.0, 21.0, 45.0, 43.0], (1, 21.0, 44.0)), ([2.0, 2.0], (0, 2.0, 2.0))],
)
def test_the_slowest_rail_stands_beside_the_median_of_the_others(rates, slow):
    found = bandwidth.slow_rail(rates)
    assert found == (slow and dict(zip(("rail", "rate", "others"), slow, strict=True)))


def test_a_message_takes_a_quarter_of_a_gpus_free_memory():
    assert bandwidth.room(24 << 30) == 6 << 30
    assert bandwidth.room(None) > 1 << 42


@pytest.mark.parametrize(
    ("op", "size", "n", "meant"),
    [
        ("all_reduce", 1000, 3, 1000),
        ("all_gather", 1000, 3, 996),
        ("all_to_all", 1, 4, 16),
        ("sendrecv", 7, 2, 4),
        ("reduce_scatter", 1 << 30, 8, 1 << 30),
    ],
)
def test_a_message_is_whole_elements_of_every_rank(op, size, n, meant):
    assert bandwidth.whole(op, size, n) == meant


@pytest.mark.parametrize(
    ("one", "seconds", "timed", "warm"),
    [(0.05, 1, 20, 4), (0.25, 1, 5, 1), (3, 1, 5, 1), (1e-5, 1, 200, 81), (0.125, 2, 16, 2)],
)
def test_thirty_percent_of_the_bytes_go_before_the_clock_starts(one, seconds, timed, warm):
    assert bandwidth.iterations(one, seconds) == (timed, warm)
    assert warm + bandwidth.WARM >= 0.3 * (timed + warm + bandwidth.WARM)


def test_a_message_grows_until_an_iteration_can_be_timed():
    size, rate = bandwidth.PROBE, 5e6  # 40 Mbit/s
    for _ in range(10):
        after = bandwidth.grow(size, size / rate, 1.0, 64 << 20)
        if after == size:
            break
        size = after
    assert 0.05 <= size / rate <= 0.25
    assert bandwidth.grow(64 << 20, 1e-6, 1.0, 64 << 20) == 64 << 20


@pytest.mark.parametrize(
    ("pairs", "ranks", "left"),
    [
        ([], [], []),
        ([(2, 0), (2, 1), (2, 3)], [2], []),
        ([(0, 3), (1, 3), (2, 3)], [3], []),
        ([(0, 1)], [], [(0, 1)]),
        ([(1, 0), (1, 1)], [1], []),
        ([(2, 0), (2, 1), (0, 3), (1, 3), (2, 3)], [2, 3], []),
    ],
)
def test_pieces_that_arrive_wrong_meet_at_the_rank_that_is_wrong(pairs, ranks, left):
    assert bandwidth.odd_pieces(pairs) == (ranks, left)


@pytest.mark.parametrize("n", [2, 3, 4, 7, 8, 64, 1000])
def test_log2_sums_name_any_one_rank_that_spoils_them(n):
    bits = (n - 1).bit_length()
    for rank in range(n):
        bad = [(not rank >> bit & 1, bool(rank >> bit & 1)) for bit in range(bits)]
        assert bandwidth.contributor(bad, n) == rank
    assert bandwidth.contributor([(True, True)] * bits, n) is None
    assert bandwidth.contributor([(False, False)] * bits, n) is None


# --- real processes


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_every_operation_of_gloo_is_timed_and_right(workers, n):
    answers = workers.group(range(n), [one(op, 1 << 20) for op in EVERY])
    assert [set(answer) for answer in answers] == [{"id", "results"}] * n
    for op, result in zip(EVERY, answers[0]["results"], strict=True):
        assert (result["op"], result["correct"], result["wrong"]) == (op, True, [])
        assert result["iterations"] >= 5
        assert 0 < result["median"] <= result["p99"]
        assert result["algbw"] == pytest.approx(result["bytes"] / result["median"] / 1e9)
        assert result["busbw"] == pytest.approx(result["algbw"] * bandwidth.busbw_factor(op, n))
        assert len(result["per_rank"]) == n
    for answer in answers[1:]:
        for mine, first in zip(answer["results"], answers[0]["results"], strict=True):
            assert mine == {**first, "per_rank": [], "per_rail": []}


@pytest.mark.slow
def test_all_rails_send_at_once_in_one_direction(workers):
    rails = {"from": [0, 1], "to": [2, 3]}
    answers = workers.group(range(4), [one("sendrecv", 4 << 20, **rails)])
    result = answers[0]["results"][0]
    assert len(result["per_rail"]) == 2
    slow = result["slow_rail"]
    assert (slow["rate"], slow["others"]) == (min(result["per_rail"]), max(result["per_rail"]))
    assert [answer["results"][0]["slow_rail"] for answer in answers] == [slow] * 4
    assert result["busbw"] == pytest.approx(2 * min(result["per_rail"]))
    assert result["slowest_rank"] in (2, 3)
    assert result["correct"] is True


@pytest.mark.slow
def test_sendrecv_without_rails_is_the_ring_of_nccl_tests(workers):
    answers = workers.group(range(3), [{"op": "sendrecv", "bytes": 1 << 20, "seconds": 0.2, "check": True}])
    result = answers[0]["results"][0]
    assert len(result["per_rail"]) == 3
    assert result["busbw"] == result["algbw"] == pytest.approx(min(result["per_rail"]))
    assert result["correct"] is True


@pytest.mark.slow
def test_what_is_no_operation_is_unsupported_and_what_is_no_command_an_error(workers):
    (answer, _) = workers.group([0, 1], [one("all_the_things", 100), one("all_reduce", 100)])
    assert "none of all_reduce" in answer["results"][0]["unsupported"]
    assert answer["results"][1]["correct"] is True
    for line in (b"nonsense\n", b"[1]\n", b'{"id": 7, "do": "dance"}\n'):
        workers.children[0].stdin.write(line)
        workers.children[0].stdin.flush()
        answer = workers.hear(0)
        assert "error" in answer
        assert "\n" not in answer["error"]
    workers.say(0, id=3, do="matmul", seconds=0.2)
    product = workers.hear(0)
    assert (product["id"], product["repeatable"], product["dtype"]) == (3, True, "float32")
    assert product["tflops"] > 0


@pytest.mark.slow
def test_what_a_library_prints_is_no_answer():
    """A worker's own standard output is its answers alone, whatever is written to descriptor 1."""
    noisy = (
        "import os, sys, launcher.preflight.worker as worker\n"
        "start = worker.start\n"
        "worker.start = lambda *a: (os.write(1, b'noise\\n'), print('noise'), start(*a))[2]\n"
        "sys.exit(worker.main(['--backend', 'gloo']))\n"
    )
    commands = b'{"id": 1, "do": "matmul", "seconds": 0.1}\n{"id": 2, "do": "quit"}\n{"id": 3, "do": "matmul"}\n'
    done = subprocess.run([sys.executable, "-c", noisy], input=commands, capture_output=True, timeout=60, check=True)
    ready, product = map(json.loads, done.stdout.splitlines())
    assert (ready["ready"], product["id"]) == (True, 1)
    assert done.stderr.count(b"noise") == 2


@pytest.mark.slow
def test_a_worker_reads_nccls_own_log_when_it_keeps_one():
    kept = Path(__file__).parent / "data" / "nccl" / "efa.log"
    commands = b'{"id": 1, "do": "transport"}\n'
    argv = [sys.executable, "-m", "launcher.preflight.worker"]
    with_log = subprocess.run(
        [*argv, "--nccl-log", kept], input=commands, capture_output=True, timeout=60, check=True
    )
    answer = json.loads(with_log.stdout.splitlines()[1])
    found = from_json(transport.Transport, answer["transport"])
    assert found == transport.read(kept.read_text())
    without = subprocess.run(argv, input=commands, capture_output=True, timeout=60, check=True)
    assert json.loads(without.stdout.splitlines()[1]) == {"id": 1, "skipped": "no log of NCCL is kept"}


@pytest.mark.slow
def test_a_worker_without_its_backend_says_so_and_ends():
    """No NCCL on a machine without GPUs."""
    argv = [sys.executable, "-m", "launcher.preflight.worker", "--backend", "nccl"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(argv, input=b"", capture_output=True, timeout=60, env=env, check=False)
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert answer["ready"] is False
    assert answer["error"]


@pytest.mark.slow
def test_a_peer_that_dies_is_an_error_and_the_next_group_works():
    workers = Workers(3)
    try:
        workers.join([0, 1, 2], [one("all_reduce", 1000), one("all_reduce", 64 << 20, seconds=50)], timeout=15)
        time.sleep(2)
        workers.children[1].kill()
        begin = time.monotonic()
        for rank in (0, 2):
            answer = workers.hear(rank)
            assert answer["error"].startswith("all_reduce: ")
            assert [result["correct"] for result in answer["results"]] == [True]
        assert time.monotonic() - begin < 25
        workers.start(1)
        assert workers.hear(1)["ready"]
        for answer in workers.group([0, 1, 2], [one("all_reduce", 1000)]):
            assert answer["results"][0]["correct"] is True
    finally:
        workers.stop()


@pytest.mark.slow
def test_a_peer_that_hangs_or_never_comes_is_a_time_out_and_the_next_group_works():
    workers = Workers(2)
    try:
        workers.join([0], [one("all_reduce", 1000)], size=2, timeout=3)
        begin = time.monotonic()
        assert workers.hear(0)["error"].startswith("joining: ")
        assert 2 < time.monotonic() - begin < 13

        workers.group([0, 1], [one("all_reduce", 1000)])
        workers.join([0, 1], [one("all_reduce", 64 << 20, seconds=50)], timeout=10)
        time.sleep(3)
        workers.children[1].send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        assert workers.hear(0)["error"].startswith("all_reduce: ")
        assert time.monotonic() - begin < 20
        workers.children[1].send_signal(signal.SIGCONT)
        assert "error" in workers.hear(1)

        for answer in workers.group([0, 1], [one("all_reduce", 1000)]):
            assert answer["results"][0]["correct"] is True
    finally:
        workers.stop()


SPOILT = """
import json, sys
import torch, torch.distributed as dist
from launcher.preflight import bandwidth
rank, size, path, cases = *map(int, sys.argv[1:3]), sys.argv[3], json.loads(sys.argv[4])
here = {"rank": rank, "size": size, "backend": "gloo", "device": torch.device("cpu"), "timeout": 30}
group = bandwidth.join(dist.FileStore(path, size), **here)
found = []
for op, when in cases:
    def spoil(now, at, tensor, op=op, when=when):
        if now == when and at == (1 if op == "sendrecv" else 2):
            tensor.mul_(2)  # zeros stay zeros

    rails = {"from": [0], "to": [1]} if op == "sendrecv" else {}
    measure = {"op": op, "bytes": 40000, "seconds": 0.01, "check": True, **rails}
    found.append(bandwidth.measure(group, measure, spoil=spoil))
dist.barrier()
dist.destroy_process_group()
if rank == 0:
    print(json.dumps(found))
"""
WRONG = [
    ("all_reduce", "made", [2], "rank 2 has wrong values before it sends them"),
    ("all_reduce", "sent", [2], "rank 2 spoils every sum that it contributes to"),
    ("all_reduce", "received", [2], "rank 2 gets a wrong sum while others get the right one"),
    ("reduce_scatter", "sent", [2], "rank 2 spoils every sum that it contributes to"),
    ("reduce_scatter", "received", [2], "rank 2 gets a wrong sum while others get the right one"),
    ("all_gather", "sent", [2], "rank 2 sends or gets wrong values"),
    ("all_to_all", "received", [2], "rank 2 sends or gets wrong values"),
    ("sendrecv", "received", [], "values arrive wrong from rank 0 to rank 1; which of the two is unclear"),
]


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """What three ranks found of each case, one after another in one group."""
    cases = [(op, when) for op, when, _, _ in WRONG]
    argv = [sys.executable, "-c", SPOILT]
    words = ["3", str(tmp_path_factory.mktemp("spoilt") / "store"), json.dumps(cases)]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    children = [subprocess.Popen([*argv, str(rank), *words], stdout=subprocess.PIPE, env=env) for rank in range(3)]
    try:
        outs = [child.communicate(timeout=60)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0, 0]
    return dict(zip(cases, json.loads(outs[0]), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("op", "when", "wrong", "why"), WRONG)
def test_a_wrong_result_names_the_rank(spoilt, op, when, wrong, why):
    found = spoilt[op, when]
    assert (found["correct"], found["wrong"], found["why"]) == (False, wrong, why)


SMALL = """
import json, resource, sys
import torch, torch.distributed as dist
from launcher.preflight import bandwidth
rank, size, limited, port = map(int, sys.argv[1:])
store = dist.PrefixStore("x", dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0))
here = {"rank": rank, "size": size, "backend": "gloo", "device": torch.device("cpu"), "timeout": 30}
group = bandwidth.join(store, **here)
if rank == limited:
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20),) * 2)
for op, count in (("all_to_all", 256 << 20), ("sendrecv", 256 << 20), ("all_reduce", 40000)):
    print(json.dumps(bandwidth.measure(group, {"op": op, "bytes": count, "seconds": 0.01, "check": True})))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_message_that_one_rank_has_no_memory_for_ends_nothing():
    """Every rank says so, and the next measurement is right."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv = [sys.executable, "-c", SMALL]
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    words = [[*argv, str(rank), "3", "1", str(port)] for rank in range(3)]
    children = [subprocess.Popen(one, stdout=subprocess.PIPE, env=env) for one in words]
    try:
        outs = [child.communicate(timeout=60)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    for out in outs:
        big, pair, small = map(json.loads, out.splitlines())
        assert "does not fit: 268435452 bytes on 1 of 3 ranks, rank 1: " in big["unsupported"]
        assert pair["unsupported"].startswith("does not fit: 268435456 bytes on 1 of 3 ranks, rank 1: ")
        assert (small["bytes"], small["correct"]) == (40000, True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tcp", "file"])
def test_who_does_not_answer_is_named_and_words_come_in_the_order_of_ranks(kind, tmp_path):
    dist = pytest.importorskip("torch.distributed")
    if kind == "tcp":
        store = dist.TCPStore("127.0.0.1", 0, 3, is_master=True, wait_for_workers=False)
    else:
        store = dist.FileStore(str(tmp_path / "store"), 3)
    assert store.has_extended_api() == (kind == "tcp")
    store = dist.PrefixStore("x", store)
    store.set_timeout(timedelta(seconds=1))
    group = bandwidth.Group(store, 0, 3, None, 1.0)
    for rank in (1, 2):
        store.set(f"step1/{rank}", str(10 + rank))
    assert group.agree(10, list) == [10, 11, 12]
    store.set("step2/1", "11")
    with pytest.raises(TimeoutError, match="rank 2 did not answer: "):
        group.agree(10, list)


# --- links of known speed


@contextlib.contextmanager
def net(nodes, rate):
    if reason := namespaces.why_not():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    with namespaces.Namespaces(nodes, rate_mbit=rate) as made:
        workers = Workers(nodes, nic="eth0", wrap=made.inside)
        try:
            yield made, workers
        finally:
            workers.stop()


STREAM = """
import socket, sys, time
if sys.argv[1] == "send":
    with socket.create_connection((sys.argv[2], 7777), timeout=20) as wire:
        end = time.monotonic() + float(sys.argv[3])
        while time.monotonic() < end:
            wire.sendall(bytes(1 << 16))
else:
    with socket.create_server(("", 7777)) as server:
        print("ready", flush=True)
        wire, _ = server.accept()
        total, begin = 0, None
        while data := wire.recv(1 << 20):
            now = time.perf_counter()
            if begin is None:
                begin = first = now
            if now - begin > 1.5:  # the window has opened, the bucket is empty
                total += len(data)
            else:
                first = now
        print(total * 8 / (now - first) / 1e6)
"""


def stream(made, a, b, seconds=5.0):
    """Mbit/s of data that one plain TCP connection carries from node `a` to node `b`."""
    receive = [sys.executable, "-c", STREAM, "receive"]
    server = subprocess.Popen(made.inside(b, receive), stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout.readline() == "ready\n"
        send = [sys.executable, "-c", STREAM, "send", made.address(b), str(seconds)]
        subprocess.run(made.inside(a, send), check=True, timeout=60)
        return float(server.communicate(timeout=60)[0])
    finally:
        server.kill()


@pytest.mark.slow
def test_gloo_reaches_what_a_plain_tcp_stream_does_on_the_same_link():
    with net(4, 40) as (made, workers):
        plain = stream(made, 0, 1)
        wanted = [{"op": "all_reduce", "bytes": 0, "seconds": 2.0}, {**one("sendrecv", 0, seconds=2.0)}]
        answers = workers.group(range(4), wanted, address=made.address(0))
        together, pair = (result["busbw"] * 8e3 for result in answers[0]["results"])
    print(f"TCP {plain:.1f}, all_reduce {together:.1f}, sendrecv {pair:.1f} Mbit/s")
    assert 36 < plain < 40
    assert 0.9 * plain < together < 1.1 * plain  # 0.998 where nothing else runs
    assert 0.97 * plain < pair < 1.03 * plain


@pytest.mark.slow
def test_sendrecv_sees_one_direction_of_a_node_and_of_a_link():
    def mbit(a, b):
        answers = workers.group(range(3), [one("sendrecv", 0, **{"from": [a], "to": [b]})], address=made.address(0))
        return answers[0]["results"][0]["busbw"] * 8e3

    with net(3, 80) as (made, workers):
        made.shape(1, tx=40)
        assert (mbit(1, 0), mbit(0, 1)) == (pytest.approx(38, rel=0.06), pytest.approx(76, rel=0.06))
        made.shape(1, rx=56)
        assert (mbit(1, 2), mbit(0, 1)) == (pytest.approx(76, rel=0.06), pytest.approx(53, rel=0.06))
        made.shape(1)
        made.shape_link(0, 1, 40)
        assert (mbit(0, 1), mbit(1, 0)) == (pytest.approx(38, rel=0.06), pytest.approx(76, rel=0.06))
        assert mbit(0, 2) == pytest.approx(76, rel=0.06)
        made.shape_link(0, 1, None)
        assert mbit(0, 1) == pytest.approx(76, rel=0.06)


@pytest.mark.slow
def test_namespaces_of_a_process_that_is_gone_are_removed():
    if reason := namespaces.why_not():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    left = (
        "import os, namespaces; made = namespaces.Namespaces(2).__enter__(); print(made.tag, flush=True); os._exit(0)"
    )
    env = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}  # noqa: PTH120
    done = subprocess.run([sys.executable, "-c", left], capture_output=True, text=True, env=env, check=True)
    tag = done.stdout.strip()
    assert tag in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    namespaces.sweep()
    there = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
    there += subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert tag not in there
