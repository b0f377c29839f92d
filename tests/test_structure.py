import pytest
import torch

from woodfisher.saving.structure import fits, structure_of


def of(rows):
    return torch.tensor([[character == "x" for character in row] for row in rows])


@pytest.mark.parametrize(
    ("kept", "pattern"),
    [
        (of(["xxxx", "xxxx"]), "dense"),
        (of(["....", "...."]), "empty"),
        (of(["xxxx", "....", "xxxx"]), "channels"),
        (of(["x.xx", "x.xx", "x.xx"]), "input channels"),
        (of(["xx..x..x", ".xx..xx."]), "2:4"),
        (of(["x......x", ".x.....x"]), "1:4"),
        (of(["xx.xx.x.", ".xx..xx.", "xxxx...."] * 4), "unstructured"),
        (of(["xxxx....", "....xxxx"]), "1x4"),
        (of(["xx", "xx", "xx", "xx", "..", "..", "..", ".."])[:, :1].repeat(1, 2), "channels"),
        (of(["x.", "x.", "x.", "x.", ".x", ".x", ".x", ".x"]), "4x1"),
        (of(["xxxx....", "....xxxx"]).repeat_interleave(4, 0), "4x4"),
        (of(["xxxx....", "....xxxx"]).repeat_interleave(8, 0).repeat_interleave(2, 1), "8x8"),
        (of(["x.x", "x.."]), "unstructured"),
        (torch.tensor([True, False, True]), "channels"),
    ],
)
def test_patterns_are_found(kept, pattern):
    assert structure_of(kept) == pattern


def test_kernels_have_their_pattern_at_each_position():
    torch.manual_seed(0)
    chosen = torch.rand(8, 2, 4, 3, 3).argsort(2) < 2
    kept = chosen.reshape(8, 8, 3, 3)
    assert structure_of(kept) == "2:4"
    assert fits(kept, 2, 4)
    assert not fits(kept, 1, 4)
    kept = torch.zeros(8, 6, 3, 3).bool()
    kept[3] = True
    assert structure_of(kept) == "channels"


def test_sparse_weights_without_a_pattern_have_none():
    torch.manual_seed(0)
    for sparsity in (0.5, 0.9, 0.99):
        assert structure_of(torch.rand(64, 64) > sparsity) == "unstructured"
