"""The only place that starts a process."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any


@dataclass(frozen=True)
class Result:
    """`code` is None when the command was not there or did not answer in time; `err` says which."""

    code: int | None
    out: str
    err: str
    raw: bytes = b""  # of standard output, where it was asked for


Run = Callable[..., Result]


def run(
    argv: Sequence[str],
    *,
    timeout: float = 30.0,
    env: Mapping[str, str] | None = None,
    bounded: bool = False,
    stdin: bytes = b"",
    binary: bool = False,
    most: int = 0,
) -> Result:
    """A command without a shell, its text in the C locale so that it can be parsed.

    `bounded`: its time ends even when this process is killed, and Ctrl-C is not for it. For what must not go on
    unseen, nor be stopped half way. `most`: bytes of output; one that says more is ended.
    """
    environ = {**(os.environ if env is None else env), "LC_ALL": "C"}
    command = list(argv)
    if bounded and shutil.which("timeout") and shutil.which(argv[0]):
        command = ["timeout", "--kill-after=1", f"{timeout:g}", *command]
        timeout += 5
    try:
        if most:
            done = _at_most(most, command, stdin, timeout=timeout, env=environ, session=bounded)
        else:
            done = subprocess.run(
                command, capture_output=True, timeout=timeout, env=environ, input=stdin, check=False,
                start_new_session=bounded,
            )  # fmt: skip
    except FileNotFoundError:
        return Result(None, "", f"{argv[0]}: command not found")
    except TooMuch:
        return Result(None, "", f"{argv[0]} said more than {most >> 20} MiB")
    except subprocess.TimeoutExpired:
        return Result(None, "", f"{argv[0]} did not answer within {timeout:g} s")
    if command[0] == "timeout" and done.returncode in (124, 137):
        return Result(None, "", f"{argv[0]} did not answer within {command[2]} s")
    err = done.stderr.decode(errors="replace")
    if binary:
        return Result(done.returncode, "", err, done.stdout)
    return Result(done.returncode, done.stdout.decode(errors="replace"), err)


class TooMuch(Exception):
    """A command that does not stop talking."""


def _at_most(
    most: int, command: list[str], stdin: bytes, *, timeout: float, env: Mapping[str, str], session: bool
) -> subprocess.CompletedProcess[bytes]:
    """What `subprocess.run` does, in no more memory than that. Raises TooMuch, or what that raises."""
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=env, start_new_session=session)
    assert child.stdout
    assert child.stderr
    said = {child.stdout: bytearray(), child.stderr: bytearray()}

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL) if session else child.kill()  # `timeout` has a child of its own

    def listen(stream: IO[bytes]) -> None:
        with contextlib.suppress(OSError, ValueError):  # closed below
            while piece := os.read(stream.fileno(), 1 << 16):
                said[stream] += piece
                if len(said[stream]) > most:
                    end()
                    return

    def tell() -> None:
        assert child.stdin
        with contextlib.suppress(OSError, ValueError):
            child.stdin.write(stdin)
        with contextlib.suppress(OSError, ValueError):
            child.stdin.close()

    threads = [threading.Thread(target=listen, args=(stream,), daemon=True) for stream in said]
    threads.append(threading.Thread(target=tell, daemon=True))
    until = time.monotonic() + timeout
    try:
        for thread in threads:
            thread.start()
        for thread in threads:  # whoever is asked may leave somebody behind who holds on to them
            thread.join(max(0.0, until - time.monotonic()))
        if any(len(words) > most for words in said.values()):
            raise TooMuch
        if any(thread.is_alive() for thread in threads):
            raise subprocess.TimeoutExpired(command, timeout)
        code = child.wait(max(0.0, until - time.monotonic()))
    except BaseException:
        end()
        child.wait()
        raise
    for stream in said:
        stream.close()
    return subprocess.CompletedProcess(command, code, bytes(said[child.stdout]), bytes(said[child.stderr]))


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def spawn(argv: Sequence[str], *, log: str, cwd: str, env: Mapping[str, str]) -> int:
    """A process in a session of its own that outlives this one; its pid."""
    with open(log, "ab", opener=_private) as out, open(os.devnull, "rb") as null:  # noqa: PTH123 - descriptors for a child
        child = subprocess.Popen(
            list(argv),
            stdin=null,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=dict(env),
            start_new_session=True,
        )
    return child.pid


@contextlib.contextmanager
def signals_wait() -> Iterator[list[int]]:
    """SIGINT, SIGTERM and SIGHUP are written down instead of obeyed; whoever asked for this looks at the list."""
    came: list[int] = []

    def note(number: int, _: Any) -> None:
        came.append(number)

    if threading.current_thread() is not threading.main_thread():  # which has the signals to itself
        yield came
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
