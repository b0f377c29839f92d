"""The factor-and-score phase over a grid of sizes: time, rate, memory and errors, beside the peers."""

from __future__ import annotations

import itertools
import math
import platform
import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from woodfisher._version import __version__
from woodfisher.bench.machine import Roofs, peak_of, repeats
from woodfisher.bench.peers import PEERS, Peer, exact
from woodfisher.bench.spread import Spread
from woodfisher.checks import check_count, check_positive
from woodfisher.curvature import WoodFisher
from woodfisher.curvature.base import WORKSPACE
from woodfisher.curvature.blocks import operations
from woodfisher.curvature.lowrank import multiplied_in
from woodfisher.curvature.machine import seconds_of
from woodfisher.errors import WoodfisherError
from woodfisher.gradients.isolation import threads
from woodfisher.memory import Budget
from woodfisher.watch import report_progress, warn, watching

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from woodfisher.watch import Progress

_SCALE = 1e-2
"""Standard deviation of the random gradients: with λ = 1e-5 the curvature is ten times the damping."""

_LEAST_SECONDS = 0.1
"""Shorter runs are repeated up to this, so that the clock and the first touch of memory don't count."""

_CACHE = 8 * 2**20
"""Bytes that a batch of a peer's blocks may keep busy: memory bounds what the peers do, and this stays in a cache."""

_PATIENCE = 5
"""Times the peers' seconds that finding a peer's errors may take."""

_QUIET = 0.9
"""Share of the processors' time below which a run is not quiet."""

_PILOT = 4
"""Rows from which the time of all is foreseen."""


@dataclass(frozen=True)
class Case:
    """One size: N gradient rows of d weights in blocks of B.

    >>> Case(400, 2000, 1_000_000).flops / 1e9
    480.0
    """

    rows: int
    block_size: int
    weights: int

    def __post_init__(self) -> None:
        for name in ("rows", "block_size", "weights"):
            check_count(name, getattr(self, name))
        if self.block_size > self.weights:
            raise WoodfisherError(
                f"a block of {self.block_size} weights is larger than all {self.weights} weights: take smaller blocks "
                "or more weights."
            )

    @property
    def dual(self) -> bool:
        """Whether a block is factored through its N×N Gram matrix."""
        return self.rows < self.block_size

    @property
    def flops(self) -> float:
        """Floating-point operations that the phase is counted as (`curvature.blocks.operations`)."""
        return operations(self.rows, self.block_size, self.weights)

    @property
    def row_bytes(self) -> int:
        """Bytes of the float32 rows."""
        return 4 * self.rows * self.weights

    @property
    def intensity(self) -> float:
        """Counted operations for each byte of the rows."""
        return self.flops / self.row_bytes

    def __str__(self) -> str:
        return f"N={self.rows}, B={self.block_size}, d={self.weights:,}"


DEFAULT_CASES = (
    Case(400, 2000, 200_000),
    Case(400, 2000, 400_000),
    Case(1024, 50, 100_000),
    Case(200, 20_000, 200_000),
)
"""Small enough for two minutes on two cores: both forms, and one size twice as large as another."""


@dataclass(frozen=True)
class Grid:
    """What is measured, and how often.

    Attributes
    ----------
    cases:
        Sizes, one after the other.
    damping:
        λ of every case.
    repetitions:
        Times that each case is measured, peers and roofs between.
    peers:
        Whether the recursions run too.
    peer_seconds:
        Seconds that a peer may take in a repetition. It runs on fewer blocks where all would take longer, and its time
        is scaled in their number; where one block takes longer and each row costs the same, on fewer rows.
    peer_blocks:
        Blocks that a peer takes at a time; None for as many as stay in a cache.
    """

    cases: tuple[Case, ...] = DEFAULT_CASES
    damping: float = 1e-5
    repetitions: int = 3
    peers: bool = True
    peer_seconds: float = 1.0
    peer_blocks: int | None = None

    def __post_init__(self) -> None:
        if not self.cases:
            raise WoodfisherError("there is nothing to measure: name at least one size.")
        check_count("repetitions", self.repetitions)
        check_positive("damping", self.damping, "or few rows have no inverse")
        check_positive("peer_seconds", self.peer_seconds, "for a peer to run at all")
        check_count("peer_blocks", self.peer_blocks, or_none="as many as stay in a cache")

    @staticmethod
    def product(rows: Iterable[int], block_sizes: Iterable[int], weights: Iterable[int]) -> tuple[Case, ...]:
        """Every combination."""
        return tuple(Case(*sizes) for sizes in itertools.product(rows, block_sizes, weights))


