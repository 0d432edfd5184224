"""The HTML report of a comparison: what it says, that it is sound, and its pictures."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from tvm_pivot.bench import html_data
from tvm_pivot.bench.html import page, write_html
from tvm_pivot.bench.html_data import Index
from tvm_pivot.bench.html_finding import compared, finding
from tvm_pivot.bench.patterns import PatternPicture, png
from tvm_pivot.bench.results import (
    Comparison,
    LayerTime,
    Machine,
    ModelFacts,
    Noise,
    PerLayer,
    Result,
    Roofline,
    Setting,
)

HOSTILE = "<script>alert('x')</script>\x00&\"]]>"
MACHINE = Machine("Some CPU", 2, ("avx2", "fma", "cx16"), 62.8, "Linux 6.1", "3.11.2")
TITLES = {
    "pivot": "tvm_pivot",
    "pivot-dense": "tvm_pivot, dense",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "mnn-sparse": "MNN, sparse",
}
DENSE = {"pivot": 10.0, "pivot-dense": 10.0, "onnxruntime": 11.0, "openvino": 12.0}
VARIANTS = ("dense", "8x1@0.2", "8x1@0.1", "16x1@0.1", "1x1@0.1")


def facts(network: str, variant: str) -> ModelFacts:
    kind, _, density = variant.partition("@")
    kept = float(density or 1)
    pattern = {"dense": "dense", "1x1": "unstructured"}.get(kind, f"{kind} blocks")
    name = f"{network}-{variant}"
    return ModelFacts(name, network, variant, "ab" * 32, pattern, kept, 10**9, int(kept * 10**9))


def result(model: str, runtime: str, ms: float | None, threads: int = 1, **more: object) -> Result:
    title = TITLES.get(runtime, runtime)
    times = {
        "median_ms": ms,
        "min_ms": None if ms is None else ms * 0.97,
        "spread": 0.01,
        "max_error": 2e-6,
        "cores_used": float(threads),
        "convert_s": 1.5,
        "load_s": 0.25,
        "first_run_ms": 33.0,
        "peak_memory_mb": 321.0,
        "model_memory_mb": 123.0,
        "file_mb": 45.6,
        "settings": (Setting("threads", str(threads)),),
    }
    values = {"status": "ok", "version": "1.2.3", "precision": "fp32", **times, **more}
    return Result(model=model, runtime=runtime, title=title, threads=threads, **values)


def comparison(networks: int = 1, variants: tuple[str, ...] = VARIANTS, **more: object):
    models = tuple(facts(f"net{n}", v) for n in range(networks) for v in variants)
    rng = random.Random(1)
    results = []
    for m in models:
        for threads in (1, 2):
            for runtime in TITLES:
                skips = runtime in ("pivot", "mnn-sparse")
                ms = DENSE.get(runtime, 18.0) * (m.density if skips else 1) / threads
                results.append(result(m.name, runtime, ms * rng.uniform(0.98, 1.02), threads))
    values = {
        "date": "2026-05-04T10:11:12+00:00",
        "command": "tvm-pivot bench net.onnx --threads 1,2",
        "machine": MACHINE,
        "reference": "NumPy in float64",
        "tolerances": (Setting("fp32", "0.001"),),
        "models": models,
        "results": tuple(results),
        "noise": (Noise(models[0].name, "onnxruntime", 1, "fp32", 1.0123),),
        "per_layer": (per_layer(models[0].name),),
    }
    return Comparison(**{**values, **more})


def per_layer(model: str) -> PerLayer:
    layers = (
        LayerTime(
            "conv1", "conv2d", "8x1 blocks", 0.1, "sparse", 2.0, 12.0, 10**8, 10**6, 1.0,
            "compute", 0.6,
        ),
        LayerTime("pool", "other", "", 1.0, "", 0.5, None, 0, 10**5, 0.0, "memory", None),
    )  # fmt: skip
    roofline = Roofline(1, 98.0, 88.0, 33.0, 14.0, 1 << 21, 1 << 25)
    return PerLayer(model, 1, roofline, 2.5, layers)


class Checker(HTMLParser):
    """Fails where tags are not balanced; collects the visible text and all attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def check(text: str) -> Checker:
    """The page, checked: well-formed, nothing from elsewhere, nothing that runs."""
    checker = Checker(text)
    assert not checker.tags & {"script", "link", "iframe", "object", "base", "form"}
    assert not [name for name, _ in checker.attributes if name.startswith("on")]
    for name, value in checker.attributes:
        assert name not in ("src", "href") or value.startswith(("#", "data:image/png;base64,"))
    assert "http" not in re.sub('xmlns="[^"]*"|http-equiv', "", text)
    assert not re.search(r"@import|url\(", text)
    ElementTree.fromstring(text.partition("\n")[2])  # XML as a whole, so the charts too
    return checker


