"""Several processes prune as one does."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import woodfisher as wf
from models import mlp, samples
from processes import run
from woodfisher.dealing import can_be_dealt
from woodfisher.method import METHODS

BLOCK = {"curvature": wf.WoodFisher(23, 5, 1e-2), "stages": 1}

CASES = {
    "independent": {**BLOCK, "update": "independent"},
    "joint": BLOCK,
    "auto": {**BLOCK, "curvature": wf.WoodFisher(23, 5, "auto")},
    "relative": {**BLOCK, "curvature": wf.WoodFisher(23, 50, wf.Relative(1))},
    "three stages": {**BLOCK, "stages": 3},
    "rows in factors": {**BLOCK, "curvature": wf.WoodFisher(23, 5, 1e-2, keep="factors"), "stages": 3},
    "rows on disk": {**BLOCK, "curvature": wf.WoodFisher(24, 5, 1e-2, keep="disk", group=2)},
    "rows of groups": {**BLOCK, "curvature": wf.WoodFisher(24, 5, 1e-2, keep="factors", group=3)},
    "gradient": {**BLOCK, "first_order": True},
    "layer": {**BLOCK, "scope": "layer"},
    "flops": {**BLOCK, "scope": "flops"},
    "floor": {**BLOCK, "floor": 0.25},
    "2:4": {**BLOCK, "pattern": wf.NM(2, 4)},
    "1x2": {**BLOCK, "pattern": wf.Block(2)},
    "magnitude": {"criterion": "magnitude"},
    "obd": {"criterion": "obd"},
    "kfac": {"criterion": "kfac", "stages": 1},
    "full": {"criterion": "woodfisher-full", "curvature": wf.WoodFisher(23, None, 1e-2), "stages": 2},
    "refine": {**BLOCK, "refine": 2},
    "sampled": {**BLOCK, "curvature": wf.WoodFisher(23, 5, 1e-2, labels="model")},
}


class Net(nn.Module):
    """Convolutions, batch normalisation, a linear layer, and weights that are equal."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 4, 1, stride=2)
        self.third = nn.Linear(36, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.last(torch.tanh(self.third(torch.tanh(self.second(x)).flatten(1))))


def batches(seed=1):
    x, y = samples(60, (4, 6, 6), seed=seed)
    return [(x[i : i + 7], y[i : i + 7]) for i in range(0, 60, 7)]


def pruned(kind, case, start=0.0):
    """State, masks and report of a pruned network."""
    model = {"net": Net, "mlp": mlp}[kind]()
    if start:
        wf.prune(model, None, sparsity=start, criterion="magnitude-layer")
    data = batches() if kind == "net" else [samples(40, seed=1)]
    sparsity = 0.5 if "pattern" in case else 0.7
    report = wf.prune(model, data, cross_entropy, sparsity, recalibrate=20, **case)
    return model.state_dict(), report.masks, report.to_dict()


def every_case(rank):
    return {name: pruned("net", case) for name, case in CASES.items()}


def same(results, expected):
    for state, masks, report in results:
        for name, value in expected[1].items():
            assert torch.equal(masks[name], value), name
        for name, value in expected[0].items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=name)
        for key in set(report) - {"seconds", "stages"}:
            assert report[key] == expected[2][key], key
        for stage, other in zip(report["stages"], expected[2]["stages"], strict=True):
            assert stage["sparsity"] == other["sparsity"]
            assert stage["predicted"] == pytest.approx(other["predicted"], rel=1e-3, nan_ok=True)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run(every_case, 2, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_prune_as_one_does(name, two):
    same([each[name] for each in two], pruned("net", CASES[name]))
