"""Names for machines: `gpu[001-004]` <-> a list of hosts <-> a DeepSpeed hostfile."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, groupby, product

from launcher.errors import Problem, UserError
from launcher.record import record

MOST_HOSTS = 200_000

_LONGEST_NAME = 253  # RFC 1035, written out
_LONGEST_NUMBER = 15  # digits: Slurm counts in 64 bits, and prints nonsense past them
_LONGEST_RANGE = 65_536  # scontrol refuses a[1-65537] and takes a[1-65536,65537]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_ILLEGAL = re.compile(r"[^A-Za-z0-9._-]")
_STRUCTURE = re.compile(r"[\[\],\n]|\Z")
_BRACKETS = re.compile(r"\[[^]]*\]")
_ADDRESS = re.compile(r"\[([^][]+)\](?::22)?|([^][]+)")
_NUMBER = rf"[ \t]*([0-9]{{1,{_LONGEST_NUMBER}}})[ \t]*"
_RANGE = re.compile(rf"{_NUMBER}(?:-{_NUMBER}(?:/{_NUMBER})?)?")
_DIGITS = re.compile(r"([0-9]+)")
_LAST_NUMBER = re.compile(rf"((?:.*[^0-9])?)([0-9]{{1,{_LONGEST_NUMBER}}})([^0-9]+)")
_WORD = re.compile(r"[^ \t]+")
_COMMENT = re.compile(r"(?:^|[ \t])#.*")
_SLOTS = re.compile(r"slots=([0-9]{1,4})")
_GPUS = re.compile(r"(?:[A-Za-z0-9_.-]+:)*([0-9]{1,4})")
_TASKS = re.compile(r"([0-9]{1,4})(?:\(x([0-9]{1,6})\))?")

_Flaw = tuple[int, str, str]  # how far into the text, what is wrong there, what would work
_Order = tuple[str, tuple[tuple[int, str], ...]]


@record
class Host:
    """One line of a hostfile: Host("gpu001", slots=8) runs 8 ranks."""

    name: str
    slots: int


# Node lists


def expand(text: str) -> tuple[str, ...]:
    """'gpu[08-10,7]' is gpu08, gpu09, gpu10, gpu7; 'a[1-2]-ib[0-1]' is 4 names, the last bracket fastest.

    `scontrol show hostnames` and ClusterShell agree on the names. A name that comes twice stays where it came
    first: a node list is a set, as it is to ClusterShell (scontrol repeats it, a hostfile refuses it).
    A list of more than 200,000 is refused before it is made.
    """
    flaws: list[_Flaw] = []
    names: list[Iterable[str]] = []
    total = 0
    for start, item in _items(text, flaws):
        parts, size = _parts(start, item, flaws)
        if total <= MOST_HOSTS < total + size:
            what = f"{_show(item)} brings the list to {total + size:,} hosts, and {MOST_HOSTS:,} is the most"
            flaws.append((start, what, "look for a digit too many, or split the list"))
        total += size
        if not flaws:
            names.append(map("".join, product(*parts)))
    if not names and not flaws:
        raise UserError(Problem("the node list is empty", hint="name at least one host: gpu[001-004]"))
    if flaws:
        raise UserError(
            *(Problem(f"node list, {_spot(text, at)}: {what}", hint=hint) for at, what, hint in sorted(flaws))
        )
    return tuple(dict.fromkeys(chain.from_iterable(names)))


def fold(hosts: Iterable[str]) -> str:
    """gpu10, gpu9, gpu08 is 'gpu[08,9-10]'; n1-ib0, n2-ib0 is 'n[1-2]-ib[0]'.

    `expand` gives the same hosts back, sorted: by letters, then by numbers as numbers, so one set of hosts
    has one text. Two numbers of a name can fold, the last of them at its end, because scontrol refuses
    n[1-2].cluster; such names are written out. No hosts is ''.
    """
    strays: list[Problem] = []
    plain: list[str] = []
    numbered: dict[str, list[str]] = {}
    for host in dict.fromkeys(hosts):
        name = _address(host) or host
        stem = name.rstrip("0123456789")
        if not _address(name) and (flaw := _flaw(name, longest=len(name))):
            strays.append(Problem(f"'{_show(name)}' is not a host: {flaw[1]}", hint=flaw[2]))
        elif ":" in name or not 0 < len(name) - len(stem) <= _LONGEST_NUMBER:
            plain.append(name)
        else:
            numbered.setdefault(stem, []).append(name[len(stem) :])
    if strays:
        raise UserError(*strays)

    stems = [(_order(name), name, "") for name in dict.fromkeys(plain)]
    stems += [(_order(stem + "0"), stem, _ranges(numbers)) for stem, numbers in numbered.items()]
    texts = []
    for (head, tail, ranges), same in groupby(sorted(stems), key=lambda entry: _around(entry[1], entry[2])):
        alike = [stem for _, stem, _ in same]
        if len(alike) > 1:
            numbers = [stem[len(head) : len(stem) - len(tail)] for stem in alike]
            texts.append(f"{head}[{_ranges(numbers)}]{tail}[{ranges}]")
        else:
            texts.append(alike[0] + (ranges if ranges.isdigit() or not ranges else f"[{ranges}]"))
    return ",".join(texts)


def endpoint(name: str, *, port: int) -> str:
    """gpu001 at 29500 is gpu001:29500; fe80::1%eth0 is [fe80::1%eth0]:29500, which fits after tcp://."""
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


