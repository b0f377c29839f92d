"""Weights in files: to the same bits and back, small, and refused where they contradict themselves."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import woodfisher as wf
from models import Tied, mlp
from woodfisher.export import save_dense, save_export
from woodfisher.saving.bitmask import PARTS, pack, unpack
from woodfisher.saving.contents import contents_of
from woodfisher.saving.saved import (
    COMPRESSED,
    INPUTS_FIRST,
    MASKED,
    pack_state,
    packed_model,
    plain_state,
    read,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DOCS = Path(__file__).resolve().parents[1] / "docs" / "shipping.md"


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def pruned(shape=(40, 120), sparsity=0.9, dtype=torch.float32, seed=0):
    """A weight with its mask, where some kept weights are 0 and −0."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(shape, generator=generator) > sparsity
    weight = torch.randn(shape, generator=generator).to(dtype)
    weight.flatten()[::7] = 0.0
    weight.flatten()[::5] = -0.0
    return weight.masked_fill(~kept, 0), kept


class Net(nn.Module):
    """A convolution, a Linear layer, a bare parameter, and a counter."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3)
        self.fc = nn.Linear(120, 40)
        self.table = nn.Parameter(torch.randn(30, 50))
        self.register_buffer("steps", torch.tensor(7))
        self.to(dtype)


def pruned_net(dtype=torch.float32):
    model = Net(dtype)
    masks = {}
    for name in ("conv.weight", "fc.weight", "table"):
        parameter = model.get_parameter(name)
        parameter.data, masks[name] = pruned(parameter.shape, dtype=dtype)
    return model, masks


def test_the_parts_are_these():
    weight = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0, -2, 0], [0, 3, 0, 0, 0, 0, 0, 4, 0, 5]])
    kept = weight != 0
    kept[1, 0] = True
    parts = pack(weight, kept)
    assert parts["shape"].tolist() == [2, 10]
    assert parts["bitmask"].tolist() == [[0b1, 0b1], [0b10000011, 0b10]]
    assert parts["compressed"].tolist() == [1, -2, 0, 3, 4, 5]
    assert parts["row_offsets"].tolist() == [0, 2]
    assert [parts[name].dtype for name in PARTS] == [torch.int64, torch.float32, torch.uint8, torch.int64]


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(0, 19), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    sparsity=st.sampled_from((0.0, 0.3, 0.9, 1.0)),
    seed=st.integers(0, 2**20),
)
def test_packing_keeps_every_bit(shape, dtype, sparsity, seed):
    weight, kept = pruned(shape, sparsity, dtype, seed)
    again, mask = unpack(pack(weight, kept))
    assert again.dtype == dtype
    assert torch.equal(bits(again), bits(weight))
    assert torch.equal(mask.reshape(shape), kept)


@settings(deadline=None, max_examples=40)
@given(
    dtype=st.sampled_from(DTYPES), sparsity=st.sampled_from((0.0, 0.5, 0.95, 1.0)), seed=st.integers(0, 99)
)
def test_states_keep_every_bit(dtype, sparsity, seed, tmp_path_factory):
    shapes = {"a.weight": (9, 70), "b": (6, 5, 3, 3), "c.bias": (17,), "d.weight": (0, 3), "e": ()}
    state, masks = {}, {}
    for name, shape in shapes.items():
        state[name], masks[name] = pruned(shape, sparsity, dtype, seed) if shape else (torch.ones(()), None)
    masks.pop("e")
    path = tmp_path_factory.mktemp("state") / "w.safetensors"
    pack_state(state, masks).write(path)
    saved = read(path)
    assert saved.tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(bits(saved.tensors[name]), bits(tensor)), name
        assert saved.tensors[name].shape == tensor.shape
        if name in masks and not masks[name].all():
            assert torch.equal(saved.kept[name], masks[name])


def test_a_model_is_small_and_loads_back(tmp_path):
    path = tmp_path / "model.safetensors"
    model, masks = pruned_net()
    size = wf.save_weights(model, path, masks)
    saved = read(path)
    assert size == path.stat().st_size == saved.size
    assert saved.compressed == {"conv.weight", "fc.weight", "table"}
    weights = [model.get_parameter(name) for name in masks]
    assert sum(saved.stored[name] for name in masks) < 0.2 * 4 * sum(weight.numel() for weight in weights)
    other = Net()
    other.load_state_dict(wf.load_weights(path))
    for name, value in model.state_dict().items():
        assert torch.equal(bits(other.state_dict()[name]), bits(value))
    for name, mask in masks.items():
        assert torch.equal(saved.kept[name], mask)
    assert saved.metadata["woodfisher"] == wf.__version__
    assert list(tmp_path.iterdir()) == [path]


def test_ninety_per_cent_sparse_takes_at_most_0_15_of_dense(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.Linear(128, 10))
    report = wf.prune(model, [], sparsity=0.9, criterion="magnitude")
    wf.save_weights(model, tmp_path / "sparse.safetensors", report.masks)
    wf.export.save_dense(model, tmp_path / "dense.safetensors")
    sizes = {path.stem: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes["sparse"] <= 0.15 * sizes["dense"]


def test_what_would_not_shrink_or_would_lose_bits_stays_plain(tmp_path):
    path = tmp_path / "model.safetensors"
    model = nn.Sequential(nn.Linear(50, 4), nn.Linear(50, 4), nn.Linear(50, 4))
    masks = {f"{i}.weight": torch.rand(4, 50) > 0.9 for i in range(3)}
    masks["0.weight"] = torch.ones(4, 50).bool()
    masks["0.weight"][0, 0] = False
    for i in range(2):
        model[i].weight.data.masked_fill_(~masks[f"{i}.weight"], 0)
    model[1].weight.data.masked_fill_(~masks["1.weight"], -0.0)
    wf.save_weights(model, path, masks)
    saved = read(path)
    assert saved.compressed == set()
    assert all(torch.equal(saved.kept[name], mask) for name, mask in masks.items())
    for name, value in model.state_dict().items():
        assert torch.equal(bits(saved.tensors[name]), bits(value))


def test_without_masks_zeros_count_as_removed(tmp_path):
    model = mlp()
    model[0].weight.data[1:] = 0
    wf.save_weights(model, tmp_path / "model.safetensors")
    assert read(tmp_path / "model.safetensors").kept["0.weight"].sum() == 6


def test_names_that_the_parts_would_take_are_left_alone(tmp_path):
    weight, kept = pruned()
    state = {"a.weight": weight, "a.shape": torch.ones(3), "a.compressed": torch.ones(2)}
    path = tmp_path / "w.safetensors"
    pack_state(state, {"a.weight": kept}).write(path)
    again = wf.load_weights(path)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], value) for name, value in state.items())


def test_a_models_own_masks_are_tensors_like_others(tmp_path):
    state = {"a": torch.ones(3), "a_mask": torch.tensor([True, False, True])}
    path = tmp_path / "w.safetensors"
    pack_state(state, {}).write(path)
    assert wf.load_weights(path).keys() == state.keys()
    path.write_bytes(plain_state(state))
    assert wf.load_weights(path).keys() == state.keys()
    torch.save(state, tmp_path / "w.pt")
    assert wf.load_weights(tmp_path / "w.pt").keys() == state.keys()
    with pytest.warns(wf.WoodfisherWarning, match="the mask of 'a' is not saved"):
        pack_state(state, {"a": state["a_mask"]}).write(path)
    assert wf.load_weights(path).keys() == state.keys()


def test_tied_weights_are_stored_once_and_come_back_under_both_names(tmp_path):
    model = Tied()
    report = wf.prune(model, [], sparsity=0.5, criterion="magnitude")
    wf.save_weights(model, tmp_path / "model.safetensors", report.masks)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert not any(name.startswith("second") for name in stored)
    other = Tied()
    other.load_state_dict(wf.load_weights(tmp_path / "model.safetensors"))
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_tensors_of_one_memory_that_are_read_otherwise_are_stored_apart(tmp_path):
    weight, phases = torch.tensor([1.0, 0.0, -2.0]), torch.tensor([1 + 2j, 3 - 4j])
    state = {
        "weight": weight, "bits": weight.view(torch.int32),
        "phases": phases, "conjugate": phases.conj(), "negative": phases.conj().imag, "imaginary": phases.imag,
    }  # fmt: skip
    path = tmp_path / "w.safetensors"
    for content in (pack_state(state).content, plain_state(state)):
        path.write_bytes(content)
        again = wf.load_weights(path)
        assert again.keys() == state.keys()
        assert again["bits"].tolist() == [0x3F800000, 0, -0x40000000]
        assert again["conjugate"].tolist() == [1 - 2j, 3 + 4j]
        assert again["negative"].tolist() == [-2, 4]
        assert again["imaginary"].tolist() == [2, -4]


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="this torch has no such dtype")
def test_powers_of_two_in_eight_bits_come_back(tmp_path):
    scales = torch.zeros(40, 120, dtype=torch.uint8)
    scales[::9, ::4] = 130
    pack_state({"scales": scales.view(torch.float8_e8m0fnu)}).write(tmp_path / "w.safetensors")
    saved = read(tmp_path / "w.safetensors")
    assert saved.compressed == {"scales"}
    assert torch.equal(saved.tensors["scales"].view(torch.uint8), scales)


def test_models_without_tensors_are_not_saved(tmp_path):
    for save in (wf.save_weights, save_dense, save_export):
        with pytest.raises(wf.WoodfisherError, match="the model has no tensors"):
            save(nn.Sequential(), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_files_of_safetensors_own_save_model_have_tied_weights_under_both_names(tmp_path):
    safetensors.torch.save_model(Tied(), str(tmp_path / "model.safetensors"))
    assert wf.load_weights(tmp_path / "model.safetensors").keys() == Tied().state_dict().keys()


@pytest.mark.parametrize("save", [wf.save_weights, save_dense, save_export])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2, device="meta"), "'weight' is on the meta device and has no numbers"),
        (nn.LazyLinear(2), "'weight' has no shape before the model has run"),
        (nn.Linear(2, 2).state_dict(), "must be a torch.nn.Module; a OrderedDict came"),
        (None, "must be a torch.nn.Module; a NoneType came"),
    ],
)
def test_models_without_weights_are_not_saved(save, model, message, tmp_path):
    with pytest.raises(wf.WoodfisherError, match=message):
        save(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_masks_that_do_not_fit_are_refused(tmp_path):
    for masks in (
        {"0.weight": torch.ones(2, 2).bool()},
        {"0.weight": torch.ones(4, 6)},
        {"9": torch.ones(1).bool()},
    ):
        with pytest.raises(wf.WoodfisherError, match="a mask is a bool tensor of a weight's shape"):
            wf.save_weights(mlp(), tmp_path / "model.safetensors", masks)
    with pytest.raises(wf.WoodfisherError, match="masks are a dict of bool tensors.*; a list came"):
        wf.save_weights(mlp(), tmp_path / "model.safetensors", [torch.ones(4, 6).bool()])
    assert not list(tmp_path.iterdir())


def set_(name, change):
    def tamper(tensors, metadata):
        tensors[name] = change(tensors[name])

    return tamper


def drop(name):
    return lambda tensors, metadata: tensors.pop(name)


def header(text):
    def tamper(tensors, metadata):
        metadata[COMPRESSED] = text

    return tamper


def flip(bitmask):
    changed = bitmask.clone()
    changed[0, 0] ^= 1
    return changed


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (set_("fc.compressed", lambda t: t[1:]), "'fc.weight' is broken: its bitmask keeps"),
        (set_("fc.compressed", lambda t: t[None]), "values of shape"),
        (set_("fc.bitmask", flip), "its bitmask keeps"),
        (
            set_("fc.bitmask", lambda t: t[:, 1:].contiguous()),
            r"its bitmask must be uint8 of shape \(40, 15\)",
        ),
        (set_("fc.bitmask", lambda t: t.int()), "its bitmask must be uint8"),
        (set_("fc.shape", lambda t: t.flip(0)), r"its bitmask must be uint8 of shape \(120, 5\)"),
        (set_("fc.shape", lambda t: t * 2**40), "its bitmask must be uint8"),
        (set_("fc.shape", lambda t: -t), "its shape must be whole numbers"),
        (set_("fc.shape", lambda t: t[:0]), "its shape must be whole numbers"),
        (set_("fc.shape", lambda t: t.float()), "its shape must be whole numbers"),
        (
            set_("fc.shape", lambda t: torch.tensor([40, 119])),
            "bits beyond the end of a row|its bitmask keeps",
        ),
        (set_("fc.row_offsets", lambda t: t + 1), "its row_offsets are not those of its bitmask"),
        (drop("fc.row_offsets"), "its row_offsets is missing"),
        (drop("fc.shape"), "its shape is missing"),
        (drop("table.compressed"), "'table' is broken: its compressed is missing"),
        (header("{"), "JSONDecodeError"),
        (header("[]"), "must hold a name and a shape"),
        (header('{"conv": {"name": 3, "shape": [1]}}'), "must hold a name and a shape"),
        (header('{"conv": {"name": "conv.weight", "shape": [-1, 1152]}}'), "must hold a name and a shape"),
        (header('{"conv": {"name": "conv.weight", "shape": [16, 8, 3, 4]}}'), "'conv.weight' is broken"),
        (lambda tensors, metadata: metadata.update({MASKED: "[3]"}), "must list weights that have a mask"),
        (lambda tensors, metadata: metadata.update({MASKED: '["conv.bias"]'}), "must list weights that have"),
        (lambda tensors, metadata: metadata.update({INPUTS_FIRST: '"conv"'}), "must list names"),
        (header('{"none": {"name": "none", "shape": [1]}}'), "'none' is broken: its shape and compressed"),
    ],
)
def test_tampered_files_end_in_one_error(tamper, message, tmp_path):
    path = tmp_path / "model.safetensors"
    wf.save_weights(*(lambda model, masks: (model, path, masks))(*pruned_net()))
    tensors = safetensors.torch.load_file(path)
    metadata = read(path).metadata
    tamper(tensors, metadata)
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(wf.WoodfisherError, match=message):
        wf.load_weights(path)


@pytest.mark.parametrize("content", [b"", b"\x80\x04}", b"x" * 3000])
def test_foreign_and_truncated_files_end_in_one_error(content, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(wf.WoodfisherError, match="cannot be read as network weights"):
        wf.load_weights(path)
    model, masks = pruned_net()
    whole = packed_model(model, masks).content
    assert all(packed_model(model, masks).content == whole for _ in range(10))
    for length in (7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(wf.WoodfisherError, match="cannot be read as network weights"):
            wf.load_weights(path)
    with pytest.raises(wf.WoodfisherError, match="no such file"):
        wf.load_weights(tmp_path / "other.safetensors")
    with pytest.raises(wf.WoodfisherError, match="is a folder.*name one in it"):
        wf.load_weights(tmp_path)
    (tmp_path / "picture.pt").write_bytes(b"\x89PNG" + 100 * b"x")
    with pytest.raises(wf.WoodfisherError, match="none that torch.save wrote"):
        wf.load_weights(tmp_path / "picture.pt")
    for saved in (model, {}):
        torch.save(saved, tmp_path / "whole.pt")
        with pytest.raises(
            wf.WoodfisherError, match="more than tensors: save model.state_dict|holds no tensor"
        ) as raised:
            wf.load_weights(tmp_path / "whole.pt")
        assert "weights_only" not in str(raised.value)
    with pytest.raises(wf.WoodfisherError, match="a mask is a bool tensor; .* is a list"):
        wf.save_weights(model, tmp_path / "model.safetensors", {"0.weight": [True]})


def test_compressed_tensors_reads_and_writes_the_same(tmp_path):
    sparse = pytest.importorskip("compressed_tensors.compressors.sparse_compressors")
    from compressed_tensors.config import BitmaskConfig

    compressor = sparse.BitmaskCompressor(BitmaskConfig())
    model, _ = pruned_net()
    state = model.state_dict()
    masks = {name: state[name] != 0 for name in ("conv.weight", "fc.weight")}
    for name in masks:
        state[name] = state[name].masked_fill(~masks[name], 0)
    pack_state(state, masks).write(tmp_path / "ours.safetensors")
    theirs = dict(compressor.decompress(str(tmp_path / "ours.safetensors")))
    assert theirs.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(theirs[name].reshape(value.shape), value), name
    written = compressor.compress(state)
    for part in PARTS:
        assert torch.equal(written[f"fc.{part}"], pack(state["fc.weight"], masks["fc.weight"])[part])
    safetensors.torch.save_file(
        {name: value.contiguous() for name, value in written.items()}, tmp_path / "theirs.safetensors"
    )
    ours = wf.load_weights(tmp_path / "theirs.safetensors")
    assert all(torch.equal(ours[name], value) for name, value in state.items())


WITHOUT = """
import builtins, sys
real = builtins.__import__
def refuse(name, *args, **kwargs):
    if name.split(".")[0] == "woodfisher":
        raise ImportError("woodfisher is not installed")
    return real(name, *args, **kwargs)
