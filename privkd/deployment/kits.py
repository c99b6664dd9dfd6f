"""NVFlare's startup kits, made by its own commands: certificates, and what each site forbids the other.

Keys are made where they are used: a device's request leaves with its public key alone, and comes back signed.
Beside each kit we write the site's own policy (``local/*.json``), which NVFlare reads before anything that
the other side says: one class that a job may name, no code of a job's, no logs sent away, no command but a
job's.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from privkd.errors import ConfigError, RunError
from privkd.privacy.events import PartyId

PROJECT, OPERATOR = "privkd", "operator@privkd.local"
AUTHORITY, SERVER_KIT, OPERATOR_KIT = "authority", "server", "operator"
_PROFILE = "profile.yaml"
_MODULE = "privkd.deployment.nvflare"
COURIER_CLASS, ROUNDS_CLASS = f"{_MODULE}.Courier", f"{_MODULE}.Rounds"
MAX_DEVICES = 100_000
DEAD_SECONDS = 60
"""After so long without a sign a device counts as away, and no job waits for it."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_LOG_COMPONENTS = ("site_log_streamer", "log_receiver")
_ROLES = ("project_admin", "org_admin", "lead", "member")
_FORBIDDEN = ("clone_job", "download_job", "operate", "shell_commands", "byoc", "server-predeployed-flwr")
_SECONDS = 120.0


def nvflare(*words: str, seconds: float = _SECONDS) -> Mapping[str, Any]:
    """What NVFlare's command line answers to ``words``.

    Raises:
        ConfigError: NVFlare is not installed.
        RunError: it refuses, or does not end within ``seconds``.
    """
    if find_spec("nvflare") is None:
        raise ConfigError("NVFlare carries no message, as it is not installed: pip install 'privkd[nvflare]'")
    command = [sys.executable, "-m", "nvflare.cli", "--format", "json", *words]
    # It keeps notes in the home folder, which a service's user may not have.
    with tempfile.TemporaryDirectory() as home:
        try:
            done = subprocess.run(
                command,
                env=os.environ | {"HOME": home},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=max(1.0, seconds),
                umask=0o077,
            )
        except subprocess.TimeoutExpired:
            raise RunError(f"nvflare {words[0]} {words[1]}: no end within {seconds:.0f} s") from None
    return _answer(words, done.stdout, done.stderr)


def _answer(words: tuple[str, ...], out: bytes, err: bytes) -> Mapping[str, Any]:
    for line in reversed(out.decode(errors="replace").splitlines()):
        try:
            said = json.loads(line)
        except ValueError:
            continue
        if isinstance(said, dict) and "status" in said:
            if said["status"] == "ok":
                data: dict[str, Any] = said.get("data") or {}
                return data
            raise RunError(f"nvflare {words[0]}: {said.get('message')} {said.get('hint', '')}")
    last = err.decode(errors="replace").strip().splitlines()[-1:]
    raise RunError(f"nvflare {words[0]}: {last[0] if last else 'no answer'}")


@dataclass(frozen=True)
class Authority:
    """What `make_authority` made: where it lies, and the fingerprint that each device compares."""

    folder: Path
    fingerprint: str


def make_authority(folder: Path, host: str, port: int) -> Authority:
    """The cloud's half: an authority in ``folder``, and the kits of its server and of its operator.

    ``host`` is the server's name: devices reach it by it, and it must lead to this machine.

    Raises:
        ConfigError: NVFlare is not installed.
        RunError: the folder holds an authority already, or NVFlare refuses the name.
    """
    folder = folder.absolute()
    authority = folder / AUTHORITY
    if authority.exists():
        raise RunError(f"{authority} exists already: a new authority would lock all devices out")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    server = {"host": host, "fed_learn_port": port, "admin_port": port}
    profile = {"name": PROJECT, "scheme": "grpc", "connection_security": "mtls", "server": server}
    # The authority comes last, so that what NVFlare refuses can be tried again.
    with tempfile.TemporaryDirectory(dir=folder) as own:
        new = Path(own) / AUTHORITY
        new.mkdir(mode=0o700)
        _write_yaml(new / _PROFILE, profile)
        made = nvflare("cert", "init", "--profile", str(new / _PROFILE), "-o", str(new))
        fingerprint = str(made["rootca_fingerprint_sha256"])
        (new / "fingerprint").write_text(fingerprint + "\n")
        for kit, participant in (
            (SERVER_KIT, {"name": host, "type": "server", "org": "cloud"}),
            (OPERATOR_KIT, {"name": OPERATOR, "type": "admin", "org": "cloud", "role": "lead"}),
        ):
            request = _request(participant, Path(own) / kit)
            signed = _approve(request, new, Path(own) / f"{kit}.signed.zip")
            _package(signed, request.parent, fingerprint, folder / kit)
        enforce(folder / SERVER_KIT)
        new.rename(authority)
    return Authority(folder, fingerprint)


