"""Parts of the services: keys, settings, terms, spool, the device's side, noise splits, the channel."""

import math
import os
import stat
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.special import logsumexp

from privkd.channels.registry import open_channel
from privkd.channels.secure import SecureChannel, SecureOptions
from privkd.config import load_config
from privkd.errors import ChannelError, ConfigError
from privkd.privacy.events import ZCdp
from privkd.privacy.noise import NoiseRoot
from privkd.secure.keys import load_noise_key, load_sealing_key, make_keys, public_hex
from privkd.secure.party import load_party
from privkd.secure.shares import reconstruct
from privkd.secure.terms import RoundTerms, distributed_rho, distributed_variance, set_digest
from privkd.secure.upload import Upload, header_of, prepare, unseal
from privkd.secure.uploads import StorageError, UploadsOnDisk, stored_rounds, stored_uploads

ROOT = NoiseRoot.from_seed(4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("keys") / "new"
    make_keys(made, third_party=True, devices=("device-0",))
    return made


@pytest.fixture(scope="module")
def terms(folder: Path) -> RoundTerms:
    party = load_party(folder / "party-0.toml")
    return RoundTerms(
        round=5, keys=party.members[:2], entries=6, minimum=2, fraction_bits=4, bound=1000, sigma2=None,
        roster=("a", "b"), expires=int(time.time()) + 100,
    )  # fmt: skip


def test_keys_are_private_whole_and_never_overwritten(folder: Path) -> None:
    parties = [load_party(folder / f"party-{rank}.toml") for rank in range(3)]
    for rank, party in enumerate(parties):
        assert (party.rank, party.parties, party.deals) == (rank, 2, rank == 2)
        assert public_hex(load_sealing_key(party.sealing_key)) == party.members[rank]
        assert len(load_noise_key(party.noise_key)) == 32
    assert len({load_noise_key(party.noise_key) for party in parties}) == 3
    secrets = [*folder.glob("*.key"), *folder.glob("*.noise")]
    assert len(secrets) == 3 * 3 + 3  # sealing, noise and TLS; the authority's, cloud's and device's
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in secrets)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match="never overwritten"):
        make_keys(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"parties": 1}, "parties=1"), ({"parties": 17}, "parties=17"), ({"port": 65535}, "port=65535"),
     ({"hosts": ("a", "b", "c")}, "3 hosts"), ({"devices": ("../x",)}, "device"),
     ({"devices": ("cloud",)}, "device")],
)  # fmt: skip
def test_bad_key_requests_leave_nothing_behind(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        make_keys(tmp_path / "x", **changes)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("listen", ["0.0.0.0:80", "10.0.0.5:8440", "aggregator.example:8440", "[::]:80"])
def test_where_others_reach_it_a_party_asks_for_certificates(tmp_path: Path, listen: str) -> None:
    """Else everybody could open and close rounds, whatever the encryption."""
    make_keys(tmp_path)
    path = tmp_path / "party-0.toml"
    public = path.read_text().replace("127.0.0.1:0", listen)
    path.write_text(public)
    assert load_party(path).tls is not None
    path.write_text(public.replace('client_ca = "ca.pem"', ""))
    with pytest.raises(ConfigError, match=r"without tls\.client_ca anybody who reaches it") as caught:
        load_party(path)
    assert "\n" not in str(caught.value)
    path.write_text(path.read_text().replace(listen, "127.0.0.1:0"))
    assert load_party(path).tls is not None


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('listen = "127.0.0.1:0"', 'listen = "0.0.0.0:80"', "only the loopback"),
        ('listen = "127.0.0.1:0"', 'listen = "nowhere"', "expected host:port"),
        ("parties = 2", "parties = 4", "expected the keys of 4"),
        ("rank = 0", "rank = 3", "rank=3"),
        ("rank = 0", "rank = 0\nrnak = 1", "rnak"),
        ("rank = 0", "rank = ", "not TOML"),
    ],
)
def test_a_bad_party_file_is_one_line(tmp_path: Path, old: str, new: str, words: str) -> None:
    make_keys(tmp_path, tls=False)
    path = tmp_path / "party-0.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=words) as caught:
        load_party(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="No such file"):
        load_party(tmp_path / "none.toml")


