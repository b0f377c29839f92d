"""Masks hold whatever trains the rest."""

import copy
import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import _global_optimizer_post_hooks, register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import woodfisher as wf
from models import ConvNet, Tied, mlp, samples
from training import Recorder, assert_held, data, plain, pruner_of, two_processes
from woodfisher.pruning.masks import Masks

SCHEDULE = wf.Milestones({1: 0.4, 3: 0.7})
KEPT = [36, 22, 22, 11, 11, 11]


class Nested(optim.Optimizer):
    """Momentum in tensors deep inside the state, beside codes of a quantised moment."""

    def __init__(self, params):
        super().__init__(params, {})

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state["moments"] = [torch.zeros_like(parameter), {"slow": (torch.zeros_like(parameter),)}]
                state["codes"] = torch.full(parameter.shape, 7, dtype=torch.uint8)
            fast, slow = state["moments"][0], state["moments"][1]["slow"][0]
            slow.lerp_(fast.lerp_(parameter.grad + 0.1, 0.5), 0.5)
            with torch.no_grad():
                parameter -= 0.1 * slow


class Both:
    """Two optimizers, one a layer."""

    def __init__(self, params):
        params = list(params)
        self.parts = [optim.Adam(params[:2]), optim.SGD(params[2:], lr=0.1, momentum=0.9)]

    @property
    def state(self):
        return {key: value for part in self.parts for key, value in part.state.items()}

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()

    def step(self):
        for part in self.parts:
            part.step()


def groups(params):
    params = list(params)
    return optim.AdamW([{"params": params[:2], "lr": 0.1}, {"params": params[2:], "weight_decay": 0.5}])


def loaded(params):
    """An optimizer that has moments of all weights from an earlier run."""
    params = list(params)
    optimizer, earlier = optim.Adam(params, lr=0.05), optim.Adam([p.detach().clone() for p in params])
    for parameter in earlier.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    earlier.step()
    optimizer.load_state_dict(earlier.state_dict())
    return optimizer


def kept_grads(model, optimizer, batch, _step):
    """Gradients are zeroed, not dropped."""
    optimizer.zero_grad(set_to_none=False)
    cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def clipped(model, optimizer, batch, _step):
    optimizer.zero_grad()
    cross_entropy(model(batch[0]), batch[1]).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()


def accumulated(model, optimizer, batch, _step):
    optimizer.zero_grad()
    for part in zip(batch[0].split(2), batch[1].split(2), strict=True):
        cross_entropy(model(part[0]), part[1]).backward()
    optimizer.step()


def with_closure(model, optimizer, batch, _step):
    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        return loss

    optimizer.step(closure)


def scaled(overflow):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def way(model, optimizer, batch, step):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(model(batch[0]), batch[1])
        scaler.scale(loss * (torch.inf if step in overflow else 1)).backward()
        before = model[0].weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model[0].weight, before) == (step in overflow)

    return way


def compiled(model, optimizer, batch, step):
    plain(torch.compile(model, backend="aot_eager"), optimizer, batch, step)


def compiled_step(model, optimizer, batch, _step):
    optimizer.zero_grad()
    cross_entropy(model(batch[0]), batch[1]).backward()
    torch.compile(optimizer.step, backend="aot_eager")()


CASES = {
    "sgd": (lambda p: optim.SGD(p, lr=0.1), plain),
    "momentum": (lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1), plain),
    "nesterov": (lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), plain),
    "adam": (lambda p: optim.Adam(p, lr=0.05, weight_decay=0.1), plain),
    "amsgrad": (lambda p: optim.Adam(p, lr=0.05, amsgrad=True), plain),
    "adamw": (lambda p: optim.AdamW(p, lr=0.05, weight_decay=0.5), plain),
    "foreach-sgd": (lambda p: optim.SGD(p, lr=0.1, momentum=0.9, foreach=True), plain),
    "foreach-adamw": (lambda p: optim.AdamW(p, lr=0.05, foreach=True), plain),
    "fused-sgd": (lambda p: optim.SGD(p, lr=0.1, momentum=0.9, fused=True), plain),
    "fused-adam": (lambda p: optim.Adam(p, lr=0.05, fused=True), plain),
    "fused-adamw": (lambda p: optim.AdamW(p, lr=0.05, fused=True), plain),
    "rmsprop": (lambda p: optim.RMSprop(p, centered=True, momentum=0.9), plain),
    "adagrad": (lambda p: optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1), plain),
    "rprop": (optim.Rprop, plain),
    "nested": (Nested, plain),
    "groups": (groups, plain),
    "two": (Both, plain),
    "loaded": (loaded, plain),
    "zeroed": (lambda p: optim.Adam(p, lr=0.05), kept_grads),
    "clipping": (lambda p: optim.SGD(p, lr=0.1, momentum=0.9), clipped),
    "accumulation": (lambda p: optim.Adam(p, lr=0.05), accumulated),
    "lbfgs": (lambda p: optim.LBFGS(p, lr=0.5, max_iter=4), with_closure),
    "closure": (lambda p: optim.AdamW(p, lr=0.05), with_closure),
    "scaler": (lambda p: optim.Adam(p, lr=0.05), scaled(overflow=())),
    "skipped": (lambda p: optim.Adam(p, lr=0.05), scaled(overflow=(2, 3))),
    "compiled": (lambda p: optim.SGD(p, lr=0.1, momentum=0.9), compiled),
    "compiled-step": (lambda p: optim.SGD(p, lr=0.1, momentum=0.9), compiled_step),
}


