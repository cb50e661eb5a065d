"""Secure sums in one process, without Flower: what opens, what stays closed, what a node refuses.

Expected values come from the standard library's hmac, from sums of Python integers and from a flow computed by hand.
"""

import hmac
import itertools
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from scipy.stats import chi2

from fedkrso_app.core import ring, shamir
from fedkrso_app.federation import sealing
from fedkrso_app.federation.discretion import Declined
from fedkrso_app.federation.opened import Opened
from fedkrso_app.federation.opening import Opening
from fedkrso_app.records.sealed import Party, Roster


class Parties:
    """``n`` nodes that have agreed on keys, and have sealed vectors of ``d`` words of ``bits``."""

    def __init__(self, n: int, threshold: int = 0, bits: int = 64, d: int = 7, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.keys = [sealing.new_key() for _ in range(n)]
        each = tuple(Party(100 + i, (i,), sealing.public(key)) for i, key in enumerate(self.keys))
        self.roster = Roster(rng.bytes(16), each, threshold or shamir.usual_threshold(n))
        self.ctx = sealing.context(self.roster, 1, "model")
        self.words = rng.integers(0, 2**bits, size=(n, d), dtype=np.uint64).astype(ring.word(bits))
        self.sealed = [self.seal(u) for u in range(n)]

    def seal(self, u: int, ctx: bytes = b"") -> sealing.Sealed:
        tail = np.array([u, 2 * u, 1], "<u8")
        return sealing.seal(self.words[u].copy(), tail, self.keys[u], u, self.roster, ctx or self.ctx)

    def answer(self, w: int, survivors: list[int]) -> list[bytes]:
        bundles = {u: self.sealed[u].bundles[w] for u in survivors}
        return sealing.answer(survivors, bundles, self.keys[w], w, self.roster.keys, self.ctx)

    def opening(self, survivors: list[int]) -> Opening:
        checks = {u: self.sealed[u].checks for u in survivors}
        return Opening(len(self.roster), self.roster.threshold, self.ctx, checks)

    def sums(self, survivors: list[int]) -> tuple[np.ndarray, np.ndarray]:
        vectors = np.sum([self.sealed[u].vector for u in survivors], axis=0, dtype=self.words.dtype)
        return vectors, np.sum([self.sealed[u].tail for u in survivors], axis=0, dtype="<u8")

    def expected(self, survivors: list[int]) -> list[int]:
        modulus = 2 ** (8 * self.words.itemsize)
        return [sum(int(self.words[u][i]) for u in survivors) % modulus for i in range(self.words.shape[1])]

    def opens(self, dropped: tuple[int, ...], silent: tuple[int, ...]) -> list[int] | None:
        """The sum where ``dropped`` nodes never send a vector and ``silent`` ones send it and answer nothing."""
        survivors = [u for u in range(len(self.keys)) if u not in dropped]
        opening, done = self.opening(survivors), False
        for w in [w for w in range(len(self.keys)) if w not in (*dropped, *silent)]:
            done = opening.add(w, self.answer(w, survivors))
        if not done:
            return None
        vector, tail = self.sums(survivors)
        opening.unmask(vector, tail)
        assert tail.tolist() == [sum(survivors), 2 * sum(survivors), len(survivors)]
        assert vector.tolist() == self.expected(survivors)
        return vector.tolist()


# ── Primitives ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_keystream_is_aes_256_in_counter_mode_and_differs_by_label():
    first, second = (np.zeros(9, "<u8") for _ in range(2))
    ring.add_keystream(first, bytes(range(32)), 0, 1)
    ring.add_keystream(second, bytes(range(32)), 1, 1)
    assert first.tobytes()[:16].hex() == "f29000b62a499fd0a9f39a6add2e7780"
    assert not set(first.tolist()) & set(second.tolist())


@pytest.mark.parametrize("bits", ring.BITS)
def test_a_keystream_that_is_added_and_taken_away_leaves_what_was_there(bits):
    whole = np.random.default_rng(0).integers(0, 2**bits, 70001, np.uint64, endpoint=False).astype(ring.word(bits))
    total = whole.copy()
    ring.add_keystream(total, bytes(32), 0, 1)
    assert (total != whole).mean() > 0.99
    ring.add_keystream(total, bytes(32), 0, -1)
    assert np.array_equal(total, whole)


def test_keys_are_derived_as_hmac_says():
    extracted = hmac.digest(bytes(32), bytes(range(32)), "sha256")
    expected = hmac.digest(extracted, b"fedkrso/mask/1" + b"\x01", "sha256").hex()
    assert expected == "41a9202870dd5f5d2574241dd620831670b1a526324b8c1486d05ec444611bd7"
    derived = HKDF(hashes.SHA256(), 32, salt=None, info=b"fedkrso/mask/1").derive(bytes(range(32)))
    assert derived.hex() == expected
    a, b = sealing.new_key(), sealing.new_key()
    assert sealing.pairwise(a, sealing.public(b), b"c") == sealing.pairwise(b, sealing.public(a), b"c")
    assert sealing.pairwise(a, sealing.public(b), b"c") != sealing.pairwise(a, sealing.public(b), b"d")


def test_shares_lie_on_a_polynomial_and_any_threshold_of_them_gives_the_secret(monkeypatch):
    drawn = iter([7, 11])
    monkeypatch.setattr(shamir.secrets, "randbelow", lambda bound: next(drawn))
    shares = shamir.split((5).to_bytes(32), 3, 5)  # 5 + 7 x + 11 x²
    assert [int.from_bytes(share) for share in shares] == [23, 63, 125, 209, 315]
    for points in itertools.permutations(range(1, 6), 3):
        assert shamir.join([shares[i - 1] for i in points], shamir.weights(points)) == (5).to_bytes(32)
    assert pow(3, shamir.PRIME - 1, shamir.PRIME) == 1 == pow(7, shamir.PRIME - 1, shamir.PRIME)


def test_fewer_shares_than_the_threshold_fit_any_secret():
    shares = shamir.split(bytes(range(32)), 3, 4)[:2]
    for secret in (0, 1, 2**255):
        # A third share that makes these two, with the others' weights, into this secret.
        first, second, third = shamir.weights([1, 2, 3])
        known = sum(int.from_bytes(share) * weight for share, weight in zip(shares, (first, second), strict=True))
        made = (secret - known) * pow(third, -1, shamir.PRIME) % shamir.PRIME
        joined = shamir.join([*shares, made.to_bytes(shamir.SHARE)], [first, second, third])
        assert joined == secret.to_bytes(32)


# ── What opens ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_all_losses_of_up_to_two_of_ten_open_to_the_sum_of_the_rest_and_three_open_nothing():
    parties, opened = Parties(10), set()
    assert parties.roster.threshold == 8
    for lost in (0, 1, 2, 3):
        for nodes in itertools.combinations(range(0, 10, 3), lost):
            for cut in range(lost + 1):
                result = parties.opens(nodes[:cut], nodes[cut:])
                opened.add((lost <= 2, result is not None))
    assert opened == {(True, True), (False, False)}


def test_random_federations_open_to_the_sum_by_python_integers():
    rng = np.random.default_rng(4)
    for seed in range(25):
        n = int(rng.integers(3, 12))
        parties = Parties(n, bits=int(rng.choice(ring.BITS)), d=int(rng.integers(1, 6)), seed=seed)
        spare = n - parties.roster.threshold
        gone = rng.permutation(n)[: rng.integers(0, spare + 1)].tolist()
        cut = int(rng.integers(0, len(gone) + 1))
        assert parties.opens(tuple(gone[:cut]), tuple(gone[cut:])) is not None


def test_a_wrong_share_is_found_named_and_left_out():
    parties = Parties(10)
    survivors = list(range(10))
    opening = parties.opening(survivors)
    for w in (4, *range(4), *range(5, 9)):  # 4 is first
        shares = parties.answer(w, survivors)
        if w == 4:
            shares[7] = bytes(33)
        done = opening.add(w, shares)
    assert done and opening.wrong == {4}
    vector, tail = parties.sums(survivors)
    opening.unmask(vector, tail)
    assert vector.tolist() == parties.expected(survivors)


def test_a_node_whose_own_shares_are_bad_is_named_and_nothing_opens(monkeypatch):
    parties = Parties(5)
    split = shamir.split
    monkeypatch.setattr(shamir, "split", lambda secret, t, n: split(bytes(32), t, n))
    parties.sealed[2] = parties.seal(2)
    opening = parties.opening(list(range(5)))
    assert not any([opening.add(w, parties.answer(w, list(range(5)))) for w in range(5)])
    assert opening.dealers == [2]


@pytest.mark.parametrize("change", ["session", "threshold", "key", "about", "round"])
def test_who_is_told_another_story_shares_no_mask_with_the_rest(change):
    """The sum stays noise, and the shares that the node packed cannot be read."""
    parties = Parties(4)
    roster = parties.roster
    other = {
        "session": lambda: sealing.context(replace(roster, session=bytes(16)), 1, "model"),
        "threshold": lambda: sealing.context(replace(roster, threshold=4), 1, "model"),
        "key": lambda: sealing.context(
            replace(roster, parties=(*roster.parties[:3], replace(roster.parties[3], key=bytes(32)))), 1, "model"
        ),
        "about": lambda: sealing.context(roster, 1, "another model"),
        "round": lambda: sealing.context(roster, 2, "model"),
    }[change]()
    assert other != parties.ctx
    parties.sealed[1] = parties.seal(1, other)
    with pytest.raises(Declined, match="place 1 were not made for this round"):
        parties.answer(0, [0, 1, 2, 3])


# ── What a server sees ───────────────────────────────────────────────────────────────────────────────────────────────


def test_sealed_words_and_their_unopened_sum_look_like_noise():
    parties = Parties(4, d=1)
    x = np.round(np.random.default_rng(1).normal(0, 2.0**20, 20000)).astype(np.int64).view("<u8")
    parties.words = np.stack([x] * 4)
    parties.sealed = [parties.seal(u) for u in range(4)]
    again = parties.seal(0)
    assert uneven(x) < 1e-9  # the control: x itself is nothing like noise
    for y in (parties.sealed[0].vector, parties.sums([0, 1, 2, 3])[0]):
        assert uneven(y) > 1e-4
        assert abs(np.corrcoef(y.view("<i8"), x.view("<i8"))[0, 1]) < 5 / 20000**0.5
    assert (again.vector != parties.sealed[0].vector).all()
    assert all(a != b for a, b in zip(again.bundles, parties.sealed[0].bundles, strict=True))


def uneven(words: np.ndarray) -> float:
    """The smallest p of χ² tests that the bytes at each of the eight places are uniform."""
    places = words.view(np.uint8).reshape(-1, 8).T
    counts = [np.bincount(place, minlength=256) for place in places]
    mean = len(words) / 256
    return min(chi2.sf(((count - mean) ** 2 / mean).sum(), 255) for count in counts)


def test_two_words_of_the_same_place_and_round_are_masked_differently_for_each_pair():
    """Every secret of a round is another one."""
    parties = Parties(5)
    checks = [sealed.checks[i : i + 8] for sealed in parties.sealed for i in range(0, 40, 8)]
    pairs = 5 * 4 // 2
    assert len(set(checks)) == 5 + pairs and len(checks) == 5 + 2 * pairs


# ── Thresholds ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("n", "threshold", "at_none", "at_one"),
    [(3, 3, 3, 2), (4, 3, 3, 2), (5, 4, 4, 3), (6, 5, 5, 4), (8, 7, 7, 6), (10, 8, 8, 7), (16, 13, 13, 12),
     (32, 26, 25, 24), (100, 80, 75, 74)],
)  # fmt: skip
def test_the_usual_thresholds_and_the_smallest_sums_that_they_leave(n, threshold, at_none, at_one):
    assert shamir.usual_threshold(n) == threshold
    assert [shamir.honest(n, threshold, c) for c in (0, 1)] == [at_none, at_one]