def test_terms_travel_and_are_checked(terms: RoundTerms) -> None:
    assert RoundTerms.unpack(terms.pack()) == terms
    later = terms.model_copy(update={"expires": terms.expires + 1, "keys": ("00" * 32, "11" * 32)})
    assert set_digest(later, [b"x"]) == set_digest(terms, [b"x"])
    for change in ({"sigma2": "1"}, {"roster": ("a",)}, {"bound": 999}, {"round": 6}, {"minimum": 1}):
        assert set_digest(terms.model_copy(update=change), []) != set_digest(terms, [])
    fields = terms.model_dump()
    for change in (
        {"sigma2": "0"}, {"sigma2": "1/0"}, {"sigma2": "nan"}, {"sigma2": str(2**73)}, {"roster": ()},
        {"roster": ("a", "a")}, {"roster": ("",)}, {"round": -1}, {"round": 2**64}, {"entries": 0},
        {"minimum": 0}, {"ring_bits": 64}, {"noise": "nobody"}, {"keys": ("00" * 32,)}, {"extra": 1},
    ):  # fmt: skip
        with pytest.raises(ChannelError, match="terms of a round"):
            RoundTerms.unpack(__import__("json").dumps(fields | change).encode())


# ---- the device's side and the spool ----------------------------------------------------------------


def opened(upload: Upload, folder: Path) -> NDArray[np.int64]:
    keys = [load_sealing_key(folder / f"party-{rank}.key") for rank in range(2)]
    shares = [unseal(e, key)[1] for e, key in zip(upload.envelopes, keys, strict=True)]
    return reconstruct([share.expand(6) for share in shares])


def test_an_upload_is_the_clipped_integers_under_a_name_of_its_own(folder: Path, terms: RoundTerms) -> None:
    block = np.array([1.0, -2.03, 0.0, 3.99, -0.01, 5.0])
    upload = prepare(block, terms, "a")
    np.testing.assert_array_equal(opened(upload, folder), np.trunc(block * 16))
    assert Upload.unpack(upload.pack()) == upload
    for damaged in (upload.pack()[:-1], b"\x05\0\0\0ab", b""):
        with pytest.raises(ChannelError, match="damaged"):
            Upload.unpack(damaged)
    again = prepare(block, terms, "a")
    assert again.upload_id != upload.upload_id
    assert not set(again.envelopes) & set(upload.envelopes)


def test_given_entropy_an_upload_is_a_function_of_its_content(folder: Path, terms: RoundTerms) -> None:
    block, entropy = np.arange(6.0), b"e" * 32
    upload = prepare(block, terms, "a", entropy)
    assert prepare(block, terms, "a", entropy) == upload
    changed = [
        prepare(block + 1, terms, "a", entropy),
        prepare(block, terms, "b", entropy),
        prepare(block, terms.model_copy(update={"round": 6}), "a", entropy),
    ]
    assert len({upload.upload_id, *(other.upload_id for other in changed)}) == 4
    assert len({e for u in (upload, *changed) for e in u.envelopes}) == 8
    noisy = terms.model_copy(update={"sigma2": "9000", "noise": "devices"})
    np.testing.assert_array_equal(
        opened(prepare(block, noisy, "a", entropy), folder),
        opened(prepare(block, noisy, "a", entropy), folder),
    )


def test_the_spool_takes_up_what_was_whole(tmp_path: Path, terms: RoundTerms) -> None:
    spool = UploadsOnDisk.create(tmp_path / terms.folder, terms)
    first, second = (prepare(np.ones(6), terms, device).envelopes[0] for device in ("a", "b"))
    spool.add(header_of(first), first)
    spool.add(header_of(first), first)
    with pytest.raises(ChannelError, match="same bytes"):
        spool.add(header_of(first), first[:-1])
    assert spool.holds("a")
    assert not spool.holds("b")
    spool.sync()
    (tmp_path / "foreign").mkdir()
    log = tmp_path / terms.folder / "uploads"
    whole = log.read_bytes()
    spool.add(header_of(second), second)
    with pytest.raises(ChannelError, match="same bytes"):
        spool.add(header_of(second), second[:-1])
    spool.sync()
    both = log.read_bytes()
    assert [device for device, _ in stored_uploads(spool.folder)] == ["a", "b"]
    # Whatever a crash leaves of the second, torn or not yet written, the first is there and no more.
    for tail in (both[len(whole) : -1], both[len(whole) : len(whole) + 5], bytes(len(both) - len(whole)),
                 flip_last(both[len(whole) :])):  # fmt: skip
        log.write_bytes(whole + tail)
        (again,) = stored_rounds(tmp_path)
        assert set(again.held) == {"a"}
        assert log.read_bytes() == whole
        again.add(header_of(second), second)
        assert set(again.held) == {"a", "b"}
        assert log.read_bytes() == both
        assert dict(stored_uploads(again.folder)) == {"a": first, "b": second}
    assert again.terms == terms
    assert again.share is None
    again.keep_share(b"share")
    assert again.share == b"share"
    again.drop_uploads()
    assert not dict(stored_uploads(again.folder))