# Hostfiles


def render(hosts: Iterable[Host]) -> str:
    r"""Host("gpu001", slots=8) is the line 'gpu001 slots=8\n'."""
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)


def parse(text: str, *, source: str = "hostfile") -> tuple[Host, ...]:
    """'gpu001 slots=8  # rack 2' is Host("gpu001", slots=8); [::1]:22 is the host ::1.

    Stricter than DeepSpeed, which reads slots=8x as 8 and takes gpu1 and gpu1.cluster for two machines.
    """
    problems: list[Problem] = []
    hosts: list[Host] = []
    lines: dict[str, tuple[int, str]] = {}  # a machine's name -> its line, and the name as written there
    shorter: dict[str, tuple[int, str]] = {}  # what else it answers to: gpu1 for gpu1.cluster
    for number, line in enumerate(text.split("\n"), start=1):
        words = list(_WORD.finditer(_COMMENT.sub("", line.removesuffix("\r"))))
        if not words:
            continue
        host, flaws = _host(words)
        key, *aliases = _aliases(host.name)
        earlier = lines.get(key) or shorter.get(key) or next((lines[a] for a in aliases if a in lines), None)
        if earlier:
            what = f"{_show(host.name)} on line {number} is {_show(earlier[1])} on line {earlier[0]} again"
            flaws.append((words[0].start(), what, "keep one of the two lines, with all its slots"))
        else:
            lines[key] = number, host.name
            for alias in aliases:
                shorter.setdefault(alias, (number, host.name))
        hosts.append(host)
        problems += [
            Problem(what, hint=hint, where=f"{source}:{number}:{at + 1}") for at, what, hint in sorted(flaws)
        ]
    if not hosts:
        problems.append(Problem("no host is named", hint="one a line: gpu001 slots=8", where=f"{source}:1:1"))
    if problems:
        raise UserError(*problems)
    return tuple(hosts)


def _host(words: list[re.Match[str]]) -> tuple[Host, list[_Flaw]]:
    """[gpu001] [slots=8] is Host("gpu001", slots=8) and no flaws."""
    flaws: list[_Flaw] = []
    written = words[0].group()
    address = _address(written)
    if not address and (flaw := _flaw(written, longest=len(written))):
        at, what, hint = flaw
        flaws.append((words[0].start() + at, what, hint))

    slots = 0
    if len(words) == 1:
        flaws.append((words[0].end(), "slots= is missing", f"{_show(written)} slots=8"))
    else:
        match = _SLOTS.fullmatch(words[1].group())
        slots = int(match[1]) if match else 0
        if not slots:
            what = f"{_show(words[1].group())} is not a number of slots"
            flaws.append((words[1].start(), what, "slots=8: a whole number, 1 to 9999"))
    if len(words) > 2:
        what = f"{_show(' '.join(word.group() for word in words[2:]))} follows the slots"
        flaws.append((words[2].start(), what, "one host a line; a comment starts with #"))
    return Host(address or written, slots), flaws


