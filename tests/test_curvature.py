"""Every curvature against dense float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

import woodfisher as wf
from models import ConvNet, mlp, samples
from reference import cut, fisher, loop_rows, recursion
from woodfisher.curvature import base
from woodfisher.curvature.base import BlockDiagonalInverse, DiagonalInverse
from woodfisher.curvature.dense import DenseInverse, cholesky, primal_blocks, triangular_inverse
from woodfisher.curvature.kfac import KroneckerInverse
from woodfisher.curvature.lowrank import LowRankInverse
from woodfisher.curvature.rows import HeldRows
from woodfisher.errors import IndefiniteError
from woodfisher.memory import Scratch
from woodfisher.triangles import column_energies, full_gram

DAMPING = 1e-2


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(n, seed=0):
    A = random(n, n, seed=seed)
    return A @ A.T / n + 0.1 * torch.eye(n, dtype=torch.float64)


def block_diagonal(F, size):
    mask = torch.block_diag(*[torch.ones(size, size, dtype=torch.float64) for _ in range(len(F) // size)])
    return F * mask


def dual():
    G = random(3, 20)
    blocks = [(0, 10), (10, 20)]
    return LowRankInverse(HeldRows(G), 2, DAMPING, 3), fisher(G, DAMPING, 3, blocks)


def dual_from_float32_rows():
    G = random(3, 20).float()
    return LowRankInverse(HeldRows(G), 2, DAMPING, 3), fisher(G, DAMPING, 3, [(0, 10), (10, 20)])


def primal():
    G = random(12, 20)
    return primal_blocks(HeldRows(G), 4, DAMPING, 6), fisher(G, DAMPING, 6, cut([20], 5))


def dense():
    F = block_diagonal(spd(12), 4)
    return DenseInverse(torch.stack([F[i : i + 4, i : i + 4] for i in (0, 4, 8)]), "F"), F


def diagonal():
    values = random(7).square() + 0.1
    return DiagonalInverse(values), torch.diag(values)


def kronecker():
    A, S = spd(4, 1), spd(3, 2)
    return KroneckerInverse(A, S, DAMPING), torch.kron(S, A) + DAMPING * torch.eye(12, dtype=torch.float64)


def composed():
    """Parts in slices and at scattered indexes."""
    F = torch.zeros(9, 9, dtype=torch.float64)
    scattered = torch.tensor([8, 1, 5])
    F[scattered[:, None], scattered] = spd(3)
    rest = torch.tensor([0, 2, 3, 4, 6, 7])
    values = random(6).square() + 0.1
    F[rest, rest] = values
    return BlockDiagonalInverse(
        [(scattered, DenseInverse(spd(3)[None], "F")), (rest, DiagonalInverse(values))]
    ), F


OPERATORS = [dual, dual_from_float32_rows, primal, dense, diagonal, kronecker, composed]


@pytest.fixture(params=[None, 400], ids=["", "small-workspace"])
def _workspace(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(base, "WORKSPACE", request.param)


@pytest.mark.usefixtures("_workspace")
@pytest.mark.parametrize("make", OPERATORS)
def test_operator_against_dense_float64(make):
    finv, F = make()
    d = len(F)
    exact = torch.linalg.inv(F)
    close = {"rtol": 1e-5, "atol": 1e-9} if make is dual_from_float32_rows else {"rtol": 1e-9, "atol": 1e-11}
    v, V = random(d, seed=3), random(d, 4, seed=4)
    torch.testing.assert_close(finv.dense(), exact, **close)
    torch.testing.assert_close(finv @ v, exact @ v, **close)
    torch.testing.assert_close(finv @ V, exact @ V, **close)
    torch.testing.assert_close(finv.forward(v), F @ v, **close)
    torch.testing.assert_close(finv.forward(V), F @ V, **close)
    torch.testing.assert_close(finv.diag(), exact.diag(), **close)
    index = torch.randperm(d, generator=torch.Generator().manual_seed(0))[:6]
    torch.testing.assert_close(finv.submatrix(index), exact[index[:, None], index], **close)
    groups = index.reshape(3, 2)
    expected = torch.stack([exact[q[:, None], q] for q in groups])
    torch.testing.assert_close(finv.submatrices(groups), expected, **close)
    keep = torch.rand(d, generator=torch.Generator().manual_seed(1)) < 0.6
    x = torch.zeros(d, dtype=torch.float64)
    x[keep] = torch.linalg.solve(F[keep][:, keep], v[keep])
    torch.testing.assert_close(finv.restricted_solve(keep, v), x, **close)
    assert (finv @ v.float()).dtype == torch.float32


@pytest.mark.parametrize("make", OPERATORS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_inverse_is_symmetric_positive_definite_and_inverts_the_forward_product(make, seed):
    finv, F = make()
    u, v = random(len(F), seed=seed), random(len(F), seed=seed + 1)
    torch.testing.assert_close(u @ (finv @ v), v @ (finv @ u), rtol=1e-7, atol=1e-7)
    assert u @ (finv @ u) > 0
    torch.testing.assert_close(finv @ finv.forward(v), v, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f @ torch.ones(6), r"vector \(7,\) or matrix \(7, k\)"),
        (lambda f: f @ torch.ones(7, dtype=torch.int64), "floating-point"),
        (lambda f: f.submatrix(torch.tensor([0, 7])), r"0…6; 0…7 came"),
        (lambda f: f.submatrix(torch.tensor([0.0])), "int64"),
        (lambda f: f.restricted_solve(torch.ones(7), torch.ones(7)), "keep"),
    ],
)
def test_wrong_arguments_of_an_operator(call, message):
    with pytest.raises(wf.WoodfisherError, match=message):
        call(diagonal()[0])


def test_a_joint_update_factors_the_kept_weights_alone():
    """Products with F and restricted solves leave the factors of all weights unmade."""
    finv = LowRankInverse(HeldRows(random(3, 20)), 2, DAMPING, 3)
    keep = torch.rand(20, generator=torch.Generator().manual_seed(1)) < 0.6
    finv.restricted_solve(keep, finv.forward(random(20, seed=3)))
    assert "_factor" not in vars(finv)
    finv.diag()
    assert "_factor" in vars(finv)


@pytest.mark.parametrize("n", [1, 32, 33, 129, 200])
def test_products_of_triangles(n):
    G = random(n, 50)
    torch.testing.assert_close(full_gram(G), G @ G.mT)
    lower = torch.stack([random(n, n), random(n, n, seed=1)]).tril()
    energies = column_energies(G.expand(2, n, 50), Scratch(G.device), lower)
    torch.testing.assert_close(energies, (lower @ G).square().sum(1))


@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
def test_triangular_inverse(n):
    L = torch.linalg.cholesky(torch.stack([spd(n, 1), spd(n, 2)]))
    torch.testing.assert_close(triangular_inverse(L), torch.linalg.inv(L), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("block_size", [1, 5, 10, 1000, None])
def test_woodfisher_is_the_recursion_on_every_block(block_size, group):
    model, (x, y) = mlp(torch.float64), samples(12, dtype=torch.float64)
    estimator = wf.WoodFisher(12, block_size, DAMPING, group=group)
    finv = estimator(wf.Objective(model, [(x, y)], cross_entropy))
    G = loop_rows(model, cross_entropy, x, y, ["0.weight", "2.weight"], group)
    N = 12 // group
    expected = torch.zeros(36, 36, dtype=torch.float64)
    for a, b in cut([24, 12], block_size):
        expected[a:b, a:b] = recursion(G[:, a:b], DAMPING, N / group)
    torch.testing.assert_close(finv.dense(), expected, rtol=1e-8, atol=1e-8)


def test_grouped_rows_estimate_the_fisher_of_single_samples():
    """Near an optimum a mean over m samples shrinks the second moment by m; the estimate must not (§2)."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False).double()
    x = torch.randn(4000, 4, dtype=torch.float64)
    y = model(x).detach() + torch.randn(4000, 1, dtype=torch.float64)
    objective = wf.Objective(model, [(x, y)], mse_loss)
    v = torch.ones(4, dtype=torch.float64)
    single = wf.WoodFisher(4000, None, 1e-9)(objective).forward(v)
    grouped = wf.WoodFisher(4000, None, 1e-9, group=8)(objective).forward(v)
    assert (grouped - single).norm() < 0.15 * single.norm()


