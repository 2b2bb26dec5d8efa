"""The same program and the same configuration on every node, byte for byte."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from typing import Any

from launcher.checks import Probe, seen, unknowns
from launcher.preflight import TOO_FEW, Finding, Setting
from launcher.preflight.parity import differing, together

STAGE = "inventory"

WHOLE = 50_000_000  # bytes, ours: a tenth of a second of hashing; of a larger file the size and the first of them
WHY = "ranks that run other code call other collectives: a hang"


def measure(setting: Setting, probe: Probe) -> dict[str, Any]:
    here = os.getcwd()
    return {
        "files": {path: digest(probe.root, path) for path in setting.files},
        "git": head(probe, here),
        "here": here,
    }


def digest(root: str, path: str) -> str:
    """The first 16 figures of SHA-256; "!" and why where there is none."""
    try:
        with open(root + path if os.path.isabs(path) else path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            sum_ = hashlib.sha256(file.read(WHOLE))
    except OSError as error:
        return f"!{error.strerror}"
    if size > WHOLE:
        sum_.update(f"{size} bytes".encode())
    return sum_.hexdigest()[:16]


def head(probe: Probe, directory: str) -> str:
    """The commit that the working directory is at, without git; empty where it is no checkout."""
    while True:
        git = os.path.join(directory, ".git")
        if (link := probe.read(git)) and link.startswith("gitdir: "):  # a worktree, or a submodule
            git = os.path.join(directory, link[len("gitdir: ") :])
        if word := probe.read(f"{git}/HEAD"):
            break
        if directory == (directory := os.path.dirname(directory)):
            return ""
    if not word.startswith("ref: "):
        return word
    name = word[len("ref: ") :]
    common = probe.read(f"{git}/commondir")
    shared = os.path.normpath(os.path.join(git, common)) if common else git
    if commit := probe.read(f"{git}/{name}") or probe.read(f"{shared}/{name}"):
        return commit
    packed = re.search(rf"^([0-9a-f]+) {re.escape(name)}$", probe.read(f"{shared}/packed-refs") or "", re.MULTILINE)
    return packed[1] if packed else ""


def facts(value: Mapping[str, Any]) -> dict[str, str]:
    files = {path: word.removeprefix("!") for path, word in value["files"].items()}
    return {**files, **({"git HEAD": value["git"][:12]} if value["git"] else {})}


def judge(found: Mapping[str, Mapping[str, Any]], setting: Setting) -> list[Finding]:
    answered = seen(found)
    missing, other = [], []
    for path in setting.files:
        words = {node: value["files"][path] for node, value in answered.items() if path in value["files"]}
        missing += [
            Finding(
                "code",
                "exclude",
                f"{path} cannot be read: {word[1:]}",
                node=node,
                measured=word[1:],
                expected=f"the file, from {answered[node]['here']}",
                fix="a shared file system, or the file in the image of every node",
            )
            for node, word in sorted(words.items())
            if word.startswith("!")
        ]
        sums = {node: word for node, word in words.items() if not word.startswith("!")}
        other += differing("code", f"SHA-256 of {path}", sums, why=WHY, fix="copy it again to every node")
    commits = {node: value["git"][:12] for node, value in answered.items()}
    other += differing(
        "code", "git HEAD of the working directory", commits, level="warn", why=WHY, fix="git pull on every node"
    )
    return [*unknowns("code", found), *together(missing, answered, code=TOO_FEW), *other]