def _aliases(name: str) -> list[str]:
    """GPU1.rack2.site is gpu1.rack2.site, gpu1.rack2 and gpu1; 10.0.0.1 is only itself."""
    if ":" in name:
        return [_ipv6(name) or name]
    labels = name.lower().rstrip(".").split(".")
    if labels[-1].isdigit():
        return [".".join(labels)]
    return [".".join(labels[:count]) for count in range(len(labels), 0, -1)]


# Allocations


def from_environment(env: Mapping[str, str]) -> tuple[Host, ...]:
    """SLURM_JOB_NODELIST=gpu[1-4] and SLURM_TASKS_PER_NODE=8(x3),4: gpu1 to gpu3 have 8 slots, gpu4 has 4.

    GPUs per node go first. SLURM_GPUS_ON_NODE speaks for one node only, so uneven tasks overrule it.
    No node list is an error: this machine alone is never what was meant.
    """
    variable = next((name for name in ("SLURM_JOB_NODELIST", "SLURM_NODELIST") if env.get(name)), None)
    if variable is None:
        raise UserError(
            Problem(
                "not inside a Slurm allocation: SLURM_JOB_NODELIST is not set",
                hint="run it inside sbatch or salloc, or name the hosts: --nodes 'gpu[001-004]'",
            )
        )
    try:
        names = expand(env[variable])
    except UserError as error:
        raise UserError(*(replace(problem, where=variable) for problem in error.problems)) from None
    return tuple(Host(name, count) for name, count in zip(names, _slots(env, nodes=len(names)), strict=True))


def _slots(env: Mapping[str, str], *, nodes: int) -> list[int]:
    """On 4 nodes, SLURM_GPUS_PER_NODE=a100:8 is 8, 8, 8, 8."""
    if everywhere := _gpus(env, "SLURM_GPUS_PER_NODE"):
        return [everywhere] * nodes

    here = _gpus(env, "SLURM_GPUS_ON_NODE")
    tasks = _tasks(env)
    counts = {count for count, _ in tasks}
    covered = sum(repeats for _, repeats in tasks)
    if here and (covered != nodes or len(counts) == 1):  # under srun the tasks are the step's, not the job's
        return [here] * nodes

    ask = "ask for the same on every node: #SBATCH --gpus-per-node=8"
    said = f"SLURM_TASKS_PER_NODE={_show(env.get('SLURM_TASKS_PER_NODE', ''))}"
    if not tasks:
        raise UserError(Problem("the allocation does not say how many GPUs a node has", hint=ask))
    if covered != nodes:
        what = f"{said} speaks of {covered:,} nodes, and the node list has {nodes:,}"
        raise UserError(Problem(what, hint="run it in the batch script itself, not under srun"))
    if here and here not in counts:
        what = f"SLURM_GPUS_ON_NODE={here} and {said} disagree, so a node's GPUs are not known"
        raise UserError(Problem(what, hint=ask))
    return [count for count, repeats in tasks for _ in range(repeats)]


def _gpus(env: Mapping[str, str], variable: str) -> int:
    """'8' is 8, 'a100:8' is 8, 'a100:4,h100:2' is 6; 0 is not set."""
    if not env.get(variable):
        return 0
    matches = [_GPUS.fullmatch(part) for part in env[variable].split(",")]
    total = sum(int(match[1]) for match in matches if match)
    if not total or None in matches:
        what = f"{_show(env[variable])} is not a number of GPUs"
        raise UserError(Problem(what, hint="8 or a100:8, from #SBATCH --gpus-per-node=8", where=variable))
    return total


