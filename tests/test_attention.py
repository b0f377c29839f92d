"""Attention in plain products, and rows from what flows through these."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import woodfisher as wf
from models import Transformer, samples
from reference import loop_rows
from woodfisher.gradients.plain import in_plain_products

LAYERS = [
    lambda: nn.MultiheadAttention(8, 2, batch_first=True),
    lambda: nn.MultiheadAttention(8, 4, bias=False),
    lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=5),
    lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=5, bias=False, batch_first=True),
]


def causal(size):
    return torch.ones(size, size, dtype=torch.bool).triu(1)


def padding(samples, size):
    return torch.arange(size) >= torch.arange(1, samples + 1).clamp(max=size)[:, None]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"attn_mask": causal(5)},
        {"attn_mask": causal(5), "is_causal": True},
        {"attn_mask": torch.randn(5, 5, dtype=torch.float64)},
        {"key_padding_mask": padding(3, 5)},
        {
            "attn_mask": causal(5).double() * -9.0,
            "key_padding_mask": padding(3, 5).double().mul(-math.inf).nan_to_num(0.0, neginf=-math.inf),
        },
        {"average_attn_weights": False},
    ],
    ids=["none", "causal", "told", "added", "padding", "both", "heads"],
)
@pytest.mark.parametrize("layer", LAYERS)
def test_plain_products_give_what_torch_gives(layer, masks, need_weights):
    torch.manual_seed(0)
    module = layer().double().eval()
    q, k, v = (torch.randn(3, 5, size, dtype=torch.float64) for size in (8, module.kdim, module.vdim))
    cases = [(q, k, v)] if module.kdim != 8 else [(q, q, q), (q, k, k), (q, k, v)]
    for case in cases:
        inputs = case if module.batch_first else [x.transpose(0, 1) for x in case]
        if case[0] is case[2]:
            inputs = [inputs[0]] * 3
        expected = module(*inputs, need_weights=need_weights, **masks)
        with in_plain_products([module]):
            found = module(*inputs, need_weights=need_weights, **masks)
        torch.testing.assert_close(found, expected)
    assert "forward" not in vars(module)


def test_masks_of_each_head():
    module = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x, mask = torch.randn(3, 5, 8), torch.randn(6, 5, 5)
    expected = module(x, x, x, attn_mask=mask)
    with in_plain_products([module]):
        torch.testing.assert_close(module(x, x, x, attn_mask=mask), expected)


@pytest.mark.parametrize("options", [{"add_zero_attn": True}, {"add_bias_kv": True}])
def test_attention_with_keys_of_its_own_goes_the_usual_way(options):
    module = nn.MultiheadAttention(8, 2, batch_first=True, **options).eval()
    x = torch.randn(3, 5, 8)
    expected = module(x, x, x)
    with in_plain_products([module]):
        torch.testing.assert_close(module(x, x, x), expected)
        torch.testing.assert_close(module(x[0], x[0], x[0])[0], expected[0][0])


class Attending(nn.Module):
    """Attention to itself, or to half of what comes in, and a linear layer."""

    def __init__(self, layer, *, whole=True):
        super().__init__()
        self.layer, self.whole, self.fc = layer, whole, nn.Linear(8, 3)

    def forward(self, x):
        if not self.layer.batch_first:
            x = x.transpose(0, 1)
        keys = x if self.whole else 2 * x
        parts = x, keys[..., : self.layer.kdim], keys[..., : self.layer.vdim]
        output = self.layer(*([x] * 3 if self.whole and self.layer.kdim == 8 else parts))[0]
        return self.fc(output.sum(1 if self.layer.batch_first else 0))


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("layer", LAYERS)
def test_rows_of_attention_follow_from_what_flows(layer, group):
    torch.manual_seed(0)
    model, (x, y) = Attending(layer()).double().eval(), samples(8, (5, 8), dtype=torch.float64)
    objective = wf.Objective(model, [(x, y)], cross_entropy, params="*weight*")
    names = list(objective.layout.shapes)
    assert set(objective.factors(group)) == set(names)
    torch.testing.assert_close(
        objective.rows(8, group=group), loop_rows(model, cross_entropy, x, y, names, group)
    )


def test_packed_weights_of_attention_to_something_else_have_no_factor_form():
    torch.manual_seed(0)
    model = Attending(nn.MultiheadAttention(8, 2), whole=False).double().eval()
    x, y = samples(8, (5, 8), dtype=torch.float64)
    objective = wf.Objective(model, [(x, y)], cross_entropy, params="*weight*")
    assert set(objective.factors()) == {"layer.out_proj.weight", "fc.weight"}
    with pytest.raises(
        wf.WoodfisherError, match=r"'layer\.in_proj_weight' .*not by one product with all of it"
    ):
        next(objective.iter_layer_rows(8))
    names = list(objective.layout.shapes)
    torch.testing.assert_close(objective.rows(8), loop_rows(model, cross_entropy, x, y, names))


def test_layers_of_torchs_own_transformers_have_factor_form():
    torch.manual_seed(0)
    model, x, y = Transformer().double().eval(), torch.randint(11, (8, 5)), torch.randint(3, (8,))
    for bias in (model.layer.self_attn.in_proj_bias, model.layer.self_attn.out_proj.bias):
        nn.init.normal_(bias)  # zeros count as removed
    objective = wf.Objective(model, [(x, y)], cross_entropy, params=["layer.*weight", "layer.*bias", "fc.*"])
    names = [name for name in objective.layout.shapes if ".norm" not in name]
    assert set(objective.factors()) == set(names)
    chosen = wf.Objective(model, [(x, y)], cross_entropy, params=names)
    torch.testing.assert_close(chosen.rows(8), loop_rows(model, cross_entropy, x, y, names))