def test_no_choice_of_survivors_opens_fewer_honest_nodes_than_the_formula_says():
    """By trying: which honest nodes could a server leave out, if each honest answer omits at most n − t?"""
    for n, t, c in itertools.product(range(3, 13), range(2, 13), range(5)):
        if not shamir.least_threshold(n) <= t <= n or c >= t or 2 * t <= n + c:
            continue
        honest, needed = n - c, t - c
        smallest = min(g for g in range(1, honest + 1) if g >= needed or reachable(honest, g, needed, n - t))
        assert shamir.honest(n, t, c) == smallest, (n, t, c)
    assert (shamir.honest(10, 7, 3), shamir.honest(10, 8, 3), shamir.honest(100, 80, 33)) == (2, 5, 39)


def reachable(honest: int, group: int, needed: int, omitted: int) -> bool:
    """Whether every honest node outside of a ``group`` can be left out by ``needed`` honest answers, each of which
    leaves out at most ``omitted`` and none of the group."""
    outside = honest - group
    # Each node outside is left out by that many different answers; each answer has room for `omitted` different nodes.
    return needed <= honest and outside * needed <= honest * min(omitted, outside)


# ── What a node refuses ──────────────────────────────────────────────────────────────────────────────────────────────


def changed(roster: Roster, place: int, **changes) -> Roster:
    parties = list(roster.parties)
    parties[place] = replace(parties[place], **changes)
    return replace(roster, parties=tuple(parties))