@dataclass(frozen=True)
class Error:
    """How far float32 diagonals are from float64: the worst entry relative to itself, and all by norm."""

    largest: float
    norm: float

    @staticmethod
    def of(diagonal: Tensor, truth: Tensor) -> Error:
        """Of diagonals of one shape."""
        apart = diagonal.double() - truth
        return Error(float((apart / truth).abs().max()), float(apart.norm() / truth.norm()))


@dataclass(frozen=True)
class PeerMeasurement:
    """A peer's time for the whole case, and what it was measured on.

    Attributes
    ----------
    seconds:
        Scaled linearly from the blocks (and rows) timed to all.
    ratio:
        Its seconds over ours, by repetition.
    blocks_timed, blocks_at_once, rows_timed:
        What ran.
    error:
        None where a run over all rows of a block would have taken too long.
    """

    name: str
    what: str
    seconds: Spread
    ratio: Spread
    blocks_timed: int
    blocks_at_once: int
    rows_timed: int
    error: Error | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            **asdict(self),
            "seconds": self.seconds.to_dict(),
            "ratio": self.ratio.to_dict(),
        }


@dataclass(frozen=True)
class Measurement:
    """One case.

    Attributes
    ----------
    seconds:
        From rows that lie in memory to the diagonal of F⁻¹, by repetition.
    matrix_rate:
        FLOP/s of a float32 matrix product, the mean of before and after each repetition.
    bandwidth:
        Bytes/s of a copy, before each repetition.
    peak_bytes:
        Most memory held above the rows; None where the system doesn't tell.
    """

    case: Case
    seconds: Spread
    matrix_rate: Spread
    bandwidth: Spread
    peak_bytes: int | None
    error: Error
    peers: tuple[PeerMeasurement, ...]

    @property
    def rate(self) -> Spread:
        """Counted FLOP/s, by repetition."""
        return Spread(tuple(self.case.flops / s for s in self.seconds.values))

    @property
    def fraction(self) -> Spread:
        """The same over the matrix product's, by repetition."""
        return Spread(tuple(a / b for a, b in zip(self.rate.values, self.matrix_rate.values, strict=True)))

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            **asdict(self.case),
            "form": "dual" if self.case.dual else "primal",
            "flops": self.case.flops,
            "row_bytes": self.case.row_bytes,
            "intensity": self.case.intensity,
            "seconds": self.seconds.to_dict(),
            "flops_per_second": self.rate.to_dict(),
            "matrix_flops_per_second": self.matrix_rate.to_dict(),
            "fraction_of_matrix_rate": self.fraction.to_dict(),
            "copy_bytes_per_second": self.bandwidth.to_dict(),
            "peak_bytes": self.peak_bytes,
            "error": asdict(self.error),
            "peers": [peer.to_dict() for peer in self.peers],
        }


@dataclass(frozen=True)
class Scaling:
    """How time grows with one size while the others stay: seconds ∝ size^exponent, by least squares of logarithms."""

    over: str
    fixed: dict[str, int]
    sizes: tuple[int, ...]
    exponent: float


