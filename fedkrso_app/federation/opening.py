"""How a server opens the sum of a round: the secrets of the survivors from shares, wrong ones found and named.

The other half of :mod:`federation.sealing`; nothing here knows Flower either.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from fedkrso_app.core import shamir
from fedkrso_app.federation.sealing import CHECK, check, mask, rank

_TRIES = 300  # subsets of the answers that are tried before more of them must come


class Opening:
    """The secrets of one round of ``n`` nodes, from its ``survivors`` (places -> the checks of their secrets)."""

    def __init__(self, n: int, threshold: int, ctx: bytes, survivors: Mapping[int, bytes]) -> None:
        self.n, self.threshold, self.ctx, self.checks = n, threshold, ctx, dict(survivors)
        self.lost = [v for v in range(n) if v not in self.checks]
        self.answers: dict[int, list[bytes]] = {}  # place -> its shares, one text for each survivor
        self.wrong: set[int] = set()  # who has answered with wrong shares
        self._secrets: dict[int, list[bytes]] = {}  # survivor -> b_u and k_uv for the lost v
        self._weights: dict[tuple[int, ...], list[int]] = {}

    @property
    def size(self) -> int:
        """Bytes of the shares that an answer has for each survivor."""
        return shamir.SHARE * (1 + len(self.lost))

    def add(self, place: int, shares: list[bytes]) -> bool:
        """Take one answer; returns whether all secrets are known now."""
        self.answers[place] = shares
        if len(self.answers) < self.threshold:
            return False
        for i, u in enumerate(self.checks):
            for tried in self._subsets() if u not in self._secrets else ():
                if secrets := self._joined(u, i, tried):
                    self._secrets[u] = secrets
                    self._name(u, i, tried)
                    break
        return len(self._secrets) == len(self.checks)

    @property
    def dealers(self) -> list[int]:
        """Survivors whose secrets no set of the answers gives, though others' can be had: their own shares are bad."""
        return [u for u in self.checks if self._secrets and u not in self._secrets]

    def unmask(self, vector: np.ndarray, tail: np.ndarray) -> None:
        """Take the masks that are left out of the sums of what the survivors sent, in place."""
        for u, (own, *pairs) in self._secrets.items():
            mask(vector, tail, own, -1)
            for v, secret in zip(self.lost, pairs, strict=True):
                mask(vector, tail, secret, -1 if v > u else 1)

    def _subsets(self) -> Iterator[tuple[int, ...]]:
        """Sets of as many answers as are needed: the first that come, then others in which each is missing in turn."""
        places = [place for place in self.answers if place not in self.wrong] + sorted(self.wrong)
        t, m = self.threshold, len(places)
        turned = (tuple((places + places)[i : i + t]) for i in range(m))
        return itertools.islice(itertools.chain(turned, itertools.combinations(places, t)), _TRIES)

    def _joined(self, u: int, i: int, places: Sequence[int]) -> list[bytes] | None:
        """The secrets of survivor ``u``, the i-th, from the answers of ``places``; None if they fail a check."""
        key = tuple(places)
        if key not in self._weights:
            self._weights[key] = shamir.weights([place + 1 for place in places])
        secrets = []
        for j, which in enumerate([0, *(rank(u, v) for v in self.lost)]):
            part = slice(shamir.SHARE * j, shamir.SHARE * (j + 1))
            try:
                secret = shamir.join([self.answers[place][i][part] for place in places], self._weights[key])
            except ValueError:
                return None
            if check(self.ctx, secret) != self.checks[u][CHECK * which : CHECK * (which + 1)]:
                return None
            secrets.append(secret)
        return secrets

    def _name(self, u: int, i: int, good: tuple[int, ...]) -> None:
        """Find out whose shares of ``u``'s secrets are wrong, where the first set of answers did not do."""
        if good == next(self._subsets()):
            return
        for place in self.answers.keys() - set(good):
            if self._joined(u, i, (*good[:-1], place)) is None:
                self.wrong.add(place)
