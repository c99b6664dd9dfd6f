"""READ HERE what anybody needs to know of a kind of channel: one `Kind` each. Light to import.

`register` adds a user's own. Neighbouring relation of every price: zero out one device's whole contribution,
the number of devices being public.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from privkd.channels import trust
from privkd.errors import ConfigError
from privkd.plugins import Registry
from privkd.privacy.events import NoPrivacy, PrivacyEvent, ZCdp

if TYPE_CHECKING:
    from privkd.channels.channel import Channel
    from privkd.channels.secure import SecureOptions
    from privkd.config import ChannelConfig
    from privkd.privacy.noise import NoiseRoot


@dataclass(frozen=True)
class Canaries:
    """How the audits send worst-case devices over a channel: some seconds of its time.

    Attributes:
        uploads: of the end-of-run audit, all rounds together.
        devices: of ``privkd audit mechanism``, at most.
        behind: what stands behind the channel, as the end-of-run audit says it.
    """

    uploads: int = 40_000
    devices: int = 8_000
    behind: str = ""


@dataclass(frozen=True)
class Kind:
    """A kind of channel, and all that is known of it without opening one.

    Attributes:
        load: the class, called with clip norm, price and root of the noise.
        trust: who sees what, for its settings and its device-level guarantee in words, empty without one.
        without_noise: why a release without noise has no device-level guarantee.
        views: what it gives the cloud, the names that audits have for it, curves' first. Where the cloud sees
            a sum alone, a second one is what is left of it to devices that pool what they sent.
        shows_each: whether the cloud sees each device's answers, or the sum of all alone.
        adds_noise: whether it can, for a device budget.
        has_parties: whether aggregators stand behind it, to which the settings of parties speak.
        draws: how many draws of noise of the price there are on the sum over so many devices.
        replay: the class that releases the same in the open, for audits' many replays. ``None``: ``load``'s.
        canaries: of the audits, for its settings.
        budgeted: whether curves give it their device-level budget: where nothing but noise hides a device. A
            plug-in's is not, as a curve is read back where no plug-in is loaded.
        unaudited: why the end-of-run audit bounds nothing over it; empty where it does.
        model: of the differential-privacy deployments registry.
        colour: in figures.
        marker: likewise.
    """

    load: "Callable[[], Callable[..., Channel]]"
    trust: "Callable[[ChannelConfig, str], trust.Trust]"
    without_noise: str
    views: tuple[str, ...] = ("per_client_logits",)
    shows_each: bool = True
    adds_noise: bool = True
    has_parties: bool = False
    draws: "Callable[[ChannelConfig, int], int]" = lambda settings, devices: devices
    replay: "Callable[[], Callable[..., Channel]] | None" = None
    canaries: "Callable[[ChannelConfig], Canaries]" = lambda settings: Canaries()
    budgeted: bool = False
    unaudited: str = ""
    model: str = "unknown"
    colour: str = "#CC79A7"
    marker: str = "D"


def _ours(room: str, name: str) -> "Callable[[], Callable[..., Channel]]":
    """One of our classes, by name, as its room is loaded when a channel of it is opened."""

    def load() -> "Callable[..., Channel]":
        found: Callable[..., Channel] = getattr(import_module(f"privkd.channels.{room}"), name)
        return found

    return load


def _through_parties(settings: "ChannelConfig") -> Canaries:
    services = settings.through_services
    uploads, devices = (2_000, 800) if services else (9_000, 2_000)
    told = (
        "none of whose noise is known" if settings.aggregator_urls else "all but one of whose noise is known"
    )
    parties = "services" if services else "processes"
    return Canaries(uploads, devices, f", by its {settings.aggregators} {parties}, {told}")


# Okabe and Ito's colours, which stay apart for colour-blind eyes; markers tell them apart in grey.
_OURS = {
    "plain": Kind(
        load=_ours("channel", "PlainChannel"),
        trust=trust.plain,
        without_noise="plain channel: the cloud sees each device's answers, without any noise",
        adds_noise=False,
        unaudited="the plain channel adds no noise, so nothing is claimed for a device",
        model="Central",
        colour="#D55E00",
        marker="o",
    ),
    "noised": Kind(
        load=_ours("channel", "NoisedChannel"),
        trust=trust.noised,
        without_noise="noised channel without a device budget adds no noise",
        budgeted=True,
        model="Local",
        colour="#0072B2",
        marker="s",
    ),
    "secure": Kind(
        load=_ours("secure", "SecureChannel"),
        trust=trust.secure,
        without_noise="secure aggregation without noise has no device-level guarantee",
        views=("secure_sum", "secure_sum_colluding"),
        shows_each=False,
        has_parties=True,
        draws=lambda settings, devices: settings.aggregators if settings.noise_from == "aggregators" else 1,
        replay=_ours("secure", "OpenSum"),
        canaries=_through_parties,
        model="Federated",
        colour="#009E73",
        marker="^",
    ),
}
OURS = tuple(_OURS)
"""The kinds that are there without any plug-in."""
NOISY = tuple(name for name in OURS if _OURS[name].adds_noise)
"""Of them, those that can add noise for a device budget."""
WITHOUT_PARTIES = tuple(name for name in OURS if not _OURS[name].has_parties)
"""Of them, those behind which no aggregators stand."""
SHOW_EACH = tuple(name for name in OURS if _OURS[name].shows_each)
"""Of them, those over which the cloud sees each device's answers."""
OUR_VIEWS = tuple(dict.fromkeys(view for kind in _OURS.values() for view in kind.views))
"""What they give the cloud."""
KINDS: Registry[Kind] = Registry("channel.kind", _OURS)