def test_removed_weights_are_left_out_of_every_block():
    model, (x, y) = mlp(torch.float64), samples(12, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight.view(-1)[[2, 3, 11]] = 0
    objective = wf.Objective(model, [(x, y)], cross_entropy)
    G = loop_rows(model, cross_entropy, x, y, ["0.weight", "2.weight"]) * objective.kept
    for block_size in (None, 36):
        finv = wf.WoodFisher(12, block_size, DAMPING)(objective)
        expected = fisher(G, DAMPING, 12, cut([24, 12], block_size)).inverse()
        torch.testing.assert_close(finv.dense(), expected, rtol=1e-8, atol=1e-8)


def test_diagonal_fisher_is_blocks_of_one():
    objective = wf.Objective(mlp(), [samples(12)], cross_entropy)
    for group in (1, 4):
        diagonal = wf.DiagonalFisher(12, DAMPING, group=group)(objective).diag()
        torch.testing.assert_close(diagonal, wf.WoodFisher(12, 1, DAMPING, group=group)(objective).diag())


def test_kfac_is_exact_for_one_sample_through_a_linear_layer():
    """The Fisher of one sample is (s aᵀ)(s aᵀ)ᵀ, a Kronecker product."""
    model, (x, y) = mlp(torch.float64), samples(1, dtype=torch.float64)
    objective = wf.Objective(model, [(x, y)], cross_entropy)
    expected = fisher(objective.rows(1), DAMPING, 1, [(0, 24), (24, 36)]).inverse()
    torch.testing.assert_close(wf.KFAC(1, DAMPING)(objective).dense(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("workspace", [1, 5000, 2**26])
def test_kfac_of_a_convolution_follows_its_definition(workspace, monkeypatch):
    monkeypatch.setattr("woodfisher.gradients.layer_rows._WORKSPACE", workspace)
    model, (x, y) = ConvNet().double().eval(), samples(5, (2, 6, 6), dtype=torch.float64)
    objective = wf.Objective(model, [(x, y)], cross_entropy, params=["conv.weight", "fc.weight"])
    patches = nn.functional.unfold(x, 3, padding=1)
    A = torch.einsum("nit,njt->ij", patches, patches) / 5
    outputs = model.conv(x).detach().requires_grad_()
    hidden = model.grouped(torch.relu(model.norm(outputs))).flatten(1)
    loss = cross_entropy(model.fc(hidden), y, reduction="sum")
    (s,) = torch.autograd.grad(loss, outputs)
    S = torch.einsum("nixy,njxy->ij", s, s) / (5 * 36)
    F = torch.kron(S, A) + DAMPING * torch.eye(72, dtype=torch.float64)
    index = torch.arange(72)
    submatrix = wf.KFAC(5, DAMPING)(objective).submatrix(index)
    torch.testing.assert_close(submatrix, F.inverse(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("model", "shape", "params", "message"),
    [
        (ConvNet(), (2, 6, 6), None, "'grouped.weight' has 2 groups"),
        (nn.Embedding(11, 3), (5,), "weight", "'weight' belongs to a Embedding"),
    ],
)
def test_kfac_names_layers_that_it_does_not_cover(model, shape, params, message):
    with pytest.raises(wf.WoodfisherError, match=message):
        wf.KFAC(4)(wf.Objective(model, [samples(4, shape)], cross_entropy, params=params))


def test_kfac_refuses_a_bias():
    with pytest.raises(wf.WoodfisherError, match=r"'0\.bias' is a vector"):
        wf.KFAC(4)(wf.Objective(mlp(), [samples(4)], cross_entropy, params="*"))


def test_kfac_refuses_a_layer_that_is_used_twice():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(6, 3))
    with pytest.raises(wf.WoodfisherError, match="called more than once"):
        wf.KFAC(4)(wf.Objective(model, [samples(4)], cross_entropy))


def exact_hessian(model, x, y, names):
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    sizes = [parameters[n].numel() for n in names]

    def loss(flat):
        parts = {n: v.view(parameters[n].shape) for n, v in zip(names, flat.split(sizes), strict=True)}
        return cross_entropy(torch.func.functional_call(model, {**parameters, **parts}, (x,)), y)

    flat = torch.cat([parameters[n].flatten() for n in names])
    return torch.autograd.functional.hessian(loss, flat)


def test_exact_hessian_and_its_diagonal():
    model, (x, y) = mlp(torch.float64), samples(12, dtype=torch.float64)
    objective = wf.Objective(model, [(x[:5], y[:5]), (x[5:], y[5:])], cross_entropy)
    H = exact_hessian(model, x, y, ["0.weight", "2.weight"])
    damped = H + torch.eye(36, dtype=torch.float64)
    torch.testing.assert_close(wf.ExactHessian(12, 1.0)(objective).dense(), damped.inverse())
    torch.testing.assert_close(wf.DiagonalHessian(12, 1.0)(objective).diag(), 1 / damped.diag())
    smallest = -float(torch.linalg.eigvalsh(H)[0])
    assert smallest > 1e-3
    once = wf.Objective(model, iter([(x, y)]), cross_entropy)
    torch.testing.assert_close(wf.ExactHessian(12, 1.0)(once).dense(), damped.inverse())
    with pytest.raises(wf.WoodfisherError, match=f"smallest eigenvalue.*{1e-3 - smallest:.3g}"):
        wf.ExactHessian(12, 1e-3)(objective)
    wf.ExactHessian(12, smallest * 1.01)(objective)
    with pytest.raises(wf.WoodfisherError, match="not positive"):
        wf.DiagonalHessian(12, 0.0)(wf.Objective(negative_diagonal(), [(x, y)], cross_entropy))


def negative_diagonal():
    model = mlp(torch.float64)
    with torch.no_grad():
        model[0].weight *= 3
        model[2].weight *= 8
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: wf.WoodFisher(damping=0), "damping must be a finite number above 0"),
        (lambda: wf.WoodFisher(damping=True), "damping must be a finite number above 0"),
        (lambda: wf.WoodFisher(damping=float("nan")), "damping"),
        (lambda: wf.DiagonalFisher(damping=-1e-3), "damping"),
        (lambda: wf.KFAC(damping=0), "damping"),
        (lambda: wf.ExactHessian(damping=-1), "at least 0"),
        (lambda: wf.WoodFisher(samples=0), "samples must be a whole number"),
        (lambda: wf.WoodFisher(samples=1.5), "samples"),
        (lambda: wf.WoodFisher(block_size=0), "block_size must be .* or None for one block"),
        (lambda: wf.WoodFisher(labels="sampled"), "labels must be one of data, model"),
    ],
)
def test_wrong_options(make, message):
    with pytest.raises(wf.WoodfisherError, match=message):
        make()


