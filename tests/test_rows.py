"""Rows kept anywhere are the rows in memory, and so is everything that is made of them."""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import woodfisher as wf
from models import mlp, samples
from woodfisher.curvature import base
from woodfisher.curvature import rows as module
from woodfisher.curvature.planning import planned
from woodfisher.curvature.rows import FactorRows, FileRows, Form, HeldRows, HostRows, WindowRows, gathered
from woodfisher.gradients.layer_rows import LayerRows


def test_rows_for_some_weights_are_made_a_few_channels_at_a_time(monkeypatch):
    model = nn.Sequential(nn.Linear(50, 60), nn.Tanh(), nn.Linear(60, 3))
    objective = wf.Objective(model, [samples(8, (50,))], cross_entropy)
    some = torch.randperm(objective.layout.size)[:400].sort().values
    expected = objective.rows(8)[:, some]
    sizes, dense = [], LayerRows.dense

    def noted(self, *args, **options):
        made = dense(self, *args, **options)
        sizes.append(made.numel() * made.element_size())
        return made

    monkeypatch.setattr("woodfisher.gradients.layer_rows._WORKSPACE", 6400)
    monkeypatch.setattr(LayerRows, "dense", noted)
    objective.rows(8, columns=some)  # the first time, a few rows are tried whole
    sizes.clear()
    torch.testing.assert_close(objective.rows(8, columns=some), expected, rtol=0, atol=0)
    assert max(sizes) <= 6400


EXACT = ["factors", "disk", "again"]


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 6, 1, stride=2)
        self.third = nn.Conv2d(6, 4, 2, groups=2, dilation=2, padding=1)
        self.last = nn.Linear(36, 3)

    def forward(self, x):
        x = torch.relu_(self.first(x))
        return self.last(torch.tanh(self.third(torch.relu(self.second(x)))).flatten(1))


def objective(kind="mlp", removed=False):
    torch.manual_seed(0)
    model, shape = (mlp(torch.float64), (6,)) if kind == "mlp" else (Conv().double(), (2, 6, 6))
    if removed:
        with torch.no_grad():
            for p in model.parameters():
                p.view(-1)[1::3] = 0
    x, y = samples(14, shape, dtype=torch.float64)
    return wf.Objective(model, [(x[:5], y[:5]), (x[5:], y[5:])], cross_entropy)


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch):
    monkeypatch.setattr("woodfisher.curvature.planning.WINDOW", 400)
    monkeypatch.setattr(base, "WORKSPACE", 400)
    monkeypatch.setattr(module, "SPAN", 300)


