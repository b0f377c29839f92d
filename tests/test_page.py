"""report.html: what it says, that it is safe and whole, and what is refused."""

import copy
import itertools
import json
import re
from html.parser import HTMLParser

import pytest

from woodfisher import WoodfisherError
from woodfisher.cli import main
from woodfisher.results.page import render
from woodfisher.results.page.charts import Series, chart, counting, linear, logarithmic, signed_logarithmic
from woodfisher.results.page.record import parse

CURVATURE = {"kind": "WoodFisher", "samples": 400, "block_size": 2000, "damping": "auto"}
OLD = {
    "task": "digits",
    "metric": "accuracy, %",
    "criterion": "woodfisher",
    "preset": None,
    "requested_sparsity": 0.9,
    "max_drop": None,
    "seed": 7,
    "dense": {"metric": 98.5},
    "magnitude": {"metric": 50.25, "sparsity": 0.9},
    "pruned": {"metric": 97.0},
    "woodfisher": "0.1.0",
    "sparsity": 0.9,
    "flops_removed": None,
    "size": 2000,
    "kept": 200,
    "method": {"curvature": CURVATURE, "update": "joint", "stages": 2},
    "layers": [
        {"name": "conv.weight", "size": 500, "kept": 150, "sparsity": 0.7},
        {"name": "fc.weight", "size": 1500, "kept": 50, "sparsity": 0.9667},
    ],
    "stages": [{"sparsity": 0.9, "predicted": 0.01}],
    "seconds": {"gradients": 1.0, "total": 1.5},
    "warnings": [],
    "out": "runs/x",
}
EXAMINED = {
    "flops": {"conv.weight": 9000, "fc.weight": 3000},
    "spectrum": {
        "rows": 128,
        "labels": "data",
        "layers": [
            {
                "name": "conv.weight",
                "weights": 150,
                "mean": 0.02,
                "rank": 3.5,
                "eigenvalues": [2.0, 0.5, 1e-4],
            },
            {"name": "fc.weight", "weights": 50, "mean": 0.0, "rank": 0.0, "eigenvalues": [0.0, 0.0]},
        ],
    },
    "missing": {},
}
ORIGIN = {
    "command": "woodfisher prune --out 'my results'",
    "date": "2026-01-31",
    "versions": {"woodfisher": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "numpy": "2.4.6"},
    "platform": "Linux-6-x86_64",
    "device": "cpu",
    "threads": 2,
}
FULL = {
    **OLD,
    "magnitude": {"metric": 50.25, "sparsity": 0.9, "layers": OLD["layers"]},
    "method": {"curvature": CURVATURE, "update": "joint", "stages": {"stages": 90, "window": 1000}},
    "stages": [
        {
            "sparsity": 0.6,
            "predicted": 0.01,
            "measured": 0.5,
            "damping": 1e-4,
            "first_order": True,
            "accepted": False,
        },
        {
            "sparsity": 0.3,
            "predicted": 0.01,
            "measured": 0.02,
            "damping": 2e-4,
            "first_order": True,
            "accepted": True,
        },
        {
            "sparsity": 0.9,
            "predicted": 0.1,
            "measured": -0.02,
            "damping": None,
            "first_order": False,
            "accepted": True,
        },
    ],
    "warnings": ["every weight of 'fc.weight' is removed"],
    "examined": EXAMINED,
    "origin": ORIGIN,
}
TRAINED = {
    **{key: FULL[key] for key in ("task", "metric", "criterion", "seed", "dense", "pruned", "sparsity", "size")},
    **{key: FULL[key] for key in ("kept", "layers", "warnings", "examined", "origin")},
    "method": {"curvature": {**CURVATURE, "damping": {"factor": 10.0}}, "stages": 1},
    "validation": {"metric": 96.5, "dense": 98.0},
    "best_epoch": 2,
    "epochs": [
        {"epoch": n, "step": 10 * n, "rate": 0.1 / n, "loss": 0.5 / n, "validation": 95.0 + n, "sparsity": 0.45 * n,
         "eligible": n == 2}
        for n in (1, 2)
    ],
    "history": [
        {"step": 5, "sparsity": 0.45, "predicted": 0.1, "seconds": 0.5, "measured": 0.2, "damping": 1e-3},
        {"step": 12, "sparsity": 0.9, "predicted": None, "seconds": 0.5},
    ],
    "seconds": {"pruning": 1.0, "training": 2.0, "total": 3.0},
}  # fmt: skip
RESULT = {
    key: FULL[key] for key in ("sparsity", "flops_removed", "size", "kept", "layers", "seconds", "warnings")
}
COMPARED = {
    **{key: FULL[key] for key in ("task", "metric", "seed", "dense", "examined", "origin")},
    "seeds": 2,
    "summary": [
        {"criterion": "magnitude", "requested_sparsity": s, "runs": 2, "mean": 90.0 - 50 * s, "sd": 1.5, "seconds": 0.1}
        for s in (0.5, 0.9)
    ]
    + [
        {"criterion": "obd", "requested_sparsity": 0.5, "runs": 2, "mean": 91.0, "sd": 0.25, "seconds": 2.0},
        {"criterion": "obd", "requested_sparsity": 0.9, "runs": 0, "mean": None, "sd": None, "seconds": None},
    ],
    "results": [
        {**RESULT, "criterion": "magnitude", "requested_sparsity": 0.9, "seed": 7, "metric": 45.0, "dense": 98.5,
         "method": {"curvature": {"kind": "Identity"}, "stages": 1}, "warnings": [],
         "stages": [{"sparsity": 0.9, "predicted": None}]},
        {**RESULT, "criterion": "obd", "requested_sparsity": 0.5, "seed": 7, "metric": 91.0, "dense": 98.5,
         "method": {"curvature": {"kind": "DiagonalFisher", "damping": 1e-5}, "stages": 1},
         "stages": [{"sparsity": 0.5, "predicted": 0.3, "measured": 0.4}]},
        {"criterion": "obd", "requested_sparsity": 0.9, "seed": 7, "dense": 98.5, "error": "not positive definite"},
    ],
}  # fmt: skip
REPORTS = {"old": OLD, "prune": FULL, "train": TRAINED, "compare": COMPARED}


