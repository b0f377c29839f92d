"""Several processes prune as one does."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import woodfisher as wf
from models import Unpadded, mlp, samples
from processes import run
from woodfisher.distributed import Ranks, on_first_rank, together
from woodfisher.gradients.dealt import dealt_names
from woodfisher.gradients.layout import Layout
from woodfisher.gradients.sharding import local, own_part, reshard, whole
from woodfisher.pruning.dealing import can_be_dealt
from woodfisher.pruning.method import METHODS
from woodfisher.surgeon.ranking import survivors

SOURCE = Path(wf.__file__).parents[1]

BLOCK = {"curvature": wf.WoodFisher(23, 5, 1e-2), "stages": 1}

CASES = {
    "independent": {**BLOCK, "update": "independent"},
    "joint": BLOCK,
    "auto": {**BLOCK, "curvature": wf.WoodFisher(23, 5, "auto")},
    "relative": {**BLOCK, "curvature": wf.WoodFisher(23, 50, wf.Relative(1))},
    "three stages": {**BLOCK, "stages": 3},
    "rows in factors": {**BLOCK, "curvature": wf.WoodFisher(23, 5, 1e-2, keep="factors"), "stages": 3},
    "rows on disk": {**BLOCK, "curvature": wf.WoodFisher(24, 5, 1e-2, keep="disk", group=2)},
    "rows of groups": {**BLOCK, "curvature": wf.WoodFisher(24, 5, 1e-2, keep="factors", group=3)},
    "gradient": {**BLOCK, "first_order": True},
    "layer": {**BLOCK, "scope": "layer"},
    "flops": {**BLOCK, "scope": "flops"},
    "floor": {**BLOCK, "floor": 0.25},
    "2:4": {**BLOCK, "pattern": wf.NM(2, 4)},
    "1x2": {**BLOCK, "pattern": wf.Block(2)},
    "magnitude": {"criterion": "magnitude"},
    "obd": {"curvature": wf.DiagonalFisher(23), "stages": 2, "update": "none"},
    "kfac": {"curvature": wf.KFAC(23), "stages": 1, "scope": "layer"},
    "full": {"criterion": "woodfisher-full", "curvature": wf.WoodFisher(23, None, 1e-2), "stages": 2},
    "refine": {**BLOCK, "refine": 2},
    "sampled": {**BLOCK, "curvature": wf.WoodFisher(23, 5, 1e-2, labels="model")},
}


class Net(nn.Module):
    """Convolutions, batch normalisation, a linear layer, and weights that are equal."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 4, 1, stride=2)
        self.third = nn.Linear(36, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.last(torch.tanh(self.third(torch.tanh(self.second(x)).flatten(1))))


def batches(seed=1):
    x, y = samples(60, (4, 6, 6), seed=seed)
    return [(x[i : i + 7], y[i : i + 7]) for i in range(0, 60, 7)]


def pruned(kind, case, start=0.0):
    """State, masks and report of a pruned network."""
    model = {"net": Net, "mlp": mlp}[kind]()
    if start:
        wf.prune(model, None, sparsity=start, criterion="magnitude-layer", recalibrate=0)
    data = batches() if kind == "net" else [samples(40, seed=1)]
    sparsity = 0.5 if "pattern" in case else 0.7
    report = wf.prune(model, data, cross_entropy, sparsity, recalibrate=20, **case)
    return model.state_dict(), report.masks, report.to_dict()


def tied():
    """A network whose weights have few magnitudes, pruned by them."""
    model = Net()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((4 * p).round().clamp(-1, 1) / 4 + 0.5)
    report = wf.prune(model, None, sparsity=0.6, criterion="magnitude", recalibrate=0)
    return model.state_dict(), report.masks, report.to_dict()


def wrapped():
    """A network in the wrapper for training by several processes, if there are several."""
    model = Net()
    outer = DistributedDataParallel(model) if distributed.is_initialized() else model
    report = wf.prune(outer, batches(), cross_entropy, 0.7, **BLOCK)
    return model.state_dict(), report.masks, report.to_dict()


def loader(rank):
    """Samples in an order that each process draws by itself."""
    torch.manual_seed(5 + rank)
    data = TensorDataset(*samples(60, (4, 6, 6), seed=1))
    return DataLoader(data, 7, shuffle=True, generator=torch.Generator().manual_seed(rank))


def shuffled(rank=0):
    """A network pruned on data whose order each process draws by itself, from another state where it is not first."""
    data, model = loader(rank), Net()
    report = wf.prune(model, data, cross_entropy, 0.7, **BLOCK)
    return model.state_dict(), report.masks, report.to_dict()


def family_of_shuffled(rank=0):
    """The second of a family, whose statistics of normalisation the first process alone takes from shuffled data."""
    model, data = Net(), loader(rank)
    _, found = wf.sweep(model, data, cross_entropy, [0.5, 0.7], recalibrate=20, **{**BLOCK, "stages": 2})
    found.write()
    return model.state_dict(), found.report.masks, found.report.to_dict()


def first_alone(rank=0):
    """The second of two networks, where the first was pruned by the first process alone, on the same shuffled data."""
    data = loader(rank)
    wf.prune(Net(), data, cross_entropy, 0.7, recalibrate=20, **CASES["full"])
    torch.manual_seed(rank)
    model = Net()
    report = wf.prune(model, data, cross_entropy, 0.7, **BLOCK)
    return model.state_dict(), report.masks, report.to_dict()


def other_buffers(rank=0, case=BLOCK):
    """A network whose statistics of normalisation differ; those of the first process count."""
    model = Net()
    model.norm.running_mean += rank
    report = wf.prune(model, batches(), cross_entropy, 0.7, recalibrate=0, **case)
    return model.state_dict(), report.masks, report.to_dict()


def random_metric(rank=0):
    """A metric of the first process that draws random numbers, between runs on shuffled data."""

    def metric(model):
        return float(torch.rand(3).sum()) * 0 + 1 - float(model.last.weight.eq(0).sum()) / 64

    model = Net()
    report = wf.prune(
        model, loader(rank), cross_entropy, max_drop=0.2, metric=metric, recalibrate=20, **BLOCK
    )
    return model.state_dict(), report.masks, report.to_dict()


def floor_within_a_drop(rank=0):
    """A search that a floor ends, which only one of the processes would notice."""
    model = mlp()
    report = wf.prune(
        model,
        [samples(40, seed=1)],
        cross_entropy,
        max_drop=0.5,
        metric=lambda model: 1 + 1e-3 * float((model[0].weight == 0).sum()),
        **{**BLOCK, "scope": "layer", "floor": 0.3},
    )
    return model.state_dict(), report.masks, report.to_dict()


def within_a_drop(rank=0):
    """A network as sparse as a metric allows, which is another one in each process; the first one's counts."""

    def metric(model):
        return (
            1.0 + rank * float(model.first.weight.count_nonzero()) - float(model.last.weight.eq(0).sum()) / 64
        )

    model = Net()
    report = wf.prune(model, batches(), cross_entropy, max_drop=0.2, metric=metric, **BLOCK)
    return model.state_dict(), report.masks, report.to_dict()


def left_out_padding(rank=0):
    """A layer that sees less of the last sample, of the second process, than of others; by its squared gradients."""
    (x, y), there = samples(24, (4, 5)), torch.ones(24, 4, dtype=torch.bool)
    there[-1, 2:] = False
    torch.manual_seed(0)
    model = Unpadded()
    curvature = wf.DiagonalFisher(24)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = wf.prune(model, [((x, there), y)], cross_entropy, 0.7, curvature=curvature, stages=2)
    told = [str(each.message) for each in caught if "slower way from here on" in str(each.message)]
    assert len(told) == (not distributed.is_initialized() or rank == 1)
    return model.state_dict(), report.masks, {**report.to_dict(), "warnings": []}


OTHERS = {
    "padding left out": left_out_padding,
    "partly pruned": lambda rank=0: pruned("net", BLOCK, 0.4),
    "partly pruned, factors": lambda rank=0: pruned("net", CASES["rows in factors"], 0.4),
    "ties": lambda rank=0: tied(),
    "wrapped": lambda rank=0: wrapped(),
    "shuffled": shuffled,
    "within a drop": within_a_drop,
    "family of shuffled": family_of_shuffled,
    "first alone": first_alone,
    "other buffers": other_buffers,
    "other buffers, first alone": lambda rank=0: other_buffers(rank, CASES["full"]),
    "random metric": random_metric,
    "floor within a drop": floor_within_a_drop,
}


def every_case(rank):
    found = {name: pruned("net", case) for name, case in CASES.items()}
    return found | {name: case(rank) for name, case in OTHERS.items()}


def same(results, expected):
    for state, masks, report in results:
        for name, value in expected[1].items():
            assert torch.equal(masks[name], value), name
        for name, value in expected[0].items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=name)
        for key in set(report) - {"seconds", "stages"}:
            assert report[key] == expected[2][key], key
        for stage, other in zip(report["stages"], expected[2]["stages"], strict=True):
            assert stage["sparsity"] == other["sparsity"]
            assert (stage["predicted"] is None) == (other["predicted"] is None)
            if other["predicted"] is not None:
                assert stage["predicted"] == pytest.approx(other["predicted"], rel=1e-3)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run(every_case, 2, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", [*CASES, *OTHERS])
def test_two_processes_prune_as_one_does(name, two):
    same([each[name] for each in two], OTHERS[name]() if name in OTHERS else pruned("net", CASES[name]))


FEW = {
    "joint": {**BLOCK, "stages": 2},
    "auto": CASES["auto"],
    "factors": CASES["rows in factors"],
    "1x2": CASES["1x2"],
    "obd": CASES["obd"],
    "magnitude": CASES["magnitude"],
}


def few_weights(rank):
    return {name: pruned("mlp", case) for name, case in FEW.items()}


def test_a_process_without_weights(tmp_path):
    three = run(few_weights, 3, tmp_path)
    for name, case in FEW.items():
        same([each[name] for each in three], pruned("mlp", case))


def what_fails(rank):
    """Messages of runs that fail in the second process, or in all."""
    found = {}

    def attempt(name, data=None, loss=cross_entropy, model=None, sparsity=0.5, **parts):
        model = Net() if model is None else model
        before = {key: value.clone() for key, value in model.state_dict().items()}
        try:
            wf.prune(model, batches() if data is None else data, loss, sparsity, **{**BLOCK, **parts})
        except wf.WoodfisherError as error:
            found[name] = str(error)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    poisoned = batches()
    poisoned[1][0][:, 0, 0, 0] = float("nan")
    attempt("all", poisoned)

    def loss(outputs, targets):
        if rank == 1:
            raise MemoryError("there is none")
        return cross_entropy(outputs, targets)

    attempt("second", loss=loss)
    broken = Net()
    if rank == 1:
        broken.first.weight.data[0] = float("inf")
    attempt("beginning", model=broken)
    attempt("data", batches(seed=rank))
    other = Net()
    other.first.weight.data *= 1 + rank
    attempt("weights", model=other)
    other = Net()
    other.norm.bias.data += rank
    attempt("weights that stay", model=other)
    attempt("weights that stay, first alone", model=other, **CASES["full"])
    attempt("generators", loader(0) if rank else batches())
    attempt("options", sparsity=0.5 + rank / 10)
    attempt("memory", curvature=wf.WoodFisher(23, 5, 1e-2, memory=1000 if rank else None))
    attempt("nothing", [])
    try:
        on_first_rank(lambda: lambda: None)
    except (AttributeError, pickle.PicklingError, wf.WoodfisherError) as error:
        found["unpicklable"] = str(error)
    result = pruned("net", BLOCK)
    assert 0 < result[2]["sparsity"] < 1
    return found


def test_what_fails_in_one_process_fails_in_all(tmp_path):
    first, second = run(what_fails, 2, tmp_path)
    assert re.search("in row|on process", first["all"])
    assert re.search("in row|on process", second["all"])
    assert "MemoryError: there is none" in second["second"]
    assert first["second"] == f"on process 1 of 2: {second['second']}"
    assert second["beginning"].startswith("the model's own weight 'first.weight' holds NaN or infinity")
    assert first["beginning"] == f"on process 1 of 2: {second['beginning']}"
    assert first["data"] == second["data"]
    assert "different samples" in first["data"] and "DistributedSampler" in first["data"]
    assert all("different weights" in first[name] for name in first if name.startswith("weights"))
    assert "different samples" in first["generators"]
    assert "different options" in first["options"]
    assert "different options" in first["memory"]
    assert "pickle" in first["unpicklable"].lower() and second["unpicklable"].startswith(
        "on process 0 of 2: "
    )
    assert "the data holds no batch; at least one sample is needed." in first["nothing"]


def one_dies(rank):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        wf.prune(Net(), batches(), cross_entropy, 0.5, **BLOCK)
    except wf.WoodfisherError as error:
        return str(error)


def test_a_process_that_is_killed_ends_the_others(tmp_path):
    with pytest.raises(FileNotFoundError, match="1.pt"):
        run(one_dies, 2, tmp_path)
    assert torch.load(tmp_path / "0.pt").startswith("the processes lost each other: one of them ended")


def out_of_step(rank):
    with pytest.raises(wf.WoodfisherError, match="do different things at the same time"):
        with together() as ranks:
            ranks.gather(1) if rank else ranks.sum(torch.ones(1))
    with pytest.raises(wf.WoodfisherError, match="do different things at the same time"):
        with together() as ranks:
            ranks.sum(torch.ones(1 + rank))
    with together() as ranks:
        sent = [torch.full((rank + 1,), to, dtype=torch.bfloat16) for to in range(ranks.size)]
        received = ranks.exchange([[t, torch.ones(2, to)] for to, t in enumerate(sent)])
        total = ranks.sum(torch.tensor([rank, 1]))
        shares = [ranks.gather(rank), ranks.first(lambda: rank), total.tolist(), ranks.rank, ranks.size]
    return [[(t.tolist(), u.shape) for t, u in received], *shares]


def test_what_ranks_do_together(tmp_path):
    for rank, result in enumerate(run(out_of_step, 2, tmp_path)):
        assert result[0] == [([rank] * (sender + 1), (2, rank)) for sender in range(2)]
        assert result[1:] == [[0, 1], 0, [1, 2], rank, 2]


@given(
    scores=st.lists(
        st.sampled_from([-0.0, 0.0, 1.0, 1.5, -2.0, 1e-300, float("inf"), -3e200])
        | st.floats(allow_nan=False)
    ),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_survivors_are_the_first_of_a_sorted_list(scores, data):
    count = len(scores)
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=torch.bool)
    cost = torch.tensor(
        data.draw(st.lists(st.integers(1, 3), min_size=count, max_size=count)), dtype=torch.int64
    )
    amount = data.draw(st.integers(0, 2 * count + 1))
    order = sorted((i for i in range(count) if kept[i]), key=lambda i: (-scores[i], i))
    stay, left = [], amount
    for i in order:
        if cost[i] <= left:
            stay.append(i)
            left -= int(cost[i])
    result = survivors(torch.tensor(scores, dtype=torch.float64), kept, amount, cost)
    assert result.nonzero().flatten().tolist() == sorted(stay)


def test_weights_are_dealt_out_evenly():
    layout = Layout({"a": (10,), "b": (7,), "c": (6,), "d": (4,), "e": (1,)})

    class Rank(Ranks):
        def __init__(self, rank):
            self.rank, self.size = rank, 2

    assert [dealt_names(layout, Rank(rank)) for rank in range(2)] == [["a", "d"], ["b", "c", "e"]]


def test_which_methods_are_dealt_out():
    dealt = {name for name, method in METHODS.items() if can_be_dealt(method)}
    assert dealt == {"woodfisher-block", "woodtaylor-block", "obd", "magnitude", "magnitude-layer"}
    block = METHODS["woodfisher-block"]
    for change in ({"pattern": wf.Channels()}, {"refine": 1}):
        assert not can_be_dealt(replace(block, **change))
    for change in ({"keep": "again"}, {"labels": "model"}, {"block_size": None}):
        assert not can_be_dealt(replace(block, curvature=replace(block.curvature, **change)))


def in_shards(model):
    """The model in shards, which a forward pass leaves whole for the time being."""
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.third, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with torch.no_grad():
        model.eval()(batches()[0][0])
    return model.train()


def gathered(model):
    reshard(model)
    return {name: whole(p) for name, p in model.named_parameters()} | dict(model.named_buffers())


def sharded(case):
    model = in_shards(Net())
    report = wf.prune(model, batches(), cross_entropy, 0.7, recalibrate=20, **case)
    return gathered(model), report.masks, report.to_dict()


def trained(model):
    """Weights, masks, momenta and norms of gradients of a model that is pruned while it is trained."""
    objective = wf.Objective(model, batches(), cross_entropy)
    schedule = wf.Polynomial(0.3, 0.8, begin=2, end=14, every=6)
    pruner = wf.Pruner(model, objective, schedule, curvature=wf.WoodFisher(23, 5, 1e-2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    norms = []
    for epoch in range(3):
        for x, y in batches():
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            norms.append(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
            optimizer.step()
            pruner.step()
        with torch.no_grad():
            model.eval()(x)
        model.train()
        if epoch == 1:
            state = pruner.state_dict()
            pruner.release()
            pruner = wf.Pruner(model, objective, schedule, curvature=wf.WoodFisher(23, 5, 1e-2))
            pruner.load_state_dict(state)
    state = gathered(model)
    momenta = {name: whole(optimizer.state[p]["exp_avg"]) for name, p in model.named_parameters()}
    return state, pruner.masks, momenta, norms


def check_refusals(rank):
    """What can't be pruned, saved or asked for ends in one error on all ranks."""
    mesh = init_device_mesh("cpu", (2,))
    linear = distribute_module(nn.Linear(4, 4), mesh, _split_outputs)
    flat = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    grid = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    both = parallelize_module(nn.Sequential(nn.Linear(4, 4)), grid["tensor"], {"0": ColwiseParallel()})
    fully_shard(both, mesh=grid["data"])
    outer = nn.Sequential(Net())
    fully_shard(outer, mesh=mesh)
    for model, says in (
        (linear, "'weight' is a DTensor .*tensor parallelism"),
        (both, "'0.weight' is a DTensor .*tensor parallelism"),
        (flat, "shard the model with .*fully_shard"),
        (outer[0], "a part of a model .* choose the part by params="),
    ):
        with pytest.raises(wf.WoodfisherError, match=says):
            wf.Objective(model, batches(), cross_entropy)
    model = in_shards(Net())
    for save in (wf.save_weights, wf.export.save_dense):
        with pytest.raises(wf.WoodfisherError, match="is spread over processes"):
            save(model, "nowhere.safetensors")
    with pytest.raises(wf.WoodfisherError, match="iterable of batches"):
        wf.prune(model, batches() if rank == 0 else 3, cross_entropy, 0.5, **BLOCK)


def _split_outputs(_, module, mesh):
    module.weight = nn.Parameter(distribute_tensor(module.weight, mesh, [Shard(0)]))


class Counting(Net):
    """A network with a buffer that training replaces, a number that it changes, and an output that it keeps."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.temperature = 1.0
        self.kept = None

    def forward(self, x):
        if self.training:
            self.seen = self.seen + len(x)
        self.kept = super().forward(x) / self.temperature
        return self.kept


def check_what_stays(rank):
    """Masks reach shards, and what training changed stays, whatever was whole for the time being."""
    model = in_shards(Counting())
    objective = wf.Objective(model, batches(), cross_entropy)
    pruner = wf.Pruner(model, objective, wf.one_shot(0.5), criterion="magnitude")
    before = {name: whole(p).clone() for name, p in model.named_parameters()}
    model(batches()[0][0]).sum().backward()
    model.temperature = 2.0
    dense = objective.current().mean_loss()
    model.zero_grad()
    pruner.step()
    assert float(model.seen) == 7 and objective.current().mean_loss() != dense
    state = pruner.state_dict()
    assert dense == pytest.approx(_mean_loss({**before, **dict(model.named_buffers())}, 2.0))

    def put_back():
        reshard(model)
        for name, p in model.named_parameters():
            local(p.data).copy_(own_part(before[name], p))
        with torch.no_grad():
            return model.eval()(batches()[0][0])

    put_back()
    pruner.apply(model)
    assert {name: int((p == 0).sum()) for name, p in gathered(model).items() if name in state["masks"]} == {
        name: int((~mask).sum()) for name, mask in state["masks"].items()
    }
    outputs = put_back()
    pruner.load_state_dict(state)
    with torch.no_grad():
        assert not torch.equal(model(batches()[0][0]), outputs)


def _mean_loss(weights, temperature):
    model = Counting().eval()
    model.load_state_dict(weights)
    model.temperature = temperature
    return wf.Objective(model, batches(), cross_entropy).mean_loss()


def check_another_is_written_to(rank):
    """A sharded copy takes what was pruned, unless it differs in what was not; all ranks say so at once."""
    model, other, plain = in_shards(Net()), in_shards(Net()), Net()
    objective = wf.Objective(model, batches(), cross_entropy)
    halved = objective.at(objective.weights / 2, objective.kept)
    for each in (other, plain):
        halved.write(each)
        assert torch.equal(gathered(each)["first.weight"], gathered(model)["first.weight"] / 2)
    reshard(other)
    with torch.no_grad():
        local(other.norm.weight)[-1] += 1 - rank  # in the shard of one rank
    with pytest.raises(wf.WoodfisherError, match="'norm.weight' of this model differs"):
        objective.write(other)
    assert torch.equal(gathered(other)["first.weight"], gathered(model)["first.weight"] / 2)


def in_one_group():
    model = Net()
    fully_shard([model.third, model.last], mesh=init_device_mesh("cpu", (2,)))
    report = wf.prune(model, batches(), cross_entropy, max_drop=0.02, metric=_goodness, floor=0.3, **BLOCK)
    return gathered(model), report.masks, report.to_dict()


def _goodness(model):
    x, y = batches()[0]
    with torch.no_grad():
        return 5 - float(cross_entropy(model(x), y))


def all_of_shards(rank):
    """One start of two processes for all that takes them."""
    check_refusals(rank)
    check_what_stays(rank)
    check_another_is_written_to(rank)
    return {
        "joint": sharded(CASES["joint"]),
        "full": sharded(CASES["full"]),
        "group": in_one_group(),
        "trained": trained(in_shards(Net())),
    }


@pytest.fixture(scope="module")
def in_two_shards(tmp_path_factory):
    return run(all_of_shards, 2, tmp_path_factory.mktemp("shards"))


@pytest.mark.parametrize("case", ["joint", "full"])
def test_a_sharded_model(case, in_two_shards):
    same([done[case] for done in in_two_shards], pruned("net", CASES[case]))


def test_modules_that_are_sharded_together(in_two_shards):
    model = Net()
    report = wf.prune(model, batches(), cross_entropy, max_drop=0.02, metric=_goodness, floor=0.3, **BLOCK)
    same([done["group"] for done in in_two_shards], (model.state_dict(), report.masks, report.to_dict()))


def test_a_model_is_pruned_while_it_is_trained_in_shards(in_two_shards):
    alone = trained(Net())
    for state, masks, momenta, norms in (done["trained"] for done in in_two_shards):
        for there, here in ((state, alone[0]), (momenta, alone[2])):
            for name in here:
                torch.testing.assert_close(there[name], here[name], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(norms, alone[3])
        for name, mask in masks.items():
            assert torch.equal(mask, alone[1][name])
            assert not state[name][~mask].any() and not momenta[name][~mask].any()


def torchrun(*arguments, **environment):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "woodfisher",
        "prune",
    ]
    source = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": source, **environment}
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=240, env=environment, check=False
    )


def test_the_command_line_in_two_processes(tmp_path):
    done = torchrun("--preset", "paper", "--sparsity", "0.9", "--out", str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    assert (
        json.loads(done.stdout)["kept"] == json.loads((tmp_path / "out" / "report.json").read_text())["kept"]
    )
    assert done.stderr.count("loading digits") == done.stderr.count("dense: accuracy") == 1
    failed = torchrun("--criterion", "magnitude", "--task", "nowhere", "--out", str(tmp_path / "none"))
    assert failed.returncode != 0 and not (tmp_path / "none").exists()
    assert "woodfisher: " in failed.stderr and "exitcode  : 2" in failed.stderr
