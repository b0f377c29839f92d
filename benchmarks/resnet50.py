"""ResNet-50 with random weights on random images of 64 x 64: `woodfisher prune --task benchmarks.resnet50:task`.

Its statistics of batch normalisation are those of the images, so that, as in a trained network, outputs are no larger
than inputs and no class is certain: time and memory are those of the trained network; what it loses is of no interest.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from woodfisher.tasks import Task

CLASSES = 1000


class Logits(nn.Module):
    """A network of Hugging Face as one that returns a tensor."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Images `(n, 3, 64, 64)` → logits `(n, 1000)`."""
        logits: Tensor = self.network(images).logits
        return logits


def task() -> Task:
    """The network with 25.5 million weights and 400 images."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(num_labels=CLASSES)  # type: ignore[call-arg]
    model = Logits(ResNetForImageClassification(config))
    images, labels = torch.randn(400, 3, 64, 64), torch.randint(CLASSES, (400,))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(images)
    model.eval()
    batches = list(zip(images.split(50), labels.split(50), strict=True))
    return Task("resnet50", model, batches, batches[:1], batches[:1], cross_entropy)
