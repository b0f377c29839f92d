"""Exported models compute what the pruned ones do, and say so only if it was measured."""

import copy
import functools
import json
import math
import re
import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils.prune import l1_unstructured

import woodfisher as wf
from models import ConvNet, Transformer, mlp
from woodfisher.cli import main
from woodfisher.export import (
    LayerSpeed,
    OnnxModel,
    Race,
    SparseConv2d,
    SparseLinear,
    Timing,
    difference,
    load_export,
    measure_layers,
    race,
    save_dense,
    save_export,
    semi_structured_layers,
    to_onnx,
    to_semi_structured,
    to_sparse,
)
from woodfisher.gradients.outputs import outputs_of
from woodfisher.saving.contents import contents_of
from woodfisher.saving.saved import EXPORT, read


def prune_(model, sparsity=0.8, **options):
    wf.prune(model, [], sparsity=sparsity, criterion="magnitude", recalibrate=0, **options)
    return model.eval()


def convnet():
    torch.manual_seed(0)
    return prune_(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, dilation=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 1),
            nn.Conv2d(16, 8, (3, 2), padding=(0, 1), dilation=(2, 1), bias=False),
            nn.Flatten(),
            nn.Linear(8 * 4 * 9, 12),
            nn.Linear(12, 4, bias=False),
        ),
        floor=0.1,
    )


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    short = functools.partial(race, rounds=3, seconds=1e-4)
    monkeypatch.setattr("woodfisher.export.sparse.race", short)
    monkeypatch.setattr("woodfisher.cli.export.race", short)


IMAGES = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LAYERS = ["0", "2", "3", "5", "6"]


