"""FedSRD's mathematics against dense formulas, brute force and scipy."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedkrso_app.core import srd

M, N, R = 7, 9, 2


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


def pair(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(M, R, seed=2 * seed, dtype=dtype), normal(R, N, seed=2 * seed + 1, dtype=dtype)


def clients(count: int, dtype: torch.dtype = torch.float64) -> list[srd.Term]:
    """Terms with unequal weights that sum to 1."""
    return [((i + 1) / (count * (count + 1) / 2), *pair(10 + i, dtype)) for i in range(count)]


def dense(terms: list[srd.Term]) -> torch.Tensor:
    return sum((p * B.double() @ A.double() for p, B, A in terms), torch.zeros(M, N, dtype=torch.float64))


def best_rank(W: torch.Tensor, r: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(W)
    return U[:, :r] @ torch.diag(S[:r]) @ Vh[:r]


class Biggest(TorchDispatchMode):
    """The largest number of elements of any tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


# Step (2): importance


def contributions(dB, dA, A, B_i):
    """‖ΔW − ΔW without this element‖_F by ΔW = dB·A + B_i·dA, element by element."""
    W = dB @ A + B_i @ dA
    scores_B, scores_A = torch.zeros_like(dB), torch.zeros_like(dA)
    for u, v in np.ndindex(*dB.shape):
        without = dB.clone()
        without[u, v] = 0
        scores_B[u, v] = (W - (without @ A + B_i @ dA)).norm()
    for u, v in np.ndindex(*dA.shape):
        without = dA.clone()
        without[u, v] = 0
        scores_A[u, v] = (W - (dB @ A + B_i @ without)).norm()
    return scores_B, scores_A


def test_importance_is_the_norm_of_each_elements_contribution():
    (B, A), (B_i, A_i) = pair(1), pair(2)
    dB, dA = B_i - B, A_i - A
    torch.testing.assert_close(dB @ A + B_i @ dA, B_i @ A_i - B @ A)  # the identity behind it
    for got, expected in zip(srd.importance(dB, dA, A, B_i), contributions(dB, dA, A, B_i), strict=True):
        torch.testing.assert_close(got, expected)


def test_importance_of_A_is_alive_in_round_1():
    (B_i, A_i), A = pair(2), pair(1)[1]
    B = torch.zeros(M, R, dtype=torch.float64)
    I_B, I_A = srd.importance(B_i - B, A_i - A, A, B_i)
    assert (I_B > 0).all() and (I_A > 0).all()
    assert (srd.importance(B_i - B, A_i - A, A, B)[1] == 0).all()  # what the old B would give


def test_importance_takes_bf16_and_answers_in_float32():
    (B_i, A_i), (_, A) = pair(2, torch.bfloat16), pair(1, torch.bfloat16)
    I_B, I_A = srd.importance(B_i, A_i, A, B_i)
    assert I_B.dtype == I_A.dtype == torch.float32
    assert I_B.shape == (M, R) and I_A.shape == (R, N)
    torch.testing.assert_close(I_B, srd.importance(B_i.float(), A_i.float(), A.float(), B_i.float())[0])


# Step (3): sparsity


@pytest.mark.parametrize("distribution", ["standard_normal", "random", "standard_exponential", "standard_cauchy"])
def test_sparsity_uses_the_biased_pearson_kurtosis(distribution):
    x = getattr(np.random.default_rng(3), distribution)((40, 5))
    kappa = scipy.stats.kurtosis(x, axis=None, fisher=False, bias=True)
    rho = srd.sparsity(torch.from_numpy(x), 0.5, math.inf)
    assert rho == pytest.approx(0.5 + 0.1 * math.log(kappa), rel=1e-12)


def test_sparsity_of_normals_has_kurtosis_3():
    rho = srd.sparsity(normal(1000, 200), 0.0, math.inf)
    assert math.exp(10 * rho) == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize("alpha, cap", [(0.85, 0.96), (0.9, 0.96), (0.9, 0.99), (0.96, 0.96), (0.0, 0.05)])