@dataclass(frozen=True)
class Bench:
    """All cases, and the machine.

    Attributes
    ----------
    multiplied_in:
        What float32 matrices are multiplied in: `float32`, or as torch is set to, `tf32` or `bf16`.
    processor_share:
        Of the processor time that the threads could have had during the matrix products, what they got: the median.
        None on other devices.
    """

    grid: Grid
    device: str
    threads: int
    multiplied_in: str
    processor_share: float | None
    measurements: tuple[Measurement, ...]

    @property
    def matrix_rate(self) -> float:
        """FLOP/s of a float32 matrix product, the median of all repetitions."""
        return statistics.median(r for m in self.measurements for r in m.matrix_rate.values)

    @property
    def bandwidth(self) -> float:
        """Bytes/s of a copy, the median of all repetitions."""
        return statistics.median(r for m in self.measurements for r in m.bandwidth.values)

    @property
    def scaling(self) -> list[Scaling]:
        """Along each axis of the grid that has two values or more."""
        found = []
        for over in ("weights", "rows", "block_size"):
            groups: dict[tuple[tuple[str, int], ...], list[tuple[int, float]]] = {}
            for m in self.measurements:
                sizes = asdict(m.case)
                size = sizes.pop(over)
                groups.setdefault(tuple(sizes.items()), []).append((size, m.seconds.median))
            for fixed, points in groups.items():
                if len({size for size, _ in points}) > 1:
                    points.sort()
                    sizes_, _ = zip(*points, strict=True)
                    found.append(Scaling(over, dict(fixed), sizes_, _slope(points)))
        return found

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "woodfisher": __version__,
            "torch": torch.__version__,
            "device": self.device,
            "threads": self.threads,
            "processes": 1,
            "float32_matmul_precision": self.multiplied_in,
            "processor_share": self.processor_share,
            "damping": self.grid.damping,
            "repetitions": self.grid.repetitions,
            "matrix_flops_per_second": self.matrix_rate,
            "copy_bytes_per_second": self.bandwidth,
            "cases": [m.to_dict() for m in self.measurements],
            "scaling": [asdict(s) for s in self.scaling],
        }


def _slope(points: Sequence[tuple[int, float]]) -> float:
    """That of a line through the points on logarithmic scales."""
    x, y = (list(map(math.log, each)) for each in zip(*points, strict=True))
    return statistics.linear_regression(x, y).slope


def run_bench(
    grid: Grid,
    device: torch.device | str = "cpu",
    thread_count: int | None = None,
    progress: Progress | None = None,
) -> Bench:
    """Measure every case of the grid on random gradient rows.

    Memory for the largest case is checked before any work.
    """
    check_count("threads", thread_count, or_none="as many as torch takes")
    device = torch.device(device)
    for case in grid.cases:
        Budget.of(device).check(
            _needs(case, grid, device), "take fewer rows or weights, smaller blocks or no peers"
        )
    with watching(progress), threads(thread_count):
        roofs = Roofs(device)
        measurements = []
        for number, case in enumerate(grid.cases):
            report_progress("cases", number, len(grid.cases))
            measurements.append(_measure(case, grid, device, roofs))
        share = statistics.median(roofs.shares) if roofs.shares else None
        if share is not None and share < _QUIET:
            warn(
                f"this process got {share:.0%} of the processor time that its threads asked for: other programs run, "
                "and the figures are off. Measure on a quiet machine, with no more threads than cores."
            )
        return Bench(
            grid,
            _device_name(device),
            torch.get_num_threads(),
            multiplied_in(device),
            share,
            tuple(measurements),
        )


def factor_and_score(rows: Tensor, block_size: int, damping: float) -> Tensor:
    """Diagonal of F⁻¹ of rows `(N, d)`: the phase that is timed."""
    return WoodFisher(samples=len(rows), block_size=block_size, damping=damping).of_rows(rows).diag()


