"""Tours of curvature against slow float64 definitions."""

from __future__ import annotations

import csv
import json
import math
import sys

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

import woodfisher as wf
from models import DictModel, Recurrent, mlp, samples
from reference import cut, loop_rows
from woodfisher.cli import main
from woodfisher.results.numbers import significant
from woodfisher.results.tour_plots import pictures, pooled
from woodfisher.tasks import load_task
from woodfisher.tour import mass_shares, spectrum_summary

MATRICES = ("Hessian", "Fisher", "empirical Fisher")


def gauss_newton(model, inputs, names, curvature):
    """(1/n) Σ JᵀAJ with the Jacobian J of the outputs, A = `curvature(output)`, one sample after the other."""
    parameters = {name: dict(model.named_parameters())[name].detach() for name in names}
    total = 0
    for x in inputs:
        J = jacrev(lambda p, x=x: functional_call(model, p, (x[None],))[0])(parameters)
        J = torch.cat([J[name].flatten(1) for name in names], dim=1)
        total = total + J.T @ curvature(model(x[None])[0].detach()) @ J
    return total / len(inputs)


def softmax_curvature(output):
    p = output.softmax(-1)
    return torch.diag(p) - torch.outer(p, p)


@pytest.fixture(scope="module")
def seen():
    model, (inputs, targets) = mlp(torch.float64), samples(12, dtype=torch.float64)
    return (
        model,
        inputs,
        targets,
        wf.tour(model, [(inputs[:5], targets[:5]), (inputs[5:], targets[5:])], cross_entropy, samples=12),
    )


def test_the_matrices_are_what_they_are_called(seen):
    model, inputs, targets, tour = seen
    names = ["0.weight", "2.weight"]
    H, F, E = (tour.stops[0].matrices[name] for name in MATRICES)
    parameters = {name: dict(model.named_parameters())[name].detach() for name in names}
    blocks = hessian(lambda p: cross_entropy(functional_call(model, p, (inputs,)), targets))(parameters)
    rows = [torch.cat([blocks[a][b].reshape(parameters[a].numel(), -1) for b in names], dim=1) for a in names]
    torch.testing.assert_close(H, torch.cat(rows))
    torch.testing.assert_close(F, gauss_newton(model, inputs, names, softmax_curvature))
    G = loop_rows(model, cross_entropy, inputs, targets, names)
    torch.testing.assert_close(E, G.T @ G / 12)
    assert tour.stops[0].loss == pytest.approx(cross_entropy(model(inputs), targets).item())


@pytest.mark.parametrize(
    ("loss", "curvature"),
    [
        (mse_loss, lambda f: 2 / len(f) * torch.eye(len(f), dtype=f.dtype)),
        (
            binary_cross_entropy_with_logits,
            lambda f: torch.diag(f.sigmoid() * (1 - f.sigmoid())) / len(f),
        ),
        (nn.CrossEntropyLoss(), softmax_curvature),
    ],
)
def test_the_fisher_is_exact_for_the_usual_losses(loss, curvature):
    model, (inputs, labels) = mlp(torch.float64), samples(7, dtype=torch.float64)
    targets = labels if isinstance(loss, nn.CrossEntropyLoss) else torch.rand(7, 3, dtype=torch.float64)
    tour = wf.tour(model, [(inputs, targets)], loss, samples=7)
    expected = gauss_newton(model, inputs, ["0.weight", "2.weight"], curvature)
    torch.testing.assert_close(tour.stops[0].matrices["Fisher"], expected)


def test_drawn_targets_agree_with_the_exact_fisher_on_average():
    model, (inputs, targets) = mlp(torch.float64), samples(5, dtype=torch.float64)
    many = inputs.repeat(2000, 1), targets.repeat(2000)
    objective = wf.Objective(model, [many], cross_entropy)
    torch.manual_seed(0)
    G = objective.rows(10000, labels="model")
    exact = sum(rows.T @ rows for rows in objective.iter_fisher_rows(10000)) / 10000
    assert float((G.T @ G / 10000 - exact).norm() / exact.norm()) < 0.05


def test_a_piecewise_linear_layer_has_its_fisher_for_a_hessian():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    tour = wf.tour(model, [samples(9, (4,), dtype=torch.float64)], cross_entropy, samples=9)
    whole, *layers = tour.stops[0].regions
    for layer in layers:
        comparison = layer.between("Fisher", "Hessian")
        assert comparison.cosine == pytest.approx(1)
        assert comparison.scale == pytest.approx(1)
    assert whole.between("Fisher", "Hessian").cosine < 0.99


