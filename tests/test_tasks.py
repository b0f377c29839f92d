"""Built-in tasks: names, formats, splits, loaders and weights."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import random
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from woodfisher.errors import WoodfisherError, WoodfisherWarning
from woodfisher.saving.saved import save_weights
from woodfisher.tasks import Task, accuracy, load_task, task_names
from woodfisher.tasks.cifar import ResNet20, read_cifar10
from woodfisher.tasks.digits import EPOCHS, PEAK_RATE, DigitsNet, _states, read_digits
from woodfisher.tasks.files import read_npz
from woodfisher.tasks.images import EncodedImages
from woodfisher.tasks.loaders import hold_out
from woodfisher.tasks.mnist import MLPNet, read_mnist
from woodfisher.tasks.weights import load_into

PIL = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn.datasets")
RNG = np.random.default_rng(0)
LABELS = np.tile(np.arange(10), 3).astype(np.uint8)
GREYS = RNG.integers(0, 256, (30, 28, 28), dtype=np.uint8)
COLOURS = RNG.integers(0, 256, (30, 3, 32, 32), dtype=np.uint8)


def refused(*words):
    """The error of the library, with all these words (plain text, in any order) in its message."""
    return pytest.raises(
        WoodfisherError, match="(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words)
    )


def encoded(pixels, kind="PNG"):
    """An image file's bytes from `3 × height × width` bytes."""
    file = io.BytesIO()
    PIL.fromarray(pixels.transpose(1, 2, 0)).save(file, kind)
    return file.getvalue()


def everything(data):
    """All images and labels of a `LabelledImages`."""
    return data.images[np.arange(len(data.labels))], data.labels


# Names


def test_names_of_built_in_tasks():
    assert task_names() == ["digits", "digits-small", "mlpnet-mnist", "resnet20-cifar10"]


def test_importing_the_package_imports_neither_sklearn_nor_pillow():
    code = "import sys, woodfisher.tasks; print([m for m in ('sklearn', 'PIL') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


OWN_TASKS = """
import torch
from woodfisher.tasks import Task, accuracy

seen = {}

def plain():
    return Task("plain", torch.nn.Linear(1, 1), [], [], [], None, accuracy)

def some(seed, weights=None):
    seen.update(seed=seed, weights=weights)
    return plain()

def every(**options):
    seen.update(options)
    return plain()

def demanding(width):
    return plain()

def wrong():
    return 3

number = 4
"""


@pytest.fixture
def own_tasks(tmp_path, monkeypatch):
    """The name of a module in the working directory, with tasks of the user's own."""
    name = f"own_tasks_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(OWN_TASKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WOODFISHER_DATA", raising=False)
    yield name
    sys.modules.pop(name, None)


def test_own_task_gets_the_options_it_declares(own_tasks, tmp_path, monkeypatch):
    path = list(sys.path)
    assert load_task(f"{own_tasks}:plain", seed=3).name == "plain"
    seen = sys.modules[own_tasks].seen
    with pytest.warns(
        WoodfisherWarning, match=r"some reads no data files of a folder, so data_root='.+' changes"
    ):
        load_task(f"{own_tasks}:some", seed=5, data_root=tmp_path)
    assert seen == {"seed": 5, "weights": None}
    load_task(f"{own_tasks}:every", weights=tmp_path / "w.pt")
    assert seen == {"seed": 0, "weights": tmp_path / "w.pt", "data_root": None}
    monkeypatch.setenv("WOODFISHER_DATA", str(tmp_path))
    load_task(f"{own_tasks}:every")
    assert seen["data_root"] == tmp_path
    load_task(f"{own_tasks}:some")
    assert sys.path == path


def test_weights_go_into_an_own_task_that_does_not_declare_them(own_tasks, tmp_path):
    trained = torch.nn.Linear(1, 1)
    save_weights(trained, tmp_path / "w.safetensors")
    task = load_task(f"{own_tasks}:plain", weights=tmp_path / "w.safetensors")
    assert torch.equal(task.model.weight, trained.weight)
    with refused("none.safetensors"):
        load_task(f"{own_tasks}:plain", weights=tmp_path / "none.safetensors")
    save_weights(torch.nn.Linear(2, 1), tmp_path / "other.safetensors")
    with refused("does not fit Linear"):
        load_task(f"{own_tasks}:plain", weights=tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("demanding", ["width", "data_root, weights and seed"]),
        ("wrong", ["must return", "Task", "int came"]),
        ("number", ["function", "has a int"]),
        ("absent", ["function", "no such name"]),
        ("two words", ["module:function"]),
    ],
)
def test_own_task_that_does_not_fit_is_refused(own_tasks, function, words):
    path = list(sys.path)
    with refused(own_tasks, *words):
        load_task(f"{own_tasks}:{function}")
    assert sys.path == path