builtins.__import__ = refuse
import torch
from torch import nn
"""


def test_files_load_without_woodfisher(tmp_path):
    """The plain file by safetensors, the compressed one by the snippet of the documentation."""
    build = "nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(200, 30))"
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(200, 30))
    report = wf.prune(model, [], sparsity=0.9, criterion="magnitude")
    wf.save_weights(model, tmp_path / "model.safetensors", report.masks)
    wf.export.save_dense(model, tmp_path / "dense.safetensors")
    assert len(read(tmp_path / "model.safetensors").compressed) == 2
    np.savez(tmp_path / "expected.npz", *(p.detach().numpy() for p in model.parameters()))
    snippet = re.search(r"```python\n(import json.*?)```", DOCS.read_text(), re.DOTALL)[1]
    code = f"""
{WITHOUT}
{snippet}
from safetensors.torch import load_file
expected = np.load("expected.npz")
for state in (dense_weights("model.safetensors"), load_file("dense.safetensors")):
    model = {build}
    model.load_state_dict(state)
    for parameter, name in zip(model.parameters(), expected.files, strict=True):
        assert np.array_equal(parameter.detach().numpy(), expected[name])
assert "woodfisher" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_header_lists_only_what_the_parts_do_not_say(tmp_path):
    model, masks = pruned_net()
    wf.save_weights(model, tmp_path / "model.safetensors", masks)
    assert json.loads(read(tmp_path / "model.safetensors").metadata[COMPRESSED]) == {
        "conv": {"name": "conv.weight", "shape": [16, 8, 3, 3]},
        "table": {"name": "table", "shape": [30, 50]},
    }


