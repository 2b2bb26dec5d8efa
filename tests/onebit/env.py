"""An interpreter whose deepspeed is 0.19.6, the last with the 1-bit optimizers, and the rest ours."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import sysconfig
from pathlib import Path

VERSION = "0.19.6"


def ensure(cache_dir: Path) -> Path:
    """The folder of a virtual environment: <it>/bin/python has deepspeed 0.19.6 and this interpreter's torch.

    Made once (about ten seconds, downloads 2 MB), found at once afterwards, by any number of callers.
    """
    venv = cache_dir / f"deepspeed-{VERSION}"
    made = venv / "made"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with (cache_dir / f"deepspeed-{VERSION}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if made.exists() and made.read_text() == sys.prefix:
            return venv
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(venv)], check=True)
        (site,) = venv.glob("lib/python*/site-packages")
        # Its own site-packages come first on sys.path, what a .pth file names comes after.
        (site / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        pip = [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--target", str(site)]
        subprocess.run([*pip, f"deepspeed=={VERSION}"], check=True)
        made.write_text(sys.prefix)
    return venv