def test_what_does_not_fit_is_refused_before_any_gradient(monkeypatch):
    def data():
        raise AssertionError("data was read")
        yield

    monkeypatch.setattr("woodfisher.memory.available_memory", lambda _: 10_000)
    objective = wf.Objective(mlp(), data(), cross_entropy)
    with pytest.raises(
        wf.WoodfisherError, match=r"400 gradient rows of 36 weights 56.2 KiB.*9.77 KiB is avail"
    ):
        wf.WoodFisher(400, 20, keep="memory")(objective)
    with pytest.raises(wf.WoodfisherError, match=r"needs .*scratch.*9.77 KiB is avail"):
        wf.WoodFisher(400, 20)(objective)
    with pytest.raises(wf.WoodfisherError, match="the Hessian of 36 weights"):
        wf.ExactHessian()(objective)
    monkeypatch.setattr("woodfisher.memory.available_memory", lambda _: 2000)
    with pytest.raises(
        wf.WoodfisherError, match=r"second moments of what layers take and give 616 B.*exclude=.*WoodFisher"
    ):
        wf.KFAC()(objective)


def test_woodfisher_of_labels_from_the_model_is_repeatable():
    objective = wf.Objective(mlp(), [samples(12)], cross_entropy)
    estimator = wf.WoodFisher(12, labels="model", damping=DAMPING)
    assert torch.equal(estimator(objective).diag(), estimator(objective).diag())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("block_size", [5, 20, None])
