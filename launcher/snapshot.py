"""The code as it is now: which files of a tree a run takes along, and the copy of them in its directory."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import posixpath
import re
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.bundle import Tree
from launcher.errors import Problem, UserError
from launcher.run import Run
from launcher.spec import SECRET_NAME, SECRET_VALUE, Code, JobSpec

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

HERE = "snapshot"  # in the run directory
CODE = "code"  # the link beside it, to the job file's place in there
PATCH = "snapshot.patch"
ROOT = "snapshot.root"  # the tree that it is a copy of
NEVER = {".git", ".hg", ".svn", "__pycache__"}
IGNORE = (".dslaunchignore", ".gitignore")  # the first that is there
LOOKED_AT = 1 << 20  # bytes: larger files are data, and are not searched for secrets
# Compressed, in a job's ConfigMaps: etcd keeps a copy of every run's, and a store has 2 GiB unless told otherwise
# (etcd's --quota-backend-bytes); one object may have 1.5 MiB (--max-request-bytes).
CARRIED = 1 << 20
TOOK = 120.0  # seconds that git may take on a slow file system
# Files that hold credentials whatever they look like: of ssh, git, curl, twine, aws and kubectl.
CREDENTIALS = re.compile(
    r"(.*/)?([._]netrc|\.git-credentials|\.pypirc|id_(rsa|dsa|ecdsa|ed25519)|\.aws/credentials|kubeconfig|\.kube/config)"
)
MARKERS = (b"hf_", b"sk-", b"ghp_", b"gho_", b"ghu_", b"ghs_", b"ghr_", b"AKIA", b"ASIA", b"PRIVATE KEY", b"eyJ")


@dataclass(frozen=True)
class Entry:
    """A file by its digest, or a symbolic link by where it leads."""

    path: str
    size: int
    executable: bool
    digest: str
    link: str = ""


@dataclass(frozen=True)
class Snapshot:
    root: str  # of the tree
    job: str  # the job file's directory in it, "." at the top
    entries: tuple[Entry, ...]
    linked: tuple[str, ...]  # ignored, or written to: they lead to the tree itself
    commit: str = ""
    patch: bytes = b""
    elsewhere: bool = False  # it runs where this tree is not: a login node, a pod
    saves: str = ""  # relative checkpoints, from the job file, then

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.entries)

    @property
    def digest(self) -> str:
        lines = [f"{entry.digest} {entry.executable:d} {entry.path} {entry.link}" for entry in self.entries]
        whole = "\n".join([self.root, self.job, *lines, *([self.saves] if self.elsewhere else self.linked)])
        return hashlib.sha256(whole.encode(errors="surrogateescape")).hexdigest()

    def facts(self) -> dict[str, object]:
        """For the journal."""
        return {"root": self.root, "files": len(self.entries), "bytes": self.size, "digest": self.digest,
                "commit": self.commit, "changed": bool(self.patch)}  # fmt: skip

    def notes(self) -> list[str]:
        at = f" at {self.commit[:12]}" if self.commit else ""
        changed = f", with changes that are not committed ({PATCH})" if self.patch else ""
        found = [f"code: {len(self.entries)} files, {human(self.size)}, of {self.root}{at}{changed}"]
        if self.linked:
            shown = ", ".join(self.linked[:4]) + (f" and {len(self.linked) - 4} more" if len(self.linked) > 4 else "")
            how = "left out, and not there" if self.elsewhere else "not copied, as they are"
            found.append(f"{how} when the job runs: {shown}")
        return found


def take(
    spec: JobSpec, base: Path, run: Run, *, avoid: Sequence[Path] = (), elsewhere: bool = False
) -> Snapshot | None:
    """The files with their digests; None where no snapshot is asked for. Nothing is written.

    `avoid`: run directories, which would hold themselves. `elsewhere`: the job runs where no link leads back to the
    tree. Raises UserError for what cannot be taken or should not.
    """
    asked = Code(take=spec.code) if isinstance(spec.code, str) else spec.code
    if asked.take == "none":
        return None
    base = base.resolve()
    start = (base / spec.train.workdir).resolve()
    root = _top(start, run) if asked.take == "git" else Path(os.path.commonpath([base, start]))
    for what, path, at in (("the job file", base, ("code",)), ("workdir", start, ("train", "workdir"))):
        if not path.is_relative_to(root):
            raise UserError(Problem(f"{what} is in {path}, and the code in {root}", "one tree for both", at))
    if root in (Path("/"), Path.home()):
        raise UserError(Problem(f"the tree would be all of {root}", "a job file beside the code", ("code",)))
    apart = {str(path.resolve()) for path in avoid}
    ignore = _Ignored(root, base, asked.ignore, git=asked.take == "git")
    commit, patch = "", b""
    if asked.take == "git":
        names, linked = _git_files(root, run)
        said = run(["git", "-C", str(root), "rev-parse", "HEAD"])
        commit = said.out.strip() if said.code == 0 else ""
        if commit:
            patch = _patch(root, run, lambda name: ignore(name) or _under(root / name, apart))
        names = [name for name in names if not _under(root / name, apart)]
        out = [name for name in names if ignore(name)]
        names, linked = sorted(set(names) - set(out)), linked + out
    else:
        names, linked = _walked(root, ignore, apart)
    # what it writes is the tree's, and no part of a snapshot
    saves = posixpath.join(spec.train.workdir, spec.train.checkpoint.dir or f"checkpoints/{spec.name}")
    if not posixpath.isabs(saves):
        place = Path(os.path.normpath(base / saves))
        if not place.is_relative_to(root):
            message = f"checkpoints would go to {place}, outside of {root}"
            raise UserError(Problem(message, "an absolute path", ("train", "checkpoint", "dir")))
        saved = place.relative_to(root).as_posix()
        linked += [] if elsewhere else [saved]
        names = [name for name in names if not _below(name, saved)]
    entries = [entry for name in names if (entry := _entry(root, name))]
    linked = [name for name in linked if not _under(root / name, apart) and Path(name).name not in NEVER]
    taken = Snapshot(
        str(root), base.relative_to(root).as_posix(), tuple(entries), tuple(_tops(linked, entries)), commit, patch,
        elsewhere, "" if posixpath.isabs(saves) else posixpath.normpath(saves),
    )  # fmt: skip
    problems = [*_too_large(taken, asked), *_secrets(taken), *(_left_out(taken, spec) if elsewhere else ())]
    if problems:
        raise UserError(*problems)
    return taken


def write(taken: Snapshot, folder: Path) -> None:
    """The copy, below a run directory that exists. Raises UserError when a file is no longer what was listed."""
    top = folder / HERE
    top.mkdir(mode=0o700)
    for entry in taken.entries:
        place = top / entry.path
        _folder(place.parent)
        if entry.link:
            place.symlink_to(entry.link)
            continue
        _private(place, _content(taken, entry), 0o700 if entry.executable else 0o600)
    if saved := kept(taken):  # below login_dir there, which is what submitted-from leads to
        place = top / os.path.normpath(f"{taken.job}/{saved}")
        _folder(place.parent)
        place.symlink_to(os.path.relpath(folder / "submitted-from" / saved, place.parent))
    for name in () if taken.elsewhere else taken.linked:
        _folder((top / name).parent)
        (top / name).symlink_to(Path(taken.root, name))
        if not Path(taken.root, name).exists():  # checkpoints, of a first run
            Path(taken.root, name).mkdir(parents=True)
    _folder(top / taken.job)
    (folder / CODE).symlink_to(posixpath.normpath(f"{HERE}/{taken.job}"), target_is_directory=True)
    _private(folder / ROOT, os.fsencode(taken.root))
    if taken.patch:
        _private(folder / PATCH, taken.patch)


def kept(taken: Snapshot) -> str:
    """Checkpoints of a run elsewhere, from the job file; nothing where a link of the tree says where they go."""
    if not taken.elsewhere or not taken.saves:
        return ""
    place = posixpath.normpath(f"{taken.job}/{taken.saves}")
    return "" if any(entry.link and _below(place, entry.path) for entry in taken.entries) else taken.saves


def packed(taken: Snapshot) -> Tree:
    """The same bytes for the same files. Raises UserError where it is more than ConfigMaps should hold."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        folder = tarfile.TarInfo(taken.job)  # where programs start, whether or not a file of it is taken
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(folder)
        for entry in sorted(taken.entries, key=lambda entry: entry.path):
            member = tarfile.TarInfo(entry.path)  # of 1970, and nobody's
            member.mode = 0o755 if entry.executable else 0o644
            if entry.link:
                member.type, member.linkname = tarfile.SYMTYPE, entry.link
                archive.addfile(member)
                continue
            data = _content(taken, entry)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    whole = buffer.getvalue()
    data = gzip.compress(whole, mtime=0)
    if len(data) > CARRIED:
        largest = sorted(taken.entries, key=lambda entry: -entry.size)[:20]
        sizes = {entry.path: len(zlib.compress(_content(taken, entry))) for entry in largest if not entry.link}
        shown = ", ".join(
            f"{name} {human(size)}" for name, size in sorted(sizes.items(), key=lambda row: -row[1])[:3]
        )
        message = f"the code has {human(len(data))} compressed, and ConfigMaps take {human(CARRIED)} of it: {shown}"
        hint = "code: {clone: https://..., ref: COMMIT}, or a line for each in .dslaunchignore"
        raise UserError(Problem(message, hint, ("code",)))
    return Tree(data, taken.job, hashlib.sha256(whole).hexdigest())


