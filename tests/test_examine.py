"""FLOPs and the curvature's spectrum by layer, and what is said where there are none."""

import pytest
import torch
from torch.nn.functional import cross_entropy

import woodfisher as wf
from woodfisher.results import examine as module
from woodfisher.results.examine import examine, spectrum_by_layer


def made(samples=30):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).double()
    data = [(torch.randn(10, 6, dtype=torch.float64), torch.randint(3, (10,))) for _ in range(samples // 10)]
    return wf.Objective(model, data, cross_entropy)


def test_flops_are_counted_layer_by_layer():
    found = examine(made(), wf.WoodFisher())
    assert found.flops == {"0.weight": 2 * 6 * 8, "2.weight": 2 * 8 * 3}
    assert found.missing == {}


@pytest.mark.parametrize("memory", [2**28, 48 * 8 * 30])
def test_the_spectrum_is_that_of_the_blocks(memory, monkeypatch):
    monkeypatch.setattr(module, "ROW_MEMORY", memory)
    objective = made()
    found = spectrum_by_layer(objective)
    assert found.rows == 30
    rows = objective.rows(30)
    for layer, (name, where) in zip(found.layers, objective.layout.slices.items(), strict=True):
        block = rows[:, where].T @ rows[:, where] / 30
        e = torch.linalg.eigvalsh(block).flip(0).clamp(min=0)
        expected = e[: min(len(e), 30)]
        assert (layer.name, layer.weights) == (name, len(block))
        assert layer.mean == pytest.approx(float(block.trace()) / len(block))
        assert layer.rank == pytest.approx(float(e.sum() ** 2 / e.square().sum()))
        torch.testing.assert_close(
            torch.tensor(layer.eigenvalues, dtype=torch.float64), expected, atol=1e-12, rtol=1e-6
        )


def test_many_eigenvalues_are_told_by_33_of_them(monkeypatch):
    torch.manual_seed(0)
    data = [(torch.randn(100, 50), torch.randint(4, (100,)))]
    objective = wf.Objective(torch.nn.Linear(50, 4), data, cross_entropy)
    (layer,) = spectrum_by_layer(objective).layers
    rows = objective.rows(100).double()
    e = torch.linalg.eigvalsh(rows @ rows.T / 100).flip(0)
    assert len(layer.eigenvalues) == 33
    assert layer.eigenvalues[0] == pytest.approx(float(e[0]))
    assert layer.eigenvalues == sorted(layer.eigenvalues, reverse=True)


def test_removed_weights_take_no_part():
    objective = made()
    kept = torch.ones(objective.layout.size, dtype=torch.bool)
    kept[: 48 - 5] = False
    first, _ = spectrum_by_layer(objective.at(objective.weights, kept)).layers
    assert first.weights == len(first.eigenvalues) == 5
    none = objective.at(objective.weights, kept & (torch.arange(len(kept)) >= 48))
    first, _ = spectrum_by_layer(none).layers
    assert (first.weights, first.mean, first.rank, first.eigenvalues) == (0, 0.0, 0.0, [0.0])


def test_what_cannot_be_found_is_said_and_no_failure(monkeypatch):
    found = examine(made(), wf.Identity())
    assert found.spectrum is None
    assert "Identity is no Fisher" in found.missing["spectrum"]
    with monkeypatch.context() as patch:
        patch.setattr(module, "ROW_MEMORY", 2000)
        found = examine(made(), wf.WoodFisher())
    assert "8 gradient rows at least; for the largest layer 5 fit into 0 MiB" in found.missing["spectrum"]
    objective = made()
    unused = torch.nn.ModuleDict({"used": objective.model, "unused": torch.nn.Linear(2, 2)})
    unused.forward = lambda x: unused["used"](x)
    objective = wf.Objective(unused, objective.data, cross_entropy)
    assert "can't be counted" in examine(objective, wf.Identity()).missing["flops"]
    found = examine(wf.Objective(made().model, [], cross_entropy), wf.WoodFisher())
    assert found.flops is found.spectrum is None
    assert "the data holds no batch" in found.missing["flops"]
    assert "the data has 0 samples" in found.missing["spectrum"]