def picture(layer: str = "conv1") -> PatternPicture:
    data = png(np.eye(8, dtype=np.uint8), ((0, 0, 0, 0), (1, 2, 3, 255)))
    return PatternPicture(
        layer, "8x1 blocks", 0.1, (512, 8), "8x1", "rows already in blocks", data, data, data,
        (8, 8), (8, 8),
    )  # fmt: skip


def test_single_model() -> None:
    c = comparison(variants=("8x1@0.1",))
    checker = check(page(c, [picture()]))
    for section in ("density", "times", "numbers", "noise", "layers", "patterns"):
        assert ("id", section) in checker.attributes
        assert ("href", f"#{section}") in checker.attributes
    for text in (
        *TITLES.values(),
        c.command,
        c.reference,
        "Some CPU",
        "0.001",
        "avx2, fma",
        "conv1",
    ):
        assert text in checker.text
    assert checker.text.count("2026-05-04 10:11:12 UTC") == 1
    assert "cx16" not in checker.text
    assert "the first 8 of 512 rows and 8 of 8 columns" in checker.text


@pytest.mark.parametrize("networks", [1, 3])
def test_several_models(networks: int) -> None:
    c = comparison(networks)
    checker = check(page(c))
    assert "patterns" not in [value for name, value in checker.attributes if name == "id"]
    folded = len(c.models) > 12
    opened = [name for name, _ in checker.attributes if name == "open"]
    assert len(opened) == (3 * networks if folded else 0)  # three variants keep a tenth
    for n in range(networks):
        assert f"net{n}" in checker.text


def test_every_number_is_the_comparisons() -> None:
    c = comparison(2)
    values = [value for name, value in check(page(c)).attributes if name == "value"]
    shown = sorted(map(float, values))
    expected = [r.median_ms for r in c.results] + [r.min_ms for r in c.results]
    expected += [layer.ms for one in c.per_layer for layer in one.layers]
    assert shown == sorted(ms for ms in expected if ms is not None)


def test_the_numbers_people_see() -> None:
    c = comparison(variants=("8x1@0.1",))
    results = tuple(
        replace(r, median_ms={"pivot": 7.6, "openvino": 1631.4}.get(r.runtime, 38.0))
        for r in c.results
        if r.threads == 1
    )
    text = check(page(replace(c, results=results))).text
    for shown in ("7.600", "38.00", "1,631", "5.0×", "215×", "2.0e-06", "33.0", "321", "45.6"):  # noqa: RUF001
        assert shown in text


def test_what_has_no_time_is_told_with_its_reason() -> None:
    c = comparison(variants=("8x1@0.1",))
    name = c.models[0].name
    reasons = {
        "missing": "pip install some-runtime==1.2",
        "failed": "Segmentation fault",
        "wrong": "max error 0.3 is above 0.001",
        "unsupported": "cannot convert LSTM",
    }
    absent = tuple(
        result(name, f"runtime {status}", None, threads, status=status, detail=detail)
        for status, detail in reasons.items()
        for threads in (1, 2)
    )
    text = check(page(replace(c, results=c.results + absent))).text
    times = text[text.index("Medians") : text.index("All numbers")]
    for status, detail in reasons.items():
        assert f"runtime {status}" in times and detail in times
        assert times.count(detail) == 1
    assert "(1 thread, 2 threads) Segmentation fault" in times