def page(content):
    return render(parse(json.dumps(content), "report.json"))


class Reader(HTMLParser):
    """Text by section, tags with their attributes, and whether all that is opened is closed."""

    VOID = frozenset({"meta", "link"})

    def __init__(self, html):
        super().__init__()
        self.tags, self.sections, self._open, self._section = [], {"top": ""}, [], "top"
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "section":
            self._section = dict(attributes)["id"]
            self.sections[self._section] = ""
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.sections[self._section] += " " + data.strip()


def sections(content):
    return {key: " ".join(text.split()) for key, text in Reader(page(content)).sections.items()}


def test_a_pruning_is_told_from_the_result_to_the_command():
    told = sections(FULL)
    assert list(told) == [
        "top", "result", "warnings", "sparsity", "flops", "stages", "damping", "spectrum", "taken-back", "time",
        "method", "reproduce",
    ]  # fmt: skip
    assert "digits: 90.00 % of the weights removed" in told["top"]
    assert "With 200 of 2,000 weights left, test accuracy falls by 1.50 to 97.00." in told["top"]
    assert "97.00 dense 98.50 (−1.50), magnitude 50.25" in told["top"]
    assert "200 of 2,000: 10.0× fewer" in told["top"]
    # 9,000 · 150/500 + 3,000 · 50/1,500 = 2,800
    assert "2.8 k of 12 k in these layers: 4.3× fewer" in told["top"]
    assert "1 warning came up" in told["top"]
    assert "every weight of 'fc.weight' is removed" in told["warnings"]
    assert "conv.weight 500 150 70.00 % 70.00 % −20.00" in told["sparsity"]
    assert "fc.weight 3 k 25.0 % 100 100" in told["flops"]
    assert "1 60.00 % +0.01 +0.5 50 1 × 10⁻⁴ used taken back" in told["stages"]
    assert "3 90.00 % +0.1 −0.02 kept weights stay" in told["stages"]
    assert "by the loss on held-out samples" in told["damping"]
    assert "conv.weight largest 2" in told["spectrum"]
    assert "fc.weight no curvature" in told["spectrum"]
    assert "λ of the last stage, 2 × 10⁻⁴" in told["spectrum"]
    assert "1 of 3 stages raised the held-out loss" in told["taken-back"]
    assert "gradients 1.0 s 66.7 %" in told["time"]
    assert "curvature.block_size 2,000" in told["method"]
    for text in (
        "woodfisher prune --out 'my results'",
        "torch 2.13.0",
        "Linux-6-x86_64",
        "threads 2",
        "seed 7",
    ):
        assert text in told["reproduce"]


def test_what_an_old_report_lacks_is_said():
    told = sections(OLD)
    assert "FLOPs not counted" in told["top"]
    assert "Not counted. This report was written by a version that did not look at it." in told["flops"]
    assert "Left out." in told["spectrum"]
    assert "None came up." in told["warnings"]
    assert "stages that don't adapt all stand" in told["taken-back"]
    assert "Seed 7. The command and the versions were not recorded" in told["reproduce"]


