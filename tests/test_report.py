"""The plan's page: what it says, and what a real browser makes of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import accumulate, combinations
from pathlib import Path

import browser
import pytest

from launcher import charts, page, report
from launcher.charts import Bar, Chart
from launcher.plan.setup import Alternative, Estimate, Part, Setup, StepTime
from launcher.report import PlanView, Stage
from launcher.spec import Shape

NASTY = (
    '</title><script>console.log("ran")</script><img src="http://evil.example/x" onerror="console.log(1)">\u202e\x00'
)


def estimate(weights=0.0, gradients=0.0, states=0.0, gathered=0.0, activations=0.0, *, host=0.0, error=0.1):
    parts = (
        ("weights", weights, "2 bytes per parameter in bf16"),
        ("gradients", gradients, "accumulated in fp32: 4 bytes per parameter"),
        ("optimizer states", states, "the fp32 copy and Adam's two moments: 12 bytes per parameter"),
        ("gathered weights", gathered, "two layers at a time, and what is fetched ahead"),
        ("reduce buckets", 1.5 if gradients else 0.0, "two buckets of 200,000,000 elements: overlap_comm"),
        ("activations", activations, "2 bytes x micro-batch x sequence x hidden per layer, and one layer at work"),
        ("logits and loss", 3.9 if activations > 3 else 0.2, "the output, its fp32 copy and its gradient"),
        ("CUDA and NCCL", 1.6, "the context, and the buffers of two communicators"),
        ("fragmentation", 0.06 * activations, "6 % of what comes and goes"),
    )
    kept = (Part("fp32 copy and moments", host, "12 bytes per parameter"), Part("pinned buffers", host / 10, "x 1.1"))
    slack = 0.06 * activations
    return Estimate(tuple(Part(*part) for part in parts), host=kept if host else (), error=error, slack=slack)


def seconds(compute, *, recompute=0.0, bubble=0.0, exposed=0.0, optimizer=0.02, tokens=4_194_304, world=32):
    parts = (
        ("compute", compute, "6 FLOPs per parameter and token, at 0.52 of the peak"),
        ("recomputation", recompute, "the forward pass once more"),
        ("pipeline bubble", bubble, "(p - 1) / m of the compute"),
        ("exposed communication", exposed, "what the backward pass does not hide"),
        ("optimizer", optimizer, "reads and writes 16 bytes per parameter"),
    )
    return StepTime(
        tuple(Part(*part) for part in parts),
        tokens=tokens,
        world=world,
        model_flops=compute * 0.52 * world * 989e12,
        peak=989e12,
        volume=48e9,
        communication=1.1,
        notes=("the bandwidth between nodes is the table's, not measured",),
    )


SHAPE = Shape(layers=32, hidden=4096, heads=32, vocab=128256)
SETUP = Setup(SHAPE, seq_len=4096, world=32, micro=4, accumulation=2, stage=2)

TAKEN = Alternative(
    "ZeRO-2, micro-batch 4, full recomputation",
    SETUP,
    estimate(15.0, 7.5, 5.6, 0.0, 14.2),
    seconds(6.4, recompute=2.1, exposed=0.31),
    "fits",
    "taken: the fastest of 212 ways that fit",
)
OTHERS = (
    Alternative(
        "ZeRO-3, micro-batch 8, full recomputation",
        replace(SETUP, stage=3, micro=8, accumulation=1),
        estimate(0.5, 0.5, 2.8, 2.2, 28.1),
        seconds(6.3, recompute=2.1, exposed=1.9),
        "fits",
        "1.17x slower: gathers the weights twice per micro-batch",
        ("train.zero: 3", "train.micro_batch: 8"),
    ),
    Alternative(
        "ZeRO-2, micro-batch 4, selective recomputation",
        replace(SETUP, recompute="selective"),
        estimate(15.0, 7.5, 5.6, 0.0, 41.0),
        seconds(6.4, recompute=0.3, exposed=0.31),
        "tight",
        "could be 1.25x faster, and may run out of memory",
        ("train.activation_checkpointing: selective",),
    ),
    Alternative(
        "ZeRO-2, micro-batch 1, optimizer on the CPU",
        replace(SETUP, micro=1, offload_optimizer="cpu"),
        estimate(15.0, 7.5, 0.0, 0.0, 3.5, host=780.0),
        seconds(6.9, recompute=2.3, exposed=0.2, optimizer=11.3),
        "fits",
        "2.4x slower: Adam runs on the host's cores",
        ("train.offload.optimizer: cpu",),
    ),
    Alternative(
        "ZeRO-0, micro-batch 1",
        replace(SETUP, stage=0, micro=1),
        estimate(15.0, 30.0, 90.0, 0.0, 9.9),
        seconds(6.9, exposed=0.4),
        "does not fit",
        "needs 152 GiB of 80",
        ("train.zero: 0", "train.micro_batch: 1"),
    ),
)
LLAMA_8B = PlanView(
    "llama-8b",
    "llama-3.1-8b (8.03 billion parameters)",
    4,
    8,
    gpu="h100-80gb",
    memory=80.0,
    usable=73.6,
    host=1000.0,
    steps=10_000,
    tokens=15e12,
    price=3.5,
    chosen=TAKEN,
    alternatives=OTHERS,
    by_stage=(
        Stage("ZeRO-0", estimate(15.0, 30.0, 90.0, 0.0, 14.2), "does not fit"),
        Stage("ZeRO-1", estimate(15.0, 30.0, 5.6, 0.0, 14.2), "tight"),
        Stage("ZeRO-2", TAKEN.estimate, "fits"),
        Stage("ZeRO-3", estimate(0.5, 1.0, 2.8, 2.2, 14.2), "fits"),
        Stage("ZeRO-3 + CPU offload", estimate(0.0, 0.5, 0.0, 2.2, 14.2), "fits"),
    ),
    decisions=(
        ("ranks", "32", "4 nodes x 8 GPUs"),
        ("zero stage", "2", "the lowest stage that fits; about 51 of 80 GiB per GPU at micro-batch 4"),
        ("activation checkpointing", "full", "does not fit without"),
        ("optimizer", "AdamW", "the usual choice"),
    ),
    notes=("activation checkpointing is up to your program: DeepSpeed's section alone recomputes nothing",),
    compression="1-bit Adam would gain 1.02x: it needs less than 3.1 GB/s between nodes to gain 1.15x.",
    checkpoint="Every 38 minutes (212 steps): 104 GiB in 42 s; 97.1 % of the time trains.",
    config={
        "train_batch_size": 1024,
        "zero_optimization": {"stage": 2, "overlap_comm": True},
        "bf16": {"enabled": True},
    },
    environment=(
        ("NCCL_IB_HCA", "mlx5", "use every mlx5 port"),
        ("OMP_NUM_THREADS", "8", "96 cores, 8 ranks, some left"),
    ),
)


def small():
    """One GPU, a model that hardly fills it, and no other way."""
    taken = Alternative(
        "ZeRO-0, micro-batch 64",
        Setup(Shape(layers=4, hidden=256, heads=4, vocab=8192), seq_len=512, world=1, per_node=1, micro=64),
        estimate(0.012, 0.012, 0.07, 0.0, 0.9),
        seconds(0.034, optimizer=0.0004, tokens=32768, world=1),
        "fits",
        "taken: nothing else was asked for",
    )
    view = PlanView("tiny", "gpt-tiny (5.3 million parameters)", 1, 1, gpu="rtx-4090", memory=24.0, usable=22.1)
    return replace(view, chosen=taken, steps=500, by_stage=(Stage("ZeRO-0", taken.estimate, "fits"),))


def huge():
    """405B on 64 GPUs: every bar but the last far beyond the card, and thirteen parts."""
    more = (Part("prefetch buckets", 1.1, "50,000,000 elements"), Part("error buffers", 2.0, "1-bit"))
    last = estimate(1.2, 1.5, 0.0, 8.8, 38.4, host=2900.0)
    last = replace(last, gpu=(*last.gpu, *more, Part("ZeRO++ copy", 9.4, "hpZ"), Part("tensor gathers", 0.8, "x")))
    taken = Alternative(
        "ZeRO-3, micro-batch 1, full recomputation, optimizer and parameters on the hosts",
        replace(SETUP, stage=3, world=64, offload_optimizer="cpu", offload_parameters="cpu"),
        last,
        seconds(118.0, recompute=39.0, exposed=61.0, optimizer=44.0, world=64),
        "tight",
        "taken: nothing else fits",
    )
    stages = (
        Stage("ZeRO-0", estimate(754, 1509, 4526, 0, 38.4), "does not fit"),
        Stage("ZeRO-1", estimate(754, 1509, 70.7, 0, 38.4), "does not fit"),
        Stage("ZeRO-2", estimate(754, 23.6, 70.7, 0, 38.4), "does not fit"),
        Stage("ZeRO-3", estimate(11.8, 23.6, 70.7, 8.8, 38.4), "does not fit"),
        Stage("ZeRO-3, optimizer and parameters offloaded to the hosts", last, "tight"),
    )
    view = PlanView("llama-405b", "llama-3.1-405b (405.9 billion parameters)", 8, 8, gpu="h100-80gb", memory=80.0)
    return replace(view, usable=73.6, host=4000.0, steps=50_000, chosen=taken, by_stage=stages)


def hostile():
    """Every text of the page tries to run something, or to load something."""

    def spoil(one):
        return replace(
            one,
            name=NASTY,
            why=NASTY,
            changes=(NASTY,),
            estimate=replace(
                one.estimate, gpu=tuple(Part(NASTY + part.name, part.value, NASTY) for part in one.estimate.gpu)
            ),
            time=replace(one.time, notes=(NASTY,)),
        )

    row = (NASTY, NASTY, NASTY)
    return replace(
        LLAMA_8B,
        job=NASTY,
        model=NASTY,
        gpu=NASTY,
        chosen=spoil(TAKEN),
        alternatives=tuple(spoil(one) for one in OTHERS),
        by_stage=(Stage(NASTY, TAKEN.estimate, "fits"),),
        decisions=(row,),
        environment=(row,),
        notes=(NASTY,),
        compression=NASTY,
        checkpoint=NASTY,
        config={NASTY: NASTY},
    )


CPU = PlanView(
    "demo", "gpt-demo (1.2 million parameters)", 2, 2, decisions=(("ranks", "4", "2 nodes x 2 processes"),)
)
VIEWS = {"usual": LLAMA_8B, "small": small(), "huge": huge(), "hostile": hostile(), "cpu": CPU}


class Outline(HTMLParser):
    """What a page is made of, as a reader without a browser sees it; every tag closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in page.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_page_is_well_formed_and_loads_nothing(view):
    made = Outline(report.plan(view))
    assert {tag for tag, _ in made.tags} <= set(
        "html head meta title style body main h1 h2 h3 p section div span b i dl dt dd table caption thead tbody tr "
        "th td code br ul li figure figcaption details summary pre svg pattern rect line text polygon desc".split()
    )
    assert not [attrs for _, attrs in made.tags if {"src", "href", "onerror", "onload"} & set(attrs)]
    ids = [attrs["id"] for _, attrs in made.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_a_page_says_what_will_run_and_what_else_could():
    words = " ".join(Outline(report.plan(LLAMA_8B)).words)
    for said in (
        "llama-3.1-8b (8.03 billion parameters) on 4 x 8 = 32 GPUs, h100-80gb with 80 GiB",
        "taken: the fastest of 212 ways that fit",
        "44.4 to 55.2, of 80",
        "475,000",  # tokens per second: 4,194,304 in 8.83 s
        "20.8 to 28.2 hours",
        "41.9 billion tokens",
        "365 days",  # 15 trillion tokens
        "cost 2,750 at 3.5 per GPU and hour",  # 32 GPUs for 24.5 hours
        "train.offload.optimizer: cpu",
        "the lowest stage that fits",
        "1-bit Adam would gain 1.02x",
        "97.1 % of the time trains",
        "NCCL_IB_HCA",
        '"overlap_comm": true',
    ):
        assert said in words, said


def test_nothing_is_predicted_without_a_gpu():
    words = " ".join(Outline(report.plan(CPU)).words)
    assert "gpt-demo (1.2 million parameters) on 2 x 2 = 4 processes on CPU" in words
    assert "neither memory nor step time is predicted" in words
    assert "Alternatives" not in words


def test_offload_says_what_the_node_has_and_when_nobody_said():
    assert "3,190 GiB of 4,000" in report.plan(VIEWS["huge"])
    assert "nobody said how much there is" in report.plan(replace(VIEWS["huge"], host=0.0))


def test_what_is_zero_is_left_out():
    words = Outline(report.plan(VIEWS["small"])).words
    assert "gradients" in " ".join(words)
    assert "gathered weights" not in " ".join(words)
    assert "recomputation" not in " ".join(words)


@pytest.mark.slow
def test_the_same_view_gives_the_same_bytes():
    code = "import test_report as t; print(ascii([t.report.plan(view) for view in t.VIEWS.values()]))"
    seeds = [{**os.environ, "PYTHONHASHSEED": seed} for seed in "12"]
    here = Path(__file__).parent
    made = [subprocess.check_output([sys.executable, "-c", code], env=seed, cwd=here) for seed in seeds]
    assert made[0] == made[1]
    assert len(made[0]) > 50_000


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (report.gib(68.24), "68.2"),
        (report.gib(6034.2), "6,034"),
        (report.gib(0.01), "&lt;0.1"),
        (report.gib(99.96), "100"),
        (report.figure(0.08421), "0.0842"),
        (report.figure(3.214), "3.21"),
        (report.figure(41234), "41,200"),
        (report.figure(0), "0"),
        (report.count(41_900_000_000), "41.9 billion"),
        (report.count(32_768), "32,800"),
        (report.duration(5400), "90.0 minutes"),
        (report.duration(200_000), "2.31 days"),
        (report.duration(9), "9.00 s"),
        (report.between(64_000, 80_000), "17.8 to 22.2 hours"),
        (page.tag("p", "a < b", class_="note", title=None), '<p class="note">a &lt; b</p>'),
        (page.text('"\u202e'), "&quot;\\u202e"),
        (page.table(("a", "b"), [], caption="none"), ""),
    ],
)
def test_worked_examples(made, text):
    assert page.text(made) == text