def test_everything_hostile_is_escaped(tmp_path: Path) -> None:
    c = comparison(variants=("8x1@0.1",))
    m = replace(c.models[0], name=HOSTILE, network=HOSTILE, pattern=HOSTILE, variant="")
    layers = replace(per_layer(HOSTILE).layers[0], name=HOSTILE, kind=HOSTILE, pattern=HOSTILE)
    bad = result(HOSTILE, HOSTILE, None, status="failed", detail=HOSTILE)
    c = replace(
        c,
        command=HOSTILE,
        reference=HOSTILE,
        date=HOSTILE,
        machine=Machine(HOSTILE, 1, (f"avx{HOSTILE}",), 1.0, HOSTILE, HOSTILE),
        models=(m,),
        results=(*(replace(r, model=HOSTILE, title=HOSTILE) for r in c.results), bad),
        noise=(Noise(HOSTILE, HOSTILE, 1, HOSTILE, 1.0),),
        per_layer=(replace(per_layer(HOSTILE), layers=(layers,)),),
    )
    write_html(c, tmp_path / "x.html", [picture(HOSTILE)])
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "<script" not in text and "\x00" not in text
    assert check(text).text.count("<script>alert('x')</script>\ufffd&\"]]>") > 20


def result_less(c: Comparison) -> list[Comparison]:
    """The comparison with ever less in it."""
    missing = tuple(replace(r, status="missing", median_ms=None, min_ms=None) for r in c.results)
    return [
        replace(c, results=tuple(r for r in c.results if not r.runtime.startswith("pivot"))),
        replace(c, results=tuple(r for r in c.results if r.runtime == "pivot")),
        replace(c, results=missing),
        replace(c, results=tuple(replace(r, median_ms=None) for r in c.results)),
        replace(c, results=tuple(replace(r, median_ms=math.nan) for r in c.results)),
        replace(c, results=()),
        replace(c, models=(), results=c.results),
        replace(c, models=(), results=(), noise=(), per_layer=()),
        replace(c, per_layer=(replace(per_layer("net"), layers=()),)),
    ]


@pytest.mark.parametrize("networks", [1, 3])
def test_incomplete_comparisons(networks: int) -> None:
    for variants in (("8x1@0.1",), VARIANTS):
        for c in result_less(comparison(networks, variants)):
            assert "tvm_pivot" in check(page(c)).text


def headline(**times: float) -> tuple[str, str]:
    """What is said of one model at 90 % removed, given medians by runtime."""
    m = facts("resnet50", "8x1@0.1")
    results = tuple(result(m.name, name.replace("_", "-"), ms) for name, ms in times.items())
    return finding(Index(comparison(models=(m,), results=results, noise=(), per_layer=())))


def test_the_finding_of_one_model() -> None:
    said, more = headline(pivot=7.6, onnxruntime=37.24, mnn_sparse=15.2, pivot_dense=50.0)
    assert more == ""
    assert said == (
        "tvm_pivot runs resnet50 with 90 % of its weights removed in 7.60 ms, 2.0× faster than "  # noqa: RUF001
        "MNN, sparse, the next fastest of 2 other runtimes, and 4.9× faster than ONNX Runtime "  # noqa: RUF001
        "(1 thread)."
    )
    said, _ = headline(pivot=7.6, onnxruntime=3.8, mnn_sparse=15.2)
    assert "2.0× slower than ONNX Runtime, the fastest of 2 other runtimes (1 thread)." in said  # noqa: RUF001
    said, _ = headline(pivot=7.6, pivot_dense=76.0)
    assert said.endswith("10× faster than its own dense build (1 thread). "  # noqa: RUF001
                         "No other runtime was timed.")  # fmt: skip
    said, _ = headline(onnxruntime=3.8)
    assert said.startswith("tvm_pivot has no time here. ONNX Runtime runs resnet50")


