"""What a run keeps over an interruption and nobody else may see: its noise key, its name at services."""

import os

from privkd.config import Config
from privkd.privacy.noise import NoiseRoot
from privkd.runs.folder import RunFolder


def noise_root(config: Config, folder: RunFolder) -> NoiseRoot:
    """Where the run's protective noise comes from: the seed in a simulation, else a secret of the folder.

    Raises:
        RunError: the secret is gone or was changed.
    """
    if config.privacy.noise == "seeded":
        return NoiseRoot.from_seed(config.seed)
    return NoiseRoot(folder.secret("noise.key", NoiseRoot.from_system().key))


def run_name(config: Config, folder: RunFolder) -> bytes:
    """Names the run at services that outlive it, so that its rounds are never taken for another's.

    A group that is started for the run knows no other, so it needs no name, and a seeded run repeats. Raises
    as `noise_root`.
    """
    return folder.secret("run.name", os.urandom(16)) if config.channel.aggregator_urls else b""