def test_sparsity_stays_between_alpha_and_the_cap(alpha, cap):
    one_spike = torch.zeros(1000)
    one_spike[3] = 1
    two_values = torch.tensor([1.0, 2.0] * 50)  # the least kurtosis there is, 1
    for scores in (one_spike, two_values, normal(50, 50).abs(), normal(50, 50).exp(), torch.rand(30)):
        assert alpha <= srd.sparsity(scores, alpha, cap) <= cap
    assert srd.sparsity(one_spike, alpha, cap) == cap
    assert srd.sparsity(two_values, alpha, cap) == alpha


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-30, 3e30])
def test_sparsity_of_constant_scores_is_alpha(value):
    assert srd.sparsity(torch.full((7, 3), value), 0.85, 0.96) == pytest.approx(0.85, abs=1e-12)


def test_sparsity_does_not_depend_on_the_scale():
    x = normal(30, 30, dtype=torch.float32).abs()
    assert srd.sparsity(x * 1e-30, 0.1, 1.0) == pytest.approx(srd.sparsity(x, 0.1, 1.0), rel=1e-6)


@pytest.mark.parametrize("bad", [torch.tensor([]), torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.inf])])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        srd.sparsity(bad, 0.85, 0.96)
    with pytest.raises(ValueError, match="finite"):
        srd.prune(bad, bad, 0.5)


# Step (4): prune


@pytest.mark.parametrize("rho", [0.0, 0.25, 0.5, 0.85, 0.9333, 0.96, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prune_agrees_with_torch_quantile(rho, dtype):
    delta, scores = normal(37, 11, seed=1, dtype=dtype), normal(37, 11, seed=2, dtype=dtype).abs()
    kept = scores >= torch.quantile(scores, rho)
    assert torch.equal(srd.prune(delta, scores, rho), delta * kept)


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.85, 0.96])
def test_prune_keeps_a_share_of_one_minus_rho(rho):
    scores = normal(100, 30, seed=4).abs()
    pruned = srd.prune(torch.ones(100, 30), scores, rho)
    assert abs(pruned.sum().item() - (1 - rho) * 3000) <= 1
    if rho:
        assert scores[pruned == 1].min() > scores[pruned == 0].max()


def test_prune_never_keeps_a_score_of_zero():
    scores = torch.zeros(10, 10)
    scores[2, 3], scores[4, 5] = 1.0, 1e-40  # 98 % zeros, one of the others subnormal
    pruned = srd.prune(torch.ones(10, 10), scores, 0.9)
    assert torch.equal(pruned, (scores > 0).float())
    assert not srd.prune(torch.ones(5, 5), torch.zeros(5, 5), 0.9).any()


def test_prune_keeps_ties_at_the_threshold():
    assert srd.prune(torch.ones(4), torch.tensor([1.0, 2.0, 2.0, 2.0]), 0.75).tolist() == [0, 1, 1, 1]


def test_prune_takes_bf16():
    delta, scores = normal(30, 4, dtype=torch.bfloat16), normal(30, 4, seed=1, dtype=torch.bfloat16).abs()
    pruned = srd.prune(delta, scores, 0.8)
    assert pruned.dtype == torch.bfloat16
    assert torch.equal(pruned.float(), srd.prune(delta.float(), scores.float(), 0.8))


def test_prune_takes_more_elements_than_torch_quantile_does():
    count = 2**24 + 3
    scores = torch.arange(count, dtype=torch.int32)
    with pytest.raises(RuntimeError):
        torch.quantile(scores.float(), 0.96)
    delta = torch.ones(count, dtype=torch.bfloat16)
    kept = srd.prune(delta, scores, 0.96).nonzero()
    first = math.ceil(0.96 * (count - 1))
    assert kept[0].item() == first and len(kept) == count - first


def test_prune_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="scores"):
        srd.prune(torch.ones(2, 3), torch.ones(3, 2), 0.5)
    for rho in (-0.1, 1.01, math.nan):
        with pytest.raises(ValueError):
            srd.prune(torch.ones(4), torch.ones(4), rho)


# Step (5): L1 compensation


