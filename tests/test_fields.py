"""`dslaunch schema SECTION`: every field of the job file, explained."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from launcher import cli, fields
from launcher.errors import UserError

ROWS = {row.path: row for row in fields.rows()}


def test_fields_of_lists_and_of_own_keys_have_their_places():
    assert ROWS["slurm.gpus_as"].takes.split(" | ")[:2] == ["gpus-per-node", "gres"]
    assert ROWS["slurm.gpus_as"].default == "gpus-per-node"
    assert ROWS["kubernetes.volumes[].claim"].help == "name of a PersistentVolumeClaim"
    assert ROWS["secrets.*.from_env"].takes == "a name for a variable"
    assert ROWS["resources.nodes"].takes == "1 to 100,000"
    assert ROWS["container.image"].takes == "an image reference without spaces"


def test_a_section_is_explained_on_lines_that_fit():
    text = fields.text("kubernetes.network", width=100)
    assert text.startswith("kubernetes.network ")
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "kubernetes.network.host_network" in text
    assert fields.text("services[].ready", width=100) == fields.text("services.ready", width=100)


def test_a_field_that_there_is_not_names_the_nearest():
    with pytest.raises(UserError) as caught:
        fields.text("slurm.partitoin", width=100)
    assert "slurm.partition" in caught.value.problems[0].hint


def test_the_command_prints_either():
    assert CliRunner().invoke(cli.cli, ["schema", "sweep"]).output.startswith("sweep ")
    assert CliRunner().invoke(cli.cli, ["schema"]).output.startswith("{")