def test_numbers_against_loops(seen):
    *_, tour = seen
    stop = tour.stops[0]
    sizes = [24, 12]
    spans = {"whole": (0, 36), "0.weight": (0, 24), "2.weight": (24, 36)}
    assert [region.name for region in stop.regions] == list(spans)
    for region in stop.regions:
        first, last = spans[region.name]
        assert region.size == last - first
        blocks = {name: M[first:last, first:last].tolist() for name, M in stop.matrices.items()}
        for comparison in region.comparisons:
            F, H = blocks[comparison.matrix], blocks[comparison.target]
            pairs = [(f, h) for frow, hrow in zip(F, H, strict=True) for f, h in zip(frow, hrow, strict=True)]
            ff, hh = math.fsum(f * f for f, _ in pairs), math.fsum(h * h for _, h in pairs)
            fh = math.fsum(f * h for f, h in pairs)
            assert comparison.cosine == pytest.approx(fh / math.sqrt(ff * hh))
            assert comparison.scale == pytest.approx(fh / ff)
            best = math.fsum((h - comparison.scale * f) ** 2 for f, h in pairs)
            for other in (0.99, 1.01):
                assert best < math.fsum((h - other * comparison.scale * f) ** 2 for f, h in pairs)
        layers = sizes if region.name == "whole" else [region.size]
        assert region.block_sizes == (*(s for s in (1, 2, 5, 10, 20) if s < max(layers)), max(layers))
        for name, M in blocks.items():
            total = math.fsum(x * x for row in M for x in row)
            for block_size, share in zip(region.block_sizes, region.mass[name], strict=True):
                inside = math.fsum(
                    M[i][j] ** 2
                    for start, stop_ in cut(layers, block_size)
                    for i in range(start, stop_)
                    for j in range(start, stop_)
                )
                assert share == pytest.approx(inside / total)
            roots = torch.linalg.eigvals(torch.tensor(M, dtype=torch.float64)).real.sort().values
            torch.testing.assert_close(region.eigenvalues[name], roots, atol=1e-12, rtol=1e-9)


def test_the_comparisons_name_each_pair_once(seen):
    pairs = [(c.matrix, c.target) for c in seen[-1].stops[0].whole.comparisons]
    assert pairs == [
        ("Fisher", "Hessian"),
        ("empirical Fisher", "Hessian"),
        ("empirical Fisher", "Fisher"),
    ]


def test_cosine_by_samples(seen):
    model, inputs, targets, tour = seen
    assert tour.sample_counts == (1, 2, 5, 10, 12)
    G = loop_rows(model, cross_entropy, inputs, targets, ["0.weight", "2.weight"])
    H = tour.stops[0].matrices["Hessian"]
    for n, whole, layer in zip(
        tour.sample_counts, tour.stops[0].whole.by_samples, tour.stops[0].layers[1].by_samples, strict=True
    ):
        E = G[:n].T @ G[:n]
        assert whole == pytest.approx(float((E * H).sum() / E.norm() / H.norm()))
        E, B = E[24:, 24:], H[24:, 24:]
        assert layer == pytest.approx(float((E * B).sum() / E.norm() / B.norm()))


def test_mass_by_chance_is_the_mean_over_random_orders():
    torch.manual_seed(0)
    M = torch.randn(7, 7, dtype=torch.float64)
    M = M + M.T
    layout = wf.Objective(nn.Linear(7, 1), None, mse_loss).layout
    _, chance = mass_shares(M, layout, [1, 3])
    measured = []
    for _ in range(3000):
        order = torch.randperm(7)
        shares, same = mass_shares(M[order][:, order], layout, [1, 3])
        measured.append(shares)
        assert same == pytest.approx(chance)
    mean = torch.tensor(measured).mean(0)
    assert mean.tolist() == pytest.approx(chance, rel=0.01)


def test_a_spectrum_in_a_few_numbers():
    summary = spectrum_summary(torch.tensor([-1.0, -1e-9, 0.0, 1.0, 3.0], dtype=torch.float64))
    assert summary == {
        "smallest": -1.0,
        "largest": 3.0,
        "negative": 1,
        "trace": pytest.approx(3.0),
        "hold_90_percent": 2,
        "top": [3.0, 1.0, 0.0, -1e-9, -1.0],
    }
    assert spectrum_summary(torch.zeros(2))["hold_90_percent"] == 0