def _content(taken: Snapshot, entry: Entry) -> bytes:
    data = _read(Path(taken.root, entry.path))
    if data is None or hashlib.sha256(data).hexdigest() != entry.digest:
        message = f"{entry.path} changed while it was copied"
        raise UserError(Problem(message, "the same command again", ("code",)))
    return data


def _private(path: Path, data: bytes, mode: int = 0o600) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)


def human(size: int) -> str:
    """1536 is 1.5 KiB."""
    amount, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def limit(text: str) -> int:
    """Bytes of a memory size: a bare number is megabytes, as Slurm has it."""
    unit = text[-1] if text[-1] in "KMGT" else "M"
    return int(text.rstrip("KMGT")) << {"K": 10, "M": 20, "G": 30, "T": 40}[unit]


# --- which files ----------------------------------------------------------------------------------


def _top(start: Path, run: Run) -> Path:
    said = run(["git", "-C", str(start), "rev-parse", "--show-toplevel"], timeout=TOOK)
    if said.code != 0:
        why = said.err.strip().splitlines()[-1] if said.err.strip() else "git does not answer"
        raise UserError(Problem(f"{start} is no git tree: {why}", "code: copy", ("code",)))
    return Path(said.out.rstrip("\n")).resolve()


def _git(root: Path, run: Run, *words: str) -> bytes:
    said = run(["git", "-C", str(root), *words], timeout=TOOK, binary=True)
    if said.code != 0:
        raise UserError(Problem(f"git {words[0]} in {root}: {said.err.strip()}", "code: copy", ("code",)))
    return said.raw


