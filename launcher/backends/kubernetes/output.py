"""What pods print: read through the API server, in the order of its timestamps, each line once whatever breaks."""

from __future__ import annotations

import contextlib
import heapq
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from queue import Empty, Queue
from typing import Any

from launcher.backends.kubernetes import api
from launcher.backends.kubernetes.watch import server_time
from launcher.errors import Unreachable

Stamped = tuple[int, bytes]  # nanoseconds since the epoch, and a line
Pod = str | Callable[[Any], str]  # its name, or what asks for it: pods of a Job come again by another one
AGAIN = 2.0  # seconds before a pod without output, or with an end of it, is asked again
WINDOW = 1.0  # seconds that a line waits for older ones of other pods
HELD = 20_000  # lines in memory; then readers wait


class Nothing(Exception):
    """The pod has no output: it is not there, or waits for its image. The server's words."""


def when(text: bytes) -> int | None:
    """2026-01-01T00:00:00.5Z, and with any zone, in nanoseconds; None where that is no time."""
    whole, _, rest = text.partition(b".")
    digits = rest.rstrip(b"Z")
    for sign in (b"+", b"-"):
        digits = digits.partition(sign)[0]
    zone = rest[len(digits) :] if rest else whole[19:]
    try:
        at = datetime.fromisoformat((whole[:19] + (b"+00:00" if zone in (b"Z", b"") else zone)).decode("ascii"))
        return int(at.timestamp()) * 10**9 + int(digits[:9].ljust(9, b"0") or 0)
    except ValueError:
        return None


def of_pod(
    namespace: str,
    pod: Pod,
    *,
    follow: bool,
    over: Callable[[], bool],
    sleep: Callable[[float], object] = time.sleep,
    container: str = "pytorch",
) -> Iterator[Stamped]:
    """Lines of one pod. Followed, a broken connection is taken up after the last line, a pod created again too.

    The server takes whole seconds, so that lines of the last second come again: those are passed.
    """
    last, same = 0, 0  # the newest time, and how many lines had it
    ahead: float | None = None  # of the server's clock to ours
    failed = 0
    while True:
        options: dict[str, Any] = {"follow": True} if follow else {"_request_timeout": api.TIMEOUT}
        if last and ahead is not None:
            options["since_seconds"] = max(1, math.ceil(time.monotonic() + ahead - last / 1e9) + 2)
        finished = over()  # before reading: nothing is printed after it
        try:
            response = api.ask(partial(_open, namespace=namespace, pod=pod, container=container, options=options))
            now = server_time(response.headers.get("Date", ""))
            ahead = now - time.monotonic() if now else ahead
            passed, skip, at = 0, same, last
            for raw in api.lines(response):
                stamp, _, text = raw.partition(b" ")
                found = when(stamp)
                at, line = (at, raw) if found is None else (found, text)
                if at < last:
                    continue
                if at == last and passed < skip:
                    passed += 1
                    continue
                same = same + 1 if at == last else 1
                last, failed = at, 0
                yield at, line
        except Nothing:
            if not follow:
                raise
        except Exception as error:
            if not follow or not (isinstance(error, Unreachable) or api.away(error)):
                with api.Answers():
                    raise
            failed += 1
        if not follow or finished:
            return
        sleep(AGAIN * min(2**failed, 16) if failed > 1 else AGAIN)


def _open(library: Any, *, namespace: str, pod: Pod, container: str, options: dict[str, Any]) -> Any:
    core = library.client.CoreV1Api()
    name = pod if isinstance(pod, str) else pod(library)
    if not name:
        raise Nothing("the pod is not there")
    try:
        return core.read_namespaced_pod_log(
            name, namespace, container=container, timestamps=True, _preload_content=False, **options
        )
    except library.client.ApiException as error:
        if error.status in (400, 404):  # 400: the container waits for its image
            raise Nothing(api.words(error)) from None
        raise


def merged(namespace: str, pods: Sequence[Pod], container: str = "pytorch") -> Iterator[bytes]:
    """All pods' lines in time order, one of each in memory. Raises Nothing when none has any."""
    silent: list[str] = []

    def lines(pod: Pod, place: int) -> Iterator[tuple[int, int, bytes]]:
        try:
            for at, line in of_pod(namespace, pod, follow=False, over=lambda: True, container=container):
                yield at, place, line
        except Nothing as error:
            silent.append(str(error))

    for _, _, line in heapq.merge(*(lines(pod, place) for place, pod in enumerate(pods))):
        yield line
    if len(silent) == len(pods):
        raise Nothing(silent[0])


def followed(
    namespace: str, pods: Sequence[Pod], over: Callable[[], bool], container: str = "pytorch"
) -> Iterator[bytes]:
    """The same as it is printed, until the job is over: a line waits a second for older ones."""
    came: Queue[tuple[int, int, bytes] | BaseException | None] = Queue(maxsize=HELD)
    ended, stop = threading.Event(), threading.Event()

    def read(pod: Pod, place: int) -> None:
        try:
            how: dict[str, Any] = {"follow": True, "over": ended.is_set, "sleep": ended.wait}
            for at, line in of_pod(namespace, pod, container=container, **how):
                while not stop.is_set():
                    with contextlib.suppress(Exception):
                        came.put((at, place, line), timeout=1.0)
                        break
                if stop.is_set():
                    return
        except BaseException as error:
            came.put(error)
        finally:
            came.put(None)

    for place, pod in enumerate(pods):
        threading.Thread(target=read, args=(pod, place), daemon=True).start()
    held: list[tuple[int, int, int, float, bytes]] = []
    left, count, asked, given_up = len(pods), 0, time.monotonic(), math.inf
    try:
        while left and time.monotonic() < given_up:
            with contextlib.suppress(Empty):
                one = came.get(timeout=0.2)
                while True:
                    if isinstance(one, BaseException):
                        raise one
                    if one is None:
                        left -= 1
                    else:
                        count += 1
                        heapq.heappush(held, (one[0], one[1], count, time.monotonic(), one[2]))
                    if len(held) >= HELD:
                        break
                    one = came.get_nowait()
            while held and (held[0][3] < time.monotonic() - WINDOW or len(held) >= HELD):
                yield heapq.heappop(held)[-1]
            if not ended.is_set() and time.monotonic() - asked > AGAIN:
                asked = time.monotonic()
                if over():
                    ended.set()
                    given_up = time.monotonic() + 15 * AGAIN  # a node that is lost keeps its connection open
        while held:
            yield heapq.heappop(held)[-1]
    finally:
        ended.set()
        stop.set()
