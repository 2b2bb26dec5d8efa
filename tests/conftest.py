import os

import pytest
import slurm_cluster


def pytest_addoption(parser):
    parser.addoption("--bless", action="store_true", help="write the gallery's rendered files; then read the diff")


def pytest_collection_modifyitems(items):
    """Whatever asks for a cluster is slow: one for jobs, one for preflights, so that no worker is left with all."""
    for item in items:
        if {"slurm", "slurm_big"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
            group = "preflight" if item.path.stem == "test_preflight_slurm" else "slurm"
            item.add_marker(pytest.mark.xdist_group(group))


def _slurm(name, **options):
    if reason := slurm_cluster.why_not():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    return slurm_cluster.borrow(name, **options)


@pytest.fixture(scope="session")
def slurm():
    """Four real nodes of 16 CPUs and 2 GPUs; a test leaves them idle."""
    with _slurm("dslaunch-slurm") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def slurm_big():
    """A controller of 4096 nodes of 8 GPUs that are not there: for `sbatch --test-only`."""
    with _slurm("dslaunch-big", nodes=4096, slurmds=False, gpus=8) as cluster:
        yield cluster
