"""The commands, as a user runs them."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

import woodfisher as wf
from woodfisher.cli import main
from woodfisher.cli.console import out
from woodfisher.cli.options import MethodOptions
from woodfisher.cli.outcome import layers_table
from woodfisher.cli.prune import _stages
from woodfisher.pruning.method import METHODS
from woodfisher.pruning.report import Layer, Stage
from woodfisher.saving.saved import read
from woodfisher.tasks import Task, load_task

QUICK = ["--stages", "2", "--samples", "50"]

USER_TASK = """
import torch
from torch.nn.functional import cross_entropy
from woodfisher.tasks import Task, accuracy

def build(inputs=6, nan=False, empty=False, fail=None):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    x, y = torch.randn(40, inputs), torch.randint(3, (40,))
    good = [(torch.randn(40, 6), y)]
    if nan:
        x[3, 1] = float("nan")
    train = [] if empty else [(x, y)]
    return Task("mine", model, train, good, good, cross_entropy, accuracy)

def good():
    return build()

def nan():
    return build(nan=True)

def narrow():
    return build(inputs=5)

def empty():
    return build(empty=True)

def broken():
    return 1 / 0

def bad_metric():
    task = build()
    return Task("mine", task.model, task.train, [], task.test, task.loss, lambda model, data: float("nan"))

def loud():
    print("hello from the task")
    return build()

def loud_below_python():
    import os
    os.write(1, b"from the task\\n")
    os.system("echo from a child")
    return build()

def shuffling():
    task = build()
    data = torch.utils.data.TensorDataset(*task.train[0])
    train = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    return Task("mine", task.model, train, task.test, task.test, task.loss)

def failing_metric():
    task = build()
    return Task("mine", task.model, task.train, [], task.test, task.loss, lambda model, data: 1 / 0)

def none_by_magnitude():
    # The metric is infinite for a pruned network whose kept weights have not moved.
    task = build()
    before = task.model[0].weight.detach().clone()
    def metric(model, data):
        weight, kept = model[0].weight, model[0].weight != 0
        return float("-inf") if not kept.all() and bool((weight == before)[kept].all()) else 1.0
    return Task("mine", task.model, task.train, [], task.test, task.loss, metric)

def none_once_pruned():
    task = build()
    def metric(model, data):
        return 1.0 if model[0].weight.all() else float("-inf")
    return Task("mine", task.model, task.train, [], task.test, task.loss, metric)

def failing_loss():
    task = build()
    return Task("mine", task.model, task.train, [], task.test, lambda outputs, targets: 1 / 0)

def no_model():
    return Task("mine", None, [], [], [], None)

def read_once():
    task = build()
    return Task("mine", task.model, task.train, [], iter([]), task.loss)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_tasks.py").write_text(USER_TASK)
    yield tmp_path
    sys.modules.pop("my_tasks", None)


def test_prune_shows_a_table_and_writes_its_results(folder, capsys):
    assert main(["prune", "--sparsity", "0.9", "--out", "results/first", *QUICK]) == 0
    shown = capsys.readouterr()
    for word in ("dense", "magnitude", "woodfisher", "conv1.weight", "kept weights", "results/first"):
        assert word in shown.out
    assert "loading digits" in shown.err
    out = folder / "results" / "first"
    names = ["layers.png", "model.safetensors", "report.html", "report.json"]
    assert sorted(p.name for p in out.iterdir()) == names
    assert sorted(p.name for p in out.parent.iterdir()) == ["first"]
    report = json.loads((out / "report.json").read_text())
    saved = read(out / "model.safetensors")
    assert report["bytes"]["stored"] == saved.size < 0.25 * report["bytes"]["dense"]
    assert f"{saved.size:,} bytes" in shown.out
    kept = 0
    for layer in report["layers"]:
        mask = saved.kept[layer["name"]]
        assert mask.dtype == torch.bool
        assert int(mask.sum()) == layer["kept"]
        assert torch.equal(mask, saved.tensors[layer["name"]] != 0)
        kept += layer["kept"]
    assert kept == report["kept"] == round(0.1 * report["size"])
    arguments = "prune --sparsity 0.9 --out results/first --stages 2 --samples 50"
    assert report["origin"]["command"].endswith(f"woodfisher {arguments}")
    assert report["examined"]["flops"]["fc2.weight"] == 2 * 320
    assert len(report["examined"]["spectrum"]["layers"]) == 4
    stage = report["stages"][-1]
    assert stage["damping"] > 0
    assert math.isfinite(stage["measured"])
    page = (out / "report.html").read_bytes()
    assert f"{arguments}</pre>".encode() in page
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").read_bytes() == page
    again = load_task("digits", weights=out / "model.safetensors")
    assert again.metric(again.model, again.test) == pytest.approx(report["pruned"]["metric"])


