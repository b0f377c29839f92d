"""The measurement of the factor-and-score phase, and the recursions that it is compared with."""

import json

import pytest
import torch

from reference import recursion
from woodfisher import WoodfisherError, WoodfisherWarning
from woodfisher.bench import Bench, Case, Error, Grid, Measurement, Spread, machine, peers, run_bench
from woodfisher.bench.measure import factor_and_score
from woodfisher.cli import main
from woodfisher.gradients.isolation import threads
from woodfisher.results.plots import plot_roofline

DAMPING = 1e-3
CPU = torch.device("cpu")


@pytest.fixture
def _small(monkeypatch):
    """Rates from small buffers, and no repetition of short runs: the logic is the same."""
    monkeypatch.setattr(machine, "order", lambda _: 64)
    monkeypatch.setattr(machine, "_COPIED", 1000)
    monkeypatch.setattr("woodfisher.bench.measure._LEAST_SECONDS", 0.0)
    monkeypatch.setattr("woodfisher.bench.measure._QUIET", 0.0)


def gradients(count, N, B, dtype=torch.float64):
    return torch.randn(count, N, B, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize(
    "shape", [(3, 5, 8), (2, 70, 9), (2, 70, 80), (1, 1, 4), (2, 3, 1), (1, 32, 40), (1, 33, 40)]
)
@pytest.mark.parametrize("peer", [*peers.PEERS, peers.exact], ids=lambda p: getattr(p, "name", "exact"))
def test_diagonals_against_the_slow_recursion(peer, shape):
    G = gradients(*shape)
    before = G.clone()
    divisor = shape[1] / 2
    diagonal = getattr(peer, "diagonal", peer)(G, DAMPING, divisor)
    expected = torch.stack([recursion(block, DAMPING, divisor).diagonal() for block in G])
    torch.testing.assert_close(diagonal, expected, rtol=1e-8, atol=1e-8)
    assert torch.equal(G, before)


@pytest.mark.parametrize("shape", [(3, 5, 8), (2, 20, 9)])
def test_float32_peers_and_our_own_phase(shape):
    G = gradients(*shape, dtype=torch.float32)
    rows = G.transpose(0, 1).flatten(1)
    expected = torch.stack([recursion(block, DAMPING, shape[1]).diagonal() for block in G])
    for peer in peers.PEERS:
        diagonal = peer.diagonal(G, DAMPING, shape[1])
        assert diagonal.dtype == torch.float32
        torch.testing.assert_close(diagonal.double(), expected, rtol=1e-3, atol=1e-2)
    ours = factor_and_score(rows, shape[2], DAMPING)
    torch.testing.assert_close(ours, expected.flatten(), rtol=1e-5, atol=1e-4)


def test_some_rows_of_a_peer_are_its_first_steps():
    G = gradients(2, 6, 4)
    part = peers.rank_one(G[:, :2], DAMPING, 6)
    expected = torch.stack([recursion(block[:2], DAMPING, 6).diagonal() for block in G])
    torch.testing.assert_close(part, expected)
    assert torch.equal(peers.rank_one(G[:, :0], DAMPING, 6), torch.full((2, 4), 1 / DAMPING).double())


def test_counts():
    dual, primal = Case(400, 2000, 1_000_000), Case(1024, 50, 600)
    assert dual.dual
    assert not primal.dual
    assert not Case(50, 50, 100).dual
    assert dual.flops == 480e9
    assert dual.intensity == 300
    assert primal.flops == pytest.approx(2 * 1024 * 50 * 600 + 1_000_000)
    assert primal.row_bytes == 4 * 1024 * 600


def test_error_is_of_the_worst_entry_and_by_norm():
    error = Error.of(torch.tensor([[1.0, 2.5]]), torch.tensor([[1.0, 2.0]]).double())
    assert error.largest == pytest.approx(0.25)
    assert error.norm == pytest.approx(0.5 / 5**0.5)


def measurement(case, seconds):
    one = Spread((seconds,))
    return Measurement(case, one, Spread((2e9,)), Spread((1e9,)), None, Error(0.0, 0.0), ())


def test_scaling_and_fractions():
    cases = [Case(10, 20, 100), Case(10, 20, 200), Case(10, 20, 400), Case(20, 20, 100)]
    seconds = [0.1, 0.2, 0.4, 0.4]
    measured = tuple(map(measurement, cases, seconds))
    bench = Bench(Grid(tuple(cases)), "cpu", 1, "float32", None, measured)
    weights, rows = bench.scaling
    assert (weights.over, weights.fixed, weights.sizes) == (
        "weights",
        {"rows": 10, "block_size": 20},
        (100, 200, 400),
    )
    assert weights.exponent == pytest.approx(1)
    assert (rows.over, rows.sizes) == ("rows", (10, 20))
    assert rows.exponent == pytest.approx(2)
    assert measured[0].fraction.median == pytest.approx(3 * 100 * 100 / 0.1 / 2e9)
    assert bench.to_dict()["cases"][0]["peak_bytes"] is None


@pytest.mark.usefixtures("_small")
def test_bench_of_a_small_grid():
    grid = Grid((Case(8, 20, 110), Case(30, 5, 50)), DAMPING, repetitions=2, peer_blocks=2)
    bench = run_bench(grid, thread_count=1)
    assert bench.threads == 1
    for m in bench.measurements:
        assert len(m.seconds.values) == len(m.fraction.values) == 2
        assert m.error.largest < 1e-5
        assert [p.name for p in m.peers] == ["rank-one", "m-fac", "m-fac-panels"]
        for p in m.peers:
            assert p.blocks_timed == m.case.weights // m.case.block_size
            assert p.blocks_at_once == 2
            assert p.rows_timed == m.case.rows
            assert p.error.largest < 1e-3
            assert p.ratio.values == pytest.approx(
                [a / b for a, b in zip(p.seconds.values, m.seconds.values, strict=True)]
            )
    assert not run_bench(Grid((Case(8, 20, 100),), peers=False, repetitions=1)).measurements[0].peers


@pytest.mark.usefixtures("_small")
def test_slow_peers_run_on_few_blocks_and_rows():
    grid = Grid((Case(20, 10, 100),), repetitions=1, peer_seconds=1e-9, peer_blocks=3)
    for p in run_bench(grid).measurements[0].peers:
        assert p.blocks_timed == 3
        assert p.rows_timed == (4 if p.name == "rank-one" else 20)
        assert (p.error is None) == (p.name == "rank-one")
        assert p.seconds.median > 0


@pytest.mark.usefixtures("_small")
def test_a_busy_machine_is_told(monkeypatch):
    monkeypatch.setattr("woodfisher.bench.measure._QUIET", 1e9)
    with pytest.warns(WoodfisherWarning, match="of the processor time that its threads asked for"):
        bench = run_bench(Grid((Case(4, 10, 20),), repetitions=1, peers=False))
    assert bench.processor_share > 0


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        1 / 0
    assert torch.get_num_threads() == before


def test_peak_of_memory():
    def work():
        return torch.ones(2**25)  # 128 MiB, larger than what an allocator keeps

    peak = machine.peak_of(CPU, work)
    if peak is None:
        pytest.skip("the system doesn't tell")
    assert 0.95 * 2**27 < peak < 1.2 * 2**27


@pytest.mark.usefixtures("_small")
def test_command_writes_and_prints(tmp_path, capsys):
    arguments = ["bench", "--rows", "4", "8", "--block-size", "6", "--weights", "60", "120"]
    assert main([*arguments, "--repetitions", "1", "--threads", "1", "--out", str(tmp_path), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert json.loads((tmp_path / "bench.json").read_text()) == content
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert {
        "device",
        "threads",
        "processes",
        "float32_matmul_precision",
        "matrix_flops_per_second",
    } <= content.keys()
    assert [(c["rows"], c["weights"], c["form"]) for c in content["cases"]] == [
        (4, 60, "dual"),
        (4, 120, "dual"),
        (8, 60, "primal"),
        (8, 120, "primal"),
    ]
    case = content["cases"][0]
    assert {
        "seconds",
        "flops_per_second",
        "fraction_of_matrix_rate",
        "peak_bytes",
        "error",
        "peers",
    } <= case.keys()
    assert {"ratio", "blocks_timed", "rows_timed", "error"} <= case["peers"][0].keys()
    assert {s["over"] for s in content["scaling"]} == {"weights", "rows"}

    assert main([*arguments, "--repetitions", "1", "--no-peers"]) == 0
    shown = capsys.readouterr().out
    assert "of matrix rate" in shown
    assert "rank-one" not in shown
    assert main([*arguments, "--repetitions", "1"]) == 0
    assert "m-fac-panels" in capsys.readouterr().out


def test_picture_without_peers(tmp_path):
    case = Case(10, 20, 100)
    bench = Bench(Grid((case,), peers=False), "cpu", 1, "float32", None, (measurement(case, 0.1),))
    plot_roofline(bench, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "0"], "rows must be a whole number of at least 1; 0 came"),
        (["--weights", "-5"], "weights must be"),
        (["--block-size", "2000", "--weights", "100"], "larger than all 100 weights"),
        (["--repetitions", "0"], "repetitions must be"),
        (["--threads", "0"], "threads must be"),
        (["--peer-blocks", "0"], "peer_blocks must be"),
        (["--peer-seconds", "0"], "peer_seconds must be"),
        (["--damping", "0"], "damping must be"),
        (["--device", "gpu"], "device 'gpu' can't be used"),
        (["--weights", "1000000000000"], "take fewer rows or weights"),
        (["--block-size", "900000", "--rows", "2"], "the peers"),
        (["--out", "/proc/version"], "is not a folder"),
    ],
)
def test_bad_input_is_one_message_and_code_2(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert not shown.out


def test_nothing_to_measure():
    with pytest.raises(WoodfisherError, match="name at least one size"):
        Grid(())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bench_on_cuda():
    bench = run_bench(Grid((Case(100, 500, 50_000), Case(200, 50, 20_000)), repetitions=2), "cuda")
    assert bench.device == torch.cuda.get_device_name()
    for m in bench.measurements:
        assert m.peak_bytes > 0
        assert m.error.largest < 1e-4
        assert all(p.error.largest < 1e-2 for p in m.peers if p.error)
