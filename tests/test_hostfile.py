"""Node lists, hostfiles and allocations, against ClusterShell, Slurm and DeepSpeed themselves."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import time
from urllib.parse import urlsplit

import pytest
from ClusterShell.NodeSet import NodeSet
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import UserError
from launcher.hostfile import MOST_HOSTS, Host, endpoint, expand, fold, from_environment, parse, render

scontrol = pytest.mark.skipif(
    not shutil.which("scontrol"), reason="scontrol is not installed: apt install slurm-client"
)


def said(function, *arguments, **named):
    """Every problem, as a user reads it."""
    with pytest.raises(UserError) as error:
        function(*arguments, **named)
    assert all(problem.hint for problem in error.value.problems)
    return [str(problem) for problem in error.value.problems]


# Node lists


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("gpu7", "gpu7"),
        ("gpu[001-004,7]", "gpu001 gpu002 gpu003 gpu004 gpu7"),
        ("a1,b[2-3]-ib[0-1]", "a1 b2-ib0 b2-ib1 b3-ib0 b3-ib1"),
        ("r[1-2]n[1-2]c[1-2]", "r1n1c1 r1n1c2 r1n2c1 r1n2c2 r2n1c1 r2n1c2 r2n2c1 r2n2c2"),
        ("a[1-2][3-4]", "a13 a14 a23 a24"),
        ("gpu[1-2].site.org", "gpu1.site.org gpu2.site.org"),
        ("gpu[1-9/4]", "gpu1 gpu5 gpu9"),
        ("gpu[01-10/5]", "gpu01 gpu06"),
        ("gpu[98-101]", "gpu98 gpu99 gpu100 gpu101"),
        ("gpu[098-101]", "gpu098 gpu099 gpu100 gpu101"),
        ("gpu[99-101],gpu[08-10,9]", "gpu99 gpu100 gpu101 gpu08 gpu09 gpu10 gpu9"),
        ("[1-2]", "1 2"),
        (" a1 ,\ta2 , b[1 - 2, 4] ", "a1 a2 b1 b2 b4"),
        ("a1\na2,\r\n\n  a3\n", "a1 a2 a3"),
        ("a2,a1,a[1-3]", "a2 a1 a3"),
        ("A1,a1", "A1 a1"),
        ("10.0.0.[1-2]", "10.0.0.1 10.0.0.2"),
        ("::1,[::2],[::3]:22,fe80::1%eth0", "::1 ::2 ::3 fe80::1%eth0"),
    ],
)
def test_a_node_list_is_its_names_in_order(text, names):
    assert expand(text) == tuple(names.split())


def test_the_range_slurm_writes_past_its_padding_is_read():
    names = expand("gpu[01-101]")
    assert (len(names), names[0], names[98], names[-1]) == (101, "gpu01", "gpu99", "gpu101")


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("", ["the node list is empty"]),
        (" \n ", ["the node list is empty"]),
        ("gpu[1-4", ["node list, column 4: this [ is never closed"]),
        ("gpu1-4]", ["node list, column 7: this ] has no [ before it"]),
        ("a[1,[2]]", ["node list, column 2: this [ is not closed before the next one"]),
        ("a[]", ["node list, column 3: an empty range"]),
        ("a[1,,2]", ["node list, column 5: an empty range"]),
        ("a[5-1]", ["node list, column 3: 5-1 runs backwards"]),
        ("a[1-010]", ["node list, column 3: 1-010 pads its two ends differently"]),
        ("a[001-3]", ["node list, column 3: 001-3 pads its two ends differently"]),
        ("a[1-9/0]", ["node list, column 3: 1-9/0 has a step of 0"]),
        ("a[-1]", ["node list, column 3: -1 is not a number or a range"]),
        ("a[1-2-3]", ["node list, column 3: 1-2-3 is not a number or a range"]),
        ("a[x]", ["node list, column 3: x is not a number or a range"]),
        ("a[\u0661]", [r"node list, column 3: \u0661 is not a number or a range"]),
        ("a[1-1234567890123456]", ["node list, column 3: 1-1234567890123456 has a number of more than 15 digits"]),
        ("a,,b", ["node list, column 3: no host stands before this comma"]),
        (",b", ["node list, column 1: no host stands before this comma"]),
        ("a b", ["node list, column 2: ' ' cannot stand in a host name"]),
        ("a[1-2]$", ["node list, column 7: '$' cannot stand in a host name"]),
        ("a\x1b", [r"node list, column 2: '\x1b' cannot stand in a host name"]),
        ("g\u00e9ant1", [r"node list, column 2: '\xe9' cannot stand in a host name"]),
        ("(null)", ["node list, column 1: '(' cannot stand in a host name"]),
        ("a1,-oProxyCommand=x", ["node list, column 4: a host name cannot start with '-'"]),
        (".a", ["node list, column 1: a host name cannot start with '.'"]),
        ("gpu1:22", ["node list, column 5: port 22 is not part of a name"]),
        ("[::1]:2222", ["node list, column 6: port 2222 is not part of a name"]),
        ("1::2::3", ["node list, column 1: 1::2::3 is not an IPv6 address"]),
        ("a" * 300, ["node list, column 1: a name of 300 characters; 253 is the most"]),
    ],
)
def test_a_bad_node_list_is_refused_with_its_column(text, problems):
    assert said(expand, text) == problems


def test_every_mistake_in_a_node_list_is_reported_at_once():
    assert said(expand, "a[5-1,x]$,-b\nc[1-2,\nd[01-2]") == [
        "node list, line 1, column 3: 5-1 runs backwards",
        "node list, line 1, column 7: x is not a number or a range",
        "node list, line 1, column 9: '$' cannot stand in a host name",
        "node list, line 1, column 11: a host name cannot start with '-'",
        "node list, line 2, column 2: this [ is never closed",
        "node list, line 3, column 3: 01-2 pads its two ends differently",
    ]


@pytest.mark.parametrize(
    ("text", "hint"),
    [("a[5-1]", "1-5"), ("a[1-010]", "001-010, or 1-10"), ("a[1-9/0]", "1-9"), ("a[001-3]", "001-003, or 1-3")],
)
def test_the_hint_is_a_range_that_works(text, hint):
    with pytest.raises(UserError) as error:
        expand(text)
    assert error.value.problems[0].hint == hint
    assert all(expand(f"a[{range_}]") for range_ in hint.split(", or "))


@pytest.mark.parametrize(
    ("hosts", "text"),
    [
        ("", ""),
        ("gpu7", "gpu7"),
        ("login", "login"),
        ("gpu001 gpu002 gpu003 gpu007", "gpu[001-003,007]"),
        ("gpu10 gpu9 gpu08", "gpu[08,9-10]"),
        ("gpu99 gpu100 gpu101", "gpu[99-101]"),
        ("gpu0 gpu1 gpu9 gpu10", "gpu[0-1,9-10]"),
        ("gpu99 gpu098 gpu100 gpu0101", "gpu[098,99-100,0101]"),
        ("b2 a1 b1 a2 login", "a[1-2],b[1-2],login"),
        ("n1-ib0 n2-ib0", "n[1-2]-ib[0]"),
        ("n1-ib0 n1-ib1 n2-ib0 n2-ib1", "n[1-2]-ib[0-1]"),
        ("n1-ib0 n1-ib1 n2-ib0 n3-ib0", "n1-ib[0-1],n[2-3]-ib[0]"),
        ("n1-eth0 n1-ib0 n2-eth0 n2-ib0", "n[1-2]-eth[0],n[1-2]-ib[0]"),
        ("r1n1 r1n2 r2n1 r2n2", "r[1-2]n[1-2]"),
        ("gpu1.site gpu2.site", "gpu1.site,gpu2.site"),
        ("10.0.0.1 10.0.0.2", "10.0.0.[1-2]"),
        ("::2 ::1 [::1]:22", "::1,::2"),
        ("a1 a1", "a1"),
        ("1 2", "[1-2]"),
        ("sn1234567890123456 sn1234567890123457", "sn1234567890123456,sn1234567890123457"),
    ],
)
def test_hosts_fold_into_brackets(hosts, text):
    assert fold(hosts.split()) == text


def test_a_fold_does_not_depend_on_the_order_of_its_hosts():
    hosts = list(expand("gpu[01-40,7],login,n[1-3]-ib[0-1]"))
    text = fold(hosts)
    random.Random(0).shuffle(hosts)
    assert fold(hosts) == text


def test_a_fold_refuses_what_it_could_not_unfold():
    assert said(fold, ["a1", "a,b", "-x", ""]) == [
        "'a,b' is not a host: ',' cannot stand in a host name",
        "'-x' is not a host: a host name cannot start with '-'",
        "'' is not a host: a host name cannot start with ''",
    ]


# ... against the others that read them

letters = st.sampled_from(["gpu", "n", "a-", "b_", "x.y", "rack"])
endings = st.sampled_from(["", "", "-x", ".site.org"])
between = st.sampled_from(["-", "n", "-ib", ".c", "_"])


@st.composite
def ranges(draw, *, steps=True):
    """7, 098-102 or 1-9/2."""
    first = draw(st.integers(0, 120))
    last = first + draw(st.integers(0, 12))
    width = draw(st.sampled_from([0, 0, len(str(last)), 3, 4]))
    step = draw(st.sampled_from(["", "", "/2", "/3"])) if steps and last > first else ""
    return f"{first:0{width}d}" + (f"-{last:0{width}d}{step}" if last > first else "")


@st.composite
def node_lists(draw, *, steps=True, numbers=3, ends=endings):
    """gpu[1-3,007]-ib[0-1/2].site.org,login"""
    items = []
    for _ in range(draw(st.integers(1, 4))):
        item = draw(letters)
        count = draw(st.integers(0, numbers))
        for index in range(count):
            inside = ",".join(draw(st.lists(ranges(steps=steps), min_size=1, max_size=2)))
            item += (draw(between) if index else "") + f"[{inside}]"
        items.append(item + (draw(ends) if count else ""))
    return ",".join(items)


names = st.lists(
    st.one_of(
        st.from_regex(r"[a-c]([0-9]{1,3})", fullmatch=True),
        st.from_regex(r"[a-b][0-3](-ib|n|\.)[0-3]{1,2}", fullmatch=True),
        st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,8}", fullmatch=True),
    ),
    min_size=1,
    max_size=40,
)


def same_as_clustershell(text):
    ours, theirs = expand(text), NodeSet(text)
    assert len(ours) == len(theirs)
    assert set(ours) == set(theirs)


@pytest.mark.slow
@given(node_lists())
def test_clustershell_reads_the_same_hosts(text):
    same_as_clustershell(text)


@pytest.mark.slow
@given(names)
def test_a_fold_expands_to_the_same_hosts(hosts):
    text = fold(hosts)
    assert set(expand(text)) == set(hosts)
    assert len(expand(text)) == len(set(hosts))
    assert fold(expand(text)) == text


@pytest.mark.slow
@given(names)
def test_clustershell_reads_what_we_fold(hosts):
    assert set(NodeSet(fold(hosts))) == set(hosts)


@given(st.sets(st.integers(0, 9999), min_size=1), st.sampled_from(["gpu{:05d}", "n{:04d}-ib0", "10.0.0.{}"]))
def test_hosts_in_order_stay_in_order(numbers, form):
    hosts = tuple(form.format(number) for number in sorted(numbers))
    assert expand(fold(hosts)) == hosts


@given(st.text(alphabet="ab1209[]-,/:.%\n $", max_size=30))
def test_any_text_is_either_hosts_or_a_user_error(text):
    try:
        hosts = expand(text)
    except UserError:
        return
    assert hosts
    assert set(expand(fold(hosts))) == set(hosts)


@pytest.fixture(scope="module")
def show_hostnames(tmp_path_factory):
    """`scontrol show hostnames`, which wants a slurm.conf but no controller."""
    conf = tmp_path_factory.mktemp("slurm") / "slurm.conf"
    conf.write_text("ClusterName=test\nSlurmctldHost=localhost\n")

    def show(text):
        argv = ["scontrol", "show", "hostnames", text]
        env = os.environ | {"SLURM_CONF": str(conf)}
        return subprocess.run(argv, env=env, capture_output=True, text=True, check=True).stdout.split()

    return show


with_slurm = settings(max_examples=60, deadline=None)


@pytest.mark.slow
@scontrol
@with_slurm
@given(text=node_lists(steps=False, numbers=2, ends=st.just("")))
def test_slurm_reads_the_same_hosts_in_the_same_order(show_hostnames, text):
    assert list(expand(text)) == list(dict.fromkeys(show_hostnames(text)))


@pytest.mark.slow
@scontrol
@with_slurm
@given(hosts=names)
def test_slurm_reads_what_we_fold(show_hostnames, hosts):
    text = fold(hosts)
    assert show_hostnames(text) == list(expand(text))


@pytest.mark.slow
@scontrol
@pytest.mark.parametrize(
    "text", ["gpu[1-70000]", "gpu[00001-10000]", "n[1-300]-ib[0-299]", "gpu[099-1001]", "::1,::2"]
)
def test_slurm_reads_what_we_fold_of_a_big_machine(show_hostnames, text):
    hosts = expand(text)
    assert show_hostnames(fold(hosts)) == list(hosts)


# Hostfiles


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("gpu1 slots=8\n", [Host("gpu1", 8)]),
        ("gpu1 slots=8", [Host("gpu1", 8)]),
        ("# two\r\n\r\n  gpu1\t slots=8 \r\n gpu2 slots=4 # half\r\n", [Host("gpu1", 8), Host("gpu2", 4)]),
        ("gpu2.a slots=1\ngpu2.b slots=1\n", [Host("gpu2.a", 1), Host("gpu2.b", 1)]),
        ("10.0.0.1 slots=1\n10.0.0.2 slots=1\n10 slots=1", [Host("10.0.0.1", 1), Host("10.0.0.2", 1), Host("10", 1)]),
    ],
)
def test_a_hostfile_is_its_hosts_in_order(text, hosts):
    assert list(parse(text)) == hosts


def test_a_rendered_hostfile_is_one_line_a_host():
    assert render([Host("gpu1", 8), Host("::1", 4)]) == "gpu1 slots=8\n::1 slots=4\n"


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("", ["hostfile:1:1: no host is named"]),
        ("# nothing\n\n", ["hostfile:1:1: no host is named"]),
        ("gpu1", ["hostfile:1:5: slots= is missing"]),
        ("gpu1 # slots=8", ["hostfile:1:5: slots= is missing"]),
        ("gpu1 8", ["hostfile:1:6: 8 is not a number of slots"]),
        ("gpu1 slots=", ["hostfile:1:6: slots= is not a number of slots"]),
        ("gpu1 slots=99999", ["hostfile:1:6: slots=99999 is not a number of slots"]),
        ("gpu1 slots=\u0668", [r"hostfile:1:6: slots=\u0668 is not a number of slots"]),
        ("gpu1 slots = 8", ["hostfile:1:6: slots is not a number of slots", "hostfile:1:12: = 8 follows the slots"]),
        ("gpu[1-4] slots=8", ["hostfile:1:4: '[' cannot stand in a host name"]),
        ("-x slots=8", ["hostfile:1:1: a host name cannot start with '-'"]),
        ("gpu1:2222 slots=8", ["hostfile:1:5: port 2222 is not part of a name"]),
        ("\ufeffgpu1 slots=8", [r"hostfile:1:1: '\ufeff' cannot stand in a host name"]),
    ],
)
def test_a_bad_hostfile_is_refused_with_its_line_and_column(text, problems):
    assert said(parse, text) == problems


def test_every_mistake_in_a_hostfile_is_reported_at_once():
    text = "gpu1 slots=8\n\ngpu1 slots=8x\ngpu$ slots=0 more\n"
    assert said(parse, text, source="hosts") == [
        "hosts:3:1: gpu1 on line 3 is gpu1 on line 1 again",
        "hosts:3:6: slots=8x is not a number of slots",
        "hosts:4:4: '$' cannot stand in a host name",
        "hosts:4:6: slots=0 is not a number of slots",
        "hosts:4:14: more follows the slots",
    ]


hosts = st.builds(
    Host,
    name=st.one_of(
        st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,12}", fullmatch=True),
        st.ip_addresses(v=6).map(str),
        st.ip_addresses(v=6).map(lambda address: f"{address}%eth0"),
    ),
    slots=st.integers(1, 9999),
)


def distinct(several):
    """The hosts that are not each other under another name."""
    kept = []
    for host in several:
        try:
            parse(render([*kept, host]))
        except UserError:
            continue
        kept.append(host)
    return kept


@pytest.mark.slow
@given(st.lists(hosts, min_size=1, max_size=8).map(distinct))
def test_a_rendered_hostfile_parses_to_the_same_hosts(several):
    assert list(parse(render(several))) == several


@pytest.mark.slow
def test_deepspeed_reads_every_hostfile_we_render(tmp_path):
    runner = pytest.importorskip("deepspeed.launcher.runner", reason="deepspeed is not installed")

    @settings(deadline=None, max_examples=200)
    @given(st.lists(hosts, min_size=1, max_size=8).map(distinct))
    def same(several):
        pool = runner._parse_hostfile(render(several).splitlines(keepends=True))
        assert list(pool.items()) == [(host.name, host.slots) for host in several]

    same()
    path = tmp_path / "hostfile"
    path.write_text(render(Host(name, 8) for name in expand("gpu[001-100],[::1]:22")))
    pool = runner.fetch_hostfile(str(path))
    assert (len(pool), pool["gpu100"], pool["::1"]) == (101, 8, 8)


# Allocations


@pytest.mark.parametrize(
    ("env", "slots"),
    [
        ({"SLURM_JOB_NODELIST": "g[1-2]", "SLURM_GPUS_ON_NODE": "8"}, "g1=8 g2=8"),
        ({"SLURM_NODELIST": "g[1-2]", "SLURM_GPUS_ON_NODE": "8"}, "g1=8 g2=8"),
        ({"SLURM_JOB_NODELIST": "g1", "SLURM_NODELIST": "g2", "SLURM_GPUS_ON_NODE": "8"}, "g1=8"),
        ({"SLURM_JOB_NODELIST": "g[1-2]", "SLURM_GPUS_PER_NODE": "a100:8"}, "g1=8 g2=8"),
        ({"SLURM_JOB_NODELIST": "g1", "SLURM_GPUS_PER_NODE": "a100:4,3g.40gb:2"}, "g1=6"),
        ({"SLURM_JOB_NODELIST": "g1", "SLURM_GPUS_PER_NODE": "4", "SLURM_TASKS_PER_NODE": "1"}, "g1=4"),
        ({"SLURM_JOB_NODELIST": "g[1-2]", "SLURM_GPUS_ON_NODE": "8", "SLURM_TASKS_PER_NODE": "1(x2)"}, "g1=8 g2=8"),
        ({"SLURM_JOB_NODELIST": "g[1-4]", "SLURM_TASKS_PER_NODE": "8(x3),4"}, "g1=8 g2=8 g3=8 g4=4"),
        ({"SLURM_JOB_NODELIST": "g[1-2]", "SLURM_GPUS_ON_NODE": "8", "SLURM_TASKS_PER_NODE": "8,4"}, "g1=8 g2=4"),
        ({"SLURM_JOB_NODELIST": "g[1-3]", "SLURM_GPUS_ON_NODE": "8", "SLURM_TASKS_PER_NODE": "1"}, "g1=8 g2=8 g3=8"),
    ],
)
def test_an_allocation_gives_its_hosts_and_slots(env, slots):
    assert " ".join(f"{host.name}={host.slots}" for host in from_environment(env)) == slots


@pytest.mark.parametrize(
    ("env", "problem"),
    [
        ({}, "not inside a Slurm allocation: SLURM_JOB_NODELIST is not set"),
        ({"SLURM_JOB_NODELIST": ""}, "not inside a Slurm allocation: SLURM_JOB_NODELIST is not set"),
        ({"SLURM_JOB_NODELIST": "g[1"}, "SLURM_JOB_NODELIST: node list, column 2: this [ is never closed"),
        ({"SLURM_JOB_NODELIST": "g1"}, "the allocation does not say how many GPUs a node has"),
        (
            {"SLURM_JOB_NODELIST": "g1", "SLURM_GPUS_ON_NODE": "0"},
            "SLURM_GPUS_ON_NODE: 0 is not a number of GPUs",
        ),
        (
            {"SLURM_JOB_NODELIST": "g1", "SLURM_GPUS_PER_NODE": "a100"},
            "SLURM_GPUS_PER_NODE: a100 is not a number of GPUs",
        ),
        (
            {"SLURM_JOB_NODELIST": "g1", "SLURM_TASKS_PER_NODE": "8(x"},
            "SLURM_TASKS_PER_NODE: 8(x is not a number of tasks for each node",
        ),
        (
            {"SLURM_JOB_NODELIST": "g[1-2]", "SLURM_TASKS_PER_NODE": "8(x999999)"},
            "SLURM_TASKS_PER_NODE=8(x999999) speaks of 999,999 nodes, and the node list has 2",
        ),
        (
            {"SLURM_JOB_NODELIST": "g[1-2]", "SLURM_GPUS_ON_NODE": "8", "SLURM_TASKS_PER_NODE": "2,1"},
            "SLURM_GPUS_ON_NODE=8 and SLURM_TASKS_PER_NODE=2,1 disagree, so a node's GPUs are not known",
        ),
    ],
)
def test_an_allocation_that_does_not_say_enough_is_refused(env, problem):
    assert said(from_environment, env) == [problem]


def test_outside_an_allocation_the_hint_says_how_to_name_hosts():
    with pytest.raises(UserError) as error:
        from_environment({"SLURM_GPUS_ON_NODE": "8"})
    assert "--nodes 'gpu[001-004]'" in error.value.problems[0].hint


# Faults


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("gpu1", "gpu1"),
        ("gpu1", "GPU1"),
        ("gpu1", "gpu1.cluster.local"),
        ("gpu1.cluster.local", "Gpu1"),
        ("gpu1.cluster", "gpu1.cluster.local"),
        ("gpu1.cluster", "gpu1.cluster."),
        ("::1", "[0:0::1]:22"),
    ],
)
def test_fault_28_a_host_that_comes_twice_is_refused_with_both_lines(first, second):
    text = f"{first} slots=8\ngpu2 slots=8\n{second} slots=8\n"
    bare = re.sub(r"[\[\]]|:22", "", second)
    assert said(parse, text) == [f"hostfile:3:1: {bare} on line 3 is {first} on line 1 again"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("gpu1 slots=8x", "hostfile:1:6: slots=8x is not a number of slots"),
        ("gpu1 slots=0", "hostfile:1:6: slots=0 is not a number of slots"),
        ("gpu1 slots=-1", "hostfile:1:6: slots=-1 is not a number of slots"),
        ("gpu1 slots=8.0", "hostfile:1:6: slots=8.0 is not a number of slots"),
        ("gpu1 slots=8 max_slots=8", "hostfile:1:14: max_slots=8 follows the slots"),
    ],
)
def test_fault_29_slots_that_are_not_a_plain_number_are_refused(line, problem):
    assert said(parse, line) == [problem]


@pytest.mark.parametrize(
    ("written", "name", "url"),
    [
        ("2001:db8::7", "2001:db8::7", "tcp://[2001:db8::7]:29500"),
        ("[::1]", "::1", "tcp://[::1]:29500"),
        ("[::1]:22", "::1", "tcp://[::1]:29500"),
        ("fe80::1%eth0", "fe80::1%eth0", "tcp://[fe80::1%eth0]:29500"),
        ("[fe80::1%ib0]:22", "fe80::1%ib0", "tcp://[fe80::1%ib0]:29500"),
        ("10.0.0.1", "10.0.0.1", "tcp://10.0.0.1:29500"),
        ("gpu1", "gpu1", "tcp://gpu1:29500"),
    ],
)
def test_fault_31_an_ipv6_address_is_a_host_and_gets_brackets_in_a_url(written, name, url):
    assert parse(f"{written} slots=8\n") == (Host(name, 8),)
    assert f"tcp://{endpoint(name, port=29500)}" == url
    assert (urlsplit(url).hostname, urlsplit(url).port) == (name, 29500)


@pytest.mark.slow
def test_fault_32_a_hundred_thousand_random_lists_are_what_clustershell_says():
    rng = random.Random(32)

    def inside():
        first = rng.randrange(110)
        last = first + rng.randrange(4)
        width = rng.choice([0, len(str(last)), 3])
        range_ = f"{first:0{width}d}-{last:0{width}d}" + rng.choice(["", "", "/2"])
        return rng.choice([range_, f"{range_},{rng.randrange(300)}", f"{first:0{width}d}"])

    forms = ["n[{}]", "n[{}]-ib[{}]", "a1,n[{}].site", "r[{}]n[{}],r[{}]n[{}]", "n[{}],login,n[{}]"]
    for _ in range(100_000):
        form = rng.choice(forms)
        same_as_clustershell(form.format(*(inside() for _ in range(form.count("{}")))))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("n[0-999999999]", "n[0-999999999] brings the list to 1,000,000,000 hosts, and 200,000 is the most"),
        ("n[1-500]-ib[1-500]", "n[1-500]-ib[1-500] brings the list to 250,000 hosts, and 200,000 is the most"),
        ("n[0-999999999999999]" * 9, "brings the list to 1,000,000,000,000,000,000 hosts, and 200,000 is the most"),
    ],
)
def test_fault_33_a_range_bomb_is_refused_before_it_is_expanded(text, problem):
    start = time.perf_counter()
    (message,) = said(expand, text)
    assert message.startswith("node list, column 1: ")
    assert message.endswith(problem)
    assert time.perf_counter() - start < 0.1


def test_fault_33_a_bomb_in_pieces_is_refused_too():
    text = "a[1-150000],b[1-50000],c[1-2],d[0-999999999]"
    assert said(expand, text) == [
        "node list, column 24: c[1-2] brings the list to 200,002 hosts, and 200,000 is the most"
    ]
    assert len(expand("a[1-150000],b[1-50000]")) == MOST_HOSTS


def test_fault_33_a_list_of_a_thousand_bombs_is_still_an_answer():
    assert len(said(expand, "a" + "[0-99999999]" * 1000)) == 2


# Speed

ten_thousand = [f"gpu{number:05d}" for number in range(1, 10_001)]


@pytest.mark.parametrize(
    "hosts", [ten_thousand, [name for name in ten_thousand if int(name[3:]) % 7]], ids=["full", "holes"]
)
def test_ten_thousand_hosts_fold_and_expand_within_50_ms_each(hosts):
    def fastest(function, argument):
        times = []
        for _ in range(7):
            start = time.perf_counter()
            function(argument)
            times.append(time.perf_counter() - start)
        return min(times)

    text = fold(hosts)
    assert list(expand(text)) == hosts
    assert fastest(fold, hosts) < 0.05
    assert fastest(expand, text) < 0.05


def test_reading_a_hostfile_imports_nothing_heavy():
    script = "import sys, launcher.hostfile; print(*{'ipaddress', 'yaml', 'pydantic', 'torch'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "\n"
