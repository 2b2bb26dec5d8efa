"""What this machine has, as JSON. `dslaunch probe` runs it on nodes; only Python is needed there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from typing import Any

Rows = list[dict[str, Any]]

# Files whose presence tells a fabric: `path` in data/fabrics.
PATHS = ["/usr/local/gib", "/dev/nvidia-caps-imex-channels", "/opt/mellanox/sharp"]
VIRTUAL = re.compile(r"(loop|ram|zram|dm-|md|sr|fd|nbd)")  # block devices that are no disks


def look(root: str = "", path: str | None = None) -> dict[str, Any]:
    """All of it. `root` stands before every path, and `path` is the PATH of commands."""
    unseen: list[str] = []
    return {
        "host": os.uname().nodename,
        "vendor": {
            name: text
            for name in ("sys_vendor", "product_name", "chassis_asset_tag", "board_vendor")
            if (text := read(f"{root}/sys/class/dmi/id/{name}"))
        },
        "rdma": rdma(root, path),
        "nics": nics(root),
        "gpus": gpus(root, path, unseen),
        "paths": [name for name in PATHS if os.path.exists(root + name)],
        "efa": run(["fi_info", "-p", "efa"], path) is not None,
        "cpus": len(re.findall(r"(?m)^processor\s*:", read(f"{root}/proc/cpuinfo") or "")),
        "memory": 1024 * number(r"MemTotal:\s+(\d+) kB", read(f"{root}/proc/meminfo")),
        "shm": free(f"{root}/dev/shm"),  # noqa: S108
        "disks": disks(root),
        "slurm": slurm(path),
        "unseen": unseen,
    }


def read(path: str) -> str | None:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None


def names(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def run(argv: list[str], path: str | None = None) -> str | None:
    """What a command prints; None when it is not there, fails or hangs."""
    found = shutil.which(argv[0], path=path)
    if not found:
        return None
    try:
        done = subprocess.run(
            [found, *argv[1:]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            timeout=20, check=False, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def number(pattern: str, text: str | None) -> int:
    found = re.search(pattern, text or "")
    return int(found[1]) if found else 0


def rdma(root: str, path: str | None) -> Rows:
    """Ports of RDMA devices: [{device, driver, layer, state, gbits}]; from ibv_devinfo where sysfs is hidden."""
    base = f"{root}/sys/class/infiniband"
    ports: Rows = []
    for device in names(base):
        driver = re.search(r"(?m)^DRIVER=(\S+)", read(f"{base}/{device}/device/uevent") or "")
        for port in names(f"{base}/{device}/ports"):
            at = f"{base}/{device}/ports/{port}"
            state = read(f"{at}/state") or ""  # "4: ACTIVE"
            ports.append({
                "device": device,
                "driver": driver[1] if driver else "",
                "layer": read(f"{at}/link_layer") or "",
                "state": state.rpartition(":")[2].strip(),
                "gbits": float((re.match(r"[\d.]+", read(f"{at}/rate") or "") or ["0"])[0]),
            })  # fmt: skip
    if not ports:
        for block in re.split(r"(?m)^hca_id:", run(["ibv_devinfo"], path) or "")[1:]:
            for port in re.split(r"(?m)^\s+port:\s", block)[1:]:
                at_state, at_layer = (re.search(rf"{key}:\s+(\S+)", port) for key in ("state", "link_layer"))
                ports.append({
                    "device": block.split()[0],
                    "driver": "",
                    "layer": at_layer[1] if at_layer else "",
                    "state": at_state[1].replace("PORT_", "") if at_state else "",
                    "gbits": 0.0,
                })  # fmt: skip
    return ports


def nics(root: str) -> Rows:
    """Interfaces but the loopback: [{name, driver, mbits, up, physical, routed}]."""
    routes = [row.split() for row in (read(f"{root}/proc/net/route") or "").splitlines()[1:]]
    routed = {row[0] for row in routes if len(row) > 1 and row[1] == "00000000"}
    found = []
    for name in names(f"{root}/sys/class/net"):
        at = f"{root}/sys/class/net/{name}"
        if name == "lo" or not os.path.isdir(at):
            continue
        driver = re.search(r"(?m)^DRIVER=(\S+)", read(f"{at}/device/uevent") or "")
        found.append({
            "name": name,
            "driver": driver[1] if driver else "",
            "mbits": number(r"^(\d+)$", read(f"{at}/speed")),
            "up": read(f"{at}/operstate") in ("up", "unknown") or name in routed,
            "physical": os.path.isdir(f"{at}/device"),
            "routed": name in routed,
        })  # fmt: skip
    return found


def gpus(root: str, path: str | None, unseen: list[str]) -> Rows:
    """[{name, mib}], from nvidia-smi or from the drivers' own files."""
    text = run(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"], path)
    if text is not None:
        rows = [row.rpartition(",") for row in text.splitlines() if row.strip()]
        return [{"name": row[0].strip(), "mib": number(r"(\d+)", row[2])} for row in rows]
    base = f"{root}/proc/driver/nvidia/gpus"
    if names(base):
        unseen.append("memory of the GPUs: there is no nvidia-smi")
        models = [re.search(r"Model:\s+(.+)", read(f"{base}/{name}/information") or "") for name in names(base)]
        return [{"name": model[1].strip() if model else "NVIDIA GPU", "mib": 0} for model in models]
    found = []
    for card in names(f"{root}/sys/class/drm"):
        at = f"{root}/sys/class/drm/{card}/device"
        memory = read(f"{at}/mem_info_vram_total")
        if re.fullmatch(r"card\d+", card) and read(f"{at}/vendor") == "0x1002" and memory:
            found.append({"name": read(f"{at}/product_name") or "AMD GPU", "mib": int(memory) >> 20})
    if not found and os.path.exists(f"{root}/dev/nvidiactl"):
        unseen.append("GPUs: /dev/nvidiactl is there and no nvidia-smi")
    return found


def free(path: str) -> list[int]:
    """Bytes of a file system, and of it those that are free."""
    try:
        found = os.statvfs(path)
    except OSError:
        return [0, 0]
    return [found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize]


def disks(root: str) -> Rows:
    """[{name, bytes}] of the block devices that are disks."""
    base = f"{root}/sys/block"
    sizes = {
        name: number(r"^(\d+)$", read(f"{base}/{name}/size")) * 512 for name in names(base) if not VIRTUAL.match(name)
    }
    return [{"name": name, "bytes": size} for name, size in sizes.items() if size]


def slurm(path: str | None) -> dict[str, Any] | None:
    """Its version and partitions, each (name, state, nodes, CPUs, MB, generic resources) of one kind of node."""
    version = run(["sinfo", "--version"], path)
    if version is None:
        return None
    rows = run(["sinfo", "-h", "-o", "%P|%a|%D|%c|%m|%G"], path)
    return {
        "version": version.strip(),
        "partitions": [row.split("|") for row in (rows or "").splitlines() if "|" in row],
    }


PIECE = 400  # characters: srun cuts lines of 1024 bytes apart and mixes those of several nodes


def main() -> None:
    """The JSON in numbered pieces, each with the host's name before it."""
    seen = look()
    text = json.dumps(seen)
    pieces = [text[at : at + PIECE] for at in range(0, len(text), PIECE)]
    for count, piece in enumerate(pieces, 1):
        print(f"{seen['host']}\t{count}/{len(pieces)}\t{piece}", flush=True)


if __name__ == "__main__":
    main()