C = TypeVar("C", bound="type[Channel]")


def register(
    name: str,
    *,
    trust: str | tuple[str, ...],
    views: tuple[str, ...] = ("per_client_logits",),
    shows_each: bool = True,
    adds_noise: bool = True,
    **more: Any,
) -> Callable[[C], C]:
    """Add the decorated class, which inherits `Channel`, to `KINDS`: one that ``channel.kind`` may name.

    With a device budget each release must be ``rho``-zCDP for each device.

    Args:
        name: letters, digits, ``-`` and ``_``.
        trust: who sees what and must be trusted with it, a sentence each.
        views: see `Kind`.
        shows_each: likewise.
        adds_noise: likewise.
        more: any other field of `Kind`; ``draws`` is one a device where the cloud sees each, else one.

    Raises:
        ConfigError: the name is taken, a view is no channel's, or a field is unknown.
    """
    sentences = (trust,) if isinstance(trust, str) else tuple(trust)
    known = Kind.__dataclass_fields__.keys() - {"load", "trust", "budgeted"}
    if unknown := sorted(more.keys() - known):
        raise ConfigError(f"channel {name!r}: unknown {unknown[0]!r}; expected some of {sorted(known)}")
    _check_views(name, views, shows_each)
    why = f"{name} channel{' without a device budget' if adds_noise else ''} adds no noise"
    more = {"without_noise": why, **more}
    if not adds_noise:
        more = {"unaudited": f"the {name} channel adds no noise, so nothing is claimed for a device", **more}
    if not shows_each:
        more = {"draws": lambda settings, devices: 1, **more}

    def enter(channel: C) -> C:
        said = _said(sentences, shows_each)
        kind = Kind(lambda: channel, said, views=views, shows_each=shows_each, adds_noise=adds_noise, **more)
        KINDS.add(name, kind, channel)
        channel.kind = name
        return channel

    return enter


def _said(sentences: tuple[str, ...], shows_each: bool) -> trust.Said:
    return trust.Said(sentences, "each device's release" if shows_each else "what is made of all answers")


def _check_views(name: str, views: tuple[str, ...], shows_each: bool) -> None:
    """Raise `ConfigError` unless ``views`` are one, or up to two of a sum, that are no models'."""
    wrong = [view for view in views if view in ("teacher", "student", "gradient", "all")]
    if wrong or not 1 <= len(views) <= (1 if shows_each else 2):
        most = "one view" if shows_each else "one view or two"
        raise ConfigError(f"channel {name!r}: views {views!r}: expected {most}, none of them a model's")


def known(name: str) -> Kind:
    """The kind of this name, or one that says that its plug-in is not loaded, as records are read."""
    return KINDS.find(name) or _unloaded(name)


def _unloaded(name: str) -> Kind:
    words = f"The channel {name!r} is a plug-in's, which is not loaded here."

    def load() -> "Callable[..., Channel]":
        raise ConfigError(words)

    why = f"{name} channel without a device budget adds no noise"
    return Kind(load, trust.Said((words,), "a release"), why)


def channel_views() -> tuple[str, ...]:
    """What all kinds give the cloud, those of plug-ins included."""
    return tuple(dict.fromkeys(view for name in KINDS for view in KINDS[name].views))


def price_of(name: str, rho: float | None) -> PrivacyEvent:
    """What one release over a channel of this kind costs a device: ``rho``-zCDP, or no guarantee."""
    return NoPrivacy(known(name).without_noise) if rho is None else ZCdp(rho)


def open_channel(
    kind: str,
    *,
    clip_norm: float,
    root: "NoiseRoot",
    rho: float | None = None,
    aggregators: int = 2,
    deadline: float = 120.0,
    options: "SecureOptions | None" = None,
) -> "Channel":
    """The channel of this kind.

    Args:
        kind: of `KINDS`.
        clip_norm: L2 bound on each device's whole ``[query, class]`` block; a public constant.
        root: where noise comes from.
        rho: zCDP price of one release to each device, or ``None`` for no noise.
        aggregators: number of parties among which ``secure`` shares the answers; at least 2.
        deadline: seconds that one step of ``secure``'s parties may take.
        options: where the parties of ``secure`` run, and how rounds are held with them.

    Raises:
        ConfigError: a setting is out of range, or this kind adds no noise.
    """
    chosen = KINDS[kind]
    if rho is not None and not chosen.adds_noise:
        raise ConfigError(f"rho={rho}: the {kind} channel adds no noise; take {' or '.join(NOISY)}")
    parties: dict[str, Any] = {"aggregators": aggregators, "deadline": deadline, "options": options}
    with KINDS.guarded(kind):
        return chosen.load()(clip_norm, rho, root, **(parties if chosen.has_parties else {}))


def open_replay(
    kind: str, *, clip_norm: float, root: "NoiseRoot", rho: float | None, aggregators: int
) -> "Channel":
    """One that releases the same in this process, for audits: a ``root`` is for one release alone."""
    chosen = KINDS[kind]
    parties = {"aggregators": aggregators} if chosen.has_parties else {}
    with KINDS.guarded(kind):
        return (chosen.replay or chosen.load)()(clip_norm, rho, root, **parties)
