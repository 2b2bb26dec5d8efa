"""Every script of slurm/ before a real controller: `sbatch --test-only` on a Slurm that has what these sites have.

Nobody runs a thousand nodes here: the controller believes in them. Accounts and QOS are enforced with a database
alone, which this one has not, so that any name passes; partitions, types of GPU, features and licenses have to exist.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import slurm_cluster
from conftest import _slurm as borrowed

from launcher import cli
from launcher.backends import slurm as backend

ROOT = Path(__file__).parents[1]
ENTRIES = sorted((ROOT / "slurm").glob("*/job.yaml"))

# Nodes by what they are: how many, CPUs, MB, type and number of GPUs, features. Every partition that an entry names
# leads to one of them. Sizes are the sites' own where they publish them, and large enough elsewhere.
KINDS = {
    "any": (512, 256, 2_000_000, "fake:8", "gpu", ("main", "gpu", "gpu-requeue", "batch", "accelerated", "p5", "ndv5",
            "a3mega", "compute", "h100", "hopper-prod", "booster", "normal", "standard-g", "boost_usr_prod", "gb200",
            "l40s", "a100", "v100")),
}  # fmt: skip
