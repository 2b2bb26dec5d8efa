import gc
import os
import signal
from pathlib import PurePath

import pytest
import slurm_cluster

# Files whose tests run one after another on one worker, as they share what is dear to start. Two clusters, so that no
# worker is left with all of Slurm; a file with a fixture of its own for all of its tests is a group by itself.
GROUPS = {
    "slurm": (
        *("test_slurm", "test_slurm_cluster", "test_submit_slurm", "test_probe", "test_remote", "test_profile"),
        "test_services_slurm",
    ),
    "slurm, the second": (
        *("test_preflight_slurm", "test_recover_slurm", "test_hang_slurm", "test_watch", "test_software_slurm"),
        *("test_slurm_options", "test_gallery_slurm"),
    ),
    "engine": ("test_accepted", "test_conformance"),  # a process for each of the machine's cores
    "workers": ("test_bandwidth",),
    "browser": ("test_health", "test_report"),
    "checkpoints": ("test_checkpoint_damage",),
    "trained": ("test_train_gpt",),
}
GROUP = {file: group for group, files in GROUPS.items() for file in files}


# What a collection makes, 9,000 items and the modules they are from, stays to the end: Python would look through all
# of it again and again, for a sixth of the fast tests' time.
gc.disable()

# Who is started by a shell in the background ignores it, and so would every child that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


def pytest_addoption(parser):
    parser.addoption("--bless", action="store_true", help="write the gallery's rendered files; then read the diff")


def pytest_collection_modifyitems(items):
    """Whatever asks for a cluster is slow."""
    for item in items:
        if {"slurm", "slurm_big"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
            if not GROUP.get(item.path.stem, "").startswith("slurm"):
                raise pytest.UsageError(
                    f"{item.path.stem} asks for a cluster: add it to a group in tests/conftest.py"
                )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Largest group first. By file: xdist 3.8 writes a group's mark where pytest 9.2 does not read it."""
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return GROUP.get(PurePath(nodeid.partition("::")[0]).stem, nodeid)

    return Groups(config, log)


def borrowed(name, **options):
    if reason := slurm_cluster.why_not():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    return slurm_cluster.borrow(name, **options)


@pytest.fixture(scope="session")
def slurm():
    """Four real nodes of 16 CPUs and 2 GPUs; a test leaves them idle."""
    with borrowed("dslaunch-slurm") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def slurm_big():
    """A controller of 4096 nodes of 8 GPUs that are not there: for `sbatch --test-only`."""
    with borrowed("dslaunch-big", nodes=4096, slurmds=False, gpus=8) as cluster:
        yield cluster