@pytest.mark.parametrize("dtype, rel", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_compensation_keeps_the_l1_norm_and_the_directions(dtype, rel):
    delta = normal(50, 8, dtype=dtype)
    pruned = srd.prune(delta, delta.abs(), 0.9)
    full = srd.compensate_l1(delta, pruned)
    assert full.dtype == dtype
    assert full.double().abs().sum().item() == pytest.approx(delta.double().abs().sum().item(), rel=rel)
    assert torch.equal(full.sign(), pruned.sign())
    cosine = (full.double() * pruned.double()).sum() / (full.double().norm() * pruned.double().norm())
    assert cosine.item() == pytest.approx(1, abs=1e-4)


def test_compensation_without_survivors_or_without_pruning_changes_nothing():
    delta = normal(5, 3)
    assert not srd.compensate_l1(delta, torch.zeros_like(delta)).any()
    assert torch.equal(srd.compensate_l1(delta, delta), delta)


# Step (8): decomposition


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])  # from 4 clients on, Σ r_i exceeds M; at 6 also N
def test_truncated_svd_is_the_dense_one(count):
    terms = clients(count)
    p, Bs, As = zip(*terms, strict=True)
    B_r, A_r = srd.truncated_svd(Bs, As, p, R)
    assert B_r.shape == (M, R) and A_r.shape == (R, N)
    torch.testing.assert_close(B_r @ A_r, best_rank(dense(terms), R), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(B_r.T @ B_r, A_r @ A_r.T, rtol=1e-8, atol=1e-8)  # split evenly


def test_truncated_svd_takes_different_ranks_and_pads_what_is_missing():
    Bs, As = [normal(M, 1, seed=1), normal(M, 3, seed=2)], [normal(1, N, seed=3), normal(3, N, seed=4)]
    W = 0.5 * (Bs[0] @ As[0] + Bs[1] @ As[1])
    for r in (1, 3, 4, 6):  # W has rank 4
        B_r, A_r = srd.truncated_svd(Bs, As, [0.5, 0.5], r)
        assert B_r.shape == (M, r) and A_r.shape == (r, N)
        torch.testing.assert_close(B_r @ A_r, best_rank(W, r), rtol=1e-8, atol=1e-8)


def test_truncated_svd_refuses_uneven_and_empty_sequences():
    B, A = pair()
    for Bs, As, p in [([], [], []), ([B, B], [A, A], [1.0]), ([B, B], [A], [0.5, 0.5])]:
        with pytest.raises(ValueError):
            srd.truncated_svd(Bs, As, p, R)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-8), (torch.float32, 1e-5)])
@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("method", ["fedsrd", "fedsrd-e"])
def test_factored_least_squares_is_the_dense_one(method, factor, dtype, tolerance):
    B, A = pair(1, dtype)
    terms = clients(3, dtype)
    W = dense(terms)
    if method == "fedsrd":
        p, Bs, As = zip(*terms, strict=True)
        terms, W = [(1.0, *srd.truncated_svd(Bs, As, p, R))], best_rank(W, R)
    T = W - B.double() @ A.double()
    if factor == "A":  # another route than pinv: lstsq
        expected = torch.linalg.lstsq(B.double(), T).solution
    else:
        expected = torch.linalg.lstsq(A.double().T, T.T).solution.T
    got = srd.least_squares_factors(terms, B, A, factor)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_one_client_makes_fedsrd_and_fedsrd_e_equal():
    B, A = pair(1)
    [(p, B_i, A_i)] = clients(1)
    cut = srd.truncated_svd([B_i], [A_i], [p], R)
    for factor in "AB":
        torch.testing.assert_close(
            srd.least_squares_factors([(1.0, *cut)], B, A, factor),
            srd.least_squares_factors([(p, B_i, A_i)], B, A, factor),
        )