@pytest.mark.parametrize("layout", ["csr", "bsr4"])
@pytest.mark.parametrize("shape", [(8,), (1, 8), (5, 8), (2, 3, 8), (1, 1, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_sparse_linear_layer_is_the_dense_one(layout, shape, bias):
    model = nn.Sequential(nn.Linear(8, 4, bias=bias)).double()
    model[0].weight.data[:, :4] = 0
    x = torch.randn(shape).double()
    sparse = to_sparse(model, {"0": layout})
    assert sparse[0].values.numel() == 16
    assert sparse(x).is_contiguous()
    torch.testing.assert_close(sparse(x), model(x))


@pytest.mark.parametrize("count", [1, 5])
def test_sparse_convolutions_are_the_dense_ones(count):
    model = convnet().double()
    x = IMAGES[:count].double()
    sparse = to_sparse(model, LAYERS)
    assert [type(sparse[int(i)]) for i in LAYERS] == [SparseConv2d] * 3 + [SparseLinear] * 2
    torch.testing.assert_close(sparse(x), model(x))
    torch.testing.assert_close(sparse[0](x[0]), model[0](x[0]))
    assert isinstance(model[0], nn.Conv2d)


def test_sparse_layers_know_what_the_dense_ones_know_of_themselves():
    model = convnet()
    sparse = to_sparse(model, LAYERS)
    attributes = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    for name in ("0", "2", "3"):
        dense, layer = model.get_submodule(name), sparse.get_submodule(name)
        for attribute in (*attributes, "padding_mode", "groups"):
            assert getattr(layer, attribute) == getattr(dense, attribute)
    assert (sparse[5].in_features, sparse[5].out_features) == (288, 12)


def test_inputs_of_other_widths_are_told():
    sparse = to_sparse(convnet(), LAYERS)
    for shape in ((5, 4, 16, 16), (4, 16, 16), (16, 16)):
        with pytest.raises(wf.WoodfisherError, match=r"takes images of 3 channels.* shape \(.*16, 16\) came"):
            sparse[0](torch.randn(shape))
    for shape in ((2, 16), (288, 2), ()):
        with pytest.raises(wf.WoodfisherError, match=r"takes \(…, 288\) inputs; shape"):
            sparse[5](torch.randn(shape))


def test_states_of_sparse_layers_round_trip():
    model = convnet()
    sparse, other = to_sparse(model, LAYERS), to_sparse(model, LAYERS)
    for buffer in other.buffers():
        buffer.zero_() if buffer.is_floating_point() else None
    other.load_state_dict(sparse.state_dict())
    assert torch.equal(other(IMAGES), sparse(IMAGES))
    assert torch.equal(copy.deepcopy(sparse)(IMAGES), sparse(IMAGES))
    assert "values" in repr(sparse[0])


def test_indexes_that_point_outside_are_refused():
    sparse = to_sparse(convnet(), ["5"])
    state = sparse.state_dict()
    state["5.col_indices"] = state["5.col_indices"] + 10**6
    with pytest.raises(RuntimeError, match="col_indices"):
        sparse.load_state_dict(state)


@pytest.mark.parametrize("layers", [["0", "5"], {"2": "bsr4", "6": "csr"}])
def test_sparse_models_come_back_from_files(layers, tmp_path):
    model = convnet()
    sparse = to_sparse(model, layers)
    size = save_export(sparse, tmp_path / "model.safetensors")
    again = load_export(ConvNetLike(), tmp_path / "model.safetensors")
    assert size == (tmp_path / "model.safetensors").stat().st_size
    assert torch.equal(again.eval()(IMAGES), sparse(IMAGES))
    assert read(tmp_path / "model.safetensors").metadata[EXPORT] == json.dumps(
        {
            "sparse": {name: list(model.get_submodule(name).weight.shape) for name in layers},
            "semi_structured": [],
        }
    )
    wf.save_weights(model, tmp_path / "pruned.safetensors")
    held, pruned = (contents_of(tmp_path / f"{name}.safetensors") for name in ("model", "pruned"))
    assert [(e.name, e.shape, e.kept, e.pattern, e.dense) for e in held.entries] == [
        (e.name, e.shape, e.kept, e.pattern, e.dense) for e in pruned.entries
    ]
    assert 0 < sum(entry.stored for entry in held.entries) < size


def ConvNetLike():
    """The same architecture with other weights."""
    model = convnet()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def test_a_compressed_or_plain_file_is_read_like_an_export(tmp_path):
    model = convnet()
    wf.save_weights(model, tmp_path / "a.safetensors")
    save_dense(model, tmp_path / "b.safetensors")
    for name in "ab":
        again = load_export(ConvNetLike(), tmp_path / f"{name}.safetensors")
        assert torch.equal(again(IMAGES), model(IMAGES))


def set_(name, change):
    def tamper(tensors, metadata):
        tensors[name] = change(tensors[name])

    return tamper


def listed(text):
    def tamper(tensors, metadata):
        metadata[EXPORT] = text

    return tamper


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (set_("5.col_indices", lambda t: t + 10**6), "col_indices"),
        (set_("5.col_indices", lambda t: t[1:]), "col_indices"),
        (set_("5.crow_indices", lambda t: t.flip(0)), "crow_indices"),
        (lambda tensors, metadata: tensors.pop("5.values"), "5.values is missing"),
        (set_("0.weight", lambda t: torch.zeros(9, 3, 3, 3)), "0.weight is larger in the file"),
        (set_("0.bias", lambda t: t[None]), "size mismatch for 0.bias"),
        (listed('{"sparse": {"1": [9]}}'), "must be a plain Linear or Conv2d"),
        (listed('{"sparse": {"7": [3, 3]}}'), "has none of that name"),
        (listed('{"sparse": {"5": [300, 300]}}'), "5.weight is larger in the file"),
        (listed('{"sparse": ["5"]}'), "must hold shapes by name"),
        (listed('{"sparse": {"5": 3}}'), "must hold shapes by name"),
        (listed('{"sparse": {"5": []}}'), "must hold shapes by name"),
        (listed('{"semi_structured": [5]}'), "must hold shapes by name"),
        (listed("[]"), "must hold shapes by name"),
        (listed("{"), "Expecting property name"),
    ],
)
def test_tampered_exports_end_in_one_error(tamper, message, tmp_path):
    path = tmp_path / "model.safetensors"
    save_export(to_sparse(convnet(), ["5"]), path)
    saved = read(path)
    tensors, metadata = dict(saved.tensors), dict(saved.metadata)
    metadata = {EXPORT: metadata[EXPORT]}
    tamper(tensors, metadata)
    safetensors.torch.save_file(tensors, path, metadata)
    model = convnet()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(wf.WoodfisherError, match=message):
        load_export(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with suppress(wf.WoodfisherError):
        contents_of(path)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["1"], "has a ReLU there"),
        (["nothing"], "has none of that name"),
        ({"5": "coo"}, "a layout is csr, or bsr4"),
        ({"5": "bsr5"}, "a layout is csr, or bsr4"),
        ({"5": None}, "a layout is csr, or bsr4 .*; None came"),
        ("05", "layers are a list of names.*; '05' came"),
        (None, "layers are a list of names.*; None came"),
    ],
)
def test_layers_that_can_not_be_sparse(layers, message):
    with pytest.raises(wf.WoodfisherError, match=message):
        to_sparse(convnet(), layers)