def test_a_dead_layer_has_no_cosine_and_can_be_drawn(tmp_path):
    model = mlp()
    with torch.no_grad():
        model[2].weight.zero_()
    tour = wf.tour(model, [samples()], cross_entropy, samples=20)
    dead = tour.stops[0].layers[1]
    assert dead.between("Fisher", "Hessian").cosine is None
    assert dead.between("Fisher", "Hessian").scale is None
    assert set(dead.mass["Hessian"]) == {None}
    json.dumps(tour.to_dict(), allow_nan=False)
    wf.plot_tour(tour, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(pictures(tour))


def test_points_of_training_see_the_same_samples():
    inputs, targets = samples(30)
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(inputs, targets), batch_size=8, shuffle=True
    )
    models = {"one": mlp(), "two": mlp()}
    before = {name: tensor.clone() for name, tensor in models["one"].state_dict().items()}
    one, two = wf.tour(models, data, cross_entropy, samples=20).stops
    assert (one.name, two.name) == ("one", "two")
    for name in MATRICES:
        torch.testing.assert_close(one.matrices[name], two.matrices[name])
    assert all(torch.equal(before[name], tensor) for name, tensor in models["one"].state_dict().items())


def test_a_class_that_the_loss_ignores_leaves_the_fisher_out():
    with pytest.warns(
        wf.WoodfisherWarning, match="the Fisher is left out.*ignore_index=2, one of the classes"
    ):
        tour = wf.tour(nn.Linear(6, 3), [samples()], nn.CrossEntropyLoss(ignore_index=2), samples=20)
    assert list(tour.stops[0].matrices) == ["Hessian", "empirical Fisher"]


def test_a_loss_of_unknown_distribution_leaves_the_fisher_out(tmp_path):
    def hinge(outputs, targets):
        return (1 + outputs - outputs.gather(1, targets[:, None])).relu().square().sum(1).mean()

    with pytest.warns(wf.WoodfisherWarning, match="the Fisher is left out.*hinge: pass sampler="):
        tour = wf.tour(mlp(), [samples()], hinge, samples=20)
    assert list(tour.stops[0].matrices) == ["Hessian", "empirical Fisher"]
    assert len(tour.warnings) == 1
    wf.plot_tour(tour, tmp_path)
    drawn = wf.tour(mlp(), [samples()], hinge, samples=20, sampler=lambda out: out.argmax(1))
    assert "Fisher" in drawn.stops[0].matrices


def test_a_model_that_returns_its_own_loss():
    inputs, labels = samples()
    batch = {"features": inputs.double(), "labels": labels}
    tour = wf.tour(DictModel().double(), [batch], samples=20)
    expected = gauss_newton(mlp(torch.float64), inputs.double(), ["0.weight", "2.weight"], softmax_curvature)
    torch.testing.assert_close(tour.stops[0].matrices["Fisher"], expected)


def test_more_classes_than_can_be_counted_are_drawn():
    model = nn.Linear(3, 101)
    objective = wf.Objective(model, [samples(4, (3,), 101)], cross_entropy)
    assert [len(rows) for rows in objective.iter_fisher_rows(4)] == [4]


def test_pooling_keeps_the_entry_of_largest_magnitude():
    M = torch.tensor([[1.0, -2.0, 0.5], [0.0, 1.5, -0.1], [3.0, -4.0, 0.25]])
    assert pooled(M, 2).tolist() == [[-2.0, 0.5], [-4.0, 0.25]]
    assert pooled(M, 3) is M


def test_numbers_for_people():
    assert [significant(x, 2) for x in (None, 0.0, -0.391, 150.0)] == ["", "0", "−0.39", "150"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": {}}, "no model to tour"),
        ({"model": "resnet"}, "must be a torch.nn.Module; a str came"),
        ({"samples": 0}, "samples must be a whole number"),
        ({"data": []}, "no batch"),
        ({"data": samples()}, "put it into a list"),
        ({"params": "decoder"}, "matches no parameter"),
        ({"model": {"a": mlp(), "b": nn.Linear(6, 3)}}, "those of 'b' differ from those of 'a'"),
        ({"model": Recurrent(), "params": "fc"}, "fails on a batch"),
    ],
)
def test_bad_input(arguments, message):
    given = {"model": mlp(), "data": [samples()], "loss": cross_entropy, "samples": 20, **arguments}
    with pytest.raises(wf.WoodfisherError, match=message):
        wf.tour(**given)


def test_a_loss_without_second_derivative_is_named():
    def root(outputs, targets):
        return (outputs - outputs.detach()).abs().pow(1.5).mean()

    with pytest.raises(wf.WoodfisherError, match="Hessian is not finite at '0.weight'"):
        wf.tour(mlp(), [samples()], root, samples=20)
    with pytest.raises(wf.WoodfisherError, match="Hessian is not finite at '0.weight'"):
        wf.DiagonalHessian(20)(wf.Objective(mlp(), [samples()], root))