def _tasks(env: Mapping[str, str]) -> list[tuple[int, int]]:
    """'8(x3),4' is 8 three times and 4 once."""
    text = env.get("SLURM_TASKS_PER_NODE")
    if not text:
        return []
    matches = [_TASKS.fullmatch(part) for part in text.split(",")]
    tasks = [(int(match[1]), int(match[2] or 1)) for match in matches if match]
    if None in matches or not all(count and repeats for count, repeats in tasks):
        what, where = f"{_show(text)} is not a number of tasks for each node", "SLURM_TASKS_PER_NODE"
        raise UserError(Problem(what, hint="8(x3),4 is 8 on three nodes and 4 on one", where=where))
    return tasks


# Reading one name


def _flaw(name: str, *, longest: int) -> _Flaw | None:
    """gpu_1 is fine; gpu$1 has a $ at 3."""
    if not name or name[0] in "-.":
        return 0, f"a host name cannot start with {name[:1]!a}", "start with a letter or a digit"
    before, colon, port = name.rpartition(":")
    if colon and port.isdigit() and (":" not in before or before.endswith("]")):
        what = f"port {_show(port)} is not part of a name"
        return len(before), what, "set Port for this host in ~/.ssh/config"
    if name.count(":") > 1:
        return 0, f"{_show(name)} is not an IPv6 address", "2001:db8::1, [::1] or fe80::1%eth0"
    if illegal := _ILLEGAL.search(name):
        what = f"{illegal.group()!a} cannot stand in a host name"
        return illegal.start(), what, "letters, digits, '.', '_' and '-' can"
    if longest > _LONGEST_NAME:
        return 0, f"a name of {longest:,} characters; {_LONGEST_NAME} is the most", "look for a missing comma"
    return None


def _address(text: str) -> str | None:
    """'::1', '[::1]' and '[::1]:22' are ::1, since 22 is what ssh uses anyway; 'gpu1' is None."""
    if ":" not in text or not (match := _ADDRESS.fullmatch(text)):
        return None
    bare: str = match[1] or match[2]
    return bare if _ipv6(bare) else None


def _ipv6(text: str) -> str | None:
    """0:0::1%eth0 is ::1%eth0, the one way to write it; 1::2::3 is None."""
    from ipaddress import IPv6Address  # rare, and slow to import

    address, percent, zone = text.partition("%")
    if percent and not _NAME.fullmatch(zone):
        return None
    try:
        return str(IPv6Address(address)) + percent + zone
    except ValueError:
        return None


def _show(text: str) -> str:
    """At most 60 characters, and none that a terminal would obey."""
    return (text if len(text) <= 60 else text[:57] + "...").encode("unicode_escape").decode("ascii")


# Reading a list


def _spot(text: str, at: int) -> str:
    """Offset 8 of 'gpu1\\ngpu[1' is line 2, column 4."""
    line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
    return f"line {line}, column {column}" if "\n" in text else f"column {column}"


def _items(text: str, flaws: list[_Flaw]) -> Iterator[tuple[int, str]]:
    """'a[1,2], b' is (0, 'a[1,2]') and (8, 'b'): what stands between commas and newlines outside brackets."""
    start, opened, sound = 0, -1, True
    for match in _STRUCTURE.finditer(text):
        at, mark = match.start(), match.group()
        if mark == "[":
            if opened >= 0:
                flaws.append((opened, "this [ is not closed before the next one", "gpu[1-4],b[1-2]"))
                sound = False
            opened = at
        elif mark == "]":
            if opened < 0 and sound:
                flaws.append((at, "this ] has no [ before it", "gpu[1-4]"))
                sound = False
            opened = -1
        elif mark != "," or opened < 0:
            if opened >= 0:
                flaws.append((opened, "this [ is never closed", "gpu[1-4]"))
                sound = False
            raw = text[start:at]
            item = raw.strip()
            if item and sound:
                yield start + raw.index(item[0]), item
            elif not item and mark == ",":
                flaws.append((at, "no host stands before this comma", "gpu1,gpu2"))
            start, opened, sound = at + 1, -1, True