def _git_files(root: Path, run: Run) -> tuple[list[str], list[str]]:
    """Tracked or new, and what is ignored: whole directories by their name alone."""

    def listed(*words: str) -> list[str]:
        return [os.fsdecode(name) for name in _git(root, run, "ls-files", "-z", *words).split(b"\0") if name]

    names = listed("--cached", "--recurse-submodules") + listed("--others", "--exclude-standard")
    ignored = listed("--others", "--ignored", "--exclude-standard", "--directory")
    return sorted(set(names)), [name.rstrip("/") for name in ignored]


def _patch(root: Path, run: Run, left_out: Callable[[str], bool]) -> bytes:
    """What is not committed, without what is left out: also of files that are deleted."""
    changed = _git(root, run, "diff", "--name-only", "--no-renames", "-z", "HEAD", "--", ".").split(b"\0")
    without = [name for path in changed if path and left_out(name := os.fsdecode(path))]
    words = ("--binary", "--no-renames", "--no-ext-diff", "--no-textconv", "--no-color", "--src-prefix=a/",
             "--dst-prefix=b/")  # fmt: skip
    return _git(root, run, "diff", *words, "HEAD", "--", ".", *(f":(exclude,top,literal){name}" for name in without))


class _Ignored:
    """Patterns as .gitignore has them; the last that matches decides."""

    def __init__(self, root: Path, base: Path, named: str | None, *, git: bool) -> None:
        self.root = root
        self.rows: list[tuple[str, GitIgnoreSpec]] = []
        self.nested = False
        if named:
            if (data := _read(base / named)) is None:
                raise UserError(Problem(f"there is no {base / named}", "", ("code", "ignore")))
            self._add("", data)
        elif (data := _read(root / IGNORE[0])) is not None:
            self._add("", data)
        else:
            self.nested = not git  # git itself knows them

    def enter(self, folder: str) -> None:
        if self.nested and (data := _read(self.root / folder / IGNORE[1])) is not None:
            self._add(folder, data)

    def _add(self, folder: str, data: bytes) -> None:
        from pathspec import GitIgnoreSpec

        self.rows.append((folder, GitIgnoreSpec.from_lines(os.fsdecode(data).splitlines())))

    def __call__(self, name: str, *, folder: bool = False) -> bool:
        answer = False
        for below, patterns in self.rows:
            if not below or name.startswith(f"{below}/"):
                inner = name[len(below) + 1 :] if below else name
                said = patterns.check_file(inner + ("/" if folder else "")).include
                answer = answer if said is None else said
        return answer


