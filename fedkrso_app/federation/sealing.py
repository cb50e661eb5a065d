"""A node's half of secure sums: what it checks before it trains, how it seals its vector, what it tells of others'.

Two messages per round. The first brings the roster (who takes part, with which keys, at which threshold) and takes back
the vector under masks:

    y_u = x_u + G(b_u) + Σ_{v after u} G(k_uv) − Σ_{v before u} G(k_uv)     b_u fresh, k_uv agreed on by u and v

with Shamir shares of b_u and of every k_uv, encrypted for one party each. In the sum over all the k_uv cancel out. The
second message names the survivors S, whose vectors arrived; each party answers with its shares of b_u and, for those v
outside of S, of k_uv. It does so for one S per round, ever: two sums that differ in one party would give that party's
vector. docs/privacy-protocol.md has the reasons.

Bytes in and out: nothing here knows Flower. Secrets come from the operating system.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedkrso_app.core import shamir
from fedkrso_app.core.ring import add_keystream
from fedkrso_app.federation.discretion import Declined
from fedkrso_app.records.sealed import KEY, SESSION, Roster, Sealed

CHECK = 8  # bytes of a secret's hash that travel
MOST = 128  # nodes of one round
VECTOR, TAIL = 0, 1  # labels of a secret's two keystreams
SIGNER = 8  # bytes of a signature that say whose it is; the others differ each time
_NONCE = 12


def new_key() -> bytes:
    """A private key."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public(key: bytes) -> bytes:
    """The public half of a private ``key``."""
    return X25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw()


def digest(*parts: bytes | str | int) -> bytes:
    """SHA-256 over ``parts``, each with its length before it."""
    sha = hashlib.sha256()
    for part in parts:
        raw = part if isinstance(part, bytes) else str(part).encode()
        sha.update(len(raw).to_bytes(8) + raw)
    return sha.digest()


def context(roster: Roster, round: int, *more: Any) -> bytes:
    """What all masks of a round depend on: whoever was told another story shares no mask with the rest, and the sum
    stays noise. ``more``: what else must be the same at all (run, version, model, instructions, shapes)."""
    each = [digest(party.node, repr(party.partitions), party.key, party.signature).hex() for party in roster.parties]
    return digest("fedkrso/context/1", roster.session, round, roster.threshold, *each, *map(repr, more))


def members(roster: Roster) -> bytes:
    """Who takes part, whatever the session and the keys for its masks: partitions and, of signed keys, the signers."""
    return digest("fedkrso/members/1", repr([(party.partitions, party.signature[:SIGNER]) for party in roster.parties]))


def place_of(roster: Roster, key: bytes, partitions: Sequence[int], least: int) -> int:
    """The place of the node with the private ``key`` in ``roster``, once that is one to take part in: at least
    ``least`` nodes, a threshold that keeps sums whole, every node and key once, itself among them.

    Raises :class:`Declined`.
    """
    n, t, keys = len(roster), roster.threshold, roster.keys
    if n < least:
        raise Declined(f"this node takes part in sums of at least {least} nodes, and the round asks {n}.")
    if n > MOST:
        raise Declined(f"the round asks {n} nodes; secure sums are of at most {MOST}.")
    if not shamir.least_threshold(n) <= t <= n:
        raise Declined(f"the threshold {t} is not between {shamir.least_threshold(n)} and {n}, the number of nodes.")
    if len(roster.session) != SESSION or any(len(each) != KEY for each in keys):
        raise Declined("the roster's session or one of its keys has a wrong length.")
    if len(set(keys)) < n or len({party.node for party in roster.parties}) < n:
        raise Declined("the roster names a node or a key twice.")
    asked = [party.partitions for party in roster.parties]
    if not all(asked) or asked != sorted(asked) or len(set(roster.partitions)) < len(roster.partitions):
        raise Declined("the roster is not sorted, or names a partition twice.")
    own = public(key)
    if own not in keys:
        raise Declined("the roster does not have this node's key.")
    if asked[keys.index(own)] != tuple(partitions):
        raise Declined("the roster has other partitions of this node than it is asked for.")
    return keys.index(own)


def pairwise(key: bytes, other: bytes, ctx: bytes) -> bytes:
    """k_uv of the private ``key`` and the ``other`` party's public one: the same for both."""
    return _agreed(key, other, b"fedkrso/mask/1" + ctx)