LIES = {
    "another key of mine": (lambda r: changed(r, 1, key=bytes(range(32))), "does not have this node's key"),
    "a key twice": (lambda r: changed(r, 0, key=r.parties[2].key), "a node or a key twice"),
    "a node twice": (lambda r: changed(r, 0, node=r.parties[2].node), "a node or a key twice"),
    "without me": (lambda r: replace(r, parties=r.parties[:1] + r.parties[2:]), "this node's key"),
    "unsorted": (lambda r: replace(r, parties=r.parties[::-1]), "not sorted"),
    "a partition twice": (lambda r: changed(r, 0, partitions=(0, 1)), "a partition twice"),
    "other partitions of mine": (lambda r: changed(r, 1, partitions=(1, 9)), "other partitions of this node"),
    "a low threshold": (lambda r: replace(r, threshold=3), "threshold 3 is not between 4 and 5"),
    "a threshold beyond all": (lambda r: replace(r, threshold=6), "threshold 6 is not"),
    "a short key": (lambda r: changed(r, 0, key=b"short"), "wrong length"),
    "a short session": (lambda r: replace(r, session=b""), "wrong length"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_roster_that_is_no_sound_one_is_declined(lie):
    parties = Parties(5)
    change, reason = LIES[lie]
    assert sealing.place_of(parties.roster, parties.keys[1], [1], 3) == 1
    with pytest.raises(Declined, match=reason):
        sealing.place_of(change(parties.roster), parties.keys[1], [1], 3)


def test_a_roster_below_the_node_s_own_least_is_declined():
    parties = Parties(5)
    with pytest.raises(Declined, match="at least 6 nodes, and the round asks 5"):
        sealing.place_of(parties.roster, parties.keys[1], [1], 6)


@pytest.mark.parametrize("chosen", [[0, 1, 2], [0, 2, 1, 3], [0, 1, 2, 2], [0, 1, 2, 9], [-1, 0, 1, 2]])
def test_survivors_that_are_too_few_or_no_places_are_declined(chosen):
    sealing.survivors_of([0, 1, 2, 4], 5, 4)
    with pytest.raises(Declined):
        sealing.survivors_of(chosen, 5, 4)


def test_a_key_of_small_order_is_declined():
    parties = Parties(3)
    roster = changed(parties.roster, 0, key=bytes(32))
    with pytest.raises(Declined, match="is no key"):
        sealing.seal(parties.words[1].copy(), np.zeros(3, "<u8"), parties.keys[1], 1, roster, parties.ctx)


def test_a_round_is_opened_once_and_a_version_twice_also_after_a_restart():
    ours = lambda: Opened("0" * 16, 3)  # noqa: E731  # a fresh process each time
    enter = lambda round, version: ours().enter(round, version, "all", f"session {round}")  # noqa: E731
    enter(1, 0)
    ours().note(1, 0, "these survivors")
    ours().note(1, 0, "these survivors")  # the same question again
    for attempt in (lambda: ours().note(1, 0, "others"), lambda: enter(1, 0), lambda: enter(1, 1)):
        with pytest.raises(Declined, match="round 1 is not after 1"):
            attempt()
    ours().note(2, 0, "a second round of the same version")
    with pytest.raises(Declined, match="version 0 was the start of 2 rounds"):
        enter(3, 0)
    ours().note(3, 1, "the next version")
    with pytest.raises(Declined, match="version 0 is before version 1"):
        enter(4, 0)  # or two versions in turn would be opened for ever
    Opened("0" * 16, 4).enter(1, 0, "all", "session")  # another node of this machine
    ours().path.write_text("{")
    with pytest.raises(Declined, match="cannot be read"):
        enter(9, 9)


def test_a_round_is_sealed_for_the_same_nodes_only_and_once_per_session_also_after_a_restart():
    ours = lambda: Opened("0" * 16, 3)  # noqa: E731  # a fresh process each time
    ours().enter(1, 0, "all", "a")
    ours().enter(2, 0, "others", "b")  # round 1 was not opened
    ours().enter(1, 0, "all", "c")  # a server that was killed does round 1 again
    with pytest.raises(Declined, match="sealed round 1 for other nodes"):
        ours().enter(1, 0, "others", "d")
    with pytest.raises(Declined, match="in this session already"):
        ours().enter(1, 0, "all", "a")
    ours().note(1, 0, "these survivors")
    with pytest.raises(Declined, match="sealed round 2 for other nodes"):
        ours().enter(2, 0, "all", "e")


def test_who_takes_part_is_told_by_partitions_and_signers_whatever_the_keys_of_a_session():
    parties = Parties(4)
    same = changed(replace(parties.roster, session=bytes(16), threshold=4), 1, key=bytes(32))
    assert sealing.members(same) == sealing.members(parties.roster)
    for change in ({"partitions": (1, 9)}, {"signature": b"another signer"}):
        assert sealing.members(changed(parties.roster, 1, **change)) != sealing.members(parties.roster)


def test_two_sums_that_differ_in_one_node_give_that_node_s_vector():
    """Why a round is opened once: a patched node that answers twice."""
    parties = Parties(4)

    def sum_of(survivors):
        opening = parties.opening(survivors)
        assert [opening.add(w, parties.answer(w, survivors)) for w in range(4)][-1]
        vector, tail = parties.sums(survivors)
        opening.unmask(vector, tail)
        return vector

    assert np.array_equal(sum_of([0, 1, 2, 3]) - sum_of([0, 2, 3]), parties.words[1])


def test_two_rosters_of_a_round_would_give_a_difference_of_two_nodes_though_each_answers_once():
    """Why a round is sealed for the same nodes only: 0, 1, 2 open one sum of three of four, 3, 4, 5 the other."""
    words = np.arange(6, dtype="<u8")[:, None] * np.array([3, 5, 7], "<u8")

    def sum_of(nodes, answering, survivors):
        parties = Parties(4, threshold=3, d=3)
        parties.words = words[nodes]
        parties.sealed = [parties.seal(u) for u in range(4)]
        chosen = [nodes.index(u) for u in survivors]
        opening = parties.opening(chosen)
        assert [opening.add(nodes.index(w), parties.answer(nodes.index(w), chosen)) for w in answering][-1]
        vector, tail = parties.sums(chosen)
        opening.unmask(vector, tail)
        return vector

    one = sum_of([0, 1, 2, 3], [0, 1, 2], [0, 1, 3])
    other = sum_of([0, 3, 4, 5], [3, 4, 5], [0, 3, 4])
    assert np.array_equal(one - other, words[1] - words[4])


# ── Memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_adding_replies_needs_the_memory_of_one_whatever_their_number():
    peaks = []
    for n in (3, 12):
        parties = Parties(n, d=1)
        parties.words = np.ones((n, 30000), "<u8")
        tracemalloc.start()
        total = np.zeros(30000, "<u8")
        for u in range(n):
            total += parties.seal(u).vector
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
