"""What a run keeps over an interruption and nobody else may see: its noise key, its name at services."""

import os

from privkd.channels.secure import SecureOptions
from privkd.config import Config
from privkd.privacy.events import PartyId
from privkd.privacy.noise import NoiseRoot
from privkd.privacy.votes import VoteRule
from privkd.runs.folder import RunFolder


def noise_root(config: Config, folder: RunFolder) -> NoiseRoot:
    """Where the run's protective noise comes from: the seed in a simulation, else a secret of the folder.

    Raises:
        RunError: the secret is gone or was changed.
    """
    if config.privacy.noise == "seeded":
        return NoiseRoot.from_seed(config.seed)
    return NoiseRoot(folder.secret("noise.key", NoiseRoot.from_system().key))


def secure_options(
    config: Config, folder: RunFolder, roster: tuple[PartyId, ...], votes: VoteRule | None = None
) -> SecureOptions | None:
    """Where the secure channel's parties run, and how it holds rounds; none over another channel.

    Raises as `noise_root`. ``roster``: all devices of the run.
    """
    channel = config.channel
    if channel.kind != "secure":
        return None
    return SecureOptions(
        services=channel.through_services,
        urls=channel.aggregator_urls,
        ca=channel.ca,
        certificate=channel.certificate,
        key=channel.key,
        pins=channel.aggregator_keys,
        # Services outlive runs: their rounds need names that no other run has. A group that is started for
        # the run knows no other, so it needs no name, and a seeded run repeats.
        run=folder.secret("run.name", os.urandom(16)) if channel.aggregator_urls else b"",
        roster=roster,
        minimum=channel.minimum_devices,
        noise=channel.noise_from,
        projections=channel.norm_projections,
        votes=votes,
    )