def test_a_shared_layer_goes_by_any_of_its_names(tmp_path):
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    model = nn.Sequential(layer, layer)
    for names in (["0"], ["1"], ["0", "1"]):
        sparse = to_sparse(model, names)
        assert [type(each) for each in sparse] == [
            SparseLinear if name in names else nn.Linear for name in ("0", "1")
        ]
        torch.testing.assert_close(sparse(x), model(x))
        save_export(sparse, tmp_path / "sparse.safetensors")
        assert torch.equal(load_export(model, tmp_path / "sparse.safetensors")(x), sparse(x))


def test_layers_with_groups_hooks_or_parametrizations_stay_dense():
    model = ConvNet()
    with pytest.raises(wf.WoodfisherError, match="without groups or hooks"):
        to_sparse(model, ["grouped"])
    l1_unstructured(model.fc, "weight", 0.5)
    with pytest.raises(wf.WoodfisherError, match="without groups or hooks"):
        to_sparse(model, ["fc"])
    with pytest.raises(wf.WoodfisherError, match=r"put it into a torch.nn.Sequential"):
        to_sparse(nn.Linear(2, 2), [""])


def test_layers_are_measured_on_what_they_get():
    model = convnet()
    model[2].weight.data.fill_(1.0)
    speeds = measure_layers(model, IMAGES[:1])
    assert [speed.name for speed in speeds] == ["0", "3", "5", "6"]
    for speed in speeds:
        weight = model.get_submodule(speed.name).weight
        assert speed.shape == weight.shape
        assert speed.sparsity == pytest.approx(float((weight == 0).double().mean()))
        assert speed.layout == "csr"
        assert 0 < speed.race.sparse.low <= speed.race.sparse.median <= speed.race.sparse.high
        assert speed.race.threads == torch.get_num_threads()
    assert not model[0]._forward_pre_hooks


def test_blocks_are_tried_where_there_are_blocks(monkeypatch):
    layouts = []
    monkeypatch.setattr(
        "woodfisher.export.sparse.race",
        lambda dense, sparse: layouts.append(sparse.func.values.shape[1:]) or timed(1, len(layouts)),
    )
    model = nn.Sequential(nn.Linear(16, 16))
    model[0].weight.data[:8, 8:] = 0
    model[0].weight.data[8:, :8] = 0
    (speed,) = measure_layers(model, torch.randn(3, 16))
    assert layouts == [(), (8, 8)]
    assert speed.layout == "csr"


def timed(dense, sparse, spread=0.1):
    one, other = (Timing(t, t - spread, t + spread) for t in (dense, sparse))
    return Race(one, other, 1)


def test_what_won_is_beyond_the_spread():
    assert timed(2, 1).won
    assert timed(2, 1).speedup == 2
    assert timed(1, 2).lost
    near = timed(1.1, 1)
    assert not near.won
    assert not near.lost


def test_sides_take_turns():
    calls = []
    result = race(lambda: calls.append("d"), lambda: calls.append("s"), rounds=4, seconds=1e-6)
    turns = "".join(calls).replace("dd", "d").replace("ss", "s")
    assert turns.count("ds") >= 4
    assert result.dense.median > 0


def test_a_spread_takes_two_turns_at_least():
    assert race(lambda: None, lambda: None, rounds=2, seconds=1e-6).dense.median > 0
    with pytest.raises(wf.WoodfisherError, match="rounds must be a whole number of at least 2; 1 came"):
        race(lambda: None, lambda: None, rounds=1)


class Wrapped(nn.Module):
    """Returns an object with its outputs and a loss for an attribute."""

    def __init__(self, model, wrap):
        super().__init__()
        self.model, self.wrap = model, wrap

    def forward(self, x):
        return self.wrap(self.model(x))