@pytest.mark.parametrize("case", CASES)
def test_masks_hold(case):
    make, way = CASES[case]
    model, seen = mlp(), []
    with torch.no_grad():
        model[0].weight[0, 0] = 0
    pruner = pruner_of(model, SCHEDULE, curvature=Recorder(seen=seen))
    optimizer = make(model.parameters())
    kept = []
    for step, batch in enumerate([*data(), data()[0]]):
        way(model, optimizer, batch, step)
        assert_held(model, pruner, optimizer)
        before = pruner.masks
        pruner.step()
        assert_held(model, pruner, optimizer)
        assert not any((now & ~before[name]).any() for name, now in pruner.masks.items())
        kept.append(sum(int(mask.sum()) for mask in pruner.masks.values()))
    assert kept == [35, *KEPT[1:]]
    assert [int(kept.sum()) for _, kept, _ in seen] == [35, 22]
    for rows, mask, _ in seen:
        assert not rows[:, ~mask].any()
        assert rows[:, mask].any(0).all()
    if case == "nested":
        assert all((state["codes"] == 7).all() for state in optimizer.state.values())


def test_the_memory_of_lbfgs_starts_anew_when_weights_go():
    model = mlp()
    pruner = pruner_of(model, wf.Milestones({1: 0.5}))
    optimizer = optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    lengths = []
    for batch in data()[:3]:
        with_closure(model, optimizer, batch, 0)
        pruner.step()
        lengths.append(sum(len(state["old_dirs"]) for state in optimizer.state.values()))
    assert lengths[0] > lengths[1] == 0 < lengths[2]


def test_an_earlier_state_of_lbfgs_may_be_loaded_before_that_of_the_pruner():
    model = mlp()
    pruner = pruner_of(model, wf.Milestones({1: 0.5}))
    optimizer = optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    with_closure(model, optimizer, data()[0], 0)
    pruner.step()
    saved = copy.deepcopy([each.state_dict() for each in (model, optimizer, pruner)])
    ends = []
    for _ in range(2):
        with_closure(model, optimizer, data()[1], 0)
        pruner.step()
        ends.append(model[0].weight.detach().clone())
        for each, state in zip((model, optimizer, pruner), copy.deepcopy(saved), strict=True):
            each.load_state_dict(state)
    assert torch.equal(*ends)


def test_a_state_of_kept_weights_is_left_alone():
    """Without weights to remove, training is the same to the last bit as without masks."""
    trained = []
    for pruned in (False, True):
        model = mlp()
        pruner = pruner_of(model, wf.one_shot(0.0)) if pruned else None
        optimizer = optim.AdamW(model.parameters(), lr=0.05)
        for batch in data():
            plain(model, optimizer, batch)
            if pruner is not None:
                pruner.step()
        trained.append([*model.parameters(), *(s["exp_avg"] for s in optimizer.state.values())])
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


def test_the_norm_that_gradients_are_clipped_by_counts_kept_weights_only():
    model, batch = mlp(), data()[0]
    pruner = pruner_of(model, wf.one_shot(0.7))
    pruner.step()
    free = copy.deepcopy(model)
    for net in (model, free):
        cross_entropy(net(batch[0]), batch[1]).backward()
    grads = {name: p.grad.clone() for name, p in free.named_parameters()}
    everything = torch.cat([g.flatten() for g in grads.values()]).norm()
    for name, kept in pruner.masks.items():
        grads[name] *= kept
    expected = torch.cat([g.flatten() for g in grads.values()]).norm()
    assert expected < 0.9 * everything
    torch.testing.assert_close(nn.utils.clip_grad_norm_(model.parameters(), 1.0), expected)


