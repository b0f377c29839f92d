"""Patterns, budgets and floors: what may go together, and how much of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

import woodfisher as wf
from models import ConvNet, samples
from reference import kkt
from test_curvature import random, spd
from woodfisher.curvature.base import DiagonalInverse, over_all
from woodfisher.curvature.dense import DenseInverse
from woodfisher.gradients.layout import Layout
from woodfisher.pruning.adaptive import Adaptive
from woodfisher.surgeon.patterns import parse_pattern
from woodfisher.surgeon.saliency import group_saliency
from woodfisher.surgeon.selection import Selection

QUICK = Adaptive(stages=5, window=30, held_out=20)
CURVATURE = wf.WoodFisher(samples=40, block_size=None, damping=1e-2)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))


def batches(shape=(8,), classes=4, count=200):
    inputs, targets = samples(count, shape, classes)
    return [(inputs[i : i + 50], targets[i : i + 50]) for i in range(0, count, 50)]


def by_size(weights, amount, selection):
    """What stays under the identity, where a group costs half of its squared norm."""
    flat = torch.as_tensor(weights, dtype=torch.float64)
    return selection(flat, DiagonalInverse(torch.ones_like(flat)), flat != 0, amount)


TABLE = [
    # pattern, shape, groups as flat indexes
    (wf.Block(2), (2, 4), [[0, 1], [2, 3], [4, 5], [6, 7]]),
    (wf.Block(2, 2), (2, 4), [[0, 1, 4, 5], [2, 3, 6, 7]]),
    (wf.Block(2), (1, 2, 1, 3), [[0, 3], [1, 4], [2, 5]]),
    (wf.Channels(), (2, 1, 1, 3), [[0, 1, 2], [3, 4, 5]]),
    (wf.Channels(), (3, 2), [[0, 1], [2, 3], [4, 5]]),
]


@pytest.mark.parametrize(("pattern", "shape", "expected"), TABLE)
def test_groups(pattern, shape, expected):
    (groups,) = pattern.groups(Layout({"w": shape}))
    assert sorted(map(sorted, groups.tolist())) == expected


def test_sets_of_n_m_lie_along_the_inputs():
    index, kept = wf.NM(1, 2).quota(Layout({"conv": (1, 4, 1, 2), "fc": (1, 2)}))
    assert kept == 1
    assert sorted(index.tolist()) == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 9]]
    index, _ = wf.NM(1, 2).quota(Layout({"up": (2, 1, 1, 2)}, {"up": 1}))
    assert sorted(index.tolist()) == [[0, 2], [1, 3]]


def test_a_transposed_convolution_has_its_inputs_first():
    model = nn.Sequential(nn.ConvTranspose2d(4, 2, 3), nn.Flatten(), nn.Linear(32, 3))
    objective = wf.Objective(model, None)
    assert objective.layout.transposed == {"0.weight": 1}
    assert [len(group) for group in wf.Channels().groups(objective.layout)] == [2, 3]


def test_heads_take_rows_of_the_inputs_and_columns_of_the_output():
    packed = Layout({"attn.in_proj_weight": (12, 4), "attn.out_proj.weight": (4, 4)})
    apart = Layout(
        {**{f"l.{k}.weight": (4, 4) for k in ("query", "key", "value")}, "l.out.dense.weight": (4, 4)}
    )
    for layout in (packed, apart):
        (groups,) = wf.Heads(2).groups(layout)
        rows = [[r * 4 + c for r in (0, 1, 4, 5, 8, 9) for c in range(4)], None]
        first = rows[0] + [48 + 4 * r + c for r in range(4) for c in (0, 1)]
        assert sorted(groups[0].tolist()) == sorted(first)
        assert sorted(groups.flatten().tolist()) == list(range(64))


def test_attention_without_a_removed_head_is_attention_without_it():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 4, batch_first=True)
    layer = nn.TransformerEncoderLayer(8, 4, 16, dropout=0.0, batch_first=True)
    layer.self_attn = attention
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(40, 3))
    report = wf.prune(
        model, batches((5, 8), 3), cross_entropy, 0.5, params=["0.self_attn.in_proj_weight", "*out_proj.weight"],
        pattern=wf.Heads(4), curvature=CURVATURE, stages=1,
    )  # fmt: skip
    rows = attention.in_proj_weight.detach().reshape(3, 4, 2, 8)
    gone = [h for h in range(4) if not rows[:, h].any()]
    columns = attention.out_proj.weight.detach().reshape(8, 4, 2)
    assert len(gone) == 2 and not columns[:, gone].any() and report.sparsity == 0.5
    assert all(rows[:, h].all() and columns[:, h].all() for h in range(4) if h not in gone)


@pytest.mark.parametrize("stages", [1, 3, QUICK])
@pytest.mark.parametrize("pattern", [wf.NM(2, 4), wf.NM(1, 4), wf.Block(4), wf.Block(2, 2), wf.Channels()])
def test_patterns_hold_and_the_rest_moves(pattern, stages):
    model = net()
    before = model[0].weight.detach().clone()
    report = wf.prune(model, batches(), cross_entropy, pattern=pattern, curvature=CURVATURE, stages=stages,
                      floor=0.1, sparsity=None if isinstance(pattern, wf.NM) else 0.5)  # fmt: skip
    masks = torch.cat([mask.flatten() for mask in report.masks.values()])
    layout = wf.Objective(model, None).layout
    if isinstance(pattern, wf.NM):
        index, n = pattern.quota(layout)
        assert (masks[index].sum(1) == n).all()
        assert report.sparsity == pattern.sparsity
    else:
        for groups in pattern.groups(layout):
            assert (masks[groups].all(1) | ~masks[groups].any(1)).all()
        assert 0.5 <= report.sparsity < 0.7
    if stages is not QUICK:  # stages that adapt may find that the weights had better stay
        assert (report.masks["0.weight"] & (model[0].weight != before)).any()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.floats(0, 1), st.data())
def test_on_the_way_to_n_m_exactly_the_amount_stays_and_never_less_in_a_set(seed, n, share, data):
    layout = Layout({"w": (6, 8)})
    selection = Selection(layout, wf.NM(n, 4))
    weights = torch.randn(48, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    least = 12 * n
    amount = least + round(share * (48 - least))
    keep = by_size(weights, amount, selection)
    sets = keep[wf.NM(n, 4).quota(layout)[0]].sum(1)
    assert int(keep.sum()) == amount and int(sets.min()) >= n
    later = data.draw(st.integers(least, amount))
    again = by_size(torch.where(keep, weights, 0), later, selection)
    assert int(again.sum()) == later and not (again & ~keep).any()


def test_a_set_with_fewer_weights_than_n_m_keeps_them():
    selection = Selection(Layout({"w": (2, 4)}), wf.NM(2, 4))
    with pytest.warns(wf.WoodfisherWarning, match=r"a sparsity of 62.50%, and not 50.00%"):
        keep = by_size([1.0, 0, 0, 0, 4, 3, 2, 1], 4, selection)
    assert keep.tolist() == [True, False, False, False, True, True, False, False]


@pytest.mark.parametrize("pattern", [wf.NM(2, 4), wf.NM(8, 16), wf.NM(16, 32)])
def test_of_equal_weights_the_first_of_a_set_stay(pattern):
    selection = Selection(Layout({"w": (2, 64)}), pattern)
    index, n = pattern.quota(selection.layout)
    keep = by_size(torch.ones(128), 64, selection)
    assert keep[index].tolist() == [[place < n for place in range(2 * n)]] * len(index)


def test_of_equal_weights_the_first_of_a_layer_count_for_the_floor():
    selection = Selection(Layout({"v": (40, 10), "w": (40, 10)}), floor=0.3)
    keep = by_size(torch.cat([torch.ones(400), torch.full((400,), 2.0)]), 400, selection)
    assert keep[:400].nonzero().flatten().tolist() == list(range(120))
    assert keep[400:].nonzero().flatten().tolist() == list(range(280))


def test_a_bias_that_begins_at_zero_is_no_removed_weight():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].bias.zero_()
        model[0].weight[1] = 0
    pattern = wf.Channels((("0.weight", "0.bias"),))
    objective = wf.Objective(model, batches(), cross_entropy, params=pattern.params)
    pruner = wf.Pruner(model, objective, wf.one_shot(0.5), pattern=pattern, curvature=CURVATURE)
    assert pruner.masks["0.bias"].tolist() == [True, False, True, True]
    report = wf.prune(model, batches(), cross_entropy, 0.5, params=pattern.params, pattern=pattern, stages=1,
                      curvature=CURVATURE)  # fmt: skip
    assert int(report.masks["0.bias"].sum()) == 2 and model[0].bias[report.masks["0.bias"]].all()


def test_groups_are_ranked_by_their_cost_for_each_weight():
    layout = Layout({"a": (2, 2), "b": (2, 4)})
    weights = [3.0, 0.1, 1, 1, 2, 2, 0.1, 0.1, 1.5, 1.5, 1.5, 1.5]
    keep = by_size(weights, 8, Selection(layout, wf.Channels()))
    assert keep.tolist() == [True] * 4 + [False] * 4 + [True] * 4
    keep = by_size(weights, 7, Selection(layout, wf.Channels()))
    assert keep.tolist() == [True] * 2 + [False] * 6 + [True] * 4


def test_the_cost_of_a_group_is_its_least_rise_of_the_quadratic_however_large(monkeypatch):
    F = spd(12)
    finv, w = DenseInverse(F[None], "F"), random(12)
    index = torch.arange(12).reshape(2, 6)
    expected = []
    for group in index:
        removed = torch.zeros(12, dtype=torch.bool)
        removed[group] = True
        delta = kkt(F, w, torch.zeros_like(w), removed)
        expected.append(float(delta @ F @ delta / 2))
    assert group_saliency(w, finv, index).tolist() == pytest.approx(expected)
    monkeypatch.setattr("woodfisher.curvature.base.LARGEST", 2)
    assert group_saliency(w, finv, index).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("largest", [4096, 3])
@pytest.mark.parametrize(
    ("count", "rows", "width"), [(1, 4, 9), (1, 4, 3), (3, 4, 7), (2, 30, 7), (2, 5, 12)]
)
def test_group_energies_are_those_of_the_dense_inverse(count, rows, width, largest, monkeypatch):
    monkeypatch.setattr("woodfisher.curvature.base.LARGEST", largest)
    torch.manual_seed(0)
    size, damping = 36, 0.03
    kept = torch.rand(48) > 0.2
    kept[torch.cumsum(kept, 0) > size] = False
    kept[(~kept).nonzero()[: size - int(kept.sum())]] = True
    held = wf.WoodFisher(block_size=size // count, damping=damping).of_rows(torch.randn(rows, size))
    finv = over_all([(slice(0, held.size), held)], kept, damping)
    index = torch.stack([torch.randperm(48)[:width] for _ in range(5)])
    w = torch.randn(48, dtype=torch.float64)
    dense = finv.dense()
    expected = [float(w[q] @ torch.linalg.solve(dense[q][:, q], w[q])) for q in index]
    assert finv.group_energies(index, w).tolist() == pytest.approx(expected, rel=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 0.5), st.floats(0.5, 1))
def test_no_layer_falls_below_the_floor(seed, floor, share):
    layout = Layout({"a": (4, 5), "b": (3, 7), "c": (30,)})
    scale = torch.cat([torch.full((20,), 1e-3), torch.full((21,), 1.0), torch.full((30,), 1e3)])
    weights = scale * torch.randn(71, generator=torch.Generator().manual_seed(seed))
    amount = max(round(share * 71), -(-round(71 * floor) // 1) + 3)
    keep = by_size(weights, amount, Selection(layout, floor=floor))
    assert int(keep.sum()) == min(amount, 71)
    for part in layout.split(keep).values():
        assert int(part.sum()) >= floor * part.numel() - 1e-9


def test_flops_are_counted_and_the_target_is_met_to_one_weight():
    model = ConvNet()
    objective = wf.Objective(model, batches((2, 6, 6), 3), cross_entropy)
    each = {name: int(part.flatten()[0]) for name, part in objective.layout.split(objective.flops()).items()}
    assert each == {"conv.weight": 2 * 36, "grouped.weight": 2 * 4, "fc.weight": 2}
    for sparsity in (0.3, 0.8):
        pruned = ConvNet()
        report = wf.prune(pruned, batches((2, 6, 6), 3), cross_entropy, sparsity, scope="flops",
                          curvature=CURVATURE, stages=2)  # fmt: skip
        assert 0 <= report.flops_removed - sparsity < 72 / int(objective.flops().sum())


def test_a_layer_whose_flops_are_unknown_is_named():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(wf.WoodfisherError, match=r"FLOPs of 'idle.weight' can't be counted"):
        wf.prune(Half(), batches(), cross_entropy, 0.5, criterion="magnitude", scope="flops")


def test_ends_can_be_left_out():
    layout = wf.Objective(ConvNet(), None, exclude=[":first", ":last"]).layout
    assert list(layout.shapes) == ["grouped.weight"]


WRONG = [
    ({"pattern": wf.NM(2, 5)}, r"2:5 does not divide '0.weight', which has 12 outputs and 8 inputs"),
    ({"pattern": wf.Block(4, 5)}, r"5x4 does not divide '0.weight'"),
    ({"pattern": wf.NM(2, 4), "sparsity": 0.9}, "reached at a sparsity of 0.5 and at no other"),
    ({"pattern": wf.NM(2, 4), "max_drop": 0.1, "metric": lambda model: 1.0}, "has one sparsity"),
    ({"pattern": "2:4"}, "pattern must be a value such as wf.NM"),
    ({"pattern": wf.Heads(2)}, "heads are made of query, key and value weights"),
    ({"pattern": wf.Channels(), "refine": 3, "stages": 1}, "refine swaps single weights"),
    ({"floor": 1.5}, r"floor must be a number in \[0, 1\)"),
    ({"floor": 0.5, "sparsity": 0.9}, "the floor of 0.5 in every layer keeps 72 of 144"),
    ({"scope": "best"}, "scope must be one of global, layer, flops"),
    ({"patern": wf.NM(2, 4)}, "there is no argument 'patern'"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options_say_what_to_do(options, message):
    model = net()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(wf.WoodfisherError, match=message):
        wf.prune(model, batches(), cross_entropy, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "make", [lambda: wf.NM(4, 4), lambda: wf.NM(0, 4), lambda: wf.Block(0), lambda: wf.Heads(0)]
)
def test_wrong_patterns_are_refused(make):
    with pytest.raises(wf.WoodfisherError, match=r"n:m keeps n of m|must be a whole number"):
        make()


def test_patterns_by_name():
    names = ["unstructured", "2:4", "1x4", "channels", "12heads"]
    assert [str(parse_pattern(name)) for name in names] == names
    with pytest.raises(wf.WoodfisherError, match="a pattern is one of"):
        parse_pattern("2-4")


def test_channels_of_transposed_convolutions_in_groups_are_theirs():
    index = Layout({"up": (4, 2, 1)}, {"up": 2}).index("up")
    assert index.squeeze(2).tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    model = nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(100, 4))
    objective = wf.Objective(model, batches((4, 3, 3)), cross_entropy, params="0.weight")
    assert objective.layout.transposed == {"0.weight": 4}
    options = {"params": "0.weight", "criterion": "magnitude"}
    report = wf.prune(model, batches((4, 3, 3)), cross_entropy, 0.5, pattern=wf.Channels(), **options)
    assert report.kept == 18
    with pytest.raises(wf.WoodfisherError, match="2:4 does not divide '0.weight'"):
        wf.prune(model, batches((4, 3, 3)), cross_entropy, pattern=wf.NM(2, 4), **options)


def test_scalars_are_groups_of_their_own():
    layout = Layout({"w": (2, 2), "scale": ()})
    assert sorted(sorted(g) for groups in wf.Channels().groups(layout) for g in groups.tolist()) == [
        [0, 1],
        [2, 3],
        [4],
    ]


def test_n_m_that_a_sparse_model_does_not_have_is_refused():
    model = net()
    with torch.no_grad():
        model[0].weight[:8] = 0
        model[2].weight[:3] = 0
    with pytest.raises(wf.WoodfisherError, match="are zero already, but not in the pattern 2:4"):
        wf.prune(model, batches(), cross_entropy, criterion="magnitude", pattern=wf.NM(2, 4))
    pruner = wf.Pruner(
        model,
        wf.Objective(model, batches(), cross_entropy),
        wf.one_shot(0.5),
        criterion="magnitude",
        pattern=wf.NM(2, 4),
    )
    with pytest.raises(wf.WoodfisherError, match="are zero already, but not in the pattern 2:4"):
        pruner.step()
    dense = net()
    wf.prune(dense, batches(), cross_entropy, criterion="magnitude", pattern=wf.NM(2, 4))
    again = wf.prune(dense, batches(), cross_entropy, criterion="magnitude", pattern=wf.NM(2, 4))
    assert again.sparsity == 0.5


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_floor_is_kept_or_refused_before_any_work(scope):
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 4))
    report = wf.prune(model, [], None, 0.9, criterion="magnitude", floor=0.1, scope=scope)
    assert [layer.kept for layer in report.layers] == [10, 4]
    objective = wf.Objective(net(), batches(), cross_entropy)
    with pytest.raises(wf.WoodfisherError, match="the floor of 0.05 in every layer keeps 8 of 144"):
        wf.Pruner(objective.model, objective, wf.Polynomial(0.2, 0.95, begin=0, end=9), floor=0.05)
    with pytest.raises(wf.WoodfisherError, match="lower one of them"):
        wf.prune(
            net(), [], None, 0.8, criterion="magnitude", floor=0.15, scope="layer", pattern=wf.Channels()
        )
    with pytest.raises(wf.WoodfisherError, match="without regard to a floor"):
        wf.prune(net(), batches(), cross_entropy, 0.5, stages=1, refine=3, floor=0.1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("criterion", ["magnitude", "woodfisher", "woodfisher-block"])
def test_a_sparsity_below_the_smallest_group_is_refused(criterion, scope):
    model = nn.Linear(8, 4)
    before = model.weight.clone()
    share = ", shared out among the layers" if scope == "layer" else ""
    with pytest.raises(
        wf.WoodfisherError, match=f"may stay{share}, and no group of the pattern 4x4 is as small"
    ):
        wf.prune(
            model, batches(), cross_entropy, 0.8, criterion=criterion, pattern=wf.Block(4, 4), scope=scope
        )
    assert torch.equal(model.weight, before)


def test_the_floor_counts_what_is_left_of_a_group():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    with torch.no_grad():
        model[1].weight[:, ::2] = 0
        model[1].weight *= 1e-3
    report = wf.prune(model, None, sparsity=0.6, criterion="magnitude", pattern=wf.Block(2, 2), floor=0.3)
    assert report.layers[1].kept >= 0.3 * 128


def test_a_class_of_ones_own_called_conv1d_is_a_convolution():
    class Conv1D(nn.Conv1d):
        pass

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(8, 4, 1))
    wf.prune(model, None, criterion="magnitude", pattern=wf.NM(2, 4))
    assert ((model[0].weight != 0).reshape(4, 2, 4).sum(2) == 2).all()


@pytest.mark.filterwarnings("ignore:every weight of '2.weight' is removed")
def test_a_group_that_is_too_large_is_passed_over():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 50), nn.ReLU(), nn.Linear(50, 1))
    with torch.no_grad():
        model[2].weight.fill_(9.0)
    report = wf.prune(model, None, sparsity=0.9, criterion="magnitude", pattern=wf.Channels())
    assert report.kept == 24  # six channels of four; the best-ranked group has 50 weights, and 25 may stay


@pytest.mark.parametrize("kind", ["separate", "in one", "by head"])
def test_heads_however_their_weights_are_stored(kind):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            if kind == "separate":
                self.query, self.key, self.value = (nn.Linear(8, 8, bias=False) for _ in range(3))
            else:
                self.add_module(
                    {"in one": "qkv", "by head": "query_key_value"}[kind], nn.Linear(8, 24, bias=False)
                )
            self.out = nn.Linear(8, 8, bias=False)

    model = Attention()
    wf.prune(model, None, sparsity=0.5, criterion="magnitude", pattern=wf.Heads(4))
    heads = (model.out.weight != 0).reshape(8, 4, 2).any(2).any(0)
    assert int(heads.sum()) == 2
    for name, module in list(model.named_children())[:-1]:
        shape = (4, 3, 2, 8) if name == "query_key_value" else (-1, 4, 2, 8)
        rows = (module.weight != 0).reshape(shape).any(3).any(-1)
        rows = rows if name == "query_key_value" else rows.mT
        assert all(torch.equal(part, heads) for part in rows.mT)


@pytest.mark.parametrize(
    "shapes",
    [{"l.qkv_proj": (16, 8)}, {"l.q_proj": (8, 8), "l.k_proj": (4, 8), "l.v_proj": (4, 8)}],
    ids=["in one", "separate"],
)
def test_heads_that_share_keys_and_values_are_refused(shapes):
    with pytest.raises(
        wf.WoodfisherError, match=r"cut into 4 heads: .*grouped-query attention\) are not supported"
    ):
        wf.Heads(4).groups(Layout({**shapes, "l.o_proj": (8, 8)}))


def test_heads_of_weights_outside_of_attention_are_explained():
    with pytest.raises(wf.WoodfisherError, match=r"alone with params=, as in params=\['\*\.query\.weight'"):
        wf.Heads(2).groups(Layout({"fc.weight": (8, 8)}))


@pytest.mark.parametrize("scope", ["global", "layer", "flops"])
def test_a_floor_that_a_pattern_breaks_is_refused(scope):
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    options = {"criterion": "magnitude", "pattern": wf.NM(1, 4), "scope": scope}
    with pytest.raises(
        wf.WoodfisherError, match=r"1:4 keeps 0.25 of every tensor, less than the floor of 0.5"
    ):
        wf.prune(model, [samples(9, (8,), classes=4)], cross_entropy, floor=0.5, **options)
    wf.prune(model, [samples(9, (8,), classes=4)], cross_entropy, floor=0.25, **options)