def _parts(start: int, item: str, flaws: list[_Flaw]) -> tuple[list[Iterable[str]], int]:
    """'a[1-2]-ib[0]' is [a] [1 2] [-ib] [0] [''], which makes 2 names."""
    if len(item) <= _LONGEST_NAME and _NAME.fullmatch(item):
        return [(item,)], 1
    if address := _address(item):
        return [(address,)], 1

    parts: list[Iterable[str]] = []
    at, size, longest = start, 1, 0
    pieces = [item] if ":" in item else re.split(r"[\[\]]", item)
    for index, piece in enumerate(pieces):
        if index % 2:  # inside brackets
            ranges = list(_numbers(at, piece, flaws))
            parts.append(chain.from_iterable(map(f"%0{width}d".__mod__, numbers) for numbers, width in ranges))
            size = min(size * sum(len(numbers) for numbers, _ in ranges), 10**18)  # enough digits to print
            longest += max((max(width, len(str(numbers[-1]))) for numbers, width in ranges), default=0)
        else:
            parts.append((piece,))
            longest += len(piece)
        at += len(piece) + 1
    # a bracket counts as digits here, so that offsets stay
    name = item if ":" in item else _BRACKETS.sub(lambda found: "0" * len(found.group()), item)
    if flaw := _flaw(name, longest=longest):
        offset, what, hint = flaw
        flaws.append((start + offset, what, hint))
    return parts, size


def _numbers(start: int, text: str, flaws: list[_Flaw]) -> Iterator[tuple[range, int]]:
    """'098-102/2,7' is 98, 100, 102 three digits wide, and 7 one digit wide."""
    for part in text.split(","):
        at, what = start, part.strip()
        start += len(part) + 1
        match = _RANGE.fullmatch(part)
        if not match:
            if not what:
                wrong = "an empty range"
            elif any(len(digits) > _LONGEST_NUMBER for digits in _DIGITS.findall(part)):
                wrong = f"{_show(what)} has a number of more than {_LONGEST_NUMBER} digits"
            else:
                wrong = f"{_show(what)} is not a number or a range"
            flaws.append((at, wrong, "7, 1-4 or 1-9/2"))
            continue
        first, last, step = match[1], match[2] or match[1], match[3] or "1"
        if int(last) < int(first):
            flaws.append((at, f"{what} runs backwards", f"{last}-{first}"))
        elif int(step) == 0:
            flaws.append((at, f"{what} has a step of 0", f"{first}-{last}"))
        elif len(first) != len(last) and (last[0] == "0" or len(first) > len(last)):
            # [01-100] is fine: Slurm itself says gpu[01-100]
            width = max(len(first), len(last))
            hint = f"{first.zfill(width)}-{last.zfill(width)}, or {int(first)}-{int(last)}"
            flaws.append((at, f"{what} pads its two ends differently", hint))
        else:
            yield range(int(first), int(last) + 1, int(step)), len(first)


# Writing a list


def _order(name: str) -> _Order:
    """gpu9 is before gpu10, and every gpu before any n1-ib0."""
    pieces = _DIGITS.split(name)
    return "0".join(pieces[::2]), tuple((int(digits), digits) for digits in pieces[1::2])


def _around(stem: str, ranges: str) -> tuple[str, str, str]:
    """n12-ib is what stands around 12: n, -ib. Equal ones fold over that number too."""
    match = _LAST_NUMBER.fullmatch(stem) if ranges else None
    return (match[1], match[3], ranges) if match else (stem, "", ranges)


def _ranges(numbers: Iterable[str]) -> str:
    """8, 9, 10, 12 is '8-10,12'; 09, 10 is '09-10'; 99, 100 is '99-100', and 01 to 100 is '01-99,100'."""
    texts: list[str] = []
    first = last = ""
    least = latest = -2
    for value, digits in sorted((int(digits), digits) for digits in numbers):
        follows = value == latest + 1 and value - least < _LONGEST_RANGE
        # ClusterShell wants padded ends of one length, and only a first end says how wide
        unpadded = digits[0] != "0" and (first[:1] != "0" or first == "0")
        if follows and (len(digits) == len(first) or unpadded):
            last, latest = digits, value
            continue
        if first:
            texts.append(first if first == last else f"{first}-{last}")
        first = last = digits
        least = latest = value
    return ",".join([*texts, first if first == last else f"{first}-{last}"])
