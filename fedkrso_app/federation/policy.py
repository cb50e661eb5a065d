"""What a node takes part in, by its own ``--node-config``: the run's settings come from the other side.

require = "secure-aggregation"   only sealed updates leave this node; "example-privacy": only ones with noise
min-cohort = 5                   and only sums of at least so many nodes are opened (implies the line above)
key = "/keys/node0"              the SuperNode's private key, which signs this node's key for the masks
peers = "/keys/peers.pub"        public keys, one a line, of the nodes whose sums it joins
max-epsilon = 3.0                ε that its rows may spend over all runs (implies "example-privacy")
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedkrso_app.config import Config, names, resolved_path
from fedkrso_app.federation.discretion import Declined
from fedkrso_app.federation.sealing import SIGNER, digest
from fedkrso_app.records.sealed import Party
from fedkrso_app.strategies.privacy import Privacy
from fedkrso_app.strategies.secure import SecureSums

REQUIREMENTS = ("secure-aggregation", "example-privacy")
LEAST = 3  # nodes in a sum that is worth the name
KEYS = ("require", "min-cohort", "key", "peers", "max-epsilon")


@dataclass(frozen=True)
class Policy:
    """A node's. ``key`` and ``peers`` are paths, "" where there are none."""

    require: tuple[str, ...] = ()
    min_cohort: int = 0
    key: str = ""
    peers: str = ""
    max_epsilon: float = 0.0  # 0: no bound

    @classmethod
    def of(cls, node_config: Mapping[str, Any]) -> "Policy":
        """Raises :class:`Declined` for a key that makes no sense, so that no typing error takes the policy away."""
        for key in node_config:
            close = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.75)
            if key not in KEYS and close:
                raise Declined(f"this node's config has the unknown key {key!r}; did you mean {close[0]!r}?")
        texts = {key: node_config.get(key, "") for key in ("require", "key", "peers")}
        least = node_config.get("min-cohort", 0)
        wrong = [key for key, text in texts.items() if not isinstance(text, str)]
        if wrong or type(least) is not int or least < 0:
            raise Declined(f"{(wrong or ['min-cohort'])[0]} in this node's config is of the wrong type.")
        most = node_config.get("max-epsilon", 0.0)
        if isinstance(most, bool) or not isinstance(most, int | float) or not 0 <= most < math.inf:
            raise Declined(f"max-epsilon = {most!r} in this node's config is not a number; write for instance 3.0.")
        required = tuple(names(texts["require"]))
        for name in required:
            if name not in REQUIREMENTS:
                raise Declined(
                    f"require = {name!r} in this node's config is none of the requirements it knows: "
                    f"{', '.join(REQUIREMENTS)}."
                )
        return cls(required, least, texts["key"], texts["peers"], float(most))

    @property
    def least(self) -> int:
        """Nodes without which this one opens no sum."""
        return max(LEAST, self.min_cohort)

    def check(self, config: Config) -> None:
        """Raise :class:`Declined` where a run with this ``config`` is not one to take part in."""
        sealed = bool(self.min_cohort or self.peers or "secure-aggregation" in self.require)
        if sealed and not config.secure_aggregation:
            raise Declined("this node only sends sealed updates; set secure-aggregation = true.")
        if config.secure_aggregation and config.of(SecureSums).min_cohort < self.min_cohort:
            raise Declined(
                f"this node joins sums of at least {self.min_cohort} nodes; set secagg.min-cohort = {self.min_cohort}."
            )

        noisy = "example-privacy" in self.require or self.max_epsilon
        if noisy and config.of(Privacy).unit != "example":
            raise Declined("this node only takes part in runs with privacy.unit = 'example'.")
        if noisy and config.of(Privacy).randomness != "os":
            raise Declined("this node only adds noise that nobody can draw again; set privacy.randomness = 'os'.")

    def sign(self, claim: bytes) -> bytes:
        """``claim`` signed with this node's own key; b"" without one. Raises :class:`Declined` where the key cannot be
        used."""
        if not self.key:
            return b""
        try:
            key = serialization.load_ssh_private_key(resolved_path(self.key).read_bytes(), password=None)
        except (OSError, ValueError, TypeError) as error:
            raise Declined(f"key in this node's config cannot be read ({type(error).__name__}).") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise Declined("key in this node's config is of another kind than SuperNodes have: take an EC key.")
        return _fingerprint(key.public_key()) + key.sign(claim, ec.ECDSA(hashes.SHA384()))

    def verify(self, run: str, parties: Sequence[Party]) -> None:
        """Raise :class:`Declined` unless every party's key is signed by a peer of its own, where peers are named."""
        if not self.peers:
            return
        peers, used = self._peers(), set()
        for party in parties:
            about = f"partition {party.partitions[0]}'s key"
            print_, signature = party.signature[:SIGNER], party.signature[SIGNER:]
            if print_ not in peers:
                raise Declined(f"{about} is not signed by a key in peers.")
            if print_ in used:
                raise Declined(f"{about} is signed by the same peer as another's.")
            used.add(print_)
            try:
                peers[print_].verify(signature, claim(run, party.node, party.key), ec.ECDSA(hashes.SHA384()))
            except InvalidSignature:
                raise Declined(f"{about} is not signed by a key in peers.") from None

    def _peers(self) -> dict[bytes, ec.EllipticCurvePublicKey]:
        try:
            lines = [line for line in resolved_path(self.peers).read_bytes().splitlines() if line.strip()]
            keys = [serialization.load_ssh_public_key(line) for line in lines]
        except (OSError, ValueError) as error:
            raise Declined(f"peers in this node's config cannot be read ({type(error).__name__}).") from None
        return {_fingerprint(key): key for key in keys if isinstance(key, ec.EllipticCurvePublicKey)}


def claim(run: str, node: int, key: bytes) -> bytes:
    """What a node signs: that ``key`` is its own for the masks of ``run``."""
    return digest("fedkrso/join/1", run, node, key)


def _fingerprint(key: ec.EllipticCurvePublicKey) -> bytes:
    raw = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return digest(raw)[:SIGNER]