def test_the_finding_of_several_models_is_honest() -> None:
    models = [facts(f"net{n}", "8x1@0.1") for n in range(4)]
    times = {"net0": (10, 40), "net1": (10, 20), "net2": (10, 5), "net3": (None, 7)}
    results = []
    for m in models:
        ours, theirs = times[m.network]
        status = "ok" if ours else "failed"
        results.append(result(m.name, "pivot", ours, status=status))
        results.append(result(m.name, "onnxruntime", theirs))
    c = comparison(models=tuple(models), results=tuple(results), noise=(), per_layer=())
    said, more = finding(Index(c))
    assert said == (
        "Over 3 networks with 90 % of the weights removed (3 models), tvm_pivot is 2.0× faster "  # noqa: RUF001
        "than ONNX Runtime in the median, from 2.0× slower to 4.0× (1 thread)."  # noqa: RUF001
    )
    assert more == (
        "It is the fastest of all runtimes for 2 of 3 models; the fastest otherwise: "
        "ONNX Runtime for 1. It has no time that counts for net3-8x1@0.1."
    )


def test_comparing_in_words() -> None:
    said = [compared(times).replace("\u00d7", "x") for times in (4.94, 1.05, 1.02, 0.98, 0.95, 0.5)]
    assert said == [
        "4.9x faster than",
        "5 % faster than",
        "as fast as",
        "as fast as",
        "5 % slower than",
        "2.0x slower than",
    ]


def test_runtimes_that_skip_no_zeros_may_be_timed_on_dense_weights_only() -> None:
    dense, sparse = facts("net", "dense"), facts("net", "8x1@0.1")
    results = (
        result(dense.name, "onnxruntime", 12.0),
        result(dense.name, "mnn-sparse", 20.0),
        result(dense.name, "pivot-dense", 11.0),
        result(sparse.name, "pivot", 2.0),
    )
    c = comparison(models=(dense, sparse), results=results, noise=(), per_layer=())
    index = Index(c)
    (group,) = index.groups
    entries = [(e.result.runtime, e.borrowed) for e in index.entries(sparse, group)]
    assert entries == [("pivot", False), ("pivot-dense", True), ("onnxruntime", True)]
    assert index.over(sparse, "onnxruntime", group) == 6.0
    assert index.baseline(sparse, "pivot-dense", group) == 11.0
    assert "ONNX Runtime\u00a0*" in check(page(c)).text


def test_precisions_are_not_mixed() -> None:
    m = facts("net", "8x1@0.1")
    results = (
        result(m.name, "pivot", 5.0),
        result(m.name, "openvino", 10.0),
        result(m.name, "openvino", 1.0, precision="bf16"),
    )
    c = comparison(models=(m,), results=results, noise=(), per_layer=())
    assert "2.0\u00d7 faster than OpenVINO (1 thread)" in finding(Index(c))[0]
    assert "1 thread, bf16" in check(page(c)).text


def test_variants_are_named() -> None:
    shown = [(v, html_data.pattern_of(facts("n", v)), html_data.label(facts("n", v)))
             for v in ("dense", "8x1@0.1", "1x1@0.05", "dlmc@0.1")]  # fmt: skip
    assert shown == [
        ("dense", "dense", "dense"),
        ("8x1@0.1", "8x1 blocks", "8x1 blocks, 10 % kept"),
        ("1x1@0.05", "unstructured", "unstructured, 5 % kept"),
        ("dlmc@0.1", "dlmc", "dlmc, 10 % kept"),
    ]