def test_outputs_in_attributes_are_compared_and_none_are_told():
    model, x = mlp(), torch.randn(4, 6)
    wrapped = Wrapped(model, lambda y: SimpleNamespace(loss=y.sum(), logits=y))
    assert len(outputs_of(wrapped, x)) == 2
    with pytest.raises(wf.WoodfisherError, match="returns no tensors"):
        outputs_of(Wrapped(model, lambda y: y.tolist()), x)


def test_difference_is_relative_to_the_largest_output():
    a = torch.tensor([1.0, -4.0])
    assert difference([a], [a]) == 0
    assert difference([a + 0.4], [a]) == pytest.approx(0.1)
    assert difference([a], [a, a]) == math.inf
    assert difference([a[:1]], [a]) == math.inf
    assert difference([a * math.nan], [a]) == math.inf
    assert difference([a], [0 * a]) == math.inf
    assert difference([a + 0.4j], [a + 0j]) == pytest.approx(0.1)
    assert difference([a > 0], [a < 0]) == 1


def test_channels_that_were_cut_out_come_back_from_files(tmp_path):
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    example = IMAGES[:2]
    fresh = copy.deepcopy(model)
    pattern = wf.Channels.of(model, example)
    prune_(model, 0.5, pattern=pattern, params=pattern.params)
    small = wf.shrink(model, example)
    assert small[0].out_channels < 8
    save_export(small, tmp_path / "small.safetensors")
    again = load_export(fresh.eval(), tmp_path / "small.safetensors")
    assert torch.equal(again(example), small(example))
    assert str(again) == str(small)
    torch.testing.assert_close(again(example), model(example))
    sparse = to_sparse(small, ["4", "8"])
    save_export(sparse, tmp_path / "sparse.safetensors")
    again = load_export(fresh.eval(), tmp_path / "sparse.safetensors")
    assert str(again) == str(sparse)
    assert torch.equal(again(example), sparse(example))


