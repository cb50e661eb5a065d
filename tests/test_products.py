"""Sums of products of factors against dense matrices."""

import numpy as np
import pytest
import torch

from fedkrso_app.core import products

M, N, R = 7, 9, 3
SHARES = [0.5, 0.2, 0.3]


def factors(*ranks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return [draw(M, r) for r in ranks], [draw(r, N) for r in ranks]


def dense(Bs, As, p):
    return sum(share * B @ A for share, B, A in zip(p, Bs, As, strict=True))


def close(a, b, atol=1e-12):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=atol)


@pytest.mark.parametrize("ranks", [(3, 3, 3), (2, 1, 4), (1, 1, 1)])
def test_spectral_is_the_dense_svd_with_orthonormal_rows(ranks):
    Bs, As = factors(*ranks)
    B, A = products.spectral(Bs, As, SHARES, R, torch.eye(R, N, dtype=torch.float64))
    U, S, Vh = torch.linalg.svd(dense(Bs, As, SHARES))
    close(B @ A, U[:, :R] * S[:R] @ Vh[:R])
    close(A @ A.T, torch.eye(R, dtype=torch.float64))
    close(B.norm(dim=0), S[:R])
    for rank in (1, 2):  # a prefix is the best approximation of its rank
        close(B[:, :rank] @ A[:rank], U[:, :rank] * S[:rank] @ Vh[:rank])


@pytest.mark.parametrize("zero", [False, True])
def test_spectral_completes_what_the_sum_lacks_by_rows_that_can_train(zero):
    Bs, As = factors(1)
    Bs = [B * 0 for B in Bs] if zero else Bs
    B, A = products.spectral(Bs, As, [1.0], R, torch.randn(R, N, dtype=torch.float64))
    close(B @ A, Bs[0] @ As[0])
    close(A @ A.T, torch.eye(R, dtype=torch.float64))
    close(B[:, 1:], torch.zeros(M, R - 1, dtype=torch.float64))


def test_spectral_changes_no_pair_that_it_has_made():
    B, A = products.spectral(*factors(3), [1.0], R, torch.zeros(R, N))
    again, rows = products.spectral([B], [A], [1.0], R, torch.zeros(R, N))
    close(again @ rows, B @ A)
    close(again.abs(), B.abs(), 1e-10)  # up to the signs


def stacked(Bs, As):
    return np.stack([A.numpy() for A in As]), np.stack([B.T.numpy() for B in Bs])


def test_the_residual_is_what_the_means_miss_in_c_minus_one_blocks():
    Bs, As = factors(2, 2, 2)
    D_A, D_B = products.residual(*stacked(Bs, As), SHARES)
    B, A = (sum(p * X for p, X in zip(SHARES, Xs, strict=True)) for Xs in (Bs, As))
    close(D_B.T @ D_A, dense(Bs, As, SHARES) - B @ A)
    assert D_A.shape == (2 * 2, N) and D_B.shape == (2 * 2, M)


def test_the_residual_of_one_client_is_empty_and_that_of_equal_ones_or_of_one_A_is_zero():
    Bs, As = factors(2, 2, 2)
    assert [len(D) for D in products.residual(*stacked(Bs[:1], As[:1]), [1.0])] == [0, 0]
    equal = products.residual(*stacked(Bs[:1] * 3, As[:1] * 3), SHARES)
    close(equal[0], np.zeros_like(equal[0]), 1e-15)
    frozen = products.residual(*stacked(Bs, As[:1] * 3), SHARES)
    close(frozen[1].T @ frozen[0], np.zeros((M, N)), 1e-14)


def test_the_ridge_solves_its_least_squares_problem():
    Bs, As = factors(2, 2, 2)
    B, A = (sum(p * X for p, X in zip(SHARES, Xs, strict=True)) for Xs in (Bs, As))
    missing = dense(Bs, As, SHARES) - B @ A
    for penalty in (0.0, 0.01, 1.0):
        lam = penalty * float((A @ A.T).trace()) / 2
        rows = torch.cat([A.T, lam**0.5 * torch.eye(2, dtype=torch.float64)])  # one problem, dense and stacked
        expected = torch.linalg.lstsq(rows, torch.cat([missing.T, torch.zeros(2, M, dtype=torch.float64)])).solution.T
        close(products.ridge(Bs, As, SHARES, penalty), expected)
    best = products.ridge(Bs, As, SHARES, 0.0)
    assert (missing - best @ A).norm() < missing.norm()
    close(products.ridge(Bs, As, SHARES, 1e15), torch.zeros(M, 2, dtype=torch.float64))
    close(products.ridge(Bs[:1] * 3, As[:1] * 3, SHARES, 0.0), torch.zeros(M, 2, dtype=torch.float64))


def test_the_norm_of_a_product_is_that_of_the_dense_one():
    (B,), (A,) = factors(3)
    assert products.squared_norm(A, B) ** 0.5 == pytest.approx(float((B @ A).norm()))


def test_layers_by_component_come_back_and_a_smaller_rank_is_the_first_rows():
    sizes = [(M, N), (4, 5)]
    pairs = [(torch.randn(R, n), torch.randn(m, R)) for m, n in sizes]
    A, B = products.by_component(pairs, R)
    assert (A.shape, B.shape) == ((R, N + 5), (R, M + 4))
    for (A_l, B_l), (A_r, B_r) in zip(pairs, products.by_layer(A, B, sizes), strict=True):
        assert torch.equal(A_l, A_r) and torch.equal(B_l, B_r)
    for both, first in zip((A, B), products.by_component(pairs, 2), strict=True):
        assert np.array_equal(both[:2], first)


def test_truncated_components_are_each_layers_best_approximation():
    sizes = [(M, N), (4, 5)]
    pairs = [(torch.randn(3, n), torch.randn(m, 3)) for m, n in sizes]
    A, B = products.truncated(*products.by_component(pairs, 3), sizes, 1)
    for (A_l, B_l), (A_r, B_r) in zip(pairs, products.by_layer(A, B, sizes), strict=True):
        U, S, Vh = torch.linalg.svd(B_l @ A_l)
        close(B_r @ A_r, U[:, :1] * S[:1] @ Vh[:1], 1e-5)
    assert A.shape[0] == B.shape[0] == 1
    both = products.by_component(pairs, 3)
    assert products.truncated(*both, sizes, 3)[0] is both[0]