def test_a_moving_average_follows_once_masks_are_applied():
    model = mlp()
    pruner = pruner_of(model, SCHEDULE)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for batch in data():
        plain(model, optimizer, batch)
        report = pruner.step()
        ema.update_parameters(model)
        if report is not None:
            assert any(ema.module.get_parameter(n)[~kept].any() for n, kept in pruner.masks.items())
            pruner.apply(ema)
        for name, kept in pruner.masks.items():
            averaged = ema.module.get_parameter(name)
            assert not averaged[~kept].any()
            assert averaged[kept].all()
    with pytest.raises(wf.WoodfisherError, match=r"of shape \(4, 6\)"):
        pruner.apply(nn.Sequential(nn.Linear(3, 3)))


def pruned_model(build=mlp, shape=(6,)):
    model = build()
    pruner = pruner_of(model, wf.one_shot(0.5), [samples(8, shape)])
    pruner.step()
    return model, pruner


@pytest.mark.parametrize("way", ["deepcopy", "save", "state_dict"])
def test_copies_hold_plain_tensors(way, tmp_path):
    model, pruner = pruned_model()
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "save":
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    else:
        torch.save(model.state_dict(), tmp_path / "state.pt")
        other = mlp(seed=1)
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert list(other.state_dict()) == list(mlp().state_dict())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    plain(other, optim.SGD(other.parameters(), lr=0.1), data()[0])
    assert all(other.get_parameter(name)[~kept].any() for name, kept in pruner.masks.items())
    again = pruner_of(other, wf.one_shot(0.8))
    again.step()
    assert again.sparsity == pytest.approx(0.8, abs=0.02)


def test_weights_loaded_into_the_model_are_masked_after_the_next_step():
    model, pruner = pruned_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    model.load_state_dict(mlp(seed=3).state_dict())
    plain(model, optimizer, data()[0])
    assert_held(model, pruner, optimizer)


def test_a_compiled_model_and_the_one_inside_are_the_same():
    weights = []
    for compile_ in (lambda m: m, lambda m: torch.compile(m, backend="aot_eager")):
        model = mlp()
        outer = compile_(model)
        pruner = pruner_of(outer, SCHEDULE)
        optimizer = optim.SGD(outer.parameters(), lr=0.1, momentum=0.9)
        for batch in data():
            plain(outer, optimizer, batch)
            pruner.step()
            assert_held(model, pruner, optimizer)
        pruner.apply(outer)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        assert pruner.sparsity == 1 - 11 / 36
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_two_processes_have_one_model(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=two_processes, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(180)
        process.kill()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for part in (lambda r: r["model"], lambda r: r["pruner"]["masks"]):
        assert all(torch.equal(value, part(second)[name]) for name, value in part(first).items())
    assert sum(int(mask.sum()) for mask in first["pruner"]["masks"].values()) == 11
    assert first["error"].startswith("the gradient of '0.weight' in row")
    assert second["error"] == f"on process 0 of 2: {first['error']}"


@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(set(CASES) - {"compiled", "compiled-step", "skipped", "scaler"})),
            st.floats(1e-4, 0.5),
            st.integers(1, 3),
        ),
        min_size=1,
        max_size=4,
    ),
    st.floats(0, 0.9),
)
@settings(max_examples=15, deadline=None)
@pytest.mark.filterwarnings("ignore:every weight of")
def test_a_removed_weight_never_returns(segments, final):
    model, batches = mlp(), data()
    total = sum(steps for *_, steps in segments)
    pruner = pruner_of(model, wf.Polynomial(0, final, begin=0, end=total - 1), criterion="magnitude")
    removed, step = torch.zeros(36, dtype=torch.bool), 0
    for case, lr, steps in segments:
        make, way = CASES[case]
        optimizer = make(model.parameters())
        for group in getattr(optimizer, "param_groups", ()):
            group["lr"] = lr
        for _ in range(steps):
            way(model, optimizer, batches[step % len(batches)], step)
            assert_held(model, pruner, optimizer)
            pruner.step()
            assert_held(model, pruner, optimizer)
            step += 1
            now = ~torch.cat([kept.flatten() for kept in pruner.masks.values()])
            assert not (removed & ~now).any()
            removed = now
    assert int(removed.sum()) == 36 - round((1 - final) * 36)


def test_a_pruner_that_is_dropped_leaves_nothing():
    gc.collect()
    hooks = len(_global_optimizer_post_hooks)
    model, pruner = pruned_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    plain(model, optimizer, data()[0])
    pruner.step()
    gone, removed = weakref.ref(pruner), ~pruner.masks["0.weight"]
    gc.disable()
    try:
        del pruner
        assert gone() is None
    finally:
        gc.enable()
    assert len(_global_optimizer_post_hooks) == hooks
    assert not any(p._backward_hooks for p in model.parameters())
    plain(model, optimizer, data()[0])
    assert model[0].weight[removed].any()
    pruner_of(model, SCHEDULE)