@pytest.mark.parametrize("name", ["", "mnist", "a.b", ":f", ".relative:f", "no_such_module_here:f", "x:"])
def test_unknown_task_lists_the_built_in_ones(name):
    with refused("digits, digits-small, mlpnet-mnist, resnet20-cifar10", "module:function"):
        load_task(name)


@pytest.mark.parametrize(
    ("name", "source"),
    [("mlpnet-mnist", "MNIST's four IDX files"), ("resnet20-cifar10", "cifar-10-python.tar.gz")],
)
def test_missing_data_is_explained(name, source, tmp_path, monkeypatch):
    monkeypatch.delenv("WOODFISHER_DATA", raising=False)
    with refused(source, "no data folder was given", "WOODFISHER_DATA"):
        load_task(name)
    with refused(source, "is not a folder"):
        load_task(name, data_root=tmp_path / "absent")
    with refused("--weights", str(tmp_path)):
        load_task(name, data_root=tmp_path)
    reader = read_mnist if name == "mlpnet-mnist" else read_cifar10
    with refused(source, str(tmp_path)):
        reader(tmp_path)


# The digits


def test_digits_task_is_good_repeatable_and_leaves_no_trace():
    torch.manual_seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    threads = torch.get_num_threads()
    with torch.no_grad():
        task = load_task("digits")
        (first,) = _states(DigitsNet, (EPOCHS,), PEAK_RATE)
        _states.cache_clear()
        (second,) = _states(DigitsNet, (EPOCHS,), PEAK_RATE)
    for batches in (task.train, task.validation, task.test):
        inputs, targets = next(iter(batches))
        assert inputs.dtype == torch.float32
        assert targets.dtype == torch.int64
        assert inputs.shape == (len(targets), 1, 8, 8)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert torch.get_num_threads() == threads
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert accuracy(task.model, task.test) >= 97
    assert not task.model.training
    assert all(parameter.requires_grad for parameter in task.model.parameters())


def test_digits_tasks_share_no_weights():
    one, other = load_task("digits"), load_task("digits")
    with torch.no_grad():
        one.model.fc2.weight.zero_()
    assert other.model.fc2.weight.abs().sum() > 0
    assert load_task("digits").model.fc2.weight.abs().sum() > 0


def test_digits_are_split_60_15_25_in_every_class():
    parts = read_digits()
    counts = np.array([np.bincount(part.tensors[1], minlength=10) for part in parts])
    assert counts.sum() == 1797
    fractions = counts / counts.sum(axis=0)
    assert np.abs(fractions - np.array([[0.60], [0.15], [0.25]])).max() < 0.01
    train = parts[0].tensors[0]
    assert train.mean().abs() < 1e-5
    assert train.var(correction=0) == pytest.approx(1, abs=1e-4)


def test_digits_with_given_weights(tmp_path):
    network = DigitsNet()
    torch.save(network.state_dict(), tmp_path / "digits.pt")
    task = load_task("digits", weights=tmp_path / "digits.pt")
    assert torch.equal(task.model.conv2.weight, network.conv2.weight)


def test_without_sklearn_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with refused("pip install 'woodfisher[tasks]'", "scikit-learn"):
        load_task("digits")


def test_without_pillow_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with refused("pip install 'woodfisher[tasks]'", "Pillow"):
        EncodedImages([], "images")


# Splits and loaders


def test_same_seed_same_training_batches():
    def epochs(seed):
        task = load_task("digits", seed=seed)
        return [torch.cat([targets for _, targets in task.train]) for _ in range(2)]

    first, again, other = epochs(0), epochs(0), epochs(1)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert not torch.equal(*first)
    assert not torch.equal(first[0], other[0])
    assert torch.equal(first[0].sort().values, other[0].sort().values)