def flip_last(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def test_what_the_disk_refused_is_forgotten_and_keeps_nothing_else_out(
    tmp_path: Path, terms: RoundTerms, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = UploadsOnDisk.create(tmp_path / terms.folder, terms)
    first, second = (prepare(np.ones(6), terms, device).envelopes[0] for device in ("a", "b"))
    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", lambda descriptor, data, offset: len(data) - 1)
        spool.add(header_of(first), first)
        with pytest.raises(StorageError, match="No space left on device") as caught:
            spool.sync()
        assert str(tmp_path) not in str(caught.value)
        assert not spool.holds("a")
        spool.add(header_of(first), first)
        assert spool.held == {}
    spool.add(header_of(second), second)
    spool.sync()
    spool.add(header_of(first), first)
    assert set(spool.held) == {"a", "b"}
    assert dict(stored_uploads(spool.folder)) == {"a": first, "b": second}


def test_threads_share_syncs_and_none_is_acknowledged_before_its_own(
    tmp_path: Path, terms: RoundTerms, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = UploadsOnDisk.create(tmp_path / terms.folder, terms)
    envelopes = {f"d{i}": prepare(np.ones(6), terms, f"d{i}").envelopes[0] for i in range(40)}
    durable: list[int] = [0]
    acknowledged: list[bool] = []
    fdatasync = os.fdatasync

    def slow(descriptor: int) -> None:
        size = os.fstat(descriptor).st_size
        time.sleep(0.02)
        fdatasync(descriptor)
        durable.append(size)

    monkeypatch.setattr("os.fdatasync", slow)

    def put(device: str) -> None:
        spool.add(header_of(envelopes[device]), envelopes[device])
        spool.sync()
        reached = max(durable)
        acknowledged.append(reached >= spool._places[device].start + spool._places[device].size)

    threads = [threading.Thread(target=put, args=(device,)) for device in envelopes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert acknowledged == [True] * 40
    assert len(durable) < 20, "forty uploads, a handful of syncs"
    assert {device: bytes(e) for device, e in stored_uploads(spool.folder)} == envelopes


@pytest.mark.parametrize("module", ["upload", "service", "client", "group", "keys", "local"])
def test_neither_device_nor_service_loads_torch(module: str) -> None:
    code = f"import privkd.secure.{module}, sys; assert not {{'torch', 'crypten'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---- noise by the devices ---------------------------------------------------------------------------


def exact_divergence(s2: float, summands: int, shift: int, alpha: float) -> float:
    """Renyi divergence of a sum of discrete Gaussians from itself shifted, by convolution."""
    reach = 60
    x = np.arange(-reach, reach + 1)
    one = np.exp(-(x**2) / (2 * s2))
    law = one / one.sum()
    for _ in range(summands - 1):
        law = np.convolve(law, one / one.sum())
    p, q = law[shift:], law[:-shift]
    # Tails under 1e-250 are noise of the convolution; leaving them out lowers the divergence by nothing seen.
    kept = (p > 1e-250) & (q > 1e-250)
    return float(logsumexp(alpha * np.log(p[kept]) + (1 - alpha) * np.log(q[kept])) / (alpha - 1))


@pytest.mark.parametrize(("s2", "summands"), [(0.25, 2), (0.5, 3), (1.0, 2), (2.0, 4)])
@pytest.mark.parametrize("shift", [1, 2])
def test_the_price_of_a_sum_bounds_its_divergence(s2: float, summands: int, shift: int) -> None:
    """And it is no looser than needed: at the Gaussian's price once the noise is well above one."""
    rho = distributed_rho(shift, Fraction(s2), summands, entries=1)
    for alpha in (1.5, 2.0, 4.0):
        assert exact_divergence(s2, summands, shift, alpha) <= alpha * rho * (1 + 1e-9)
    gaussian = shift**2 / (2 * summands * s2)
    assert rho >= gaussian
    if s2 >= 2:
        assert rho < 1.001 * gaussian


def test_small_noise_is_priced_above_the_gaussian_or_refused() -> None:
    assert distributed_rho(1, Fraction(1, 100), 10, entries=100) > 2 * (1 / (2 * 10 / 100))
    sigma2 = distributed_variance(1 << 19, 0.5, 100)
    assert distributed_rho(1 << 19, sigma2 / 100, 100, 1 << 26) <= 0.5
    assert float(sigma2) == pytest.approx((1 << 38) / (2 * 0.5), rel=1e-8)
    with pytest.raises(ConfigError, match="too little noise"):
        distributed_variance(100, 0.5, 100_000)
    with pytest.raises(ConfigError, match="drown"):
        distributed_variance(1 << 20, 1e-20, 2)


# ---- the channel ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_norm_check_lets_clipped_devices_pass() -> None:
    """Three devices clipped to the norm; each is rejected with probability 2^-40 at most."""
    answers = 100 * torch.randn(3, 100, 4, generator=torch.Generator().manual_seed(2))
    options = SecureOptions(services=True, projections=256)
    with open_channel("secure", clip_norm=5.0, root=ROOT, options=options) as channel:
        release = channel.release(answers, devices=["a", "b", "c"], round=0)
    with SecureChannel(5.0, None, ROOT) as plain:
        assert torch.equal(release.answers, plain.release(answers, devices=["a", "b", "c"], round=0).answers)


@pytest.mark.parametrize("services", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_devices_noise_is_of_the_stated_size(services: bool) -> None:
    """At 1e-6; a repeated release is the same."""
    answers = torch.randn(5, 200, 4, generator=torch.Generator().manual_seed(1))
    devices = [f"device-{i}" for i in range(5)]
    with open_channel("secure", clip_norm=30.0, root=ROOT) as channel:
        exact = channel.release(answers, devices=devices, round=0)
    options = SecureOptions(services=services, noise="devices", minimum=4)
    with open_channel("secure", clip_norm=30.0, rho=0.5, root=ROOT, options=options) as channel:
        release = channel.release(answers, devices=devices, round=0)
        again = channel.release(answers, devices=devices, round=0)
    assert torch.equal(release.answers, again.answers)
    assert release.devices == tuple(devices)
    assert channel.event == ZCdp(0.5)
    assert release.noise_std == pytest.approx(30 * math.sqrt(5 / 4) / 5, rel=1e-5)
    residual = (release.answers - exact.answers).numpy() / release.noise_std
    assert 5e-7 < stats.chi2.cdf((residual**2).sum(), residual.size) < 1 - 5e-7


@pytest.mark.parametrize("noise", ["aggregators", pytest.param("devices", marks=pytest.mark.slow)])
def test_whoever_falls_silent_the_mean_is_over_those_who_stay(noise: str) -> None:
    """Three of five upload, where two would do: the noise on their sum is never less than priced, and of the
    stated size (1e-6)."""
    answers = torch.randn(3, 200, 4, generator=torch.Generator().manual_seed(1))
    roster = tuple(f"device-{i}" for i in range(5))
    stay = (roster[0], roster[2], roster[3])
    options = SecureOptions(services=True, noise=noise, minimum=2, roster=roster)  # type: ignore[arg-type]
    with open_channel("secure", clip_norm=30.0, rho=0.5, root=ROOT, options=options) as channel:
        release = channel.release(answers, devices=stay, round=0)
        with pytest.raises(ChannelError, match="1 devices, fewer than minimum_devices=2"):
            channel.release(answers[:1], devices=stay[:1], round=1)
        with pytest.raises(ChannelError, match="stranger is not on the roster"):
            channel.release(answers[:2], devices=("stranger", roster[0]), round=1)
    assert release.devices == stay
    assert channel.event == ZCdp(0.5)
    on_sum = release.noise_std * 3
    assert on_sum == pytest.approx(30 * math.sqrt(2 if noise == "aggregators" else 3 / 2), rel=1e-5)
    blocks = answers.double().reshape(3, -1)
    clipped = blocks * (30 / blocks.norm(dim=1, keepdim=True)).clamp(max=1)
    residual = (release.answers - clipped.mean(0).reshape(200, 4)).numpy() / release.noise_std
    assert 5e-7 < stats.chi2.cdf((residual**2).sum(), residual.size) < 1 - 5e-7


def test_settings_of_services_are_checked() -> None:
    for options, words in [
        (SecureOptions(urls=("nonsense",)), "expected an address"),
        (SecureOptions(minimum=0), "minimum_devices=0"),
        (SecureOptions(projections=64, noise="devices"), "norm_projections"),
        (SecureOptions(urls=("https://h:1",), ca=Path("none.pem")), "certificates"),
    ]:
        with pytest.raises(ConfigError, match=words):
            open_channel("secure", clip_norm=1.0, root=ROOT, options=options)
    with pytest.raises(ConfigError, match="are for kind 'secure'"):
        load_config(settings={"channel.kind": "plain", "channel.aggregator_urls": ["https://h:1"]})
    with pytest.raises(ConfigError, match="are for kind 'secure'"):
        load_config(settings={"channel.kind": "noised", "channel.noise_from": "devices"})
    assert not load_config().channel.through_services
    assert load_config(settings={"channel.aggregator_urls": ["https://h:1"]}).channel.through_services
    few = open_channel("secure", clip_norm=1.0, root=ROOT, options=SecureOptions(minimum=6))
    with few, pytest.raises(ChannelError, match="fewer than minimum_devices=6; nothing was released"):
        few.release(torch.ones(5, 1, 1), devices=list("abcde"), round=0)