def test_woodfisher_on_cuda_equals_the_cpu(block_size):
    model, (x, y) = mlp(), samples(12)
    on_cpu = wf.WoodFisher(12, block_size, DAMPING)(wf.Objective(model, [(x, y)], cross_entropy))
    on_gpu = wf.WoodFisher(12, block_size, DAMPING)(wf.Objective(mlp().cuda(), [(x, y)], cross_entropy))
    torch.testing.assert_close(on_gpu.diag().cpu(), on_cpu.diag(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(on_gpu.dense().cpu(), on_cpu.dense(), rtol=1e-4, atol=1e-4)


@pytest.mark.data
@pytest.mark.parametrize("samples_count", [1, 100, 1000])
@pytest.mark.parametrize("damping", [1e-8, 1e-5, 1e-1])
@pytest.mark.parametrize("block_size", [1, 50, 500, 2000, 40000])
def test_errors_on_real_rows(mlpnet_rows, samples_count, damping, block_size):
    """On a slice of the first layer and the two small layers, to keep dense float64 quick."""
    G = mlpnet_rows[:samples_count]
    columns = torch.arange(4000, 8000) if block_size != 40000 else torch.arange(4000, 6500)
    G = G[:, columns].contiguous()
    size = min(block_size, len(columns))
    count = len(columns) // size
    make = LowRankInverse if samples_count < size else primal_blocks
    finv = make(HeldRows(G), count, damping, samples_count)
    v = torch.stack([random(len(columns)), G[0].double()], dim=1)
    blocks = cut([len(columns)], size)[:count]
    diagonal, products = [], []
    for a, b in blocks:
        F = fisher(G[:, a:b], damping, samples_count, [(0, b - a)])
        diagonal.append(F.inverse().diag())
        products.append(torch.linalg.solve(F, v[a:b]))
    exact, product = torch.cat(diagonal), torch.cat(products)
    diag = finv.diag()
    assert (diag > 0).all()
    assert (diag - exact).norm() <= 1e-5 * exact.norm()
    assert ((diag - exact).abs() / exact).max() <= 1e-3
    assert ((finv @ v - product).norm(dim=0) <= 1e-5 * product.norm(dim=0)).all()


def test_kfac_with_a_loss_that_cannot_be_vectorised():
    def loss(outputs, targets):
        return cross_entropy(outputs, targets) * (1.0 if targets[0].item() >= 0 else 2.0)

    data = [samples(5, dtype=torch.float64)]
    exact = wf.KFAC(5, DAMPING)(wf.Objective(mlp(torch.float64), data, cross_entropy)).dense()
    with pytest.warns(wf.WoodfisherWarning, match="can't vectorise"):
        finv = wf.KFAC(5, DAMPING)(wf.Objective(mlp(torch.float64), data, loss))
    torch.testing.assert_close(finv.dense(), exact)


def test_the_damping_of_a_hessian_is_not_rounded():
    model = mlp()
    with torch.no_grad():
        model[0].weight[0] = 0
    shift = wf.DiagonalHessian(12, 0.1)._shift(wf.Objective(model, [samples(12)], cross_entropy))
    assert shift.dtype == torch.float64
    assert (shift == 0.1).all()


def test_all_columns_of_a_hessian_are_of_the_same_samples():
    inputs, targets = samples(200, dtype=torch.float64)
    data = DataLoader(
        TensorDataset(inputs, targets), 50, shuffle=True, generator=torch.Generator().manual_seed(0)
    )
    model = mlp(torch.float64)
    H = wf.ExactHessian(50, 1.0)(wf.Objective(model, data, cross_entropy)).dense().inverse()
    data.generator.manual_seed(0)
    x, y = next(iter(data))
    expected = exact_hessian(model, x, y, ["0.weight", "2.weight"]) + torch.eye(36, dtype=torch.float64)
    torch.testing.assert_close(H, expected)
    data.generator.manual_seed(0)
    diagonal = wf.DiagonalHessian(50, 1.0)(wf.Objective(model, data, cross_entropy)).diag()
    torch.testing.assert_close(1 / diagonal, expected.diag())


@pytest.mark.parametrize("kind", [wf.ExactHessian, wf.DiagonalHessian])
def test_hessians_without_damping_go_on_where_weights_are_removed(kind):
    torch.manual_seed(0)
    x = torch.randn(100, 8)
    model = torch.nn.Linear(8, 1)
    data = [(x, x[:, :3].sum(1, keepdim=True))]
    report = wf.prune(
        model, data, torch.nn.functional.mse_loss, 0.5, curvature=kind(100, damping=0), stages=2
    )
    assert report.kept == 4


@pytest.mark.parametrize(
    "curvature",
    [
        wf.WoodFisher(20, 6, 0.3),
        wf.DiagonalFisher(20, 0.3),
        wf.KFAC(20, 0.3),
        wf.ExactHessian(20, 3.0),
        wf.DiagonalHessian(20, 0.3),
        wf.Identity(),
    ],
    ids=lambda curvature: type(curvature).__name__,
)
def test_the_report_tells_the_damping(curvature):
    given = getattr(curvature, "damping", None)
    report = wf.prune(mlp(), [samples(20)], cross_entropy, 0.5, curvature=curvature, stages=1)
    assert [stage.damping for stage in report.stages] == [given]
    assert curvature(wf.Objective(mlp(), [samples(20)], cross_entropy)).damping == given


def test_what_stands_above_the_diagonal_is_not_taken_for_the_matrix():
    matrix = torch.tensor([[[1.0, torch.nan], [2.0, 1.0]]], dtype=torch.float64)
    with pytest.raises(IndefiniteError, match=r"eigenvalue, damping included, is -1 "):
        cholesky(matrix, "it")
    matrix[0, 1, 0] = torch.nan
    with pytest.raises(wf.WoodfisherError, match="it holds NaN or infinity"):
        cholesky(matrix, "it")


def test_products_with_no_columns_and_blocks_of_no_weights():
    model, data = mlp(), [samples(20)]
    for estimator in (wf.KFAC(20), wf.WoodFisher(20, 6, 0.1), wf.DiagonalFisher(20), wf.Identity()):
        finv = estimator(wf.Objective(model, data, cross_entropy))
        assert (finv @ torch.empty(36, 0)).shape == finv.forward(torch.empty(36, 0)).shape == (36, 0)
        assert finv.submatrix([]).shape == (0, 0)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda finv: finv @ [1.0] * 3, "a list came"),
        (lambda finv: finv @ torch.ones(3).numpy(), "a ndarray came"),
        (lambda finv: finv.restricted_solve(torch.ones(3) > 0, torch.ones(3).long()), "torch.int64 of shape"),
        (lambda finv: finv.restricted_solve([True] * 3, torch.ones(3)), "keep must be a bool .* a list"),
        (
            lambda finv: finv.group_energies(torch.tensor([[0, 1]]), torch.ones(2)),
            r"shape \(3,\); torch.float32 of shape \(2,\) came",
        ),
        (lambda finv: finv.submatrix([[0, 1], [1, 2]]), r"a vector .* \(2, 2\) came"),
        (lambda finv: finv.submatrix("ab"), "a vector of flat indexes; 'ab' came"),
        (lambda finv: finv.submatrices([[0, 1]]), "an int64 tensor of shape .* a list came"),
        (lambda finv: wf.WoodFisher().of_rows([[1.0]]), "matrix of one gradient a row.* a list came"),
    ],
)
def test_what_an_operator_can_not_take_is_refused(call, says):
    with pytest.raises(wf.WoodfisherError, match=says):
        call(DiagonalInverse(torch.ones(3)))