def test_evaluation_batches_come_in_the_same_order():
    task = load_task("digits", seed=7)
    for batches, part in ((task.validation, 1), (task.test, 2)):
        inputs = torch.cat([inputs for inputs, _ in batches])
        assert torch.equal(inputs, read_digits()[part].tensors[0])


def test_hold_out_is_balanced_and_spread_over_each_class():
    labels = np.repeat([0, 1, 3], [40, 25, 33])
    train, validation = hold_out(labels, per_class=500)
    assert validation.tolist() == [0, 20, 40, 52, 65, 81]
    assert sorted([*train, *validation]) == list(range(98))
    assert np.bincount(labels[hold_out(labels, per_class=1)[1]]).tolist() == [1, 1, 0, 1]
    assert hold_out(np.array([0, 0, 1, 1]))[1].tolist() == [0, 2]
    with refused("two images of each class", "class 1 has 1"):
        hold_out(np.array([0, 0, 1]))


# MNIST


def idx(values):
    sizes = np.array(values.shape, ">u4").tobytes()
    return bytes((0, 0, 8, values.ndim)) + sizes + values.tobytes()


def write_mnist(folder, separator="-", compress=False):
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        for kind, values in (("images", GREYS), ("labels", LABELS)):
            name = f"{part}-{kind}{separator}idx{values.ndim}-ubyte"
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(values)))
            else:
                (folder / name).write_bytes(idx(values))


@pytest.mark.parametrize("place", [".", "MNIST/raw"])
@pytest.mark.parametrize("separator", ["-", "."])
@pytest.mark.parametrize("compress", [False, True])
def test_mnist_idx_files(tmp_path, place, separator, compress):
    write_mnist(tmp_path / place, separator, compress)
    for part in read_mnist(tmp_path):
        images, labels = everything(part)
        np.testing.assert_array_equal(images, GREYS[:, None])
        np.testing.assert_array_equal(labels, LABELS)


def mnist_arrays(**changes):
    usual = {"train_images": GREYS, "train_labels": LABELS, "test_images": GREYS, "test_labels": LABELS}
    return {key: value for key, value in {**usual, **changes}.items() if value is not None}


def test_mnist_archive_task(tmp_path):
    np.savez(tmp_path / "mnist.npz", **mnist_arrays())
    network = MLPNet()
    torch.save(network.state_dict(), tmp_path / "mlpnet_mnist.pt")
    state = torch.get_rng_state()
    task = load_task("mlpnet-mnist", data_root=tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    ((inputs, targets),) = task.test
    assert isinstance(task, Task)
    assert inputs.dtype == torch.float32
    assert targets.tolist() == LABELS.tolist()
    expected = (torch.from_numpy(GREYS[:, None]) / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(inputs, expected)
    assert sum(len(targets) for _, targets in task.train) == 20
    assert sum(len(targets) for _, targets in task.validation) == 10
    torch.testing.assert_close(
        task.loss(task.model(inputs), targets), -task.model(inputs)[range(30), targets].mean()
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"test_labels": None}, ["lacks test_labels"]),
        ({"train_images": GREYS[:, :14]}, ["N × 28 × 28", "(30, 14, 28)"]),
        ({"train_images": GREYS.astype(np.float32)}, ["bytes", "float32"]),
        ({"train_labels": LABELS[:-1]}, ["one label for each", "30 images", "(29,)"]),
        ({"train_labels": LABELS + np.uint8(1)}, ["from 0 to 9", "1 to 10"]),
        ({"train_labels": LABELS.astype(np.float32)}, ["whole numbers", "float32"]),
        ({"train_labels": LABELS.astype("U1")}, ["whole numbers", "<U1"]),
        ({"train_images": GREYS[:0], "train_labels": LABELS[:0]}, ["0 images"]),
        ({"train_labels": np.array([{}] * 30, object)}, ["cannot be read", "pickle"]),
    ],
)
def test_malformed_mnist_archive_is_refused(tmp_path, changes, words):
    np.savez(tmp_path / "mnist.npz", **mnist_arrays(**changes))
    with refused("mnist.npz", *words):
        read_mnist(tmp_path)


@pytest.mark.parametrize("size", [0, 10, 2000, -30])
def test_truncated_archive_is_refused(tmp_path, size):
    file = io.BytesIO()
    np.savez(file, **mnist_arrays())
    (tmp_path / "mnist.npz").write_bytes(file.getvalue()[:size])
    with refused("mnist.npz", "cannot be read", "fetch the file again"):
        read_mnist(tmp_path)