def test_data_that_ends_early_is_warned_of():
    with pytest.warns(wf.WoodfisherWarning, match="the data ended after 20"):
        assert wf.tour(mlp(), [samples()], cross_entropy).samples == 20


def test_too_large_a_model_is_refused_before_work(monkeypatch):
    monkeypatch.setattr("woodfisher.memory.available_memory", lambda _: 2**16)
    ran = []
    model = mlp()
    model.register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(
        wf.WoodfisherError, match=r"3 matrices of 36 × 36 .*choose fewer weights, as in --params"
    ):
        wf.tour(model, [samples()], cross_entropy, samples=20)
    assert ran == []


TASK = """
import dataclasses
import torch
import torch.nn.utils.prune
from torch.nn.functional import cross_entropy
from woodfisher.tasks import Task

def build(bad=False):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    data = [(torch.randn(40, 6), torch.randint(3, (40,)))]
    start = {k: v.clone() for k, v in model.state_dict().items()}
    if bad:
        start.pop("0.weight")
    return Task("mine", model, data, data, data, cross_entropy, earlier={"The start": start})

def bad():
    return build(bad=True)

def masked():
    task = build()
    torch.nn.utils.prune.l1_unstructured(task.model[2], "weight", 5)
    return dataclasses.replace(task, earlier={"The start": task.model.state_dict()})
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tour_tasks.py").write_text(TASK)
    yield tmp_path
    sys.modules.pop("tour_tasks", None)


def test_the_command_prints_one_object_and_draws(folder, capsys):
    assert main(["tour", "--task", "tour_tasks:build", "--samples", "40", "--out", "seen", "--json"]) == 0
    shown = capsys.readouterr()
    content = json.loads(shown.out)
    assert "loading tour_tasks:build" in shown.err
    assert [stop["name"] for stop in content["stops"]] == ["The start", "trained"]
    assert set(content["metrics"]) == {"The start", "trained"}
    assert [region["name"] for region in content["stops"][0]["regions"]] == ["whole", "0.weight", "2.weight"]
    for region in content["stops"][1]["regions"]:
        pair = next(c for c in region["comparisons"] if c["matrix"] == "empirical Fisher")
        assert 0 < pair["cosine"] < 1
    assert json.loads((folder / "seen" / "report.json").read_text()) == content
    assert sorted(path.name for path in (folder / "seen").iterdir()) == [
        "blocks.png",
        "layers-1-the-start.png",
        "layers-2-trained.png",
        "matrices.png",
        "report.json",
        "samples.png",
        "spectra.csv",
        "spectra.png",
    ]
    with (folder / "seen" / "spectra.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 2 * (30 + 15)
    first = [float(row["eigenvalue"]) for row in rows[:45]]
    assert first == sorted(first, reverse=True)


def test_the_command_shows_a_table_for_a_part_of_a_model(folder, capsys):
    arguments = [
        "tour",
        "--task",
        "tour_tasks:build",
        "--params",
        "2",
        "--exclude",
        "*.bias",
        "--samples",
        "30",
    ]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "The start: mean loss" in shown
    assert "2 (15)" in shown
    assert "0 (30)" not in shown
    assert (folder / "runs" / "tour_tasks-build-tour-seed0" / "matrices.png").exists()


def test_the_command_takes_a_masked_model_at_earlier_points(folder, capsys):
    assert main(["tour", "--task", "tour_tasks:masked", "--samples", "30", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["metrics"]) == ["The start", "trained"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "0"], "samples must be"),
        (["--task", "tour_tasks:bad"], "earlier point 'The start' that does not fit"),
        (["--task", "tour_tasks:build", "--params", "decoder"], "matches no parameter"),
        (["--task", "nowhere:build"], "cannot be imported"),
        (["--out", "tour_tasks.py"], "is not a folder"),
    ],
)
def test_bad_input_to_the_command(arguments, message, folder, capsys):
    assert main(["tour", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert [path.name for path in folder.iterdir() if path.name != "__pycache__"] == ["tour_tasks.py"]


def test_the_default_network_is_trained_and_keeps_earlier_points():
    task = load_task("digits-small")
    assert list(task.earlier) == ["untrained", "early"]
    assert sum(p.numel() for name, p in task.model.named_parameters() if name.endswith("weight")) == 990
    assert task.evaluate(task.model) > 90
    start = type(task.model)()
    start.load_state_dict(task.earlier["untrained"])
    assert task.evaluate(start) < 30