def _walked(root: Path, ignore: _Ignored, apart: set[str]) -> tuple[list[str], list[str]]:
    """Files, and the topmost of what is left out."""
    names: list[str] = []
    linked: list[str] = []

    def visit(folder: str) -> None:
        ignore.enter(folder)
        with os.scandir(root / folder) as rows:
            found = sorted(rows, key=lambda row: row.name)
        for row in found:
            name = f"{folder}/{row.name}" if folder else row.name
            inside = row.is_dir(follow_symlinks=False)
            if row.name in NEVER or row.path in apart:
                continue
            if ignore(name, folder=inside) or (inside and _environment(Path(row.path))):
                linked.append(name)
            elif inside:
                visit(name)
            else:
                names.append(name)

    try:
        visit("")
    except OSError as error:
        raise UserError(Problem(f"cannot read {error.filename}: {error.strerror}", "", ("code",))) from None
    return names, linked


def _environment(folder: Path) -> bool:
    return (folder / "pyvenv.cfg").exists() or (folder / "conda-meta").is_dir()


def _under(path: Path, apart: set[str]) -> bool:
    return any(str(path) == one or str(path).startswith(one + "/") for one in apart)


def _below(name: str, top: str) -> bool:
    return name == top or name.startswith(f"{top}/")


def _tops(linked: Sequence[str], entries: Sequence[Entry]) -> Iterator[str]:
    """A link stands where the snapshot has nothing of its own: checkpoints/demo becomes checkpoints."""
    folders = {parent.as_posix() for entry in entries for parent in Path(entry.path).parents}
    taken = {entry.path for entry in entries}
    made: set[str] = set()
    for name in sorted(set(linked)):
        parts = name.split("/")
        top = next(
            ("/".join(parts[:n]) for n in range(1, len(parts) + 1) if "/".join(parts[:n]) not in folders), name
        )
        if top not in made and top not in taken and top not in folders:
            made.add(top)
            yield top


def _entry(root: Path, name: str) -> Entry | None:
    path = root / name
    try:
        there = path.lstat()
    except OSError:  # tracked, and deleted since
        return None
    if stat.S_ISLNK(there.st_mode):
        goal = Path(os.path.normpath(path.parent / path.readlink()))
        inside = Path(goal).is_relative_to(root)
        link = os.path.relpath(goal, path.parent) if inside else str(goal)
        return Entry(name, 0, False, "link", link)
    data = _read(path) if stat.S_ISREG(there.st_mode) else None
    if data is None:
        if stat.S_ISREG(there.st_mode):
            raise UserError(Problem(f"cannot read {path}", "a line in .dslaunchignore", ("code",)))
        return None  # a pipe or a socket; a submodule that is not checked out
    return Entry(name, len(data), bool(there.st_mode & 0o100), hashlib.sha256(data).hexdigest())


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _folder(path: Path) -> None:
    if not path.is_dir():
        _folder(path.parent)
        path.mkdir(mode=0o700)


