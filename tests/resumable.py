"""A short run of `train` for child processes that get killed; imported before they are forked."""

import lightning.pytorch  # noqa: F401  what a forked child should not have to import
import sklearn.datasets  # noqa: F401
import torch

import woodfisher.integrations.lightning
import woodfisher.training.finetuning  # noqa: F401
from woodfisher import Polynomial, WoodFisher
from woodfisher.tasks import load_task
from woodfisher.training import Training, train


def run(weights, out, resume=False, ready=None):
    """Train digits for five epochs and prune it nine times; what came of it, of tensors and numbers alone."""
    torch.set_num_threads(1)
    task = load_task("digits", weights=weights)
    if ready is not None:
        ready.set()
    trained = train(
        task,
        Polynomial(0.3, 0.9, begin=0, end=4, every=0.5),
        Training(epochs=5, distil=0.3),
        curvature=WoodFisher(samples=60, block_size=None, damping=1e-3),
        seed=3,
        out=out,
        resume=resume,
    )
    return {
        "state": task.model.state_dict(),
        "masks": trained.masks,
        "best": trained.best.epoch,
        "epochs": [vars(epoch) for epoch in trained.epochs],
        "history": [(removal.step, removal.sparsity, removal.predicted) for removal in trained.history],
        "metrics": (out / "metrics.csv").read_text(),
    }


def reference(weights, out, ready, file):
    """Run to the end and write what came of it to `file`."""
    torch.save(run(weights, out, ready=ready), file)