@pytest.mark.parametrize("start", ["zero", "later"])
def test_nothing_dropped_and_one_client_that_trained_B_only_reproduces_its_B(start):
    """compensate none, ρ = 0, p = 0, FedSRD-e, B round, dA = 0: the whole round is the identity."""
    B, A = pair(1, torch.float32)
    B = torch.zeros_like(B) if start == "zero" else B
    B_i = pair(2, torch.float32)[0]
    dB, dA = B_i - B, torch.zeros_like(A)
    I_B, I_A = srd.importance(dB, dA, A, B_i)
    up_B, up_A = srd.prune(dB, I_B, 0.0), srd.prune(dA, I_A, 0.0)
    assert torch.equal(up_B, dB) and torch.equal(up_A, dA)
    delta_B = srd.least_squares_factors([(1.0, B + up_B, A + up_A)], B, A, "B")
    down = srd.dare(delta_B, 0.0, np.random.default_rng(0))
    assert torch.equal(down, delta_B)
    # as exact as float32 can be: one rounding of the delta, one of the sum
    torch.testing.assert_close(B + down, B_i, rtol=2e-7, atol=2e-7)


def test_T_inside_the_columns_of_B_makes_the_A_round_exact():
    B, A = pair(1)
    terms = [(0.25, B @ normal(R, R, seed=5), normal(R, N, seed=6)), (0.75, B, normal(R, N, seed=7))]
    new_A = A + srd.least_squares_factors(terms, B, A, "A")
    torch.testing.assert_close(B @ new_A, dense(terms), rtol=1e-8, atol=1e-8)


def test_T_inside_the_rows_of_A_makes_the_B_round_exact():
    B, A = pair(1)
    terms = [(0.25, normal(M, R, seed=6), normal(R, R, seed=5) @ A), (0.75, normal(M, R, seed=7), A)]
    new_B = B + srd.least_squares_factors(terms, B, A, "B")
    torch.testing.assert_close(new_B @ A, dense(terms), rtol=1e-8, atol=1e-8)


def test_the_A_round_of_a_zero_B_is_zero():
    B, A = pair(1)
    assert not srd.least_squares_factors(clients(3), torch.zeros_like(B), A, "A").any()


def test_clients_that_changed_nothing_change_nothing():
    B, A = pair(1)
    for factor in "AB":
        delta = srd.least_squares_factors([(0.3, B, A), (0.7, B, A)], B, A, factor)
        assert delta.abs().max() < 1e-13


def test_what_no_client_moved_stays_exactly_zero_through_the_decomposition():
    (B, A), terms = pair(3, torch.float32), clients(3, torch.float32)
    for _, B_i, _ in terms:
        B_i[1:4] = 0
    p, Bs, As = zip(*terms, strict=True)
    target = (1.0, *srd.truncated_svd(Bs, As, p, R))
    assert 0 < target[1][1:4].abs().max() < 1e-12  # the noise that DARE might leave alone
    delta = srd.least_squares_factors([target], torch.zeros_like(B), A, "B")
    assert not delta[1:4].any() and delta[4:].all()


def test_rcond_bounds_what_a_nearly_dependent_factor_does():
    B = normal(M, 1, seed=1, dtype=torch.float32).repeat(1, 2)
    noisy = B + torch.tensor([0.0, 1e-4]) * normal(M, 1, seed=2, dtype=torch.float32)
    A = pair(1, torch.float32)[1]
    wild = srd.least_squares_factors(clients(2, torch.float32), noisy, A, "A")
    tame = srd.least_squares_factors(clients(2, torch.float32), noisy, A, "A", rcond=1e-3)
    assert wild.norm() > 100 * tame.norm()
    # equal columns up to float32's own rounding count as dependent by default, though float64 does the work
    rounded = B * torch.tensor([1.0, 1 + 2**-23])
    default = srd.least_squares_factors(clients(2, torch.float32), rounded, A, "A")
    torch.testing.assert_close(default, tame, rtol=1e-2, atol=1e-2)


def test_least_squares_refuses_another_factor():
    with pytest.raises(ValueError, match="factor"):
        srd.least_squares_factors(clients(1), *pair(), "a")


def test_no_tensor_of_m_by_n_elements():
    m = n = 20_000  # dense: 1.6 GB in float32
    with Biggest() as biggest:
        B, A = normal(m, 2, seed=1, dtype=torch.float32), normal(2, n, seed=2, dtype=torch.float32)
        terms = [(0.5, B + 1, A), (0.5, B, A - 1)]
        cut = srd.truncated_svd([B_i for _, B_i, _ in terms], [A_i for _, _, A_i in terms], [0.5, 0.5], 2)
        deltas = [
            srd.least_squares_factors(W_terms, B, A, factor) for W_terms in (terms, [(1.0, *cut)]) for factor in "AB"
        ]
        srd.importance(deltas[1], deltas[0], A, B)
    assert all(x.isfinite().all() for x in deltas)
    assert 0 < biggest.numel <= 4 * m  # the two stacked factors