def test_archive_with_foreign_members_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "mnist.npz", "w") as archive:
        for key in mnist_arrays():
            archive.writestr(key, "text")
    with refused("mnist.npz", "bytes of shape"):
        read_mnist(tmp_path)
    with refused("absent.npz", "cannot be read"):
        read_npz(tmp_path / "absent.npz", ["x"])


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    "change", [lambda raw: raw[:6], lambda raw: raw[:-5], lambda raw: b"", lambda raw: b"no" + raw]
)
def test_malformed_idx_file_is_refused(tmp_path, compress, change):
    write_mnist(tmp_path, compress=compress)
    path = tmp_path / f"train-images-idx3-ubyte{'.gz' if compress else ''}"
    path.write_bytes(change(path.read_bytes()))
    with refused(path.name, "cannot be read as an IDX file"):
        read_mnist(tmp_path)


def test_missing_idx_file_is_named(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with refused("t10k-labels-idx1-ubyte", str(tmp_path)):
        read_mnist(tmp_path)


def test_mlpnet_takes_images_in_three_shapes():
    network, images = MLPNet(), torch.randn(5, 1, 28, 28)
    outputs = network(images)
    torch.testing.assert_close(network(images[:, 0]), outputs)
    torch.testing.assert_close(network(images.flatten(1)), outputs)
    torch.testing.assert_close(outputs.exp().sum(dim=1), torch.ones(5))
    assert sum(parameter.numel() for parameter in network.parameters()) == 784 * 40 + 40 * 20 + 20 * 10


# CIFAR-10


def write_batches(folder, key=str.encode, protocol=2, **changes):
    """Six batches; the first 25 images for training, five to a batch, the others for the test."""
    folder.mkdir(exist_ok=True)
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    for position, name in enumerate(names):
        rows = slice(5 * position, 5 * position + 5)
        content = {
            "batch_label": name,
            "labels": LABELS[rows].tolist(),
            "data": COLOURS[rows].reshape(5, -1),
            "filenames": [f"{row}.png" for row in range(5)],
        }
        content = {key(field): value for field, value in {**content, **changes}.items()}
        (folder / name).write_bytes(pickle.dumps(content, protocol))


@pytest.mark.parametrize("place", [".", "cifar-10-batches-py"])
@pytest.mark.parametrize("key", [str, str.encode])
@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar_python_batches(tmp_path, place, key, protocol):
    write_batches(tmp_path / place, key, protocol)
    train, test = (everything(part) for part in read_cifar10(tmp_path))
    np.testing.assert_array_equal(train[0], COLOURS[:25])
    np.testing.assert_array_equal(train[1], LABELS[:25])
    np.testing.assert_array_equal(test[0], COLOURS[25:])


def test_cifar_batch_as_python_2_wrote_it(tmp_path):
    """Byte strings where Python 3 writes text, and an array in column order."""
    write_batches(tmp_path)
    parts = [
        b"\x80\x02}(U\x06labels](K\x03K\x04e",
        b"U\x04datacnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR",
        b"(K\x01K\x02M\x00\x0c\x86",
        b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
        b"\x88T\x00\x18\x00\x00" + COLOURS[:2].reshape(2, -1).tobytes("F"),
        b"tbu.",
    ]
    (tmp_path / "test_batch").write_bytes(b"".join(parts))
    images, labels = everything(read_cifar10(tmp_path)[1])
    np.testing.assert_array_equal(images, COLOURS[:2])
    assert labels.tolist() == [3, 4]


class Malicious:
    """A pickle of this writes a file as soon as it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (exec, (f"open({str(self.path)!r}, 'w').close()",))


def test_malicious_pickle_is_refused_and_not_executed(tmp_path):
    write_batches(tmp_path, filenames=Malicious(tmp_path / "executed"))
    with pytest.raises(WoodfisherError, match=r"data_batch_1.*exec.*refused"):
        read_cifar10(tmp_path)
    assert not (tmp_path / "executed").exists()
    pickle.loads((tmp_path / "data_batch_1").read_bytes())
    assert (tmp_path / "executed").exists(), "the pickle would have been harmless, and the test void"


@pytest.mark.parametrize(
    "call",
    [
        b"cnumpy\nload\n",
        b"cos\nsystem\n",
        b"cnumpy.core.multiarray\nscalar\n",
        b"c_codecs\ndecode\n",
        b"cbuiltins\ngetattr\n",
    ],
)
def test_no_other_name_is_admitted_in_a_pickle(tmp_path, call):
    write_batches(tmp_path)
    (tmp_path / "data_batch_2").write_bytes(b"\x80\x02" + call + b"U\x01x\x85R.")
    with refused("data_batch_2", "refused"):
        read_cifar10(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": COLOURS[:5].reshape(5, -1)[:, :100]}, ["N × 3072", "(5, 100)"]),
        ({"data": COLOURS[:5].reshape(5, -1).astype(np.float32)}, ["f4", "u1"]),
        ({"data": [1, 2]}, ["N × 3072"]),
        ({"labels": [0, 1, 2, 3]}, ["one label for each", "5 images"]),
        ({"labels": [0, 1, 2, 3, 10]}, ["from 0 to 9", "0 to 10"]),
        ({"labels": [0, 1, 2, 3, 10**30]}, ["from 0 to 9", "object"]),
        ({"labels": [[0], [1, 2]]}, ["no list of whole numbers"]),
    ],
)
def test_malformed_cifar_batch_is_refused(tmp_path, changes, words):
    write_batches(tmp_path, **changes)
    with refused("data_batch_1", *words):
        read_cifar10(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"text", pickle.dumps([1, 2]), None])
def test_truncated_foreign_or_missing_cifar_batch_is_refused(tmp_path, content):
    write_batches(tmp_path)
    path = tmp_path / "data_batch_4"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40] if content is None else content)
    with refused("data_batch_4", "python version of CIFAR-10"):
        read_cifar10(tmp_path)
    path.unlink()
    with refused("data_batch_4", "FileNotFoundError"):
        read_cifar10(tmp_path)


def write_image_folder(root):
    for part in ("train", "test"):
        for position, (image, label) in enumerate(zip(COLOURS, LABELS, strict=True)):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{position:02d}.png").write_bytes(encoded(image))
    (root / "train" / "notes.txt").write_text("not a class")
    (root / "train" / "class3" / "notes.txt").write_text("not an image")


def test_image_folder(tmp_path):
    write_image_folder(tmp_path)
    by_class = np.argsort(LABELS, kind="stable")
    for part in read_cifar10(tmp_path):
        images, labels = everything(part)
        np.testing.assert_array_equal(labels, LABELS[by_class])
        np.testing.assert_array_equal(images, COLOURS[by_class])


def test_image_folder_that_does_not_fit_is_refused(tmp_path):
    write_image_folder(tmp_path)
    small = tmp_path / "train" / "class0" / "00.png"
    small.write_bytes(encoded(COLOURS[0, :, :16]))
    train, test = read_cifar10(tmp_path)
    with refused(str(small), "32 × 32", "32 × 16"):
        train.images[np.array([0])]
    small.write_bytes(encoded(COLOURS[0])[:60])
    with refused(str(small), "cannot be decoded"):
        train.images[np.array([0])]
    assert test.images[np.array([0, 1])].shape == (2, 3, 32, 32)
    (tmp_path / "test" / "class9").rename(tmp_path / "test" / "extra")
    with refused("same 10 folders", "extra"):
        read_cifar10(tmp_path)


def jpeg_arrays(part, **changes):
    files = [encoded(image, "JPEG") for image in COLOURS]
    usual = {
        "jpeg": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
        "labels": LABELS,
    }
    return {f"{part}_{key}": value for key, value in {**usual, **changes}.items()}


def test_jpeg_archive_is_decoded_when_asked_for(tmp_path, monkeypatch):
    np.savez(tmp_path / "cifar10_jpeg.npz", **jpeg_arrays("train"), **jpeg_arrays("test"))
    torch.save(ResNet20().state_dict(), tmp_path / "resnet20_cifar10_jpeg.pt")
    decoded = []
    original = EncodedImages._decoded
    monkeypatch.setattr(EncodedImages, "_decoded", lambda self, i: decoded.append(i) or original(self, i))
    monkeypatch.setattr("woodfisher.tasks.loaders.TRAIN_BATCH", 4)
    task = load_task("resnet20-cifar10", data_root=tmp_path)
    assert decoded == []
    inputs, targets = next(iter(task.train))
    assert len(decoded) == 4
    assert targets.tolist() == LABELS[decoded].tolist()
    expected = np.asarray(PIL.open(io.BytesIO(encoded(COLOURS[decoded[0]], "JPEG")))).transpose(2, 0, 1)
    torch.testing.assert_close(inputs[0], (torch.from_numpy(expected.copy()) / 255 - 0.5) / 0.5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"offsets": np.arange(31)}, ["rise from 0"]),
        ({"offsets": np.arange(0)}, ["rise from 0"]),
        ({"offsets": np.arange(31.0)}, ["whole numbers", "float64"]),
        ({"labels": LABELS[:4]}, ["one label for each"]),
    ],
)
def test_malformed_jpeg_archive_is_refused(tmp_path, changes, words):
    np.savez(tmp_path / "cifar10_jpeg.npz", **jpeg_arrays("train"), **jpeg_arrays("test", **changes))
    with refused("cifar10_jpeg.npz", *words):
        read_cifar10(tmp_path)


def test_damaged_jpeg_is_named(tmp_path):
    damaged = jpeg_arrays("train")
    damaged["train_jpeg"] = np.zeros_like(damaged["train_jpeg"])
    np.savez(tmp_path / "cifar10_jpeg.npz", **damaged, **jpeg_arrays("test"))
    with refused("image 7 of train_jpeg", "cannot be decoded"):
        read_cifar10(tmp_path)[0].images[np.array([7])]


@pytest.mark.parametrize(
    ("network", "shape"), [(ResNet20, (3, 32, 32)), (MLPNet, (784,)), (DigitsNet, (1, 8, 8))]
)
def test_networks_have_gradients_for_each_sample(network, shape):
    model = network().eval()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    inputs, targets = torch.randn(2, *shape), torch.tensor([1, 2])

    def loss(weights, image, target):
        return cross_entropy(functional_call(model, weights, (image[None],)), target[None])

    rows = vmap(grad(loss), (None, 0, 0))(weights, inputs, targets)
    cross_entropy(model(inputs), targets).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(rows[name].mean(dim=0), parameter.grad, rtol=1e-3, atol=1e-5)


# Weights


def small_network():
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def wrapped(key):
    return lambda state: {"epoch": 3, key: state}


@pytest.mark.parametrize(
    "form",
    [
        lambda state: state,
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {**state, "0.weight_mask": state["0.weight"] > 0},
        lambda state: {
            name: value.double() if value.is_floating_point() else value for name, value in state.items()
        },
        wrapped("state_dict"),
        wrapped("model_state_dict"),
        wrapped("model"),
        lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
    ],
)
def test_weights_in_every_accepted_form(tmp_path, form):
    source, model = small_network(), small_network()
    torch.save(form(source.state_dict()), tmp_path / "weights.pt")
    load_into(model, tmp_path / "weights.pt")
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_safetensors_with_masks(tmp_path):
    source, model = small_network(), small_network()
    state = source.state_dict()
    state["0.weight_mask"] = state["0.weight"] > 0
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    load_into(model, tmp_path / "weights.safetensors")
    assert torch.equal(model[0].weight, source[0].weight)


def test_masks_that_the_model_has_itself_are_loaded(tmp_path):
    source, model = nn.Linear(3, 2), nn.Linear(3, 2)
    for each, mask in ((source, [True, False]), (model, [True, True])):
        each.register_buffer("bias_mask", torch.tensor(mask))
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    load_into(model, tmp_path / "weights.pt")
    assert model.bias_mask.tolist() == [True, False]


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


def changed(name, change):
    return lambda state: {**state, name: change(state[name])}


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (without("0.bias"), ["0.bias missing"]),
        (lambda state: {"0.weight": state["0.weight"]}, ["0.bias", "and 2 more missing"]),
        (lambda state: {}, ["it holds no tensor"]),
        (lambda state: {**state, "2.bias": torch.ones(2)}, ["2.bias unexpected"]),
        (lambda state: {**state, "0.weight_mask": torch.ones(2, 3)}, ["0.weight_mask unexpected"]),
        (lambda state: {**state, "other_mask": torch.ones(2) > 0}, ["other_mask unexpected"]),
        (changed("0.weight", lambda value: value.T.contiguous()), ["0.weight", "(2, 3)", "(3, 2) came"]),
        (changed("0.weight", lambda value: value.int()), ["0.weight", "torch.float32", "torch.int32 came"]),
        (changed("1.running_var", lambda value: value / 0), ["1.running_var", "not finite"]),
        (changed("0.bias", lambda value: value.double() * 1e300), ["0.bias", "not finite"]),
        (changed("0.bias", lambda value: 3), ["0.bias", "no dense tensor"]),
        (changed("0.weight", lambda value: value.to_sparse()), ["0.weight", "no dense tensor"]),
        (lambda state: list(state.values()), ["state dict", "list came"]),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_nothing_changes(tmp_path, form, words):
    model = small_network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save(form(small_network().state_dict()), tmp_path / "weights.pt")
    with refused("weights.pt", *words):
        load_into(model, tmp_path / "weights.pt")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_missing_truncated_and_foreign_weight_files_are_refused(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    with refused(path.name, "no such file"):
        load_into(small_network(), path)
    save = torch.save if suffix == ".pt" else safetensors.torch.save_file
    save(small_network().state_dict(), path)
    whole = path.read_bytes()
    for content in (
        b"",
        b"text",
        whole[: len(whole) // 2],
        pickle.dumps(Malicious(tmp_path / "executed"), 2),
    ):
        path.write_bytes(content)
        with refused(path.name, "cannot be read as network weights"):
            load_into(small_network(), path)
    assert not (tmp_path / "executed").exists()


def test_a_whole_pickled_model_is_refused(tmp_path):
    torch.save(small_network(), tmp_path / "model.pt")
    with refused("model.pt", "state dict"):
        load_into(small_network(), tmp_path / "model.pt")


# The real data


@pytest.mark.data
def test_mlpnet_mnist_accuracy(data_root):
    task = load_task("mlpnet-mnist", data_root=data_root)
    assert accuracy(task.model, task.test) == pytest.approx(93.97, abs=1e-9)
    assert len(task.train.dataset) == 55000
    targets = torch.cat([targets for _, targets in task.validation])
    assert targets.bincount().tolist() == [500] * 10


def test_a_metric_goes_by_its_own_name():
    def r_squared(model, batches):
        return 1.0

    def named(*given, **parts):
        return Task("plain", torch.nn.Linear(1, 1), [], [], [], None, *given, **parts).metric_name

    assert named() == named(accuracy) == "accuracy, %"
    assert named(r_squared) == "r_squared"
    assert named(r_squared, metric_name="R²") == "R²"


def test_accuracy_leaves_out_what_is_ignored_and_refuses_what_it_does_not_know():
    x, y = torch.eye(3).repeat(2, 1, 1), torch.tensor([[0, -100, 2], [-100, 1, 0]])
    assert accuracy(_Same(), [(x, y)]) == 75.0
    wide = torch.eye(200)[[156, 3]]
    assert accuracy(_Same(), [(wide, torch.tensor([156, 4], dtype=torch.uint8))]) == 50.0
    for inputs, targets in (
        (x, y + 0.5),
        (x, y[..., None]),
        (x[..., :1, 0], y[:, 0, None]),
        ({"x": x}, y),
        (x, [0]),
    ):
        with pytest.raises(WoodfisherError, match="Give the task a metric of its own"):
            accuracy(_Same(), [(inputs, targets)])


def test_a_task_without_test_data_says_so():
    task = Task("few", _Same(), [], [], None, cross_entropy, metric=lambda model, data: torch.tensor(0.5))
    assert task.validate(task.model) == 0.5
    with pytest.raises(WoodfisherError, match="the task few has no test data"):
        task.evaluate(task.model)


class _Same(nn.Module):
    """Returns what it is given."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.scale


@pytest.mark.data
def test_resnet20_cifar10_state_dict_and_accuracy(data_root):
    """On every twentieth test image, to be quick; all of them give 88.23 %."""
    task = load_task("resnet20-cifar10", data_root=data_root)
    saved = torch.load(data_root / "resnet20_cifar10_jpeg.pt", weights_only=True)
    assert list(task.model.state_dict()) == list(saved)
    some = task.test.dataset[list(range(0, 10000, 20))]
    assert accuracy(task.model, [some]) == pytest.approx(86.8, abs=0.5)