def test_a_network_that_is_sparse_already_is_shown_as_it_was_given(folder, capsys):
    arguments = ["prune", "--task", "my_tasks:good", "--criterion", "magnitude"]
    assert main([*arguments, "--sparsity", "0.5", "--out", "half"]) == 0
    assert capsys.readouterr().err.count("magnitude: accuracy") == 1
    assert (
        main([*arguments, "--sparsity", "0.75", "--out", "more", "--weights", "half/model.safetensors"]) == 0
    )
    row = next(line for line in capsys.readouterr().out.splitlines() if "as given" in line)
    assert row.split("│")[3].strip() == "36"
    row = re.search(r"as given.*?</tr>", (folder / "more" / "report.html").read_text(), re.DOTALL)
    assert "50.00 %" in row[0] and "36" in row[0]


def test_json_is_one_object_and_nothing_else(folder, capsys):
    assert main(["prune", "--sparsity", "0.5", "--json", "--seed", "3", *QUICK]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["task"] == "digits"
    assert content["sparsity"] == pytest.approx(0.5)
    assert 90 < content["dense"]["metric"] <= 100
    assert content["pruned"]["metric"] > 50
    assert {"gradients", "curvature", "saliency", "update", "total"} <= content["seconds"].keys()
    assert {"name", "size", "kept"} <= content["layers"][0].keys()
    assert content["out"] == "runs/digits-woodfisher-0.5-seed3"
    assert (folder / content["out"] / "report.json").exists()


def test_equal_seeds_give_equal_results(folder, capsys):
    metrics = []
    for seed in (1, 1, 2):
        main(["prune", "--sparsity", "0.97", "--json", "--seed", str(seed), *QUICK])
        metrics.append(json.loads(capsys.readouterr().out)["stages"])
    assert metrics[0] == metrics[1] != metrics[2]


def test_what_a_task_prints_stays_out_of_the_results(folder, capsys):
    assert (
        main(["prune", "--task", "my_tasks:loud", "--sparsity", "0.5", "--json", "--out", "out", *QUICK]) == 0
    )
    shown = capsys.readouterr()
    assert json.loads(shown.out)["kept"] == 36
    assert "hello from the task" in shown.err


def test_what_a_task_writes_below_python_stays_out_of_the_results(folder):
    command = [sys.executable, "-m", "woodfisher", "prune", "--task", "my_tasks:loud_below_python"]
    options = ["--criterion", "magnitude", "--sparsity", "0.5", "--json", "--out", "out"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["kept"] == 36
    assert "from the task\nfrom a child\n" in done.stderr


def test_help_is_shown_whatever_the_terminal_can_show(folder):
    command = [sys.executable, "-m", "woodfisher", "prune", "--help"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    assert b"--sparsity X" in subprocess.run(command, env=environment, capture_output=True, check=True).stdout


def test_seeds_order_the_data_of_tasks_that_know_of_none(folder, capsys):
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(found))
        arguments = ["--task", "my_tasks:shuffling", "--seed", str(seed), "--samples", "8", "--stages", "1"]
        assert (
            main(
                [
                    "prune",
                    "--criterion",
                    "woodfisher-block",
                    "--json",
                    "--out",
                    "out",
                    *arguments,
                    "--damping",
                    "1",
                ]
            )
            == 0
        )
        found.append(json.loads(capsys.readouterr().out)["stages"])
    assert found[0] == found[1] != found[2]


def test_seeds_that_change_nothing_are_warned_of(folder, capsys):
    arguments = ["compare", "--seeds", "2", "--sparsity", "0.5", "--methods", "magnitude"]
    assert main([*arguments, "--task", "my_tasks:good"]) == 0
    assert "in the same order whatever the seed" in capsys.readouterr().err
    assert main([*arguments, "--task", "my_tasks:shuffling"]) == 0
    assert "whatever the seed" not in capsys.readouterr().err


def test_a_page_goes_into_a_folder_too(folder, capsys):
    assert main(["prune", "--sparsity", "0.5", "--out", "out", *QUICK]) == 0
    (folder / "pages").mkdir()
    assert main(["report", "out", "--out", "pages"]) == 0
    assert (folder / "pages" / "report.html").exists()


def test_what_is_read_is_not_replaced_by_what_is_made_of_it(folder, capsys):
    assert main(["prune", "--task", "my_tasks:good", "--criterion", "magnitude", "--out", "out"]) == 0
    before = {file: file.read_bytes() for file in (folder / "out").iterdir()}
    assert main(["report", "out", "--out", "out/report.json"]) == 2
    export = ["export", "--task", "my_tasks:good", "--to", "dense", "--weights", "out/model.safetensors"]
    assert main([*export, "--out", "out"]) == 2
    assert capsys.readouterr().err.count("is the file that is read: name another place with --out") == 2
    assert {file: file.read_bytes() for file in (folder / "out").iterdir()} == before


@pytest.mark.parametrize(("name", "shown"), [(b"bad\xff", "bad�"), ("für".encode(), "für")])
def test_names_that_are_no_text_cost_no_results(name, shown, folder):
    command = [sys.executable, "-m", "woodfisher", "prune", "--task", "my_tasks:good", "--out", name]
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([*command, "--criterion", "magnitude"], env={**os.environ, **ascii_only}, check=True)
    out = folder / os.fsdecode(name)
    report = json.loads((out / "report.json").read_text())
    assert report["out"] == shown and shown in report["origin"]["command"]
    assert shown in (out / "report.html").read_text(encoding="utf-8")


def in_bash(command):
    command = f"set -o pipefail; {sys.executable} -m woodfisher {command}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("options", ["", "--json"])
def test_a_reader_that_has_enough_ends_the_command_quietly(options, folder):
    save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
    done = in_bash(f"inspect model.safetensors {options} | true")
    assert (done.returncode, done.stderr) == (2, "")


@pytest.mark.parametrize("command", ["inspect model.safetensors --json", "--help", "--version"])
def test_results_that_cannot_be_written_are_one_line(command, folder):
    save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
    done = in_bash(f"{command} > /dev/full")
    assert done.returncode == 2
    assert done.stderr == "woodfisher: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_get_nothing(closed, folder):
    save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
    done = in_bash(f"inspect model.safetensors {closed}")
    assert (done.returncode, done.stderr) == (0, "")
    assert ("On disk" in done.stdout) == (closed == "2>&-")


def test_compare(folder, capsys):
    methods = "magnitude, magnitude-layer,obd,kfac,woodfisher,woodtaylor-block"
    arguments = ["compare", "--sparsity", "0.5", "0.9", "--methods", methods, "--out", "out", *QUICK]
    assert main([*arguments, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    names = [name.strip() for name in methods.split(",")]
    assert [(r["criterion"], r["requested_sparsity"]) for r in content["results"]] == [
        (name, sparsity) for name in names for sparsity in (0.5, 0.9)
    ]
    assert sorted(p.name for p in (folder / "out").iterdir()) == [
        "accuracy.png",
        "report.html",
        "report.json",
        "results.csv",
    ]
    assert main([*arguments, "--task", "my_tasks:good"]) == 0
    assert "50 %" in capsys.readouterr().out


def test_compare_over_seeds(folder, capsys):
    arguments = [
        "compare",
        "--seeds",
        "2",
        "--sparsity",
        "0.5",
        "0.8",
        "0.5",
        "--out",
        "out",
        "--json",
        *QUICK,
    ]
    assert main([*arguments, "--methods", "magnitude,woodfisher-full", "--task", "my_tasks:good"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [r["seed"] for r in content["results"]] == [0] * 4 + [1] * 4
    for cell in content["summary"]:
        metrics = [
            r["metric"]
            for r in content["results"]
            if (r["criterion"], r["requested_sparsity"]) == (cell["criterion"], cell["requested_sparsity"])
        ]
        assert cell["runs"] == 2
        assert cell["mean"] == pytest.approx(sum(metrics) / 2)
        assert cell["sd"] == pytest.approx(abs(metrics[0] - metrics[1]) / 2**0.5)
        assert f"{cell['mean']:.2f} ±{cell['sd']:.2f}" in (folder / "out" / "report.html").read_text()
    with (folder / "out" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["metric"]) for row in rows] == [r["metric"] for r in content["results"]]


def test_stages_that_adapt_show_what_they_predicted_and_measured(folder, capsys):
    arguments = ["prune", "--task", "my_tasks:good", "--sparsity", "0.8", "--train-samples", "30"]
    assert main([*arguments, "--damping", "2x", "--out", "out"]) == 0
    shown = capsys.readouterr().out
    assert "predicted" in shown
    assert "measured" in shown
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["method"]["curvature"]["damping"] == {"factor": 2.0}
    assert all(stage["measured"] is not None for stage in report["stages"])


def test_of_many_stages_a_few_are_shown_with_the_tries_taken_back_before_each():
    def stage(number, measured=0.25, accepted=True):
        return Stage(number / 100, 1.5e-7, measured, damping=0.01, first_order=False, accepted=accepted)

    stages = [stage(n) for n in range(1, 23)]
    stages[3:3] = [stage(8, 3.0, accepted=False), stage(6, 2.0, accepted=False)]
    report = SimpleNamespace(stages=stages, method={"stages": {"stages": 22}})
    console = Console(file=StringIO(), width=100)
    console.print(_stages(report))
    shown = console.file.getvalue()
    rows = [line.split("│")[1:-1] for line in shown.splitlines() if "%" in line]
    assert "22 stages, 2 tries taken back" in shown
    assert [row[0].strip() for row in rows] == [f"{n}.0%" for n in range(2, 23, 2)]
    assert [row[5].strip() for row in rows] == ["", "2", *[""] * 9]
    assert {(row[1].strip(), row[2].strip()) for row in rows} == {("+1.5e-07", "+0.25")}


def test_stages_of_a_fixed_number_have_no_tries_and_nothing_of_them_is_cut():
    stages = [Stage(0.5, -0.00061234, 0.0006789, damping=0.000123, accepted=True)] * 2
    report = SimpleNamespace(stages=stages, method={"stages": 2})
    console = Console(file=StringIO(), width=44)
    console.print(_stages(report))
    shown = console.file.getvalue()
    assert "taken" not in shown and "…" not in shown
    assert "2 stages: change of the loss" in " ".join(shown.split())


def test_on_narrow_terminals_names_fold_and_numbers_stay_whole(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "34")
    table = Table(box=SIMPLE_HEAD)
    for heading in ("layer", "kept weights", "", "time"):
        table.add_column(heading, justify="left" if heading in ("layer", "") else "right")
    table.add_row("block.conv.weight", "12,345,678", "█" * 20, "1.5 s")
    out().print(table)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "─" not in line]
    assert [row for row in rows if row] == [
        ["kept"],
        ["layer", "weights", "time"],
        ["block", "12,345,678", "████…", "1.5", "s"],
        [".conv"],
        [".weig"],
        ["ht"],
    ]


def test_on_narrow_terminals_bars_are_shorter_and_still_shares(monkeypatch, capsys):
    layers = [Layer(name, 100, kept) for name, kept in (("first.conv.weight", 50), ("fc", 0))]
    for columns, bars in (("120", [10, 20]), ("36", [3, 6])):
        monkeypatch.setenv("COLUMNS", columns)
        out().print(layers_table("", {"removed": layers}))
        shown = capsys.readouterr().out
        assert "…" not in shown
        assert [line.count("█") for line in shown.splitlines() if "%" in line] == bars


@pytest.mark.filterwarnings("ignore:every weight of")
def test_prune_to_a_drop(folder, capsys):
    arguments = ["prune", "--criterion", "magnitude", "--max-drop", "5%", "--json", "--out", "out"]
    assert main(arguments) == 0
    content = json.loads(capsys.readouterr().out)
    task = load_task("digits", weights=folder / "out" / "model.safetensors")
    dense = load_task("digits")
    assert task.metric(task.model, task.validation) >= 0.95 * dense.metric(dense.model, dense.validation)
    assert 0.3 < content["sparsity"] < 0.9
    assert content["requested_sparsity"] is None


def test_compare_goes_on_after_a_failure(folder, capsys):
    arguments = ["compare", "--task", "my_tasks:good", "--methods", "hessian,magnitude", "--sparsity", "0.5"]
    assert main([*arguments, "--damping", "1e-9", "--out", "out"]) == 0
    shown = capsys.readouterr()
    assert "failed" in shown.out
    assert "not positive definite" in shown.err
    results = json.loads((folder / "out" / "report.json").read_text())["results"]
    assert ["error" in result for result in results] == [True, False]


def test_a_network_without_a_metric_costs_no_other_its_result(folder, capsys):
    arguments = ["--task", "my_tasks:none_by_magnitude", "--out", "out", "--json", "--damping", "1"]
    assert main(["prune", "--sparsity", "0.5", "--stages", "1", *arguments]) == 0
    shown = capsys.readouterr()
    assert "magnitude has no metric: the metric of the task mine must be a finite float" in shown.err
    content = json.loads(shown.out)
    assert content["magnitude"]["metric"] is None and content["pruned"]["metric"] == 1
    page = (folder / "out" / "report.html").read_text()
    assert "magnitude failed" in page
    assert main(["report", "out"]) == 0 and (folder / "out" / "report.html").read_text() == page
    capsys.readouterr()
    methods = ["--methods", "magnitude,woodfisher-full", "--sparsity", "0.0", "0.5"]
    assert main(["compare", *methods, "--stages", "1", *arguments]) == 0
    shown = capsys.readouterr()
    assert [cell["mean"] for cell in json.loads(shown.out)["summary"]] == [1, None, 1, 1]
    assert "magnitude at 0.5 failed: the metric of the task mine must be a finite float" in shown.err


def test_a_pruned_network_without_a_metric_is_written(folder, capsys):
    options = "--sparsity 0.5 --stages 1 --damping 1 --out out".split()
    assert main(["prune", "--task", "my_tasks:none_once_pruned", *options]) == 0
    shown = capsys.readouterr()
    assert "woodfisher has no metric: the metric of the task mine must be a finite float" in shown.err
    assert "failed" in shown.out
    assert json.loads((folder / "out" / "report.json").read_text())["pruned"]["metric"] is None
    assert "the network has no finite test" in (folder / "out" / "report.html").read_text()
    assert (folder / "out" / "model.safetensors").exists()


@pytest.fixture
def _interruptible():
    """SIGINT interrupts, also where the tests run in the background, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_has_ended_before_an_interruption_is_written(number, folder, capsys, monkeypatch):
    evaluate, measured, handler = Task.evaluate, [], signal.getsignal(number)

    def interrupted(*arguments):
        measured.append(arguments)
        if len(measured) == 4:
            signal.raise_signal(number)
        return evaluate(*arguments)

    monkeypatch.setattr(Task, "evaluate", interrupted)
    arguments = ["compare", "--task", "my_tasks:good", "--methods", "magnitude-layer,magnitude"]
    assert main([*arguments, "--sparsity", "0.5", "0.7", "--seeds", "2", "--out", "out"]) == 130
    shown = capsys.readouterr()
    assert "interrupted; the results lack 6 of 8 networks" in shown.err.splitlines()[-1]
    assert "70 %" in shown.out and "failed" in shown.out
    content = json.loads((folder / "out" / "report.json").read_text())
    assert ["metric" in result for result in content["results"]] == [True] * 2 + [False] * 6
    assert [cell["runs"] for cell in content["summary"]] == [1, 1, 0, 0]
    assert "magnitude at 70 %, seed 1, failed: interrupted" in (folder / "out" / "report.html").read_text()
    measured[:] = [()] * 2
    assert main([*arguments, "--out", "other"]) == 130
    assert "no results were written" in capsys.readouterr().err
    assert not (folder / "other").exists()
    assert signal.getsignal(number) is handler


def test_interruption_is_one_line(folder, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("woodfisher.cli.prune.prune", interrupt)
    assert main(["prune", "--task", "my_tasks:good", "--out", "out"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_a_task_of_ones_own(folder, capsys):
    assert main(["prune", "--task", "my_tasks:good", "--sparsity", "0.5", "--json", "--stages", "2"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["size"] == 72
    assert "warning: 400 samples were asked for and the data ended after 40" in shown.err


@pytest.mark.parametrize("command", [[], ["prune"], ["compare"]])
def test_help_reads_like_a_manual(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "usage: woodfisher" in text
    assert "{None" not in text
    assert "(default: None)" not in text
    if command == ["prune"]:
        assert all(name in text for name in METHODS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "--sparsity", "1.5"], "in [0, 1)"),
        (["prune", "--criterion", "fisher"], "criterion must be one of woodfisher"),
        (
            ["prune", "--preset", "paper", "--criterion", "obd", "--block-size", "7"],
            "--block-size does not apply",
        ),
        (["prune", "--damping", "0"], "damping must be a finite number above 0"),
        (["prune", "--damping", "-1e-3"], "damping must be"),
        (["prune", "--damping", "1y"], "multiple of the mean curvature, or auto; '1y' came"),
        (["prune", "--damping", "0x"], "factor of a relative damping"),
        *(
            (
                ["prune", "--criterion", "kfac", "--damping", value],
                f"--damping {value} is for a full or block",
            )
            for value in ("auto", "0.5x")
        ),
        (["prune", "--max-drop", "1%", "--sparsity", "0.5"], "not both"),
        (["prune", "--max-drop", "150%"], "--max-drop must be a number in [0, 1)"),
        (["prune", "--max-drop", "some"], "as in 1% or 0.01; 'some' came"),
        (["prune", "--train-samples", "0"], "train_samples must be"),
        (["compare", "--seeds", "0"], "seeds must be"),
        (["prune", "--block-size", "0"], "block_size must be"),
        (["prune", "--samples", "0"], "samples must be"),
        (["train", "--stages", "0", "--task", "no:task"], "stages must be a whole number of at least 1"),
        *(
            ([command, *options, "--stages", "auto"], "stages that adapt carry the rows of one block along")
            for command in ("prune", "plan", "train", "compare")
            for options in (["--block-size", "50"], ["--update", "independent"], ["--preset", "paper"])
        ),
        (["prune", "--criterion", "kfac", "--stages", "auto"], "stages that adapt carry"),
        (["prune", "--recalibrate", "-1"], "recalibrate must be a whole number of at least 0; -1 came"),
        (["prune", "--refine", "-1"], "refine must be a whole number of at least 0; -1 came"),
        (["prune", "--params", "decoder.*"], "matches no parameter"),
        (["prune", "--exclude", "decoder"], "matches no parameter"),
        (["prune", "--task", "cifar100"], "there is no task"),
        (["prune", "--task", "nowhere:build"], "No module named 'nowhere'. Write"),
        (["prune", "--task", "my_tasks:failing_loss"], "my_tasks.py, line"),
        (["prune", "--task", "my_tasks:nan"], "in row 3 is nan"),
        (["prune", "--task", "my_tasks:narrow"], "fails on a batch of (8, 5) float32"),
        (["prune", "--task", "my_tasks:empty"], "no batch"),
        (["prune", "--task", "my_tasks:broken"], "ZeroDivisionError: division by zero"),
        (["prune", "--task", "my_tasks:bad_metric"], "must be a finite float; nan came"),
        (
            ["prune", "--task", "my_tasks:failing_metric"],
            "the metric of the task mine fails on the test data: ZeroDivisionError",
        ),
        (["prune", "--task", "my_tasks:no_model"], "must be a torch.nn.Module; a NoneType came"),
        *(
            ([command, "--task", "my_tasks:failing_metric", "--params", "decoder.*"], "matches no parameter")
            for command in ("prune", "compare", "train")
        ),
        (["prune", "--device", "meta"], "can't be used here: it holds no values"),
        (
            ["prune", "--criterion", "magnitude", "--refine", "3"],
            "--refine does not apply to the criterion magnitude",
        ),
        (["prune", "--out", "long" * 80], "can't be made"),
        (["prune", "--out", "dangling/deeper"], "dangling is not a folder that can be written to"),
        (["prune", "--seed", "9" * 30], "seed must be a whole number below 2^63"),
        (["compare", "--seed", f"{2**63 - 1}", "--seeds", "2"], "seed must be a whole number below 2^63"),
        (["prune", "--task", "my_tasks:read_once"], "accuracy of no samples"),
        (["compare", "--task", "my_tasks:nan", "--methods", "woodfisher"], "every run failed"),
        (["compare", "--sparsity", "--methods", "magnitude"], "name at least one sparsity"),
        (["compare", "--pattern", "2-4", "--methods", "magnitude"], "a pattern is one of unstructured"),
        (["prune", "--pattern", "2:4"], "2:4 does not divide 'conv1.weight'"),
        (["prune", "--task", "mlpnet-mnist", "--data-root", "nowhere"], "MNIST"),
        (["prune", "--weights", "missing.pt"], "no such file"),
        (["prune", "--weights", "truncated.safetensors"], "truncated.safetensors"),
        (["prune", "--weights", "other.safetensors"], "conv1.weight must have shape"),
        (["prune", "--out", "my_tasks.py"], "is not a folder"),
        (["prune", "--device", "gpu"], "device 'gpu' can't be used"),
        (["compare", "--methods", "magnitude,best"], "each method must be one of"),
        (["compare", "--methods", ","], "name at least one method"),
        (["compare", "--sparsity", "0.5", "2"], "in [0, 1)"),
    ],
)
def test_bad_input_is_one_message_and_code_2(arguments, message, folder, capsys):
    state = load_task("digits").model.state_dict()
    save_file({**state, "conv1.weight": torch.zeros(3, 3)}, folder / "other.safetensors")
    (folder / "truncated.safetensors").write_bytes((folder / "other.safetensors").read_bytes()[:1000])
    (folder / "dangling").symlink_to("nowhere")
    before = sorted(folder.iterdir())
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err.replace("\n", " ")
    assert "Traceback" not in shown.err
    assert sorted(p for p in folder.iterdir() if p.name != "__pycache__") == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune", "--sparsty", "0.5"],
        ["prune", "--sparsity", "half"],
        ["compare", "--sparsity", "0.5", "half"],
        ["prune", "--stages", "half"],
        ["pune"],
    ],
)
def test_unknown_options_exit_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "NoneType" not in capsys.readouterr().err


def test_blocks_that_do_not_fit_the_memory_are_refused(folder, capsys, monkeypatch):
    monkeypatch.setattr("woodfisher.memory.available_memory", lambda _: 2**20)
    assert main(["prune", "--block-size", "20000", "--out", "out"]) == 2
    message = capsys.readouterr().err
    assert "this needs" in message
    assert "vectors of scores and update" in message
    assert "take fewer samples" in message
    assert not (folder / "out").exists()


def test_only_prune_runs_in_several_processes(folder, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["compare", "--out", "out"]) == 2
    assert "only `woodfisher prune` works in several processes" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert main(["tour", "--out", "out"]) == 2
    assert capsys.readouterr() == ("", "")
    assert not (folder / "out").exists()


def test_blocks_and_swaps_are_for_a_fixed_number_of_stages(folder, capsys):
    arguments = ["prune", "--sparsity", "0.5", "--json", "--out", "out", "--block-size", "500"]
    assert main([*arguments, "--stages", "1"]) == 0
    fixed = json.loads(capsys.readouterr().out)["method"]
    assert main(["plan", "--block-size", "500", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == fixed["curvature"]["samples"] == 400
    assert main(["prune", "--criterion", "magnitude", "--refine", "0", "--out", "out"]) == 0


def test_in_a_comparison_those_stages_adapt_that_can():
    options = MethodOptions(stages="auto", samples=30_000, damping="0.5x")
    methods = {name: options.method(name, strict=False) for name in ("magnitude", "obd", "woodfisher")}
    stages = {name: method.staging for name, method in methods.items()}
    assert stages == {"magnitude": 1, "obd": 1, "woodfisher": wf.Adaptive()}
    assert [methods[name].curvature.damping for name in ("obd", "woodfisher")] == [
        METHODS["obd"].curvature.damping,
        wf.Relative(0.5),
    ]


@pytest.mark.parametrize("memory", ["8GiB", "100MiB"])
def test_plans_of_stages_that_adapt(memory, folder, capsys):
    arguments = ["plan", "--criterion", "woodfisher", "--memory", memory]
    if memory == "100MiB":
        assert main(arguments) == 2
        assert "10 gradient rows of 21456 weights with their copies" in capsys.readouterr().err
        return
    assert main([*arguments, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["peak"] == made["base"] + sum(made["bill"].values()) <= 2**33
    assert [course["first_order"] for course in made["courses"]] == [True, False] and made["held_out"] == 216
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert f"{made['courses'][0]['rows']} gradient rows through 120 stages" in said and "of 8 GiB" in said
    assert main([*arguments, "--keep", "disk"]) == 2
    assert "keep='disk' came" in capsys.readouterr().err


def test_the_installed_command_and_the_module(folder):
    installed = Path(sys.executable).parent / "woodfisher"
    for command in ([installed], [sys.executable, "-m", "woodfisher"]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("woodfisher ")


def test_what_cannot_be_written_leaves_the_old_results(folder, capsys, monkeypatch):
    out = folder / "out"
    assert main(["prune", "--sparsity", "0.5", "--out", "out", *QUICK]) == 0
    old = {p.name: p.read_bytes() for p in out.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("woodfisher.cli.prune.plot_layers", fail)
    assert main(["prune", "--sparsity", "0.9", "--out", "out", *QUICK]) == 2
    shown = capsys.readouterr()
    assert "disk full" in shown.err
    assert "90.00%" in shown.out and "No file was written" in shown.out
    assert {p.name: p.read_bytes() for p in out.iterdir()} == old
    assert sorted(p.name for p in folder.iterdir() if p.name != "__pycache__") == ["my_tasks.py", "out"]