# Step (9): DARE


def test_dare_is_unbiased():
    delta = normal(6, 5)
    draws = torch.stack([srd.dare(delta, 0.8, np.random.default_rng(s)) for s in range(4000)])
    deviation = delta.abs() * math.sqrt(0.8 / 0.2 / len(draws))  # of the mean of so many draws
    assert ((draws.mean(dim=0) - delta).abs() < 5 * deviation).all()
    assert torch.equal(draws[0] != 0, torch.isclose(draws[0], 5 * delta))


@pytest.mark.parametrize("bits", [np.random.PCG64, np.random.Philox, np.random.SFC64])
def test_dare_drops_where_its_mask_says_and_the_seed_is_enough(bits):
    delta = normal(40, 10, dtype=torch.bfloat16)
    down = srd.dare(delta, 0.8, np.random.Generator(bits(7)))
    mask = srd.dare_mask((40, 10), 0.8, np.random.Generator(bits(7)))  # knows the shape and the seed alone
    assert mask.dtype == bool and mask.shape == (40, 10)
    assert down.dtype == torch.bfloat16
    assert torch.equal(down != 0, torch.from_numpy(mask))
    values = down[torch.from_numpy(mask)]  # what travels
    rebuilt = torch.zeros_like(delta).masked_scatter(torch.from_numpy(mask), values)
    assert torch.equal(rebuilt, down)
    assert not np.array_equal(mask, srd.dare_mask((40, 10), 0.8, np.random.Generator(bits(8))))


def test_dare_mask_is_the_uniform_draw_of_numpy_and_advances_the_generator():
    rng = np.random.default_rng(5)
    expected = np.random.default_rng(5).random((2, 30, 4)) >= 0.3
    assert np.array_equal(srd.dare_mask((30, 4), 0.3, rng), expected[0])
    assert np.array_equal(srd.dare_mask((30, 4), 0.3, rng), expected[1])


def test_dare_mask_golden():
    mask = srd.dare_mask((2, 8), 0.5, np.random.Generator(np.random.Philox(key=[1234, 7])))
    assert srd.pack_bits(mask).tobytes().hex() == "adbe"  # words from a Philox4x64-10 in plain Python


@pytest.mark.parametrize("p", [1.0, -0.1, 1.5, math.nan])
def test_dare_refuses_a_probability_out_of_range(p):
    with pytest.raises(ValueError, match="probability"):
        srd.dare(torch.ones(3), p, np.random.default_rng(0))


# Bitmaps


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 15, 16, 17, 1003])
def test_bits_round_trip(count):
    mask = np.random.default_rng(count).random(count) < 0.5
    packed = srd.pack_bits(mask)
    assert packed.dtype == np.uint8 and len(packed) == math.ceil(count / 8)
    for data in (packed, packed.tobytes()):
        bits = srd.unpack_bits(data, count)
        assert bits.dtype == bool and np.array_equal(bits, mask)


def test_bit_order_and_element_order():
    mask = np.zeros((2, 6), dtype=bool)
    mask[0, 0] = mask[0, 2] = mask[1, 3] = True  # flat positions 0, 2 and 9
    assert srd.pack_bits(mask).tolist() == [0b00000101, 0b00000010]
    assert np.array_equal(srd.pack_bits(np.asfortranarray(mask)), srd.pack_bits(mask))


@pytest.mark.parametrize("data, count", [(b"\0", 9), (b"\0\0", 8), (b"", 1), (b"\0", 0)])
def test_bitmaps_of_a_wrong_length_are_refused(data, count):
    with pytest.raises(ValueError, match="bytes"):
        srd.unpack_bits(data, count)


def test_bits_beyond_the_count_are_refused():
    assert srd.unpack_bits(b"\x1f", 5).all()
    with pytest.raises(ValueError, match="beyond"):
        srd.unpack_bits(b"\x20", 5)