def test_scratch_is_handed_out_again():
    scratch = Scratch(torch.device("cpu"))
    first = scratch("a", (2, 3), torch.float32)
    assert scratch("a", (3, 2), torch.float32).data_ptr() == first.data_ptr()
    others = scratch("b", (2, 3), torch.float32), scratch("a", (2, 3), torch.float64)
    assert len({each.data_ptr() for each in (first, *others)}) == 3
    larger = scratch("a", (4, 3), torch.float32)
    assert larger.shape == (4, 3) and larger.is_contiguous() and larger.dtype == torch.float32
    assert scratch("a", (2, 3), torch.float32).data_ptr() == larger.data_ptr()


@pytest.mark.parametrize(("threads", "each"), [(1, 5), (2, 4), (3, 3), (8, 5)])
def test_groups_of_blocks_are_shared_out_evenly(monkeypatch, threads, each):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    groups = base.spans(12, base.WORKSPACE // 5, by_threads=True)
    assert [i for group in groups for i in range(12)[group]] == list(range(12))
    assert {group.stop - group.start for group in groups[:-1]} == {each}


@pytest.mark.parametrize("block_size", [None, 7, 1])
@pytest.mark.parametrize("scale", [1e-26, 1e-22, 1e-18, 1e15])
def test_a_loss_in_any_unit_has_the_same_curvature_in_that_unit(scale, block_size):
    model, data = mlp(), [samples(30)]

    def finv(scale, damping):
        objective = wf.Objective(model, data, lambda out, y: cross_entropy(out, y) * scale)
        return wf.WoodFisher(30, block_size, damping)(objective)

    expected, found = finv(1.0, 1e-3), finv(scale, 1e-3 * scale**2)
    torch.testing.assert_close(found.diag() * scale**2, expected.diag(), rtol=1e-3, atol=0)
    relative = finv(scale, wf.Relative(0.1)).damping
    assert relative / scale**2 == pytest.approx(finv(1.0, wf.Relative(0.1)).damping, rel=1e-4)


def test_rows_that_overflow_have_no_relative_damping():
    rows = wf.WoodFisher(damping=wf.Relative(1.0))
    with pytest.raises(wf.WoodfisherError, match=r"Relative\(factor=1.0\) is inf here"):
        rows.of_rows(torch.full((4, 6), 1e200, dtype=torch.float64))


def test_a_damping_that_rounding_swallows_is_told():
    rows = torch.randn(5, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.warns(wf.WoodfisherWarning, match="a damping of 1e-15 is so small .* raise it"):
        wf.WoodFisher(block_size=None, damping=1e-15).of_rows(rows) @ rows[0]
    finv = wf.WoodFisher(block_size=None, damping=1e-10).of_rows(rows)
    torch.testing.assert_close(finv.forward(finv @ rows[0]), rows[0], rtol=1e-3, atol=1e-5)