def test_recurrent_layers_of_fewer_inputs_come_back_from_files(tmp_path):
    class Net(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.first, self.recurrent = nn.Linear(6, width), nn.LSTM(width, 8, 2)
            self.last = nn.Linear(8, 3)

        def forward(self, x):
            return self.last(self.recurrent(torch.relu(self.first(x)))[0])

    small, example = Net(5).eval(), torch.randn(4, 5, 6)
    save_export(small, tmp_path / "small.safetensors")
    again = load_export(Net(12).eval(), tmp_path / "small.safetensors")
    assert torch.equal(again(example), small(example))
    assert str(again) == str(small)


class Scaled(nn.Module):
    """Channels go through an embedding, a bare parameter, and a norm that has no other parameters."""

    def __init__(self):
        super().__init__()
        self.table, self.scale = nn.Embedding(20, 8), nn.Parameter(torch.ones(8))
        self.norm, self.fc, self.last = nn.BatchNorm1d(8, affine=False), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.table(x) * self.scale
        return self.last(torch.relu(self.norm(self.fc(x)) + x))


def test_channels_of_bare_parameters_embeddings_and_norms_come_back_from_files(tmp_path):
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model, example = Scaled().eval(), torch.arange(6)
    for silent in (model.table.weight.T, model.fc.weight, model.fc.bias):
        silent.data[:3] = 0
    small = wf.shrink(model, example)
    assert small.scale.shape == (5,)
    save_export(small, tmp_path / "small.safetensors")
    again = load_export(model, tmp_path / "small.safetensors")
    assert torch.equal(again(example), small(example))
    assert str(again) == str(small)
    assert again.norm.num_features == again.table.embedding_dim == 5


def test_onnx_takes_any_batch_and_equals_the_model(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    model = convnet()
    to_onnx(model, IMAGES[:2], tmp_path / "model.onnx")
    again = OnnxModel(tmp_path / "model.onnx")
    for count in (1, 5):
        assert difference(again(IMAGES[:count]), [model(IMAGES[:count])]) < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    with pytest.raises(wf.WoodfisherError, match="takes 1 tensors"):
        again((IMAGES, IMAGES))
    for images in (IMAGES.double(), IMAGES[:, :2], IMAGES[0], IMAGES.bfloat16()):
        came = re.escape(f"{images.dtype} of shape {tuple(images.shape)} came")
        with pytest.raises(wf.WoodfisherError, match=rf"tensor\(float\) of shape \[.*3, 16, 16\]; .*{came}"):
            again(images)
    with pytest.raises(wf.WoodfisherError, match="at least two samples"):
        to_onnx(model, IMAGES[:1], tmp_path / "other.onnx")
    monkeypatch.setattr("woodfisher.export.onnx.difference", lambda *_: 2e-5)
    with pytest.raises(
        wf.WoodfisherError, match=r"2.0e-05 of the largest .* at most 1.0e-05 is allowed: no file"
    ):
        to_onnx(model, IMAGES[:3], tmp_path / "other.onnx")
    to_onnx(model, IMAGES[:3], tmp_path / "coarse.onnx", tolerance=1e-4)
    (tmp_path / "foreign.onnx").write_bytes(b"foreign")
    with pytest.raises(wf.WoodfisherError, match="onnxruntime can't read"):
        OnnxModel(tmp_path / "foreign.onnx")
    assert not list(tmp_path.glob("*other*"))


def test_models_that_can_not_be_traced_are_explained(tmp_path, capsys):
    pytest.importorskip("onnxruntime")

    class Branching(nn.Module):
        def forward(self, x):
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(wf.WoodfisherError, match="torch can't export the model to ONNX"):
        to_onnx(Branching(), torch.randn(2, 3), tmp_path / "model.onnx")
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_what_onnxruntime_can_not_run_is_explained(tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(
        wf.WoodfisherError, match="can't run the exported model: .*find an implementation"
    ) as told:
        to_onnx(mlp().bfloat16(), torch.randn(2, 6).bfloat16(), tmp_path / "model.onnx")
    assert ".part" not in str(told.value)
    assert not list(tmp_path.iterdir())


def test_the_missing_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(wf.WoodfisherError, match=r"pip install 'woodfisher\[onnx\]'"):
        OnnxModel(tmp_path / "model.onnx")


def semi_structured(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128), nn.Linear(128, 64)).to(dtype)
    return prune_(model, None, pattern=wf.NM(2, 4), exclude="3")


def test_2_4_layers_are_found_and_need_a_gpu():
    model = semi_structured()
    empty = [nn.utils.skip_init(nn.Linear, *size) for size in ((0, 8), (8, 0), (0, 0))]
    assert semi_structured_layers(model) == ["0", "2"]
    assert semi_structured_layers(nn.Sequential(model, *empty)) == ["0.0", "0.2"]
    with pytest.raises(wf.WoodfisherError, match="2:4 runs on NVIDIA GPUs .* the model is on cpu"):
        to_semi_structured(model)
    with pytest.raises(wf.WoodfisherError, match="no Linear layer of the model is 2:4"):
        to_semi_structured(mlp())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_2_4_on_a_gpu_equals_the_model(tmp_path):
    model = semi_structured(torch.float16).cuda()
    x = torch.randn(64, 128, device="cuda", dtype=torch.float16)
    sparse = to_semi_structured(model)
    assert difference([sparse(x)], [model(x)]) < 1e-2
    save_export(sparse, tmp_path / "model.safetensors")
    again = load_export(semi_structured(torch.float16).cuda(), tmp_path / "model.safetensors")
    assert torch.equal(again(x), sparse(x))


# The commands

TASK = """
from types import SimpleNamespace
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from woodfisher.tasks import Task
from woodfisher.tasks.weights import load_into

def wide(weights=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 4))
    if weights is not None:
        load_into(model, weights)
    data = [(torch.randn(80, 64), torch.randint(4, (80,)))]
    return Task("wide", model, data, data, data, cross_entropy)

class Translator(nn.Sequential):
    config = SimpleNamespace(is_encoder_decoder=True)

    def forward(self, inputs, labels=None):
        return super().forward(inputs) + labels

def translator(weights=None):
    task = wide(weights)
    data = [{"inputs": inputs, "labels": labels[:, None].float()} for inputs, labels in task.train]
    return Task("translator", Translator(*task.model), data, data, data, None, lambda model, data: 0.0)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_exports.py").write_text(TASK)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 4))
    report = wf.prune(model, [], sparsity=0.9, criterion="magnitude", floor=0.05)
    wf.save_weights(model, tmp_path / "pruned.safetensors", report.masks)
    yield tmp_path
    sys.modules.pop("my_exports", None)


EXPORT_IT = ["export", "--task", "my_exports:wide", "--weights", "pruned.safetensors", "--samples", "8"]


def test_inspect(folder, capsys):
    assert main(["inspect", "pruned.safetensors", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["kept"] == round(0.1 * content["size"])
    assert content["bytes"]["stored"] == (folder / "pruned.safetensors").stat().st_size
    by_name = {layer["name"]: layer for layer in content["layers"]}
    assert by_name["0.weight"]["shape"] == [256, 64]
    assert by_name["0.weight"]["pattern"] == "unstructured"
    assert by_name["0.weight"]["dense"] == 4 * 256 * 64 > 6 * by_name["0.weight"]["stored"]
    assert by_name["0.bias"]["pattern"] is None
    assert main(["inspect", "pruned.safetensors"]) == 0
    shown = capsys.readouterr().out
    assert "unstructured" in shown
    assert "2 others" in shown
    torch.save(semi_structured().state_dict(), "plain.pt")
    assert main(["inspect", "plain.pt", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [layer["pattern"] for layer in content["layers"]] == [None, "2:4", None, "2:4", None, "dense"]
    assert main(["inspect", "nowhere.pt"]) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "file"),
    [
        (["--to", "dense"], "model.safetensors"),
        (["--to", "onnx", "--measure"], "model.onnx"),
        (["--to", "csr", "--layers", "0", "--measure"], "model.safetensors"),
    ],
)
def test_export(options, file, folder, capsys):
    assert main([*EXPORT_IT, *options, "--batch", "16", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    out = folder / content["out"]
    assert sorted(path.name for path in out.iterdir()) == ["export.json", file]
    assert json.loads((out / "export.json").read_text()) == content
    assert content["difference"] <= content["tolerance"] == 1e-5
    assert content["bytes"]["stored"] == (out / file).stat().st_size
    assert [each["batch"] for each in content["measured"]] == ([1, 16] if "--measure" in options else [])
    for each in content["measured"]:
        assert ("as fast as dense" in each["verdict"]) and each["threads"] == 1
    if content["to"] == "csr":
        assert {"name", "speedup", "sparsity"} <= content["layers"][0].keys()
        inputs = torch.randn(3, 64)
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 4))
        again, pruned = load_export(model, out / file), load_export(model, "pruned.safetensors")
        assert isinstance(again[0], SparseLinear)
        torch.testing.assert_close(again(inputs), pruned(inputs))
    assert main([*EXPORT_IT, *options]) == 0
    assert "Results are in" in capsys.readouterr().out


def test_onnx_is_compared_on_one_sample_too(folder, capsys):
    assert main([*EXPORT_IT, "--to", "onnx", "--samples", "1", "--batch", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 1


def test_layers_that_do_not_win_are_not_converted(folder, capsys, monkeypatch):
    speeds = [LayerSpeed(name, (2, 2), 0.9, "csr", timed(1.0, 2.0)) for name in "02"]
    monkeypatch.setattr("woodfisher.cli.export.measure_layers", lambda *_: speeds)
    assert main([*EXPORT_IT, "--to", "csr"]) == 2
    shown = capsys.readouterr().err
    assert "dense is faster here" in shown
    assert "takes 2.00 of the dense time" in shown
    speeds[0] = LayerSpeed("0", (2, 2), 0.9, "csr", timed(2.0, 1.0))
    monkeypatch.setattr("woodfisher.cli.export.race", lambda *_: timed(1.0, 2.0))
    assert main([*EXPORT_IT, "--to", "csr"]) == 2
    assert "with the layers sparse that are faster alone" in capsys.readouterr().err
    assert not (folder / "csr").exists()
    monkeypatch.setattr("woodfisher.cli.export.race", lambda *_: timed(2.0, 1.0))
    assert main([*EXPORT_IT, "--to", "csr"]) == 0
    header = read(folder / "csr" / "model.safetensors").metadata[EXPORT]
    assert json.loads(header)["sparse"] == {"0": [256, 64]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "2:4"], "2:4 runs on NVIDIA GPUs"),
        (["--to", "dense", "--layers", "0"], "--layers belongs to --to csr"),
        (["--to", "dense", "--measure"], "--measure belongs to the others"),
        (["--to", "dense", "--tolerance", "0"], "tolerance must be a finite number above 0"),
        (["--to", "dense", "--batch", "0"], "batch must be a whole number"),
        (["--to", "csr", "--layers", "1"], "has a ReLU there"),
        (["--to", "dense", "--weights", "my_exports.py"], "cannot be read as network weights"),
        (["--to", "dense", "--device", "tpu9"], "can't be used here"),
        (["--to", "dense", "--out", "my_exports.py"], "is not a folder"),
    ],
)
def test_bad_input_is_one_message_and_nothing_written(options, message, folder, capsys):
    before = sorted(folder.iterdir())
    assert main([*EXPORT_IT, *options]) == 2
    shown = capsys.readouterr()
    assert message in shown.err.replace("\n", " ")
    assert "Traceback" not in shown.err
    assert sorted(path for path in folder.iterdir() if path.name != "__pycache__") == before


def test_outputs_that_differ_are_not_written(folder, capsys, monkeypatch):
    monkeypatch.setattr("woodfisher.cli.export.difference", lambda *_: 2e-5)
    arguments = [*EXPORT_IT, "--to", "csr", "--layers", "0"]
    assert main(arguments) == 2
    assert "2.0e-05 of the largest output away" in capsys.readouterr().err
    assert not (folder / "csr").exists()
    assert main([*arguments, "--tolerance", "1e-4"]) == 0


@pytest.mark.filterwarnings("ignore:the model has no channels")
def test_channels_that_are_not_silent_stay(folder, capsys):
    pytest.importorskip("torch_pruning")
    assert main([*EXPORT_IT, "--to", "channels"]) == 2
    assert "no channel of the model can be cut out" in capsys.readouterr().err


PRUNE_CHANNELS = ["--task", "my_exports:wide", "--pattern", "coupled-channels"]


@pytest.mark.parametrize(
    "command",
    [
        ["prune", "--stages", "1", "--samples", "8"],
        ["train", "--epochs", "2", "--samples", "8"],
    ],
)
def test_commands_remove_channels_that_export_cuts_out(command, folder, capsys):
    pytest.importorskip("torch_pruning")
    assert main([*command, *PRUNE_CHANNELS, "--sparsity", "0.5", "--out", "run", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["method"]["pattern"] == "coupled-channels"
    assert {layer["name"]: layer["sparsity"] for layer in content["layers"]} == {
        "0.weight": 0.5,
        "0.bias": 0.5,
    }
    export = ["export", "--task", "my_exports:wide", "--samples", "8", "--json"]
    assert main([*export, "--to", "channels", "--weights", "run/model.safetensors"]) == 0
    out = json.loads(capsys.readouterr().out)["out"]
    small = load_export(
        nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 4)), folder / out / "model.safetensors"
    )
    assert small[0].out_features == small[2].in_features == 128


def test_channels_are_those_of_the_chosen_weights_in_each_run_and_plan(folder, capsys):
    pytest.importorskip("torch_pruning")
    few = ["--stages", "1", "--samples", "8"]
    assert main(["plan", *PRUNE_CHANNELS, *few, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == 64 * 256 + 256
    options = ["--methods", "magnitude,woodfisher", "--sparsity", "0.25", "--seeds", "2"]
    assert main(["compare", *PRUNE_CHANNELS, *few, *options, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["sparsity"] for result in results] == [0.25] * 4
    assert main(["prune", *PRUNE_CHANNELS, *few, "--exclude", "0"]) == 2
    assert "the weights among 0.weight, 0.bias." in capsys.readouterr().err.replace("\n", " ")
    assert not (folder / "runs").exists()


def test_a_decoder_keeps_the_labels_that_its_inputs_are_made_of(folder):
    arguments = ["export", "--task", "my_exports:translator", "--weights", "pruned.safetensors"]
    assert main([*arguments, "--to", "dense"]) == 0


def test_weights_are_asked_for(folder, capsys):
    assert main(["export", "--to", "dense"]) == 2
    assert "name the pruned weights with --weights" in capsys.readouterr().err


def test_onnx_of_attention(tmp_path):
    pytest.importorskip("onnxruntime")
    model = Transformer().eval()
    tokens = torch.randint(0, 11, (3, 6))
    to_onnx(model, tokens, tmp_path / "model.onnx")
    assert difference(OnnxModel(tmp_path / "model.onnx")(tokens[:1]), [model(tokens[:1])]) < 1e-5


def test_onnx_of_torchs_encoder_layer(tmp_path):
    pytest.importorskip("onnxruntime")
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(3, 6, 8)
    to_onnx(model, x, tmp_path / "model.onnx")
    assert torch.backends.mha.get_fastpath_enabled()
    assert difference(OnnxModel(tmp_path / "model.onnx")(x[:1]), [model(x[:1])]) < 1e-5


class Named(nn.Module):
    """Calls its layer by keyword."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(input=x)


def test_layers_that_are_called_by_keyword_can_be_sparse():
    model, x = prune_(Named()), torch.randn(2, 8)
    assert [speed.name for speed in measure_layers(model, x)] == ["layer"]
    torch.testing.assert_close(to_sparse(model, ["layer"])(x), model(x))


class Converting(nn.Module):
    """Takes its inputs in the dtype of its layers' weights, as T5 and ViT do."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, bias=False), nn.Linear(4, 2, bias=False)

    def forward(self, x):
        x = self.conv(x.to(self.conv.weight.device, self.conv.weight.dtype)).mean((2, 3))
        return self.fc(x.to(self.fc.weight.dtype))


def test_the_dtype_of_a_sparse_layer_can_be_read():
    model = prune_(Converting()).double()
    sparse = to_sparse(model, ["conv", "fc"])
    torch.testing.assert_close(sparse(IMAGES), model(IMAGES))
    assert sparse.fc.weight.shape == model.fc.weight.shape
    assert sparse.fc.state_dict().keys() == {"crow_indices", "col_indices", "values"}


def test_layers_that_cannot_be_sparse_here_are_refused():
    encoder = prune_(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), params=["linear*.weight"])
    with pytest.raises(wf.WoodfisherError, match="belongs to a TransformerEncoderLayer"):
        to_sparse(encoder, ["linear1"])
    with pytest.raises(wf.WoodfisherError, match="the model is in bfloat16"):
        to_sparse(prune_(Named()).bfloat16(), ["layer"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sparse_layers_compute_in_their_own_dtype_under_autocast(dtype):
    model = prune_(Converting())
    sparse = to_sparse(model, ["conv"])
    with torch.autocast("cpu", dtype):
        assert sparse.conv(IMAGES).dtype == torch.float32
        assert sparse.conv(IMAGES.to(dtype)).dtype == torch.float32
        assert sparse(IMAGES).dtype == dtype
        assert torch.is_autocast_enabled("cpu")
    torch.testing.assert_close(sparse(IMAGES), model(IMAGES))
    for layer in (sparse.to(dtype), to_sparse(Named(), ["layer"]).to(dtype)):
        with pytest.raises(
            wf.WoodfisherError, match=r"float32 and float64, and the model is in b?float16: convert"
        ):
            layer(IMAGES[..., :8])


def test_a_sparse_file_takes_the_dtype_of_the_network(tmp_path):
    model, x = prune_(Named().double()), torch.randn(2, 8)
    save_export(to_sparse(model, ["layer"]), tmp_path / "sparse.safetensors")
    model = model.float()
    torch.testing.assert_close(load_export(model, tmp_path / "sparse.safetensors")(x), model(x))


def test_layers_that_cannot_be_sparse_are_neither_measured_nor_loaded(tmp_path):
    encoder = prune_(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), params=["linear*.weight"])
    encoder.train()
    assert measure_layers(encoder, torch.randn(2, 5, 16)) == []
    with pytest.raises(wf.WoodfisherError, match=r"the layer 'no\.where' must be a plain Linear"):
        to_sparse(encoder, ["no.where"])
    model = prune_(Named())
    save_export(to_sparse(model, ["layer"]), tmp_path / "sparse.safetensors")
    with pytest.raises(wf.WoodfisherError, match="the model is in bfloat16"):
        load_export(model.bfloat16(), tmp_path / "sparse.safetensors")


def test_onnx_is_of_evaluation_mode_and_says_why_it_can_not_be(tmp_path):
    pytest.importorskip("onnxruntime")
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    x = torch.randn(4, 4)
    to_onnx(model, x, tmp_path / "model.onnx")
    assert model.training
    assert all(module.training for module in model)
    assert difference(OnnxModel(tmp_path / "model.onnx")(x), [model.eval()(x)]) < 1e-5

    class Depends(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(wf.WoodfisherError, match="can't export") as caught:
        to_onnx(Depends(), x, tmp_path / "other.onnx")
    assert "\x1b" not in str(caught.value)
    assert "This is step" not in str(caught.value)
