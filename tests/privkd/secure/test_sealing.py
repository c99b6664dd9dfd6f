"""One key exchange a device and run: no two envelopes share an AES key, and nothing altered is opened."""

import itertools
import random
import time

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from privkd.errors import ChannelError, RefusalError
from privkd.secure import upload as sealing
from privkd.secure.keys import public_hex
from privkd.secure.party import Party
from privkd.secure.rounds import admit_header
from privkd.secure.terms import RoundTerms
from privkd.secure.upload import SharedSecrets, header_of, prepare, unseal

KEYS = [X25519PrivateKey.generate() for _ in range(4)]
TERMS = RoundTerms(
    round=3, run="ab" * 32, keys=tuple(public_hex(key) for key in KEYS[:2]), entries=6, minimum=2,
    fraction_bits=4, bound=1000, sigma2=None, roster=("a", "b"), expires=int(time.time()) + 1000,
)  # fmt: skip
ROOT = b"r" * 32


class Watched:
    """AES-GCM that notes under which key it seals what."""

    used: dict[bytes, tuple[bytes, bytes]]

    def __init__(self, key: bytes) -> None:
        self._key, self._cipher = key, sealing_cipher(key)

    def encrypt(self, nonce: bytes, data: bytes, outside: bytes) -> bytes:
        assert self.used.setdefault(self._key, (data, outside)) == (data, outside), "one key, two plaintexts"
        return sealing_cipher(self._key).encrypt(nonce, data, outside)


sealing_cipher = sealing.AESGCM


def test_whatever_differs_the_aes_key_does_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one of 1,500 random changes of one device's content, terms, round, attempt, run and
    recipients."""
    monkeypatch.setattr(sealing, "AESGCM", Watched)
    monkeypatch.setattr(Watched, "used", {}, raising=False)
    draw = random.Random(5)
    choices: dict[str, list[object]] = {
        "round": [3, 4, 2**64 - 1], "attempt": [0, 1, 999], "run": ["", "ab" * 32, "cd" * 32],
        "minimum": [1, 2], "bound": [1000, 1001], "sigma2": [None, "1", "4/3"],
        "noise": ["aggregators", "devices"], "roster": [("a", "b"), ("a", "b", "c")],
        "expires": [1000, 1001, 2**62],
        "keys": list(itertools.permutations([public_hex(key) for key in KEYS], 2)),
    }  # fmt: skip
    seen: dict[tuple[object, ...], tuple[bytes, ...]] = {}
    for _ in range(1500):
        terms = TERMS.model_copy(update={name: draw.choice(values) for name, values in choices.items()})
        device, content = draw.choice("ab"), draw.randrange(3)
        made = prepare(np.full(6, content), terms, device, ROOT)
        assert seen.setdefault((terms, device, content), made.envelopes) == made.envelopes
    # One AES key an envelope: none is shared by two questions or two aggregators.
    assert len(Watched.used) == 2 * len(seen)
    assert len(seen) > 1400


def test_a_device_has_one_public_key_a_run_and_another_in_the_next() -> None:
    def public(terms: RoundTerms, device: str = "a", root: bytes = ROOT) -> set[bytes]:
        found = prepare(np.ones(6), terms, device, root).envelopes
        return {e[len(header_of(e).pack()) :][:32] for e in found}

    mine = public(TERMS)
    assert len(mine) == 1
    for change in ({"round": 9}, {"attempt": 1}, {"expires": 5}, {"keys": TERMS.keys[::-1]}):
        assert public(TERMS.model_copy(update=change)) == mine
    others = [public(TERMS.model_copy(update={"run": run})) for run in ("", "cd" * 32)]
    others += [public(TERMS, "b"), public(TERMS, root=b"s" * 32)]
    assert len(set.union(mine, *others)) == 5


def test_the_cache_saves_the_exchange_and_opens_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    exchanges = []

    class Counting:
        def __init__(self, key: X25519PrivateKey) -> None:
            self._key = key
            self.public_key = key.public_key

        def exchange(self, public: object) -> bytes:
            exchanges.append(public)
            return self._key.exchange(public)  # type: ignore[arg-type]

    known = SharedSecrets(Counting(KEYS[0]), most=2)  # type: ignore[arg-type]
    for round in range(5):
        for device in "ab":
            envelope = prepare(
                np.full(6, round), TERMS.model_copy(update={"round": round}), device, ROOT
            ).envelopes[0]
            assert unseal(envelope, known) == unseal(envelope, KEYS[0])
    assert len(exchanges) == 2
    forged = bytearray(prepare(np.ones(6), TERMS, "a").envelopes[0])
    forged[-1] ^= 1
    with pytest.raises(ChannelError):
        unseal(bytes(forged), known)
    unseal(prepare(np.ones(6), TERMS, "a", ROOT).envelopes[0], known)
    assert len(exchanges) == 3, "what does not open takes nobody's place"
    for device in ("x", "y", "z"):
        unseal(prepare(np.ones(6), TERMS, device, ROOT).envelopes[0], known)
    unseal(prepare(np.ones(6), TERMS, "a", ROOT).envelopes[0], known)
    assert len(exchanges) == 7, "of two places the third device took one"


def test_every_part_of_an_envelope_is_bound_even_where_the_secret_is_known() -> None:
    known = SharedSecrets(KEYS[0])
    whole = prepare(np.ones(6), TERMS, "a", ROOT).envelopes[0]
    unseal(whole, known)
    for position in range(len(whole)):
        for bit in (1, 128):
            broken = bytearray(whole)
            broken[position] ^= bit
            with pytest.raises(ChannelError):
                unseal(bytes(broken), known)
    other = prepare(np.zeros(6), TERMS, "a", ROOT).envelopes[0]
    head = len(header_of(whole).pack()) + 64
    with pytest.raises(ChannelError, match="altered"):
        unseal(whole[:head] + other[head:], known)


def test_an_upload_of_version_1_is_refused_by_name() -> None:
    old = bytearray(prepare(np.ones(6), TERMS, "a").envelopes[0])
    old[4] = 1
    with pytest.raises(ChannelError, match="upload of version 1: this party opens version 2 alone"):
        header_of(bytes(old))


def test_an_upload_serves_no_later_round_of_its_name() -> None:
    party = Party(rank=0, parties=2, members=TERMS.keys)
    header = header_of(prepare(np.ones(6), TERMS, "a").envelopes[0])
    admit_header(party, TERMS.roster, TERMS, header)
    later = TERMS.model_copy(update={"expires": TERMS.expires + 1})
    with pytest.raises(RefusalError, match="upload for another expiry"):
        admit_header(party, later.roster, later, header)