@pytest.mark.parametrize(
    ("bars", "limit", "end"),
    [
        ((70.0,), 80.0, 82.4),
        ((100.0, 70.0), 80.0, 103.0),
        ((6000.0, 70.0), 80.0, 120.0),
        ((4.0, 5.0), 0.0, 5.15),
        ((4.0, 50.0), 0.0, 12.0),
    ],
)
def test_an_axis_ends_where_the_rest_can_still_be_seen(bars, limit, end):
    rows = tuple(Bar("", (Part("all", value, ""),), "") for value in bars)
    assert Chart(rows, "", str, (("", limit),) if limit else ()).end == pytest.approx(end)


def test_a_part_keeps_its_colour_and_its_place_among_the_others():
    rows = [("a", "c"), ("a", "b", "c"), ("c", "d")]
    chart = Chart(tuple(Bar("", tuple(Part(name, 1.0, "") for name in names), "") for names in rows), "", str)
    assert chart.names == ("a", "b", "c", "d")


@pytest.mark.parametrize(("end", "step"), [(120, 25), (7.3, 2), (5.15, 2), (0.04, 0.01), (8_000, 2_000), (1, 0.2)])
def test_axes_have_round_steps(end, step):
    assert charts.tick(end) == pytest.approx(step)


# What a real browser makes of it.

