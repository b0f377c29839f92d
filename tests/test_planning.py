"""Plans: what is kept where, what it takes, and what is refused."""

import time
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import woodfisher as wf
from models import mlp, samples
from woodfisher import memory
from woodfisher.curvature import planning
from woodfisher.curvature.machine import Machine
from woodfisher.curvature.planning import planned
from woodfisher.curvature.rows import FactorRows, FileRows, GatheredRows, HeldRows, gathered
from woodfisher.gradients import base
from woodfisher.memory import parse_bytes
from woodfisher.pruning.method import METHODS
from woodfisher.pruning.window import window_for

MIB = 2**20


def wide():
    """Rows of 400 samples take 400 · 100 · 100 · 4 bytes = 15.3 MiB dense, and 400 · 200 · 4 in factor form."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 100, bias=False))
    return wf.Objective(model, [samples(400, (100,), classes=100)], cross_entropy)


@pytest.fixture
def _nothing_is_small(monkeypatch):
    monkeypatch.setattr(planning, "SMALL", 0)
    monkeypatch.setattr(memory, "resident_memory", lambda _: 100 * MIB)
    monkeypatch.setattr(planning, "WORKSPACE", MIB)
    monkeypatch.setattr(planning, "TILE", MIB)
    monkeypatch.setattr(planning, "WINDOW", MIB)


def kept(limit, machine=None, **options):
    curvature = wf.WoodFisher(400, 500, 1e-3, memory=limit, **options)
    return planned(wide().within(MIB), curvature, machine or Machine())


@pytest.mark.usefixtures("_nothing_is_small")
def test_the_cheapest_place_that_fits_is_taken(monkeypatch):
    slow = Machine(memory=1e5, disk=1e4)
    assert kept(1000 * MIB, slow).keep == "factors"
    quick = Machine(flops=1e5, memory=1e12, disk=1e3)
    assert kept(1000 * MIB, quick).keep == "memory"
    monkeypatch.setattr(wf.Objective, "factors", lambda *_: {})
    assert kept(115 * MIB, Machine(disk=1e12)).keep == "disk"
    monkeypatch.setattr(planning, "disk_room", lambda: 0)
    assert kept(115 * MIB).keep == "again"
    assert kept(115 * MIB).peak <= 115 * MIB


@pytest.mark.parametrize("keep", ["auto", "memory", "half", "factors", "disk", "again"])
@pytest.mark.parametrize(("workspace", "samples"), [(0, 400), (MIB, 100), (512 * MIB, 400), (512 * MIB, 3)])
@pytest.mark.usefixtures("_nothing_is_small")
def test_what_can_not_fit_is_refused_with_the_least_that_would(keep, workspace, samples):
    def plan(limit):
        return planned(wide().within(workspace), wf.WoodFisher(samples, 500, 1e-3, keep=keep, memory=limit))

    for limit in (1, 100 * MIB):
        with pytest.raises(wf.WoodfisherError, match=r"is not enough: .* 100 MiB as it is.*Give") as said:
            plan(limit)
        least = parse_bytes(str(said.value).split("Give ")[1].split(" or more")[0])
        assert plan(least).peak <= least


@pytest.mark.usefixtures("_nothing_is_small")
def test_later_stages_count_the_memory_that_the_first_one_found(monkeypatch):
    objective = wide().begun()
    monkeypatch.setattr(memory, "resident_memory", lambda _: 2**50)
    again = objective.on(objective.data).begun()
    assert planned(again, wf.WoodFisher(9, 500, 1e-3)).budget.base == objective.base < 2**50


def test_a_plan_counts_its_work_and_reads_one_batch_at_most():
    reads = []

    class Batches:
        dataset = range(400)

        def __iter__(self):
            for batch in [samples(20), samples(380)]:
                reads.append(len(batch[0]))
                yield batch

    objective = wf.Objective(mlp(), Batches(), cross_entropy)
    made = wf.plan(objective, wf.WoodFisher(400, 10, 1e-3, memory="8GiB"))
    assert set(reads) == {20}
    assert (made.rows, made.weights, made.blocks, made.block_size) == (400, 36, 5, 10)
    # Blocks of 10, 10, 10, 4 and 2 weights: GᵀG, its Cholesky factor and the inverse of that.
    assert made.flops == pytest.approx(
        sum(B * (2 * 400 * B + B * B / 3 + B * B / 3) for B in (10, 10, 10, 4, 2))
    )
    assert made.keep == "memory"
    assert made.peak == made.budget.base + sum(size for _, size in made.bill)
    assert all(seconds >= 0 for seconds in made.seconds.values())
    text = str(made)
    for part in ("400 gradient rows of 36 weights", "in memory", "peak memory", "of 8 GiB", "expected"):
        assert part in text


def test_gradients_are_expected_to_take_what_those_of_the_first_samples_took():
    class Slow(torch.nn.Linear):
        def forward(self, x):
            time.sleep(0.02)
            return super().forward(x)

    model = Slow(6, 4)
    objective = wf.Objective(model, [samples(40)] * 10, cross_entropy)
    made = wf.plan(objective, wf.WoodFisher(400, 10, 1e-3))
    assert made.seconds["gradients"] >= 0.2  # ten batches


@pytest.mark.parametrize("how", [wf.WoodFisher(40, 10, 1e-3), METHODS["woodfisher"]])
def test_memory_that_timing_gradients_takes_is_not_that_of_the_process_as_it_is(how, monkeypatch):
    monkeypatch.setattr(base, "resident_memory", lambda _: 100 * MIB)
    monkeypatch.setattr(memory, "resident_memory", lambda _: 900 * MIB)
    made = wf.plan(wf.Objective(mlp(), [samples(60)], cross_entropy), how)
    assert made.budget.base == 100 * MIB


def test_a_plan_of_a_method_counts_its_update_and_the_choice_of_its_damping():
    objective = wf.Objective(mlp(), [samples(400)], cross_entropy)
    method = replace(METHODS["woodfisher-block"], curvature=wf.WoodFisher(400, 10, "auto"))
    made = wf.plan(objective, method)
    assert min(made.seconds["damping"], made.seconds["update"]) > 0
    assert f"expected: {sum(made.seconds.values()):.2g} s (gradients" in str(made)
    without = wf.plan(objective, replace(method, curvature=wf.WoodFisher(400, 10, 1e-3), update="none"))
    assert not without.seconds["damping"]
    assert "update" not in without.seconds


def test_dual_blocks_count_three_operations_for_a_pair_of_rows_and_a_weight():
    assert planned(wide(), wf.WoodFisher(40, 5000, 1e-3)).flops == 3 * 40**2 * 10_000


@pytest.mark.parametrize(
    ("keep", "kind"),
    [
        ("memory", HeldRows),
        ("half", HeldRows),
        ("factors", FactorRows),
        ("disk", FileRows),
        ("again", GatheredRows),
    ],
)
@pytest.mark.filterwarnings("ignore:gradient rows are kept in bfloat16")
def test_rows_are_kept_where_the_plan_says(keep, kind):
    objective = wf.Objective(mlp(), [samples(12)], cross_entropy)
    curvature = wf.WoodFisher(12, 10, 1e-3, keep=keep)
    assert isinstance(gathered(objective, curvature, planned(objective, curvature), None), kind)


def test_pruning_under_a_budget_gives_the_same_network():
    torch.manual_seed(0)
    data, models = [samples(60)], [mlp(), mlp()]
    curvature = wf.WoodFisher(50, 10, 1e-3)
    wf.prune(models[0], data, cross_entropy, 0.5, curvature=curvature, stages=3)
    tight = replace(curvature, keep="again", memory="64GiB")
    wf.prune(models[1], data, cross_entropy, 0.5, curvature=tight, stages=3)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_rows_that_the_data_is_too_small_for_are_refused():
    with pytest.raises(
        wf.WoodfisherError, match="a row averages 16 samples, and there are 10: give more data"
    ):
        wf.plan(wf.Objective(mlp(), [samples(10)], cross_entropy), wf.WoodFisher(400, 10, 1e-3, group=16))


@pytest.mark.parametrize("small", [0, 2**30])
def test_planning_draws_no_random_numbers(small, monkeypatch):
    monkeypatch.setattr(planning, "SMALL", small)
    loader = DataLoader(TensorDataset(*samples(60)), batch_size=10, shuffle=True)
    objective = wf.Objective(mlp(), loader, cross_entropy)
    before = torch.get_rng_state()
    planned(objective, wf.WoodFisher(50, 10, 1e-3))
    wf.plan(objective, wf.WoodFisher(50, 10, 1e-3, keep="factors"))
    assert torch.equal(torch.get_rng_state(), before)


def test_small_rows_are_planned_without_reading_data():
    class Unread:
        dataset = range(60)

        def __iter__(self):
            raise AssertionError("data was read")

    assert planned(wf.Objective(mlp(), Unread(), cross_entropy), wf.WoodFisher(50, 10, 1e-3)).keep == "memory"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "much"}, "4GiB or 500MB; 'much' came"),
        ({"memory": 0}, "4GiB or 500MB; 0 came"),
        ({"keep": "cloud"}, "keep must be one of auto, memory"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(wf.WoodfisherError, match=message):
        wf.WoodFisher(**options)


def test_rows_that_can_not_be_had_in_factor_form_are_refused():
    objective = wf.Objective(mlp(), iter([samples(12)]), cross_entropy)
    with pytest.raises(wf.WoodfisherError, match="factor form"):
        wf.WoodFisher(12, 10, 1e-3, keep="factors")(objective)
    with pytest.raises(wf.WoodfisherError, match="read only once"):
        wf.WoodFisher(12, 10, 1e-3, keep="again")(objective)


def test_methods_are_planned_by_their_stages():
    objective = wf.Objective(mlp(), [samples(60)], cross_entropy)
    method = wf.METHODS["woodfisher"]
    window = wf.plan(objective, method)
    assert isinstance(window, wf.Window)
    assert window.held_out == 12
    assert [(c.first_order, c.rows, c.stages) for c in window.courses] == [(True, 48, 120), (False, 48, 40)]
    assert window.samples == (120 + 40) * 48
    assert "48 gradient rows through 40 stages without the gradient; 48 are new at each" in str(window)
    block = wf.plan(objective, wf.METHODS["woodfisher-block"], memory="8GiB")
    assert isinstance(block, wf.Plan) and block.rows == 60
    with pytest.raises(wf.WoodfisherError, match=r"the rows of a wf.WoodFisher, and Identity\(\) keeps none"):
        wf.plan(objective, wf.METHODS["magnitude"])
    with pytest.raises(wf.WoodfisherError, match=r"wf.plan\(objective, wf.METHODS.*0.5 came"):
        wf.plan(objective, 0.5)
    without_length = wf.Objective(mlp(), Unsized([samples(60)]), cross_entropy)
    state = torch.get_rng_state()
    assert wf.plan(without_length, method).courses == window.courses
    assert torch.equal(torch.get_rng_state(), state)


class Unsized:
    """Batches that tell no length, in random order."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return (self.batches[i] for i in torch.randperm(len(self.batches)).tolist())


@pytest.mark.parametrize(
    ("samples", "known", "runs"), [(960_000, 60_000, 1), (240_000, 2_000, 2), (960_000, 2_000, 2)]
)
def test_more_samples_than_usual_are_no_repetition_of_few(samples, known, runs):
    method = wf.METHODS["woodfisher"]
    method = replace(method, curvature=replace(method.curvature, samples=samples))
    window = window_for(wf.Objective(mlp(), [], cross_entropy), method, known)
    assert [course.stages for course in window.courses] == [120, 40][:runs]
