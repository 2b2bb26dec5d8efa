"""What torch.save wrote, told whole from damaged: a zip file of stored records, or its old format. Never unpickled.

A pickle is only read as the list of its instructions, which runs nothing.
"""

from __future__ import annotations

import os
import pickletools
import re
import struct
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, BinaryIO

END, END64, LOCATOR = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
TAIL = 22 + 65535 + 20  # the end record, the longest comment, zip64's locator
BLOCK = 1 << 20
PICKLE = 64 << 20  # bytes of one that are read: 700 parameters take 0.1 MB
OLD = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # how files of torch.save began before torch 1.6

if TYPE_CHECKING:
    Words = dict[str, object]
# In the pickle of a file of model states, what is written once and right beside its key.
NUMBERS = ("global_steps", "dp_world_size", "mp_world_size")
LAYER = re.compile(r"\d+\.")  # a pipeline's parameters are named by the layer: 3.weight
FOLDER = 0x10  # the attribute of a record that is none; all of torch.save's are files, stored as they are


class Damaged(Exception):
    """In words that follow a file's name: "ends at byte 100 of 200"."""


@dataclass(frozen=True)
class Record:
    name: str
    at: int  # of its local header
    size: int
    crc: int
    flags: int


@dataclass(frozen=True)
class Archive:
    """`stem` is the file's name when it was written, "archive" where torch did not know it."""

    stem: str
    records: list[Record]
    words: Words = field(default_factory=dict)


def read(path: str, *, contents: bool = False, words: bool = False) -> Archive:
    """The archive as far as its structure tells; with `contents` every record is held against its checksum."""
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise Damaged("is empty")
        if os.pread(file.fileno(), len(OLD), 0) == OLD:
            _old(path, size)
            return Archive("archive", [])
        start, length, count = _end(file, size)
        records = _directory(os.pread(file.fileno(), length, start), count)
        said = _records(file, records, start, contents=contents, words=words)
    stems = {record.name.partition("/")[0] for record in records}
    if len(stems) != 1 or not any(record.name.endswith("/data.pkl") for record in records):
        raise Damaged("is a zip file, and not one of torch.save")
    return Archive(stems.pop(), records, said)


