"""A port for MASTER_PORT that no other program is likely to have taken.

`python3 port.py 4711 0` prints 20957 or whatever fits: the same for every try of the same job and
attempt, outside the range from which the kernel hands out ports to clients, and free right now. It runs
on the batch host before any module or environment is loaded, so Python 3.6 has to read it.
"""

import errno
import hashlib
import socket
import sys
from typing import Callable, Iterator, List, Optional, Tuple

TRIES = 50
EPHEMERAL = "/proc/sys/net/ipv4/ip_local_port_range"


def ephemeral(path: str = EPHEMERAL) -> Tuple[int, int]:
    """(32768, 60999) on most machines; that is also the answer where the kernel gives none."""
    try:
        with open(path, encoding="ascii") as file:
            low, high = (int(word) for word in file.read().split())
    except (OSError, ValueError):
        return 32768, 60999
    return low, high


def pool(taken: Tuple[int, int]) -> List[int]:
    """20000-29999, or where the kernel's own range covers most of that, what it leaves of 10000-65535."""
    low, high = taken
    for first, last in ((20000, 29999), (10000, 65535), (1025, 65535)):
        ports = [port for port in range(first, last + 1) if not low <= port <= high]
        if len(ports) >= 1000:
            return ports
    return list(range(20000, 30000))  # the kernel hands out every port there is: no place is better


def candidates(seed: str, *, taken: Optional[Tuple[int, int]] = None) -> Iterator[int]:
    """At most 50 ports, in the same order for the same seed."""
    ports = pool(taken or ephemeral())
    for number in range(TRIES):
        digest = hashlib.sha256(f"{seed}:{number}".encode("utf-8", "surrogateescape")).digest()
        yield ports[int.from_bytes(digest[:8], "big") % len(ports)]


def is_free(port: int) -> bool:
    """Whether every interface has it, IPv4 and IPv6. No SO_REUSEADDR: TIME_WAIT counts as taken."""
    for family, everywhere in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):  # noqa: S104
        try:
            with socket.socket(family, socket.SOCK_STREAM) as sock:
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind((everywhere, port))
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.ENOPROTOOPT):
                return False  # the others say that this machine has no IPv6 (or no IPv4)
    return True


def pick(seed: str, *, free: Callable[[int], bool] = is_free) -> Optional[int]:
    return next((port for port in candidates(seed) if free(port)), None)


def main(arguments: List[str]) -> int:
    if len(arguments) != 2:
        print("usage: port.py JOBID ATTEMPT", file=sys.stderr)
        return 2
    job, attempt = arguments
    port = pick(f"{job}:{attempt}")
    if port is None:
        print(
            f"dslaunch: none of {TRIES} ports tried for job {job} is free on this machine; "
            "set MASTER_PORT yourself, or look at `ss -ltn` for what holds them",
            file=sys.stderr,
        )
        return 1
    print(port)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