def test_why_flops_and_spectrum_are_missing_is_said():
    missing = {"flops": "the FLOPs of 'x' can't be counted", "spectrum": "Identity has none"}
    told = sections({**FULL, "examined": {"flops": None, "spectrum": None, "missing": missing}})
    assert "Not counted. the FLOPs of 'x' can't be counted" in told["flops"]
    assert "Left out. Identity has none" in told["spectrum"]


def test_a_training_shows_its_curves():
    told = sections(TRAINED)
    assert "That is epoch 2 of 2, chosen on validation data." in told["top"]
    assert "woodfisher, epoch 2 97.00 96.50 200 90.00 % 2.8 k" in told["result"]
    assert "2 20 0.2500 97.00 90.00 % 0.05 chosen" in told["training"]
    assert "5 45.00 % +0.1 +0.2 2 0.001" in told["stages"]
    assert "10.0 times the mean diagonal entry" in told["damping"]
    pictures = [a["aria-label"] for tag, a in Reader(page(TRAINED)).tags if a.get("role") == "img"]
    for name in ("on validation data", "Sparsity by step", "training loss", "Learning rate"):
        assert any(name in picture for picture in pictures)


def test_a_comparison_shows_spread_and_failures():
    told = sections(COMPARED)
    assert "digits: 2 methods at 2 sparsities" in told["top"]
    assert "At 90 % magnitude is best with 45.00, mean of 2 seeds" in told["top"]
    assert "2 warnings came up" in told["top"]
    assert "obd at 90 %, seed 7, failed: not positive definite" in told["warnings"]
    assert "obd 91.00 ±0.25 failed" in told["accuracy"]
    html = page(COMPARED)
    assert html.count('class="stroke s0 thin"') == 2  # error bars of magnitude
    assert "<strong>91.00 ±0.25</strong>" in html
    assert "1 50.00 % +0.3 +0.4 1.3" in told["stages"]
    assert "10⁻⁵ throughout, as given" in told["damping"]


@pytest.mark.parametrize("kind", REPORTS)
def test_the_page_is_whole_and_needs_nothing_else(kind):
    html = page(REPORTS[kind])
    reader = Reader(html)
    tags = {tag for tag, _ in reader.tags}
    assert not tags & {
        "script",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "audio",
        "video",
        "image",
        "use",
    }
    assert not re.search(r"(?i)\b(src|srcset)\s*=|url\(|@import|https?://", html)
    for _, attributes in reader.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith(("#", "data:,"))
    assert ("html", {"lang": "en"}) in reader.tags
    assert "default-src 'none'" in html
    for rule in ("prefers-color-scheme: dark", "@media print"):
        assert rule in html
    assert len(html) < 100_000
    ids = [a["id"] for _, a in reader.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for tag, a in reader.tags if tag == "a"} <= set(ids)
    assert all(
        a.get("aria-label") or a.get("aria-hidden") for tag, a in reader.tags if tag == "svg" and "class" in a
    )
    assert [tag for tag, _ in reader.tags].count("h1") == 1


