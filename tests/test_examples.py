"""The scripts in examples/, as far as they run without data and in some seconds."""

import importlib.util
from pathlib import Path

import pytest
import torch

from woodfisher.tasks import load_task

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """Examples import each other, as they can where they are run as scripts."""
    monkeypatch.syspath_prepend(str(EXAMPLES))


def run_small(name):
    """What `main` of an example returns with `--small`."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.random.fork_rng():
        return module.main(["--small"])


def test_every_example_is_run():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested


def test_my_task(monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    task = load_task("examples.my_task:digits_mlp")
    assert task.evaluate(task.model) > 90


def test_mnist(capsys):
    rows = run_small("mnist")
    assert rows["woodfisher"][-1] > rows["magnitude"][-1] + 10
    assert "digits-mlp: dense test accuracy 9" in capsys.readouterr().out


def test_cifar_resnet(capsys):
    rows = run_small("cifar_resnet")
    for sparsity, reached in rows.values():
        assert sparsity == pytest.approx(0.9, abs=1e-3)
        assert reached > 90
    assert capsys.readouterr().out.count("removed") == 14


def test_transformer():
    pytest.importorskip("transformers")
    rows = run_small("transformer")
    assert set(rows) == {(way, c) for way in ("at once", "in training") for c in ("magnitude", "woodfisher")}
    assert [sparsity for sparsity, _ in rows.values()] == pytest.approx([0.8] * 4, abs=1e-3)


def test_lightning_module():
    pytest.importorskip("lightning")
    sparsity, reached = run_small("lightning_module")
    assert sparsity == pytest.approx(0.9, abs=1e-3)
    assert reached > 60


def test_influence():
    results = run_small("influence")
    convex = results["logistic regression"]
    for correlation, share in convex["trained on from the minimum", "exact Hessian"][::2]:  # single samples
        assert correlation > 0.95
        assert 0.5 < share < 1
    (correlation, _), *_ = convex["trained on from the minimum", "none (inner product of gradients)"]
    assert correlation < 0.5
    assert {how for how, _ in results["network"]} == {
        "trained on from the minimum",
        "trained again from the start",
    }
