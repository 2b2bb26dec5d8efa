"""Secrets in what is imported: hidden before anything reads the text, and left for the user to say in the job file.

`hidden` puts a text in the place of each that has a secret's own shape, so that readers take it for what it stands
for and can neither quote nor carry the value. `finished` takes these texts out of what was made of it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from launcher.errors import Path
from launcher.imports import WHOLE, Imported, Note, leaves
from launcher.launchlint import NOT_SECRET
from launcher.spec.check import SECRET_NAME

FACE, OTHER = "hf_" + "MASKED" * 4, "sk-" + "MASKED" * 4  # of the shapes that every reader knows for a secret
STANDS = re.compile(r"(hf_|sk-)MASKED[MASKED]*")  # also one that a note has cut off
LEFT = "FILL_IN_SECRET"
SPREADS = 8  # characters from which on a value is hidden wherever else it stands

SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{20,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|eyJ[\w-]{10,}\.eyJ[\w.-]{10,}|xox[abpros]-[\w-]{10,}|nvapi-[\w-]{20,}"
    r"|AIza[\w-]{30,}|pypi-[\w-]{30,}|npm_[A-Za-z0-9]{30,}|dckr_pat_[\w-]{20,})"
)
BLOCK = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)")
VALUE = (
    r"(?:\\?\"(?P<double>[^\"\\\n]+)|\\?'(?P<single>[^'\n]+)"
    r"|(?P<bare>(?:(?![,\]}]+(?:\s|$)|,\w+=)[^\s\"';&|()<>\\])+))"
)
WORDS = (
    r"(?:(?:api|access|secret|private|account|auth|wandb|storage)[-_]?key|password|passwd|passphrase"
    r"|(?:auth|access|api|hf|hub|bot|hugging_?face(?:_hub)?|wandb|github|gitlab|refresh|session|registry)[-_]?token)"
)
NEXT = (
    r"(?:\s*=\s*|[\"']?\s*,\s*|[\"']?\s*\n\s*-\s+|[ \t]+(?:\\\n\s*)?)"  # a line's, a list's in a flow or in a block
)
NAME = r"(?P<name>[A-Za-z_][A-Za-z0-9_]{0,80})"
# What stands before a value that nobody is to read; a `name` has to be a secret's. The first three hold in prose.
PLACES = tuple(
    re.compile(pattern)
    for pattern in (
        rf"(?i:--(?:[\w-]{{0,40}}[-_])?(?:{WORDS}|secret|credentials?)|--token|--use_wandb)(?![\w-]){NEXT}{VALUE}",
        rf"--(?P<maybe>[\w-]{{0,40}}(?i:key|token))(?![\w-]){NEXT}{VALUE}",
        rf"(?<![\w-]){NAME}\+?={VALUE}",
        rf"(?<![\w-]){NAME}[\"']?[ \t]*:\s+(?!\n){VALUE}",
        rf"\bname:\s*[\"']?{NAME}[\"']?\s*,?\s*value:\s*(?:[|>][-+]?\s*\n\s*)?{VALUE}",
        rf"\bvalue:\s*{VALUE}\s*,?\s*name:\s*[\"']?{NAME}\b",
        rf"\b(?:setenv|ENV|-genv|-env|-e)\s+{NAME}\s+{VALUE}",
        rf"(?i:\b(?:x-)?(?:[\w-]{{0,40}}[-_])?{WORDS}|\bx-[\w-]{{0,40}}token)\\?[\"']?\s*:\s*{VALUE}",
        rf"(?i:\bbearer)\s+{VALUE}",
        rf"(?i:\bauthorization\\?[\"']?\s*:\s*\\?[\"']?(?:basic|token))\s+{VALUE}",
        r"[A-Za-z][A-Za-z0-9+.-]{0,20}://[^/\s:@'\"]{0,80}:(?P<bare>[^/\s@'\"]+)@",
        r"\bhttps?://(?P<bare>[^/\s:@'\"]{8,})@",
        rf"\b(?:login|sshpass|mysql\w*)\b[^\n;&|]{{0,400}}?\s-p[ =]?{VALUE}",
        rf"\bcurl\b[^\n;|]{{0,400}}?\s(?:-u|--user)[ =]?[\"']?[^\s:\"']+:{VALUE}",
        rf"\b(?:echo|printf|<<<)\s+(?:%s\s+|-n\s+)?{VALUE}\s*\|[^\n]{{0,200}}?(?:\blogin\b|-stdin\b)",
    )
)
LOGIN = re.compile(
    r"\b(?:wandb|hf|huggingface-cli|auth|comet|clearml)[\"',]*\s+[\"']?login\b(?P<rest>[^\n;&|]{0,400})"
)
WORD = re.compile(r"(?<![^\s\"'=,])(?P<bare>[^\s\"',=\[\]/.-][^\s\"',\[\]/.]{7,})")
OBJECT = re.compile(r"^kind:\s*[\"']?Secret\b", re.M)
DATA = re.compile(r"^(?:data|stringData):(?P<rows>.*\n?(?:[ \t].*\n?|\n)*)", re.M)
ENTRY = re.compile(rf"[\w.-]+[\"']?:[ \t]*(?:[|>][-+]?\s*\n\s*)?{VALUE}")
NAMED = re.compile(
    r"(?i)(.*_)?(PAT|PASS|PASSPHRASE|AUTH|BEARER|ACCESS_?TOKEN)|.+(PWD|PASSWORD|PASSWD|APITOKEN|APIKEY)"
)
NOT_NAMED = re.compile(
    r"(?i)OLDPWD|(.*_)?(pad|eos|bos|unk|sep|cls|mask|image|video|stop|end|start|eot|next|new)_token"
)
NO_SECRET = re.compile(
    r"[$`<{%*~/].*|\.{1,2}/.*|[0-9.]+|(?i:true|false|none|null|yes|no|on|off|online|offline|disabled)"
)
VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)\}?")


def hidden(text: str) -> str:
    """ "wandb login 0123abcd..." with another text for the key, wherever it stands; lines stay what they are."""
    return _without(text, found(text))


def found(text: str, *, prose: bool = False) -> set[str]:
    """Every value in it that is a secret by its shape, its name, or what stands before it.

    In prose, `secrets.TOKEN: export it` is no value, and neither is what follows `wandb login: `.
    """
    values = {match[0] for match in SHAPES.finditer(text)}
    for block in BLOCK.finditer(text):
        values |= {line.strip() for line in block[0].splitlines() if len(line.strip()) >= SPREADS}
    for document in re.split(r"^---", text, flags=re.M) if OBJECT.search(text) else ():
        if OBJECT.search(document):
            values |= {_value(one) for rows in DATA.finditer(document) for one in ENTRY.finditer(rows["rows"])}
    for login in () if prose else LOGIN.finditer(text):
        values |= {match["bare"] for match in WORD.finditer(login["rest"])}
    variables: set[str] = set()
    for _ in range(3):  # A=...; B=$A; --token $B
        before = len(variables)
        for place in PLACES[:3] if prose else PLACES:
            values |= set(_at(place, text, variables))
        if len(variables) == before:
            break
    return {value for value in values if value and not NO_SECRET.fullmatch(value) and not STANDS.search(value)}


def _at(place: re.Pattern[str], text: str, variables: set[str]) -> Iterator[str]:
    at = 0
    while match := place.search(text, at):
        at = max(match.start() + 1, min(start for start in map(match.start, ("double", "single", "bare")
                 if "double" in place.groupindex else ("bare",)) if start >= 0))  # fmt: skip
        given, value = match.groupdict(), _value(match)
        name = given.get("name")
        if name is not None and name not in variables and not _secret(name, value):
            continue
        if given.get("maybe") and not _random(value):
            continue
        variable = VARIABLE.fullmatch(value)
        if variable:
            variables.add(variable[1])
        elif name is None or len(value) > 3:
            yield value


def _value(match: re.Match[str]) -> str:
    given = match.groupdict()
    return str(given.get("double") or given.get("single") or given.get("bare") or "")


def _secret(name: str, value: str) -> bool:
    if NOT_NAMED.fullmatch(name) or NOT_SECRET.fullmatch(name):
        return False
    if SECRET_NAME.regex.fullmatch(name) or NAMED.fullmatch(name):
        return name.isupper() or _random(value)
    return name.isupper() and name.endswith("KEY") and _random(value)


def _random(value: str) -> bool:
    letters = re.search(r"[A-Za-z]", value) and re.search(r"[0-9]", value)
    return len(value) >= 12 and bool(letters) and re.fullmatch(r"[\w+/=~-]+", value) is not None


def _without(text: str, values: set[str]) -> str:
    """Longer ones first; short ones are words of their own."""
    for value in sorted(values, key=len, reverse=True):
        if value not in text:
            continue
        stands = FACE if value.startswith("hf_") else OTHER
        if len(value) >= SPREADS:
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(value)}(?![A-Za-z0-9])", stands, text)
        else:
            text = re.sub(rf"(?<=[=:@\s\"']){re.escape(value)}(?=[\s\"'@;,\]}}]|$)", stands, text)
    return text


# --- what was made of it --------------------------------------------------------------------------


def finished(made: Imported) -> Imported:
    """Without any secret: variables come from the shell that submits, and the rest is marked FILL IN."""
    values = {value for path, leaf in leaves(made.job) for value in found(_line(path, leaf))}
    job = _hidden(made.job, values)
    comments = dict(made.comments)
    notes = [replace(one, message=_shown(one.message, values)) for one in made.notes]
    for path, leaf in list(leaves(job)):
        if not STANDS.search(_line(path, leaf)):
            continue
        if path[0] == "env" and len(path) == 2:
            name = str(path[1])
            del job["env"][name]
            job.setdefault("secrets", {}).setdefault(name, {"from_env": name})
            notes.append(Note("carried", f"{name} -> secrets: its value stays in the shell that submits"))
        else:
            where = ".".join(map(str, path))
            comments.setdefault(path, f"a secret stood here; {LEFT} stands for it")
            notes.append(Note("fill in", f"{where}: a secret stood there, and {LEFT} stands for it"))
    if not job.get("env", True):
        del job["env"]
    said = {path: _shown(comment, values) for path, comment in comments.items()}
    return replace(made, job=_left(job), notes=tuple(notes), comments=said)


def _line(path: Path, leaf: Any) -> str:
    if path in WHOLE and isinstance(leaf, (list, tuple)):
        return " ".join(str(one) if re.search(r"\s", str(one)) else shlex.quote(str(one)) for one in leaf)
    return f"{path[-1]}={leaf}" if "env" in path and isinstance(leaf, str) else str(leaf)


def _shown(text: str, values: set[str]) -> str:
    return STANDS.sub("***", _without(text, values | found(text, prose=True)))


def _hidden(value: Any, values: set[str]) -> Any:
    if isinstance(value, Mapping):
        return {_hidden(key, values): _hidden(child, values) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_hidden(child, values) for child in value]
    return hidden(_without(value, values)) if isinstance(value, str) else value


def _left(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_left(key): _left(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_left(child) for child in value]
    return STANDS.sub(LEFT, value) if isinstance(value, str) else value
