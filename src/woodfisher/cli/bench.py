"""`woodfisher bench`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from rich.box import SIMPLE_HEAD
from rich.table import Table
from tyro.conf import arg

from woodfisher.bench.measure import DEFAULT_CASES, Grid, run_bench
from woodfisher.cli.console import out, print_json, progress
from woodfisher.cli.options import Count, Folder, usable_device
from woodfisher.files import check_folder, save_json, write_folder
from woodfisher.memory import format_bytes
from woodfisher.results.numbers import significant
from woodfisher.results.plots import plot_roofline, require_plots

if TYPE_CHECKING:
    from collections.abc import Sequence

    from woodfisher.bench.measure import Bench, Case, Measurement
    from woodfisher.bench.spread import Spread

Counts = Annotated[tuple[int, ...], arg(metavar="N [N ...]", help_behavior_hint="")]


@dataclass(frozen=True)
class BenchCommand:
    """Time the factor-and-score phase on random gradients: curvature from rows, then its diagonal.

    Tells seconds, counted GFLOP/s (3·N²·d where N < B, else 2·N·B·d + ⅔·B²·d), the fraction of the rate of a float32
    matrix product that is measured before and after each repetition, peak memory, errors against float64, and how many
    times longer the recursions take that the factorisation replaces. Without sizes it runs a small grid that fits two
    minutes on two cores; with sizes, every combination of them. Other programs on the machine falsify it.

    With --out, writes OUT/bench.json and OUT/roofline.png.
    """

    rows: Counts = ()
    """Gradient rows N (default, where another size is given: 400)."""

    block_size: Counts = ()
    """Most weights B in a block (default likewise: 2000)."""

    weights: Counts = ()
    """Weights d (default likewise: 1000000)."""

    damping: float = 1e-5
    """λ; the random gradients have the standard deviation 0.01."""

    repetitions: int = 3
    """Times that each size is measured, with the machine's rates and the peers between."""

    peers: Annotated[bool, arg(help_behavior_hint="")] = True
    """Leave out the recursions."""

    peer_seconds: float = 1.0
    """Seconds for a peer in a repetition; where all its blocks take longer, fewer are timed and the time is scaled."""

    peer_blocks: Count = None
    """Blocks that a peer takes at a time (default: as many as stay in a cache)."""

    threads: Count = None
    """Threads of torch (default: its own choice)."""

    device: str = "cpu"
    """Where to compute: cpu, cuda or cuda:N."""

    out: Folder = None
    """Folder for the results; files there are replaced."""

    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""

    def run(self) -> None:
        """Check everything, measure, write, show."""
        grid = Grid(
            self._cases(), self.damping, self.repetitions, self.peers, self.peer_seconds, self.peer_blocks
        )
        device = usable_device(self.device)
        if self.out is not None:
            check_folder(self.out)
            require_plots()
        with progress("measuring", "cases") as show:
            bench = run_bench(grid, device, self.threads, show)
        content = bench.to_dict()
        if self.out is not None:
            write_folder(
                self.out,
                {"bench.json": lambda path: save_json(content, path)},
                {"roofline.png": lambda path: plot_roofline(bench, path)},
            )
        if self.json:
            print_json(content)
        else:
            _show(bench)

    def _cases(self) -> tuple[Case, ...]:
        if not (self.rows or self.block_size or self.weights):
            return DEFAULT_CASES
        return Grid.product(self.rows or (400,), self.block_size or (2000,), self.weights or (1_000_000,))


def _show(bench: Bench) -> None:
    console = out()
    console.print(
        f"{bench.device}, {bench.threads} thread{'s' * (bench.threads > 1)}: float32 matrix product "
        f"{bench.matrix_rate / 1e9:.0f} GFLOP/s (in {bench.multiplied_in}), copy {bench.bandwidth / 1e9:.1f} GB/s",
        soft_wrap=True,
    )
    own = _table("factor and score", ("seconds", "GFLOP/s", "of matrix rate, % (range)", "peak"))
    for m in bench.measurements:
        peak = "unknown" if m.peak_bytes is None else format_bytes(m.peak_bytes)
        own.add_row(
            _size(m),
            significant(m.seconds.median),
            significant(m.rate.median / 1e9),
            _spread(m.fraction, 100),
            peak,
        )
    console.print(own)
    names = [p.name for p in bench.measurements[0].peers]
    if names:
        times = _table("how many times longer the recursions take (range)", names)
        for m in bench.measurements:
            times.add_row(_size(m), *(_spread(p.ratio) for p in m.peers))
        console.print(times)
    errors = _table("worst relative error of the diagonal", ["woodfisher", *names])
    for m in bench.measurements:
        found = [m.error, *(p.error for p in m.peers)]
        errors.add_row(_size(m), *("not run" if e is None else f"{e.largest:.0e}" for e in found))
    console.print(errors)
    for peers in zip(*(m.peers for m in bench.measurements), strict=True):
        timed = "; ".join(f"{p.blocks_timed} and {p.rows_timed}" for p in peers)
        console.print(
            f"{peers[0].name}: {peers[0].what}; blocks and rows timed: {timed}, scaled to all", soft_wrap=True
        )
    for s in bench.scaling:
        fixed = ", ".join(f"{name} {size:,}" for name, size in s.fixed.items())
        console.print(f"seconds ∝ {s.over}^{s.exponent:.2f} at {fixed}", soft_wrap=True)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD)
    for column in ("N, B, d", *columns):
        table.add_column(column, justify="right", overflow="fold")
    return table


def _size(m: Measurement) -> str:
    return f"{m.case.rows}, {m.case.block_size}, {m.case.weights}"


def _spread(spread: Spread, unit: float = 1) -> str:
    """Median, and lowest to highest where they differ, to three digits."""
    median, low, high = (significant(unit * x) for x in (spread.median, spread.low, spread.high))
    return median if low == high else f"{median} ({low}–{high})"
