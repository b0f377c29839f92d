"""Prune a Hugging Face transformer: in one call, and during fine-tuning with the Trainer.

    python examples/transformer.py            # a small BERT on sequences, trained here; some minutes
    python examples/transformer.py --small    # a tiny one, some seconds

Needs `pip install 'woodfisher[hf]'`; nothing is downloaded. The task: sequences of words in which two of four special
words occur, and the class is the pair, in its order. Which came first can't be told from the words alone, so that
attention has to work.
"""

from __future__ import annotations

import argparse
import copy
import tempfile

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

import woodfisher as wf
from woodfisher.integrations.hf import PruningCallback

WORDS, LENGTH, CLASSES = 32, 12, 12


class Pairs(Dataset):
    """Random words 4…31, with two different ones of 0…3 at random places."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.words = torch.randint(4, WORDS, (count, LENGTH), generator=generator)
        places = torch.rand(count, LENGTH, generator=generator).argsort(1)[:, :2].sort(1).values
        pairs = torch.tensor([(a, b) for a in range(4) for b in range(4) if a != b])
        self.labels = torch.randint(len(pairs), (count,), generator=generator)
        self.words.scatter_(1, places, pairs[self.labels])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.words[index], "labels": self.labels[index]}


def bert(small: bool) -> BertForSequenceClassification:
    """A BERT of two layers, from its configuration alone."""
    width = 16 if small else 32
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=width,
        num_hidden_layers=1 if small else 2,
        num_attention_heads=4,
        intermediate_size=4 * width,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        num_labels=CLASSES,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForSequenceClassification(config)


def fit(
    model: BertForSequenceClassification, train: Pairs, epochs: int, rate: float, *callbacks: PruningCallback
) -> None:
    """Train with Hugging Face's Trainer."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model, arguments, train_dataset=train, callbacks=list(callbacks))
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def accuracy(model: BertForSequenceClassification, test: Pairs) -> float:
    """Of the classes, in per cent."""
    model.eval()
    with torch.no_grad():
        predicted = model(input_ids=test.words).logits.argmax(1)
    return 100 * float((predicted == test.labels).double().mean())


def prune_in_training(
    model: BertForSequenceClassification,
    train: Pairs,
    sparsity: float,
    criterion: str,
    epochs: int,
    rate: float,
) -> wf.Pruner:
    """While it is trained on, step by step in the first half."""
    # --8<-- [start:callback]
    batches = DataLoader(train, batch_size=32, shuffle=True)
    objective = wf.Objective(model, batches, exclude="classifier")  # the model returns its own loss
    schedule = wf.Polynomial(0.5, sparsity, begin=0, end=epochs / 2, every=0.5).in_epochs(len(batches))
    pruner = wf.Pruner(model, objective, schedule, criterion=criterion)
    fit(model, train, epochs, rate, PruningCallback(pruner))
    # --8<-- [end:callback]
    return pruner


def main(arguments: list[str] | None = None) -> dict[tuple[str, str], tuple[float, float]]:
    """Print sparsity and test accuracy of both ways for two criteria."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a tiny model, few samples")
    parser.add_argument("--sparsity", type=float, default=0.8)
    chosen = parser.parse_args(arguments)
    train, test = Pairs(400 if chosen.small else 4000, seed=0), Pairs(1000, seed=1)
    epochs, rate = (2, 1e-2) if chosen.small else (20, 1e-3)
    dense = bert(chosen.small)
    torch.manual_seed(0)
    fit(dense, train, epochs, rate)
    print(f"dense test accuracy: {accuracy(dense, test):.2f} %")
    print(f"{'way':<14}{'criterion':<12}{'sparsity, %':>12}{'test accuracy, %':>18}")
    rows = {}
    for criterion in ("magnitude", "woodfisher"):
        model = copy.deepcopy(dense)
        # --8<-- [start:prune]
        batches = DataLoader(train, batch_size=32, shuffle=True)  # dicts, as the model takes them
        report = wf.prune(
            model, batches, sparsity=chosen.sparsity, floor=0.05, exclude="classifier", criterion=criterion
        )
        # --8<-- [end:prune]
        rows["at once", criterion] = (report.sparsity, accuracy(model, test))
        model = copy.deepcopy(dense)
        pruner = prune_in_training(model, train, chosen.sparsity, criterion, max(epochs // 4, 1), rate / 2)
        rows["in training", criterion] = (pruner.sparsity, accuracy(model, test))
    for (way, criterion), (sparsity, reached) in rows.items():
        print(f"{way:<14}{criterion:<12}{100 * sparsity:>12.2f}{reached:>18.2f}")
    return rows


if __name__ == "__main__":
    main()