def _measure(case: Case, grid: Grid, device: torch.device, roofs: Roofs) -> Measurement:
    N, B, d = case.rows, case.block_size, case.weights
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randn(N, d, generator=generator, device=device).mul_(_SCALE)

    def phase() -> Tensor:
        return factor_and_score(rows, B, grid.damping)

    phase()  # what torch sets up once is no part of what follows
    peak = peak_of(device, phase)
    checked = min(d // B, max(1, 2000 // B))
    truth = exact(_blocks(rows, B, 0, checked), grid.damping, N)
    error = Error.of(phase()[: checked * B].view(checked, B), truth)
    times = repeats(seconds_of(device, phase), _LEAST_SECONDS)
    runs = [_PeerRun(peer, rows, B, grid, truth) for peer in PEERS] if grid.peers else []
    ours, rates, bandwidths = [], [], []
    for repetition in range(grid.repetitions):
        report_progress(str(case), repetition, grid.repetitions)
        bandwidths.append(roofs.bandwidth())
        before = roofs.matrix_rate()
        ours.append(seconds_of(device, phase, times))
        rates.append((before + roofs.matrix_rate()) / 2)
        for run in runs:
            run.time()
    report_progress(str(case), grid.repetitions, grid.repetitions)
    return Measurement(
        case,
        Spread(tuple(ours)),
        Spread(tuple(rates)),
        Spread(tuple(bandwidths)),
        peak,
        error,
        tuple(run.result(ours) for run in runs),
    )


class _PeerRun:
    """One peer on the rows of one case: finds what it can do in its time, then is timed in each repetition."""

    def __init__(self, peer: Peer, rows: Tensor, B: int, grid: Grid, truth: Tensor) -> None:
        N, d = rows.shape
        self._peer, self._rows, self._B, self._grid = peer, rows, B, grid
        self._blocks = d // B
        self._at_once = min(self._blocks, grid.peer_blocks or max(1, _CACHE // (4 * peer.numbers(N, B))))
        self._N = min(_PILOT, N) if peer.even else N
        batch = self._run(self._at_once)
        if peer.even:
            self._N = min(N, max(_PILOT, int(N * grid.peer_seconds / batch)))
        self._timed = min(self._blocks, max(1, int(grid.peer_seconds / batch)) * self._at_once)
        affordable = batch * len(truth) / self._at_once <= _PATIENCE * grid.peer_seconds
        self.error = (
            Error.of(self._diagonal(0, len(truth), N), truth) if affordable or not peer.even else None
        )
        self.seconds: list[float] = []

    def _diagonal(self, first: int, count: int, N: int) -> Tensor:
        G = _blocks(self._rows[:N], self._B, first, count)
        return self._peer.diagonal(G, self._grid.damping, len(self._rows))

    def _run(self, blocks: int) -> float:
        """Seconds of all rows for that many blocks, without cutting them out of the rows.

        Where only some rows are timed, their time is scaled to all; what precedes the first row is not.
        """
        seconds = 0.0
        for first in range(0, blocks, self._at_once):
            G = _blocks(self._rows[: self._N], self._B, first, min(self._at_once, blocks - first))
            timed = self._seconds(G)
            share = self._N / len(self._rows)
            before = self._seconds(G[:, :0]) if share < 1 else 0.0
            seconds += before + max(timed - before, 0.0) / share
        return seconds

    def _seconds(self, G: Tensor) -> float:
        return seconds_of(G.device, lambda: self._peer.diagonal(G, self._grid.damping, len(self._rows)))

    def time(self) -> None:
        """One repetition."""
        scale = self._rows.shape[1] / (self._timed * self._B)
        self.seconds.append(self._run(self._timed) * scale)

    def result(self, ours: Sequence[float]) -> PeerMeasurement:
        """All repetitions, beside our seconds of each."""
        return PeerMeasurement(
            self._peer.name,
            self._peer.what,
            Spread(tuple(self.seconds)),
            Spread(tuple(a / b for a, b in zip(self.seconds, ours, strict=True))),
            self._timed,
            self._at_once,
            self._N,
            self.error,
        )


def _blocks(rows: Tensor, B: int, first: int, count: int) -> Tensor:
    """Neighbouring blocks as `(count, N, B)`, each contiguous."""
    part = rows[:, first * B : (first + count) * B]
    return part.unflatten(1, (count, B)).transpose(0, 1).contiguous()


def _needs(case: Case, grid: Grid, device: torch.device) -> list[tuple[str, int]]:
    N, B, d = case.rows, case.block_size, case.weights
    checked = min(d // B, max(1, 2000 // B))
    exact_ = 8 * checked * (3 * N * B + 3 * min(N, B) ** 2)
    batch = max((max(_CACHE, 4 * peer.numbers(N, B)) for peer in PEERS), default=0)
    return [
        (f"{N} gradient rows of {d} weights", case.row_bytes),
        ("the diagonal and scratch", 16 * d + 3 * WORKSPACE),
        ("errors in float64", exact_),
        ("what tells the machine's rates", Roofs.size(device)),
        ("the peers", batch if grid.peers else 0),
    ]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.processor() or platform.machine()})"