@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("labels", ["data", "model"])
@pytest.mark.parametrize("keep", EXACT)
def test_rows_kept_elsewhere_are_the_rows(keep, labels, group, kind, removed):
    at = objective(kind, removed)
    curvature = wf.WoodFisher(12, 7, 1e-2, group=group, labels=labels, keep=keep)
    index = at.kept.nonzero().squeeze(1) if removed else None
    plan = replace(planned(at, curvature), window=8)
    torch.manual_seed(5)
    rows = gathered(at, curvature, plan, index)
    torch.manual_seed(5)
    expected = at.rows(12, group=group, labels=labels, columns=index)
    torch.manual_seed(6)
    whole = torch.cat([rows.columns(slice(i, min(i + 5, rows.size))) for i in range(0, rows.size, 5)], dim=1)
    torch.testing.assert_close(whole, expected, rtol=1e-10, atol=1e-12)
    some = torch.randperm(rows.size)[:9]
    torch.testing.assert_close(rows.select(some), expected[:, some], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(rows.gram(), expected @ expected.T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(rows.energies(), expected.square().sum(1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(rows.part(slice(4, 11)).columns(slice(1, 5)), expected[:, 5:9])


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("chunk", [3000, 2**20])
def test_targets_are_drawn_once_for_all_windows(chunk, group):
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 3, dtype=torch.float64)
    at = wf.Objective(mlp(torch.float64), [(x[:7], y[:7]), (x[7:], y[7:])], mse_loss)
    curvature = wf.WoodFisher(40, None, 1e-2, group=group, labels="model", keep="again")
    plan = replace(planned(at, curvature), window=8, chunk=chunk)
    torch.manual_seed(5)
    rows = gathered(at, curvature, plan, None)
    torch.manual_seed(5)
    expected = at.within(chunk).rows(40, group=group, labels="model")
    for start in (0, 8, 16, 24, 32, 0):
        span = slice(start, min(start + 8, rows.size))
        torch.testing.assert_close(rows.columns(span), expected[:, span], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("block_size", [5, 20, None])
@pytest.mark.parametrize("keep", EXACT)
def test_operators_of_rows_kept_elsewhere(keep, block_size, removed, hold, monkeypatch):
    at = objective("conv", removed)
    curvature = wf.WoodFisher(12, block_size, 1e-2)
    expected = curvature(at)
    plan = planned(at, replace(curvature, keep=keep))
    monkeypatch.setattr(
        "woodfisher.curvature.woodfisher.planned", lambda *_: replace(plan, hold=hold, window=40)
    )
    finv = replace(curvature, keep=keep)(at)
    torch.testing.assert_close(finv.dense(), expected.dense(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(finv.diag(), expected.diag(), rtol=1e-8, atol=1e-8)
    v = torch.randn(at.layout.size, dtype=torch.float64)
    torch.testing.assert_close(finv.forward(v), expected.forward(v), rtol=1e-8, atol=1e-8)
    keep_some = torch.rand(at.layout.size) < 0.5
    torch.testing.assert_close(
        finv.restricted_solve(keep_some, v), expected.restricted_solve(keep_some, v), rtol=1e-7, atol=1e-7
    )
    index = torch.randperm(at.layout.size)[:6].reshape(2, 3)
    torch.testing.assert_close(finv.submatrices(index), expected.submatrices(index), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("block_size", [5, 20, None])
def test_where_factors_are_not_held_no_block_has_any(block_size, monkeypatch):
    at = objective("conv")
    curvature = wf.WoodFisher(12, block_size, 1e-2)
    plan = planned(at, curvature)
    made = []
    for where in ("dense", "lowrank"):
        factored = sys.modules[f"woodfisher.curvature.{where}"].cholesky
        monkeypatch.setattr(
            f"woodfisher.curvature.{where}.cholesky",
            lambda K, what, factored=factored: made.append(len(K)) or factored(K, what),
        )
    blocks = sum(run.count for run in curvature.runs(at))
    for hold, expected in ((True, 0), (False, blocks)):
        monkeypatch.setattr(
            "woodfisher.curvature.woodfisher.planned", lambda *_, hold=hold: replace(plan, hold=hold)
        )
        finv = curvature(at)
        v = torch.ones(at.layout.size, dtype=torch.float64)
        for again in (blocks, expected):
            made.clear()
            finv @ v
            assert sum(made) == again


def test_bfloat16_rows_say_what_they_lose():
    at = objective()
    exact = at.rows(12)
    curvature = wf.WoodFisher(12, None, 1e-2, keep="half")
    with pytest.warns(wf.WoodfisherWarning, match=r"bfloat16: rounding moved them by 0\.\d\d%"):
        rows = gathered(at, curvature, planned(at, curvature), None)
    apart = rows.columns(slice(0, rows.size)) - exact
    assert 0 < apart.norm() < 4e-3 * exact.norm()
    assert rows.columns(slice(0, 3)).dtype == torch.float64


def test_a_window_is_loaded_once_when_columns_come_in_order():
    loads = []

    class Counted(WindowRows):
        def _load(self, span):
            span = self._whole(span)
            loads.append((span.start, span.stop))
            return torch.zeros(2, span.stop - span.start)

    rows = Counted(Form(2, 50, torch.float32, torch.device("cpu"), 20))
    for start in range(0, 50, 5):
        assert rows.columns(slice(start, start + 5)).shape == (2, 5)
    assert loads == [(0, 20), (20, 40), (40, 50)]


def test_selections_that_lie_in_a_window_load_it_once():
    loads = []

    class Counted(WindowRows):
        def _load(self, span):
            span = self._whole(span)
            loads.append((span.start, span.stop))
            return torch.arange(span.start, span.stop).float().expand(2, -1)

    rows = Counted(Form(2, 50, torch.float32, torch.device("cpu"), 20))
    for index in ([3, 1], [7, 19, 9], [18], [21, 19, 30], [35]):
        assert rows.select(torch.tensor(index)).tolist() == [index] * 2
    assert loads == [(1, 21), (19, 39)]


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_span_and_selection_of_a_file(data):
    N, d = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 30))
    G = torch.randn(N, d)
    rows = FileRows(G.split(2), Form(N, d, torch.float32, torch.device("cpu"), data.draw(st.integers(1, 12))))
    start = data.draw(st.integers(0, d - 1))
    stop = data.draw(st.integers(start + 1, d))
    assert torch.equal(rows.columns(slice(start, stop)), G[:, start:stop])
    index = torch.tensor(data.draw(st.lists(st.integers(0, d - 1), min_size=1)))
    assert torch.equal(rows.select(index), G[:, index])
    assert torch.equal(HeldRows(G).select(index), G[:, index])


def test_rows_of_convolutions_with_patches_for_inputs_are_the_same():
    (layers,) = objective("conv").iter_layer_rows(12)
    for layer in layers.values():
        torch.testing.assert_close(layer.unfolded().dense(), layer.dense())
    assert any(layer.unfolded() is not layer for layer in layers.values())


def test_every_span_of_rows_in_factor_form():
    at = objective()
    G, (layers,) = at.rows(12), list(at.iter_layer_rows(12))
    for start in range(at.layout.size):
        for stop in range(start + 1, at.layout.size + 1):
            rows = FactorRows(layers, at.layout, None, Form(0, at.layout.size, at.dtype, at.device, 1))
            torch.testing.assert_close(rows.columns(slice(start, stop)), G[:, start:stop])


def host_rows(window, count=4, size=50, chunks=(3, 1), device="cpu"):
    made = torch.arange(float(count * size)).reshape(count, size)
    device = torch.device(device)
    return made, HostRows(
        iter(made.to(device).split(chunks)), Form(count + 2, size, made.dtype, device, window)
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_span_and_selection_of_rows_in_main_memory(data):
    made, rows = host_rows(data.draw(st.integers(1, 60)))
    assert rows.count == 4
    for _ in range(6):
        first = data.draw(st.integers(0, 48))
        span = slice(first, data.draw(st.integers(first + 1, 50)))
        assert torch.equal(rows.columns(span), made[:, span])
        some = torch.tensor(data.draw(st.lists(st.integers(0, 49), min_size=1, unique=True)))
        assert torch.equal(rows.select(some), made[:, some])


def test_the_next_window_is_sent_before_it_is_asked_for(monkeypatch):
    made, rows = host_rows(20)
    sent, send = [], rows._send

    def noted(span):
        sent.append((span.start, span.stop))
        return send(span)

    monkeypatch.setattr(rows, "_send", noted)
    for first in range(0, 48, 6):
        span = slice(first, first + 6)
        assert torch.equal(rows.columns(span), made[:, span])
    assert sent == [(0, 20), (14, 34), (28, 48), (42, 50)]
    assert torch.equal(rows.columns(slice(0, 6)), made[:, :6])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_rows_in_main_memory_on_cuda():
    made, rows = host_rows(2**16, count=64, size=2**20, chunks=(40, 24), device="cuda")
    for first in range(0, 2**20, 2**13):
        span = slice(first, first + 2**13)
        assert torch.equal((rows.columns(span) * 2).cpu(), made[:, span] * 2)


def test_rows_are_brought_from_main_memory_to_a_gpu_only():
    with pytest.raises(
        wf.WoodfisherError, match="brings rows from main memory to a GPU, and the model is on cpu"
    ):
        wf.plan(objective(), wf.WoodFisher(12, 7, 1e-2, keep="host"))


def test_no_room_on_disk_is_said_before_any_gradient(monkeypatch):
    monkeypatch.setattr(module, "disk_room", lambda: 100)

    def chunks():
        raise AssertionError("a gradient was taken")
        yield

    with pytest.raises(wf.WoodfisherError, match=r"2 gradient rows of 50 weights take 400 B on disk.*TMPDIR"):
        FileRows(chunks(), Form(2, 50, torch.float32, torch.device("cpu"), 8))


def test_rows_on_disk_leave_no_file(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    finv = wf.WoodFisher(12, 7, 1e-2, keep="disk")(objective())
    finv.diag()
    del finv
    assert not list(Path(tmp_path).iterdir())


def test_data_that_is_read_once_can_not_be_gathered_again():
    at = objective()
    once = at.on(iter(list(at.data)))
    assert not once.factors()
    torch.testing.assert_close(wf.WoodFisher(12, 7, 1e-2)(once).diag(), wf.WoodFisher(12, 7, 1e-2)(at).diag())