def check_name(name: PartyId) -> None:
    """Raise `ConfigError` where NVFlare takes no device of that ``name``."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"device {name!r}: over NVFlare, letters, digits, - and _ alone, at most 63 of them"
        )


def request(name: PartyId, folder: Path) -> Path:
    """A device's key in ``folder``, which stays there, and the request that goes to the cloud.

    Raises:
        ConfigError: NVFlare takes no such name, or is not installed.
        RunError: NVFlare refuses.
    """
    check_name(name)
    return _request({"name": name, "type": "client", "org": "devices"}, folder.absolute())


def approve(request: Path, folder: Path, out: Path | None = None) -> Path:
    """The authority in ``folder`` signs a device's request: what goes back to the device.

    Raises:
        ConfigError: it is no device's request: it asks for a server's or an operator's rights.
        RunError: there is no authority there, or NVFlare refuses.
    """
    kind, name = _asked(request)
    if kind != "site" or not _NAME.fullmatch(name):
        raise ConfigError(f"{request} asks for the rights of a {kind} called {name!r}, not for a device's")
    return _approve(request, folder.absolute() / AUTHORITY, out or request.parent / f"{name}.signed.zip")


def package(signed: Path, requested: Path, fingerprint: str, out: Path) -> Path:
    """A device's kit in ``out``, of what was signed and of its key in ``requested``, with its policy.

    Args:
        fingerprint: of the authority, as the cloud's operator says it on another way than this file came.

    Raises:
        RunError: the authority is another, the request was another, or ``out`` exists.
    """
    out = out.absolute()
    _package(signed.absolute(), requested.absolute(), fingerprint, out)
    enforce(out)
    return out


def enforce(kit: Path) -> None:
    """Write a device's or the server's policy into its kit, if it is not what stands there.

    Raises:
        RunError: the kit is not NVFlare's, or is not this user's.
    """
    server = (kit / "startup" / "fed_server.json").is_file()
    for name, content in (server_policy if server else device_policy)(kit.absolute()).items():
        path, text = kit / "local" / name, json.dumps(content, indent=1) + "\n"
        try:
            if not path.is_file() or path.read_text() != text:
                path.write_text(text)
        except OSError as error:
            raise RunError(f"{path}: {error.strerror or error}") from None


def device_policy(kit: Path) -> Mapping[str, Any]:
    """The files of a device's policy, by name: what the cloud may do there, which is to send bytes."""
    facts = _defaults(kit)
    facts["class_allow_list"] = [COURIER_CLASS]
    facts["allow_log_streaming"] = False
    return _files(facts, {"submit_job": "any", "manage_job": "any", "view": "none"})


def server_policy(kit: Path) -> Mapping[str, Any]:
    """The files of the server's policy, by name; its jobs lie within the kit."""
    facts = _defaults(kit)
    facts["class_allow_list"] = [ROUNDS_CLASS]
    facts["allow_log_streaming"] = False
    facts["servers"][0] |= {"max_num_clients": MAX_DEVICES, "heart_beat_timeout": DEAD_SECONDS}
    facts["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(kit / "state" / "snapshots")
    for component in facts["components"]:
        if component["id"] == "job_manager":
            component["args"]["uri_root"] = str(kit / "state" / "jobs")
    return _files(facts, {"submit_job": "any", "manage_job": "any", "view": "any"})


def _files(resources: dict[str, Any], rights: Mapping[str, str]) -> dict[str, Any]:
    none = dict.fromkeys(_FORBIDDEN, "none")
    lead = none | dict(rights)
    nobody = none | dict.fromkeys(rights, "none")
    permissions = {role: lead if role == "lead" else nobody for role in _ROLES}
    return {
        "resources.json": resources,
        "authorization.json": {"format_version": "1.0", "permissions": permissions},
        "log_config.json": _LOGGING,
    }


_LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "%(levelname)s %(name)s: %(message)s"}},
    "handlers": {
        "console": {"class": "logging.StreamHandler", "formatter": "plain", "stream": "ext://sys.stdout"}
    },
    "loggers": {"root": {"level": "INFO", "handlers": ["console"]}},
}
"""To the journal of whoever supervises it, which bounds it: no file to be sent away or to fill a disk."""


def _defaults(kit: Path) -> dict[str, Any]:
    path = kit / "local" / "resources.json.default"
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is no default of NVFlare's ({error})") from None
    facts["class_list_enforcement_mode"] = "enforce"
    facts["components"] = [one for one in facts["components"] if one["id"] not in _LOG_COMPONENTS]
    return facts


def _request(participant: Mapping[str, str], folder: Path) -> Path:
    with tempfile.TemporaryDirectory() as own:
        asked = Path(own) / "participant.yaml"
        _write_yaml(asked, {"name": PROJECT, "participants": [dict(participant)]})
        made = nvflare("cert", "request", "-p", str(asked), "--out", str(folder))
    return Path(made["request_zip"])


def _asked(request: Path) -> tuple[str, str]:
    try:
        with zipfile.ZipFile(request) as packed:
            facts = json.loads(packed.read("request.json"))
        return str(facts["kind"]), str(facts["name"])
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise RunError(f"{request} is no request for a certificate ({error})") from None


def _approve(request: Path, authority: Path, out: Path) -> Path:
    words = ("-c", str(authority), "--profile", str(authority / _PROFILE), "--out", str(out))
    nvflare("cert", "approve", *words, str(request))
    return out


def _package(signed: Path, requested: Path, fingerprint: str, out: Path) -> None:
    if out.exists():
        raise RunError(f"{out} exists already; take a folder that does not")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as own:
        words = ("--request-dir", str(requested), "--fingerprint", fingerprint, "-w", own)
        made = nvflare("package", str(signed), *words)
        shutil.move(str(made["output_dir"]), out)


def _write_yaml(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(yaml.safe_dump(dict(tree)))