def _end(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Where the directory of the records starts, its length, and how many it names."""
    tail = os.pread(file.fileno(), TAIL, max(0, size - TAIL))
    at = tail.rfind(END)
    if at < 0 or len(tail) - at < 22:
        begins = os.pread(file.fileno(), 4, 0) == b"PK\x03\x04"
        raise Damaged("was cut: its end is missing" if begins else "is not a file of torch.save")
    disk, first, here, count, length, start, comment = struct.unpack("<HHHHIIH", tail[at + 4 : at + 22])
    if at + 22 + comment != len(tail):
        raise Damaged("has bytes after its end")
    last = size - len(tail) + at  # where the directory has to end
    said = (disk, first, here, count, length, start)
    if at >= 20 and tail[at - 20 : at - 16] == LOCATOR:
        disk, last, disks = struct.unpack("<IQI", tail[at - 16 : at])
        more = os.pread(file.fileno(), 56, last) if last < size else b""
        if more[:4] != END64 or len(more) < 56 or disk or disks != 1:
            raise Damaged("has a damaged end")
        rest, _, _, disk, first, here, count, length, start = struct.unpack("<QHHIIQQQQ", more[4:56])
        ends = (last + 12 + rest, size - len(tail) + at - 20)
        narrow = (0, 0, count, count, length, start)
        wide = [value in (real, 2 ** (8 * n) - 1) for value, real, n in zip(said, narrow, (2, 2, 2, 2, 4, 4))]  # noqa: B905 - new in 3.10
        if ends[0] != ends[1] or not all(wide):
            raise Damaged("has a damaged end")
    if disk or first or here != count or start + length != last or not count:
        raise Damaged("has a damaged end")
    return start, length, count


def _directory(data: bytes, count: int) -> list[Record]:
    records, at = [], 0
    for _ in range(count):
        head = data[at : at + 46]
        if len(head) < 46 or head[:4] != b"PK\x01\x02":
            raise Damaged("has a damaged directory")
        flags, method = struct.unpack("<HH", head[8:12])
        crc, packed, size = struct.unpack("<III", head[16:28])
        name_length, extra_length, comment_length = struct.unpack("<HHH", head[28:34])
        (offset,) = struct.unpack("<I", head[42:46])
        name = data[at + 46 : at + 46 + name_length]
        extra = data[at + 46 + name_length : at + 46 + name_length + extra_length]
        wide = _wide(extra)
        if size == 0xFFFFFFFF:
            size = _next(wide)
        if packed == 0xFFFFFFFF:
            packed = _next(wide)
        if offset == 0xFFFFFFFF:
            offset = _next(wide)
        (attributes,) = struct.unpack("<I", head[38:42])
        if method or packed != size or head[34:36] != b"\0\0" or attributes & FOLDER:
            raise Damaged("has a damaged directory")
        records.append(Record(name.decode("utf-8", "replace"), offset, packed, crc, flags))
        at += 46 + name_length + extra_length + comment_length
    if at != len(data):
        raise Damaged("has a damaged directory")
    return sorted(records, key=lambda record: record.at)


def _wide(extra: bytes) -> list[int]:
    """zip64's numbers of one record, those that 32 bits cannot hold."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack("<HH", extra[at : at + 4])
        if kind == 1:
            body = extra[at + 4 : at + 4 + length // 8 * 8]
            return list(struct.unpack(f"<{len(body) // 8}Q", body))
        at += 4 + length
    return []


def _next(numbers: list[int]) -> int:
    if not numbers:
        raise Damaged("has a damaged directory")
    return numbers.pop(0)


def _records(file: BinaryIO, records: list[Record], end: int, *, contents: bool, words: bool) -> Words:
    said: Words = {}
    for number, record in enumerate(records):
        name = record.name.encode()
        head = os.pread(file.fileno(), 30 + len(name), record.at)
        if len(head) < 30 + len(name) or head[:4] != b"PK\x03\x04" or head[30:] != name:
            raise Damaged(f"has no record {record.name} where it should be")
        name_length, extra_length = struct.unpack("<HH", head[26:30])
        at = record.at + 30 + name_length + extra_length
        limit = records[number + 1].at if number + 1 < len(records) else end
        flags, method = struct.unpack("<HH", head[6:10])
        if name_length != len(name) or (flags, method) != (record.flags, 0) or at + record.size > limit:
            raise Damaged(f"has a damaged record {record.name}")
        if contents and checksum(file, at, record.size) != record.crc:
            raise Damaged(f"has changed since it was written: record {record.name} does not match its checksum")
        if words and record.name.endswith("/data.pkl") and record.size <= PICKLE:
            said = spelled(os.pread(file.fileno(), record.size, at))
    return said


def checksum(file: BinaryIO, at: int, size: int) -> int:
    crc = 0
    for start in range(at, at + size, BLOCK):
        crc = zlib.crc32(os.pread(file.fileno(), min(BLOCK, at + size - start), start), crc)
    return crc


def spelled(pickle: bytes) -> Words:
    """{"dp_world_size": 4, "global_steps": 200, "stage": 2, "ds_version": "0.19.8"}, from instructions alone."""
    found: Words = {}
    layers = set()
    experts: list[int] | None = None  # those of each layer that has some, while its list is read
    memo: dict[Any, object] = {}
    key: object = None
    inside = False  # zero_optimization of the configuration: its stage
    value: object = None
    try:
        for code, argument, _ in pickletools.genops(pickle):
            name = code.name
            if name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = value
                continue
            if name == "MEMOIZE":
                memo[len(memo)] = value
                continue
            value = None
            if name in ("BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2"):
                value = argument
            elif name in ("BINGET", "LONG_BINGET"):
                value = memo.get(argument)
            if experts is not None and name in ("EMPTY_LIST", "MARK"):
                continue
            if experts is not None and isinstance(value, int):
                experts.append(value)
                continue
            if experts:
                found.setdefault("experts", tuple(experts))
            experts = [] if value == "num_experts" else None
            if isinstance(value, int) and key in NUMBERS:
                found.setdefault(str(key), value)
            elif isinstance(value, int) and key == "stage" and inside:
                found.setdefault("stage", value)
            elif isinstance(value, str) and key == "ds_version":
                found.setdefault("ds_version", value)
            elif isinstance(value, str) and LAYER.match(value):
                layers.add(int(value.partition(".")[0]))
            inside = inside or value == "zero_optimization"
            key = value
    except (ValueError, IndexError, UnicodeDecodeError):
        raise Damaged("has a damaged record data.pkl") from None
    found["layers"] = frozenset(layers)
    return found


SIZES = {"Double": 8, "Long": 8, "ComplexFloat": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2,
         "Char": 1, "Byte": 1, "Bool": 1, "ComplexDouble": 16}  # fmt: skip


def _old(path: str, size: int) -> None:
    """The old format holds pickles, then each storage with its length: where they end, the file has to end."""
    with open(path, "rb") as file:
        try:
            for _ in range(3):  # the magic number, the protocol, the machine
                for _instruction in pickletools.genops(file):
                    pass
            storages = _storages(file)
            keys = [argument for code, argument, _ in pickletools.genops(file) if "UNICODE" in code.name]
        except (ValueError, IndexError, UnicodeDecodeError):
            raise Damaged("was cut, or changed since it was written") from None
        at = file.tell()
        for key in keys:
            file.seek(at)
            length = file.read(8)
            if key not in storages or len(length) < 8:
                raise Damaged("was cut: its end is missing")
            (numel,) = struct.unpack("<q", length)
            at += 8 + numel * storages[key]
    if at != size:
        raise Damaged(f"has {size} bytes, and its contents end at {at}")


def _storages(file: BinaryIO) -> dict[str, int]:
    """{"94051": 4}: bytes of an element of each storage, from ("storage", torch.FloatStorage, "94051", ...)."""
    found: dict[str, int] = {}
    memo: dict[Any, object] = {}
    stack: list[object] = []
    for code, argument, _ in pickletools.genops(file):
        if code.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1] if stack else None
            continue
        if code.name == "MARK":
            continue
        if code.name == "BINPERSID":
            kinds = [w for w in stack[-8:] if isinstance(w, str) and w.startswith("torch ") and w.endswith("Storage")]
            at = max((i for i, w in enumerate(stack) if kinds and w == kinds[-1]), default=-1)
            if at >= 0 and at + 1 < len(stack):
                found[str(stack[at + 1])] = SIZES.get(kinds[-1][len("torch ") : -len("Storage")], 0)
        value = memo.get(argument) if code.name in ("BINGET", "LONG_BINGET") else argument
        stack.append(value)
        del stack[:-16]
    return found