def seal(
    vector: np.ndarray, tail: np.ndarray, key: bytes, place: int, roster: Roster, ctx: bytes, seconds: int = 0
) -> Sealed:
    """Mask ``vector`` and ``tail`` (words; in place) and share out the secrets, as the party at ``place``."""
    n, own = len(roster), os.urandom(shamir.SECRET)
    others = [v for v in range(n) if v != place]
    pairs = {v: pairwise(key, roster.parties[v].key, ctx) for v in others}
    mask(vector, tail, own, 1)
    for v, secret in pairs.items():
        mask(vector, tail, secret, 1 if v > place else -1)
    secrets = [own, *pairs.values()]
    shares = [shamir.split(secret, roster.threshold, n) for secret in secrets]
    bundles = []
    for w, party in enumerate(roster.parties):
        nonce, plain = os.urandom(_NONCE), b"".join(each[w] for each in shares)
        box, about = _box(key, party.key, ctx, place, w)
        bundles.append(nonce + box.encrypt(nonce, plain, about))
    checks = b"".join(check(ctx, secret) for secret in secrets)
    return Sealed(vector, tail, bundles, checks, roster.session, seconds)


def mask(vector: np.ndarray, tail: np.ndarray, secret: bytes, sign: int) -> None:
    """Add ``sign`` times both keystreams of ``secret``, in place."""
    add_keystream(vector, secret, VECTOR, sign)
    add_keystream(tail, secret, TAIL, sign)


def check(ctx: bytes, secret: bytes) -> bytes:
    """By which a secret that was put together from shares is known to be the right one."""
    return digest("fedkrso/check/1", ctx, secret)[:CHECK]


def bundle_size(n: int) -> int:
    """Bytes of one bundle in a round of ``n`` nodes."""
    return _NONCE + 16 + shamir.SHARE * n


def survivors_of(chosen: Sequence[int], n: int, least: int) -> None:
    """Raise :class:`Declined` unless ``chosen`` are places, ascending, of at least ``least`` of ``n`` parties."""
    if list(chosen) != sorted(set(chosen)) or not all(0 <= u < n for u in chosen):
        raise Declined("the survivors are no ascending places of the roster.")
    if len(chosen) < least:
        raise Declined(f"a sum of {len(chosen)} nodes is not opened; at least {least} are needed.")


def answer(
    survivors: Sequence[int], bundles: Mapping[int, bytes], key: bytes, place: int, keys: Sequence[bytes], ctx: bytes
) -> list[bytes]:
    """For each survivor u the shares that party ``place`` holds: of b_u, then of k_uv for every v that did not survive.

    ``bundles`` (place of the sender -> bundle) are those for this party, ``keys`` the roster's. Raises
    :class:`Declined` where one was not made for it in this round.
    """
    n = len(keys)
    lost = [v for v in range(n) if v not in set(survivors)]
    shares = []
    for u in survivors:
        box, about = _box(key, keys[u], ctx, u, place)
        try:
            plain = box.decrypt(bundles[u][:_NONCE], bundles[u][_NONCE:], about)
        except (InvalidTag, KeyError, ValueError):
            raise Declined(f"the shares of the node at place {u} were not made for this round.") from None
        if len(plain) != shamir.SHARE * n:
            raise Declined(f"the shares of the node at place {u} have a wrong length.")
        wanted = [0, *(rank(u, v) for v in lost)]
        shares.append(b"".join(plain[shamir.SHARE * i : shamir.SHARE * (i + 1)] for i in wanted))
    return shares


def rank(u: int, v: int) -> int:
    """Where the secret k_uv is among those of u, after b_u."""
    return v + 1 if v < u else v


def _agreed(key: bytes, other: bytes, info: bytes) -> bytes:
    try:
        shared = X25519PrivateKey.from_private_bytes(key).exchange(X25519PublicKey.from_public_bytes(other))
    except ValueError:  # a point of small order, with which every secret would be the same
        raise Declined("a key of the roster is no key.") from None
    return HKDF(hashes.SHA256(), KEY, salt=None, info=info).derive(shared)


def _box(key: bytes, other: bytes, ctx: bytes, sender: int, receiver: int) -> tuple[AESGCM, bytes]:
    """The cipher of a bundle, the same for both ends, and what is authenticated with it."""
    ends = sender.to_bytes(2) + receiver.to_bytes(2)
    return AESGCM(_agreed(key, other, b"fedkrso/share/1" + ctx + ends)), ctx + ends