# Every text that can be seen: where, its colour, and the colour behind it.
TEXTS = """(() => {
  document.querySelectorAll('details').forEach(d => d.open = true);
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const behind = e => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor; if (c !== 'rgba(0, 0, 0, 0)') return c } };
  for (let n; n = walk.nextNode();) {
    if (!n.data.trim() || n.parentElement.closest('title, desc, style')) continue;
    const range = document.createRange(); range.selectNodeContents(n);
    const style = getComputedStyle(n.parentElement), svg = n.parentElement.tagName === 'text';
    const ink = svg ? style.fill : style.color;
    const back = n.parentElement.matches('.in') ? style.stroke : behind(n.parentElement);
    for (const r of range.getClientRects()) if (r.width && r.height)
      found.push({text: n.data, left: r.left, right: r.right, top: r.top, bottom: r.bottom, ink, back})
  }
  return found })()"""

# Every bar: its chart, its parts and what is drawn of them, in px.
BARS = """[...document.querySelectorAll('.bar')].map(bar => {
  const chart = [...document.querySelectorAll('figure')].indexOf(bar.closest('figure'));
  const px = e => ({x: e.x.baseVal.value, width: e.width.baseVal.value});
  const rects = [...bar.querySelectorAll('rect[class^=c]')];
  return {chart, width: bar.querySelector('svg').getBoundingClientRect().width,
    parts: rects.map(e => ({...px(e), name: e.querySelector('title').textContent})),
    labels: [...bar.querySelectorAll('.in')].filter(e => e.getBoundingClientRect().width).map(e => {
      const r = e.getBoundingClientRect(), left = bar.getBoundingClientRect().left;
      return {text: e.textContent, left: r.left - left, right: r.right - left}}),
    band: [...bar.querySelectorAll('.band')].map(e => [e.x1.baseVal.value, e.x2.baseVal.value])[0] ?? null,
    limits: [...bar.closest('.bars').querySelectorAll('.under .limit')].map(e => e.x1.baseVal.value)}})"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if reason := browser.why_not():
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    with browser.start(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, view in VIEWS.items():
        (folder / f"{name}.html").write_text(report.plan(view), encoding="utf-8")
    return folder


def brightness(colour):
    """Relative luminance of "rgb(1, 2, 3)" (WCAG 2.2)."""
    numbers = [int(text) / 255 for text in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in numbers]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    dark, light = sorted((brightness(one), brightness(other)))
    return (light + 0.05) / (dark + 0.05)


def overlap(one, other):
    """px that two boxes share, both ways."""
    wide = min(one["right"], other["right"]) - max(one["left"], other["left"])
    high = min(one["bottom"], other["bottom"]) - max(one["top"], other["top"])
    return min(wide, high)


@pytest.mark.slow
def test_the_browser_would_notice(chromium, tmp_path):
    """The checks below can fail: a page without our escaping asks the network, and runs what it was given."""
    (tmp_path / "raw.html").write_text(f"<!doctype html><title>x{NASTY}</title>", encoding="utf-8")
    chromium.open(tmp_path / "raw.html")
    assert any("evil.example" in url for url in chromium.requests)
    assert any("ran" in complaint for complaint in chromium.complaints)


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 800, 1280])
@pytest.mark.parametrize("name", VIEWS)
def test_a_page_holds_together_at_any_width(chromium, pages, name, width):
    chromium.open(pages / f"{name}.html", width=width)
    texts = chromium.evaluate(TEXTS)
    assert chromium.requests == [(pages / f"{name}.html").as_uri()]
    assert chromium.complaints == []
    assert chromium.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    crossed = [(a["text"], b["text"]) for a, b in combinations(texts, 2) if overlap(a, b) > 2]
    assert crossed == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", VIEWS)
def test_every_text_can_be_read(chromium, pages, name, scheme):
    chromium.open(pages / f"{name}.html", scheme=scheme)
    texts = chromium.evaluate(TEXTS)
    assert brightness(texts[0]["back"]) < 0.1 if scheme == "dark" else brightness(texts[0]["back"]) > 0.9
    faint = {text["text"]: contrast(text["ink"], text["back"]) for text in texts}
    assert {text: ratio for text, ratio in faint.items() if ratio < 4.5} == {}


@pytest.mark.slow
def test_paper_is_white_whatever_the_screen_is(chromium, pages):
    chromium.open(pages / "usual.html", scheme="dark", media="print", width=718)
    assert chromium.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert chromium.evaluate("getComputedStyle(document.querySelector('.bar rect')).printColorAdjust") == "exact"
    assert chromium.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def charts_of(view):
    """The bars as the page has them, chart by chart: (parts, band), and the limits' values."""
    stages = [stage.estimate for stage in view.by_stage]
    yield [(stage.gpu, (stage.low, stage.high)) for stage in stages], [view.memory, view.usable]
    if view.chosen.estimate.host:
        yield [(view.chosen.estimate.host, None)], [view.host]
    times = [way.time for way in (view.chosen, *view.alternatives) if way.verdict != "does not fit"]
    yield [(time.parts, [time.seconds * (1 + sign * time.error) for sign in (-1, 1)]) for time in times], []


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("name", ["usual", "small", "huge"])
def test_bars_are_as_long_as_their_numbers(chromium, pages, name, width):
    chromium.open(pages / f"{name}.html", width=width)
    drawn = chromium.evaluate(BARS)
    labelled = 0
    for index, (expected, limits) in enumerate(charts_of(VIEWS[name])):
        bars = [bar for bar in drawn if bar["chart"] == index]
        assert len(bars) == len(expected)
        if limits:
            scale = bars[0]["limits"][0] / limits[0]  # px per unit
        else:
            shortest = min(totals := [sum(part.value for part in parts) for parts, _ in expected])
            last = bars[totals.index(shortest)]["parts"][-1]
            scale = (last["x"] + last["width"]) / shortest
        for bar, (parts, band) in zip(bars, expected, strict=True):
            some = [part for part in parts if part.value > 0]
            starts = accumulate((part.value for part in some), initial=0.0)
            seen = [part for part, start in zip(some, starts, strict=False) if start * scale < bar["width"]]
            left = 0.0
            assert [part["name"].rsplit(":")[0] for part in bar["parts"]] == [part.name for part in seen]
            for part, piece in zip(seen, bar["parts"], strict=True):
                right = min((left + part.value) * scale, bar["width"])
                assert piece["x"] == pytest.approx(left * scale, abs=0.2)
                assert piece["x"] + piece["width"] == pytest.approx(right, abs=0.2)
                left += part.value
            if band and band[0] * scale < bar["width"]:
                assert bar["band"] == pytest.approx([min(value * scale, bar["width"]) for value in band], abs=0.3)
            else:
                assert bar["band"] is None
            assert bar["limits"] == pytest.approx([limit * scale for limit in limits], abs=0.3)
            for label in bar["labels"]:
                labelled += 1
                (piece,) = (p for p in bar["parts"] if p["x"] <= label["left"] < p["x"] + p["width"])
                assert label["right"] <= piece["x"] + piece["width"] + 1, label
                assert label["text"].startswith(piece["name"].split(":")[0])
    assert labelled