def test_masks_in_any_memory_order_are_saved_and_tied_tensors_count_once(tmp_path):
    model = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False))
    model[0].weight = model[1].weight = nn.Parameter(torch.randn(40, 40).T)
    with torch.no_grad():
        model[0].weight[model[0].weight.abs() < 1] = 0
    wf.save_weights(model, tmp_path / "a.safetensors", {"0.weight": model[0].weight != 0})
    assert torch.equal(read(tmp_path / "a.safetensors").tensors["0.weight"], model[0].weight)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    assert sum(read(tmp_path / "a.pt").stored.values()) == 4 * 1600


def test_a_dtype_that_files_can_not_hold_is_named(tmp_path):
    model = nn.Linear(2, 2)
    model.register_buffer("phases", torch.zeros(2, dtype=torch.complex128))
    for save in (wf.save_weights, save_dense):
        with pytest.raises(wf.WoodfisherError, match=r"can't hold torch.complex128, which \['phases'\] has"):
            save(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


class Versioned(nn.Linear):
    """A layer whose state has more than tensors."""

    def get_extra_state(self):
        return 3

    def set_extra_state(self, state):
        pass


def test_what_is_no_tensor_is_left_out_with_a_warning(tmp_path):
    for save in (wf.save_weights, save_dense):
        with pytest.warns(wf.WoodfisherWarning, match="'_extra_state' is no tensor, and is not saved"):
            save(Versioned(2, 2), tmp_path / "model.safetensors")
        assert safetensors.torch.load_file(tmp_path / "model.safetensors").keys() == {"weight", "bias"}


def test_a_plain_file_has_tied_weights_whole_under_each_name(tmp_path):
    model = Tied()
    save_dense(model, tmp_path / "model.safetensors")
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["model.pt", "model"])
def test_files_are_written_under_the_name_that_they_are_read_by(name, tmp_path):
    for save in (wf.save_weights, save_export, save_dense):
        with pytest.raises(wf.WoodfisherError, match=f"a .safetensors file; .*{name}' came"):
            save(nn.Linear(2, 2), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("pattern", "name"), [(wf.Channels(), "channels"), (wf.NM(2, 4), "2:4")])
def test_patterns_of_weights_with_inputs_first_are_named(pattern, name, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(8, 6, 3), nn.Flatten(), nn.Linear(6 * 25, 3))
    wf.prune(model, None, sparsity=0.5, criterion="magnitude", pattern=pattern, params="0.weight")
    wf.save_weights(model, tmp_path / "model.safetensors")
    (entry,) = [
        each for each in contents_of(tmp_path / "model.safetensors").layers if each.name == "0.weight"
    ]
    assert name in entry.pattern and "input" not in entry.pattern
