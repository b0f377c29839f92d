"""The command line: one module a command."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import tyro

from woodfisher._version import __version__
from woodfisher.cli.bench import BenchCommand
from woodfisher.cli.compare import Compare
from woodfisher.cli.console import make_streams_usable, note, results_apart, several
from woodfisher.cli.export import Export
from woodfisher.cli.inspect import Inspect
from woodfisher.cli.origin import remembered
from woodfisher.cli.plan import Plan
from woodfisher.cli.prune import Prune
from woodfisher.cli.report import MakePage
from woodfisher.cli.tour import Tour
from woodfisher.cli.train import Train
from woodfisher.errors import ElsewhereError, WoodfisherError, WoodfisherWarning

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DESCRIPTION = """\
Make a trained network much sparser at the least loss of accuracy, with second-order information.

  woodfisher prune                                          the embedded task, end to end, in a minute or two
  woodfisher prune --task my_project.tasks:resnet --sparsity 0.9 --out pruned
  woodfisher compare --sparsity 0.5 0.7 0.9 --methods magnitude,obd,woodfisher
  woodfisher train --task resnet20-cifar10 --sparsity 0.95 --epochs 30
  woodfisher plan --task my_project.tasks:resnet --criterion woodfisher-block --memory 4GiB
  woodfisher tour                                           the curvature of a small network, in pictures
  woodfisher report pruned                                  the page report.html anew, from report.json
  woodfisher inspect pruned/model.safetensors
  woodfisher export --to csr --measure --weights pruned/model.safetensors --task my_project.tasks:resnet
  woodfisher bench                                          how fast the inverse is on this machine

Results go to standard output, progress and warnings to standard error. Exit code 0 is success, 2 is bad input,
with one message that says what was expected, what came and what to do."""


COMMANDS: dict[str, Any] = {
    "prune": Prune,
    "compare": Compare,
    "train": Train,
    "plan": Plan,
    "tour": Tour,
    "report": MakePage,
    "inspect": Inspect,
    "export": Export,
    "bench": BenchCommand,
}


def main(args: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: the entry point of `woodfisher`."""
    make_streams_usable()
    args = sys.argv[1:] if args is None else list(args)
    try:
        if args == ["--version"]:
            sys.stdout.write(f"woodfisher {__version__}\n")
            sys.stdout.flush()
            return 0
        command = _parsed(args)
        with warnings.catch_warnings(), remembered(args), results_apart():
            warnings.simplefilter("always", WoodfisherWarning)
            warnings.showwarning = _shown_once()
            _check_alone(command)
            command.run()
    except WoodfisherError as error:
        if not isinstance(error, ElsewhereError) or os.environ.get("RANK", "0") == "0":
            note(f"woodfisher: {error}")
        return 2
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # who reads has enough
            note(f"woodfisher: {error}")
        with suppress(
            OSError, ValueError
        ):  # what is left for standard output would fail again as the process ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except KeyboardInterrupt as error:
        note(f"woodfisher: {error.args[0] if error.args else 'interrupted; no results were written'}")
        return 130
    return 0


def _parsed(args: list[str]) -> Any:
    """The command that is asked for; exits where that is help, once it is written."""
    try:
        return tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="woodfisher",
            description=DESCRIPTION,
            args=args,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        )
    finally:
        sys.stdout.flush()


def _check_alone(command: object) -> None:
    """Raise where `torchrun` starts several processes of a command that is for one."""
    if several() and not isinstance(command, Prune):
        raise ElsewhereError(
            "of the commands only `woodfisher prune` works in several processes together: run this one without "
            "torchrun."
        )


def _shown_once() -> Callable[..., None]:
    """What shows a warning as one line, the same one once."""
    shown: set[str] = set()

    def show(message: Warning | str, *_details: object) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            note(f"warning: {message}")

    return show