# --- what should not be taken ---------------------------------------------------------------------


def _too_large(taken: Snapshot, asked: Code) -> Iterator[Problem]:
    most = limit(asked.limit)
    if taken.size <= most or not most:
        return
    sizes: dict[str, int] = {}
    for entry in taken.entries:
        top = "/".join(entry.path.split("/")[:2])
        sizes[top] = sizes.get(top, 0) + entry.size
    largest = sorted(sizes.items(), key=lambda row: -row[1])[:3]
    shown = ", ".join(f"{name} {human(size)}" for name, size in largest)
    message = f"the code has {human(taken.size)}, and code.limit is {asked.limit}: {shown}"
    how = "left out" if taken.elsewhere else "linked, not copied"
    yield Problem(message, f"a line for each in .dslaunchignore: what is ignored is {how}", ("code",))


def _left_out(taken: Snapshot, spec: JobSpec) -> Iterator[Problem]:
    """A program that git ignores leads back to the tree on a cluster that sees it, and is missing anywhere else."""
    train = spec.train
    first = train.command[0] if train.command and train.command[0].startswith("./") else ""
    program = train.script or first
    if not program or program.startswith("/") or train.workdir.startswith("/"):
        return
    path = posixpath.normpath(posixpath.join(taken.job, train.workdir, program))
    if not any(path == entry.path or (entry.link and _below(path, entry.path)) for entry in taken.entries):
        at = ("train", "script" if train.script else "command")
        yield Problem(f"{path} is not in the code that is taken: it is ignored, or not there", "git add it", at)


def _secrets(taken: Snapshot) -> Iterator[Problem]:
    hint = "a line in .dslaunchignore leaves the file where it is; secrets: hands a value to the job"
    named = set()
    for entry in taken.entries:
        if entry.link:
            continue
        if CREDENTIALS.fullmatch(entry.path):
            named.add(entry.path)
            yield Problem(f"{entry.path} holds credentials by its name, and a copy of it stays", hint, ("code",))
            continue
        if entry.size > LOOKED_AT:
            continue
        data = _read(Path(taken.root, entry.path)) or b""
        settings = _settings(entry.path)
        if b"\0" in data or not (settings or any(marker in data for marker in MARKERS)):
            continue
        for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
            if _secret(line, settings):
                named.add(entry.path)
                yield Problem(f"{entry.path}:{number} looks like a secret, and a copy of it stays", hint, ("code",))
                break
    hint = "commit the change, or leave the file out by a line in .dslaunchignore"
    for name, line in _changed(taken.patch):
        if name not in named and (CREDENTIALS.fullmatch(name) or _secret(line, _settings(name))):
            named.add(name)
            message = f"what changed in {name} since the commit looks like a secret, and {PATCH} would keep it"
            yield Problem(message, hint, ("code",))


def _settings(path: str) -> bool:
    return posixpath.basename(path).startswith(".env") or path.endswith(".env")


def _secret(line: str, settings: bool) -> bool:
    """Of a file of settings, also `API_KEY=` and eight characters."""
    name, equals, value = line.removeprefix("export ").strip().partition("=")
    given = settings and equals and SECRET_NAME.regex.fullmatch(name.strip()) and len(value.strip("\"' ")) >= 8
    return bool(given or SECRET_VALUE.regex.fullmatch(line))


def _changed(patch: bytes) -> Iterator[tuple[str, str]]:
    """Each line of the hunks with its file: "-key" below "--- a/x" is ("x", "key")."""
    name, inside = "", False
    for line in patch.decode(errors="replace").split("\n"):
        if line.startswith("diff --git "):
            name, inside = "", False
        elif line.startswith("@@"):
            inside = True
        elif inside:
            yield name, line[1:].rstrip("\r")
        elif line.startswith(("--- ", "+++ ")) and line[4:] != "/dev/null":
            name = line[4:].rstrip("\t").strip('"')[2:]