def _poisoned(value):
    """Every text of a report, and every name that is shown, with markup in it."""
    evil = "<script>alert(1)</script>\"'&{{7*7}}"
    if isinstance(value, dict):
        return {key: _poisoned(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_poisoned(part) for part in value]
    return evil + value if isinstance(value, str) else value


@pytest.mark.parametrize("kind", REPORTS)
def test_nothing_from_the_file_is_executed(kind):
    content = _poisoned(REPORTS[kind])
    if content.get("examined"):
        flops = {layer["name"]: 10 for layer in _poisoned(FULL["layers"])}
        content["examined"]["flops"] = {**flops}
    content.setdefault("origin", copy.deepcopy(ORIGIN))
    content["origin"]["versions"]["<b>python"] = "</table>"
    html = page(content)
    assert "<script" not in html
    assert "<b>" not in html
    assert "{{7*7}}" in html
    assert "script" not in {tag for tag, _ in Reader(html).tags}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Invalid JSON"),
        (json.dumps(FULL)[:500], "Invalid JSON"),
        ("[]", "none of prune, train or compare"),
        ('{"name": "package", "version": "1.0"}', "none of prune, train or compare"),
        (json.dumps({**FULL, "layers": []}), "layers: List should have at least 1 item"),
        (json.dumps({**FULL, "kept": "200"}), "kept: Input should be a valid integer"),
        (json.dumps({**FULL, "sparsity": 1.5}), "sparsity: Input should be less than or equal to 1"),
        (json.dumps({**FULL, "sparsity": float("nan")}), "sparsity: Input should be a finite number"),
        (json.dumps({**FULL, "layers": [{"name": "x", "size": 0, "kept": 0}]}), "x keeps 0 of 0 weights"),
        (json.dumps({k: v for k, v in FULL.items() if k != "stages"}), "stages: Field required"),
        (json.dumps({**COMPARED, "summary": COMPARED["summary"][:2]}), "the summary lacks the method obd"),
        ("\x00\x01PK\x03\x04", "Invalid JSON"),
    ],
)
def test_other_files_are_refused(text, message, tmp_path, capsys):
    file = tmp_path / "report.json"
    file.write_text(text)
    assert main(["report", str(file)]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert str(file) in shown.err
    assert "Traceback" not in shown.err
    assert sorted(tmp_path.iterdir()) == [file]


def test_the_command_writes_beside_the_report_or_where_it_is_told(tmp_path, capsys):
    (tmp_path / "report.json").write_text(json.dumps(FULL))
    (tmp_path / "other.json").write_text(json.dumps(TRAINED))
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_text() == page(FULL)
    assert main(["report", str(tmp_path / "other.json")]) == 0
    assert (tmp_path / "other.html").read_text() == page(TRAINED)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert (tmp_path / "new" / "page.html").read_text() == page(FULL)
    assert "page.html" in capsys.readouterr().out


def test_a_report_that_is_not_there_is_one_message(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "can't be read (No such file or directory)" in capsys.readouterr().err


def test_numbers_that_no_axis_holds_are_refused():
    report = copy.deepcopy(FULL)
    report["stages"][1]["measured"] = 1.7e308
    with pytest.raises(WoodfisherError, match="numbers that can't be drawn"):
        page(report)


def _places(value, path=()):
    """The path of every value in JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from _places(part, (*path, key))


def test_whatever_is_tampered_with_is_drawn_or_refused_by_a_message():
    values = itertools.cycle([None, 0, -1, 1.7e308, 5e-324, "", [], {}, "x", True, 10**400, [1], {"a": 1}])
    outcomes = {True: 0, False: 0}
    for report in REPORTS.values():
        for path in list(_places(report))[1:]:
            content = copy.deepcopy(report)
            place = content
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = next(values)
            try:
                outcomes["</html>" in page(content)] += 1
            except WoodfisherError:
                outcomes[False] += 1
    assert min(outcomes.values()) > 50


def test_scales_have_round_ends_and_ticks():
    scale = linear([3.0, 97.0])
    assert [label for _, label in scale.ticks] == ["0", "25", "50", "75", "100"]
    assert (scale.place(0.0), scale.place(50.0), scale.place(100.0)) == (0.0, 0.5, 1.0)
    assert [label for _, label in linear([-0.004, 0.01]).ticks] == ["−0.005", "0.000", "0.005", "0.010"]
    tight = linear([50.0, 98.0], tight=True, unit=" %")
    assert [label for _, label in tight.ticks] == ["50 %", "60 %", "70 %", "80 %", "90 %"]
    assert (tight.place(50.0), tight.place(98.0)) == (0.0, 1.0)
    assert linear([5.0]).place(5.0) == pytest.approx(0.5, abs=0.3)
    assert [at for at, _ in counting(43, first=1).ticks] == [10, 20, 30, 40]
    assert [at for at, _ in counting(2, first=1).ticks] == [1, 2]


def test_logarithmic_scales():
    scale = logarithmic([2e-5, 0.5, 0.0])
    assert scale.ticks[0] == (1e-5, "10⁻⁵")
    assert (scale.place(1e-5), scale.place(1.0), scale.place(0.0)) == (0.0, 1.0, 0.0)
    assert scale.place(10**-2.5) == pytest.approx(0.5)
    signed = signed_logarithmic([-0.02, 0.5])
    places = [signed.place(v) for v in (-0.02, -0.01, 0.0, 0.01, 0.5)]
    assert places == sorted(places)
    assert places[3] - places[2] == pytest.approx(places[2] - places[1])
    assert (0.0, "0") in signed.ticks
    assert signed_logarithmic([]).place(0.0) == 0.0


@pytest.mark.parametrize(
    ("how", "marked"), [("line", (40, 0)), ("dots", (40, 90)), ("crosses", (40, 90)), ("step", (0, 0))]
)
def test_lines_of_few_points_are_marked_and_dots_always(how, marked):
    def marks(count):
        points = [(float(n), float(n)) for n in range(count)]
        drawn = chart("a chart", [Series("one", points, how=how)], linear([0.0, 90.0]), linear([0.0, 90.0]))
        return drawn.count('class="marker') + drawn.count('class="cross')

    assert (marks(40), marks(90)) == marked