def test_release_lets_go():
    model, pruner = pruned_model()
    removed = ~pruner.masks["0.weight"]
    pruner.release()
    plain(model, optim.SGD(model.parameters(), lr=0.1), data()[0])
    assert model[0].weight[removed].any()
    with pytest.raises(wf.WoodfisherError, match="let its model go by release"):
        pruner.step()
    pruner_of(model, SCHEDULE)


def test_weights_frozen_at_first_are_held_when_they_are_trained():
    model = mlp()
    model.requires_grad_(False)
    pruner = pruner_of(model, wf.one_shot(0.5))
    assert not model[0].weight.requires_grad
    pruner.step()
    model[0].requires_grad_(True)
    cross_entropy(model(data()[0][0]), data()[0][1]).backward()
    removed = ~pruner.masks["0.weight"]
    assert removed.any()
    assert not model[0].weight.grad[removed].any()
    assert model[0].weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_masks_follow_another_dtype(dtype):
    model, pruner = pruned_model()
    model.to(dtype)
    batch = (data()[0][0].to(dtype), data()[0][1])
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plain(model, optimizer, batch)
    assert_held(model, pruner, optimizer)
    assert pruner.sparsity == 0.5
    assert model[0].weight.dtype == dtype


@pytest.mark.cuda
def test_masks_follow_to_another_device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = mlp()
    pruner = pruner_of(model, wf.Milestones({0: 0.5, 1: 0.8}))
    pruner.step()
    model.to("cuda")
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plain(model, optimizer, tuple(part.to("cuda") for part in data()[0]))
    assert {mask.device.type for mask in pruner.masks.values()} == {"cuda"}
    assert_held(model, pruner, optimizer)
    pruner.step()
    assert_held(model, pruner, optimizer)
    assert pruner.sparsity == 1 - 7 / 36


@pytest.mark.parametrize(("build", "shape"), [(ConvNet, (2, 6, 6)), (Tied, (5,))], ids=["conv", "tied"])
def test_other_models(build, shape):
    model, pruner = pruned_model(build, shape)
    optimizer = optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(3):
        plain(model, optimizer, samples(8, shape))
        assert_held(model, pruner, optimizer)
        pruner.step()


def test_an_optimizer_of_an_earlier_copy_is_told_of():
    model = mlp()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    plain(model, optimizer, data()[0])
    model = copy.deepcopy(model)
    pruner = pruner_of(model, SCHEDULE)
    plain(model, optimizer, data()[0])
    with pytest.raises(wf.WoodfisherError, match="built before the model was moved, copied or loaded"):
        pruner.step()


def test_another_model_of_the_same_shapes_raises_no_alarm():
    model, other = mlp(), mlp(seed=1)
    pruner = pruner_of(model, wf.Milestones({2: 0.5}))
    critic, optimizer = optim.SGD(other.parameters(), lr=0.1), optim.SGD(model.parameters(), lr=0.1)
    for step, batch in enumerate(data()):
        plain(other, critic, batch)
        if step:
            plain(model, optimizer, batch)
        pruner.step()
    assert pruner.sparsity == 0.5
    assert other[0].weight.all()


def test_pruning_what_nobody_trains_while_another_is_trained_is_warned_of():
    model, other = mlp(), mlp(seed=1)
    pruner = pruner_of(model, wf.Milestones({1: 0.5}))
    optimizer = optim.SGD(other.parameters(), lr=0.1)
    for batch in data()[:1]:
        plain(other, optimizer, batch)
        pruner.step()
    with pytest.warns(wf.WoodfisherWarning, match="no optimizer has trained since the pruner was made"):
        report = pruner.step()
    assert len(report.warnings) == 1


def test_a_tensor_that_was_exchanged_is_told_of():
    model, pruner = pruned_model()
    model.load_state_dict(mlp().state_dict(), assign=True)
    with pytest.raises(wf.WoodfisherError, match=r"'0.weight' is another tensor.*assign=True"):
        pruner.step()


def test_one_model_takes_one_pruner():
    model, first = pruned_model()
    with pytest.raises(wf.WoodfisherError, match="another pruner holds masks on '0.weight'.*release"):
        pruner_of(model, SCHEDULE)
    assert first.sparsity == 0.5
    first.release()
    pruner_of(model, SCHEDULE)


def test_pruners_may_be_collected_in_the_midst_of_a_step():
    held = []
    handle = register_optimizer_step_post_hook(lambda *_: held.clear())
    try:
        for model in (mlp(), mlp()):
            parameters = dict(model.named_parameters())
            held.append(Masks(parameters, {name: p != 0 for name, p in parameters.items()}))
        model = mlp()
        model(torch.randn(2, 6)).sum().backward()
        optim.SGD(model.parameters(), 0.1).step()
    finally:
        handle.remove()
    assert not held
