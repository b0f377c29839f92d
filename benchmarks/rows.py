"""What per-sample gradient rows cost, against one batched backward pass over the same samples.

    python benchmarks/rows.py --json

Times are CPU seconds of one thread, the least of several runs that take turns. Weights and data are random: the cost
does not depend on them. Rows are taken into new memory, as large as they are, and into memory that is in use already:
the difference is what the system takes to hand it out. Beside them stand rows from passes in bfloat16, by torch.func
and by one backward pass a sample, and what the first rows of a case cost, with what is tried and imported for them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

import woodfisher as wf
from woodfisher.tasks.cifar import ResNet20

if TYPE_CHECKING:
    from collections.abc import Callable

SAMPLES = 32
TOKENS = 64
VOCABULARY = 1000


Case: TypeAlias = tuple[nn.Module, Tensor, int, str | list[str] | None]
"""A network, inputs, the number of classes, and which weights are chosen."""


def resnet20() -> Case:
    """ResNet-20 (270,896 weights) and images of CIFAR-10's shape, channels last as those of the task are."""
    images = torch.randn(SAMPLES, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    return ResNet20(), images, 10, None


class Sentences(nn.Module):
    """A BERT of Hugging Face that classifies: tokens `(n, 64)` → logits `(n, 2)`."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
        )
        self.network = BertForSequenceClassification(config)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.network(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        return logits


def bert(layers: int, width: int) -> Callable[[], Case]:
    """An encoder whose Linear weights are chosen, and sentences of 64 tokens."""
    return lambda: (Sentences(layers, width), torch.randint(VOCABULARY, (SAMPLES, TOKENS)), 2, None)


class Encoder(nn.Module):
    """Torch's own encoder layers and a linear one: sequences `(n, 64, width)` → logits `(n, 2)`."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(x).mean(1))
        return logits


def encoder(layers: int, width: int) -> Callable[[], Case]:
    """All matrices of an encoder, the packed ones of attention among them, and sequences of 64 vectors."""
    return lambda: (
        Encoder(layers, width),
        torch.randn(SAMPLES, TOKENS, width),
        2,
        ["*linear*.weight", "*proj*weight", "head.weight"],
    )


class Recurrent(nn.Module):
    """A recurrent layer and a linear one: sequences `(n, 64, width / 2)` → logits `(n, 2)`."""

    def __init__(self, kind: type[nn.GRU | nn.LSTM], width: int) -> None:
        super().__init__()
        self.layer = kind(width // 2, width, batch_first=True)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(x)[0][:, -1])
        return logits


def recurrent(kind: type[nn.GRU | nn.LSTM], width: int) -> Callable[[], Case]:
    """All weights of a recurrent layer and what follows, and sequences of 64 vectors."""
    return lambda: (Recurrent(kind, width), torch.randn(SAMPLES, TOKENS, width // 2), 2, "*weight*")


CASES = {
    "ResNet-20": resnet20,
    "BERT 2 x 128": bert(2, 128),
    "BERT 4 x 256": bert(4, 256),
    "BERT 4 x 512": bert(4, 512),
    "torch's encoder 2 x 128": encoder(2, 128),
    "GRU 64": recurrent(nn.GRU, 64),
    "GRU 256": recurrent(nn.GRU, 256),
    "LSTM 256": recurrent(nn.LSTM, 256),
}


def seconds(call: Callable[[], object]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def fails(what: str, call: Callable[[], object]) -> bool:
    """Whether torch can't do it with this network, or on this processor, which is told."""
    try:
        call()
    except (RuntimeError, wf.WoodfisherError) as error:
        print(f"{what}: {error}"[:160], file=sys.stderr)
        return True
    return False


def measure(name: str, repeats: int) -> dict[str, object]:
    """Times of one case; `…_ratio` are multiples of the batched backward pass."""
    torch.manual_seed(0)
    model, x, classes, params = CASES[name]()
    model.eval()
    y = torch.randint(classes, (SAMPLES,))
    objective = wf.Objective(model, [(x, y)], cross_entropy, params=params)
    rounded = wf.Objective(model, [(x, y)], cross_entropy, params=params, precision="bfloat16")

    def batched() -> None:
        model.zero_grad()
        cross_entropy(model(x), y).backward()

    def loop() -> None:
        for i in range(SAMPLES):
            model.zero_grad()
            cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()

    def vectorised() -> None:
        def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return cross_entropy(functional_call(model, weights, (x[None],)), y[None])

        weights = {name: p.detach() for name, p in objective.parameters.items()}
        vmap(grad(loss), in_dims=(None, 0, 0))(weights, x, y)

    buffer = torch.zeros(SAMPLES, objective.layout.size)
    ways = {
        "batched": batched,
        "rows": lambda: objective.rows(SAMPLES),
        "rows_to_buffer": lambda: objective.rows(SAMPLES, out=buffer),
        "rows_in_bfloat16": lambda: rounded.rows(SAMPLES),
        "loop": loop,
        "torch.func": vectorised,
    }
    first = seconds(ways["rows"])
    failing = [way for way in ("rows_in_bfloat16", "torch.func") if fails(f"{way}, {name}", ways[way])]
    ways = {way: call for way, call in ways.items() if way not in failing}
    times = {way: min(seconds(call) for _ in range(3)) for way, call in ways.items()}
    for _ in range(repeats):
        times = {way: min(times[way], seconds(ways[way])) for way in ways}
    rows = objective.rows(SAMPLES)
    batched()
    mean = torch.cat([p.grad.flatten() for p in objective.parameters.values() if p.grad is not None])
    error_of_mean = float((rows.mean(0) - mean).norm() / mean.norm())
    result: dict[str, object] = {
        "case": name,
        "weights": objective.layout.size,
        "samples": SAMPLES,
        **{f"{way}_seconds": value for way, value in times.items()},
        **{f"{way}_ratio": times[way] / times["batched"] for way in ways if way != "batched"},
        "first_rows_seconds": first,
        "error_of_mean": error_of_mean,
    }
    if "rows_in_bfloat16" in ways:
        result["error_of_bfloat16"] = float((rounded.rows(SAMPLES) - rows).norm() / rows.norm())
    return result


def main() -> None:
    """Measure all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for name in options.cases:
        results.append(each := measure(name, options.repeats))
        if not options.json:
            print(f"{name}, {each['weights']:,} weights, {SAMPLES} samples:")
            figures = {key: value for key, value in each.items() if isinstance(value, float)}
            print(*(f"  {key:23} {value:.4g}" for key, value in figures.items()), sep="\n", flush=True)
    if options.json:
        print(json.dumps({"torch": torch.__version__, "cases": results}, indent=1))


if __name__ == "__main__":
    main()
