"""What operators are given: units, containers. They name commands that exist, and keep the roles apart."""

import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import ROOT, parsed

from cli import app

UNITS = sorted((ROOT / "deploy/systemd").glob("*.service"))
CONTAINERS = ROOT / "deploy/containers"
COMPOSE: Mapping[str, Any] = yaml.safe_load((CONTAINERS / "compose.yaml").read_text())
IMAGES = (CONTAINERS / "Containerfile").read_text()
COURIERS = {"privkd-courier": "privkd-device", "privkd-cloud-courier": "privkd-cloud"}
DEVICES, AGGREGATORS = 5, 3


def parse_where_it_is(words: list[str]) -> None:
    """Parse a command, if this installation has its group."""
    groups = {group.name for group in app.registered_groups}
    groups |= {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]
    if words[0] not in groups:
        pytest.skip(f"this installation has no `privkd {words[0]}`")
    parsed(words)


def unit(path: Path) -> dict[str, list[str]]:
    """The settings of a unit's service; each may stand more than once."""
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", path.read_text(), flags=re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


def analyzed(path: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """What systemd says of a unit; a program that is on every machine stands in for ours."""
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("there is no systemd-analyze here")
    copy = folder / path.name
    copy.write_text(path.read_text().replace("/opt/privkd/bin/privkd", shutil.which("true") or "/bin/true"))
    return subprocess.run([tool, *words, str(copy)], capture_output=True, text=True)


def test_there_is_a_unit_for_each_role() -> None:
    roles = {"aggregator", "device", "courier", "cloud", "cloud-courier"}
    assert {path.stem for path in UNITS} == {f"privkd-{role}" for role in roles}


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
class TestUnits:
    def test_systemd_takes_it(self, path: Path, tmp_path: Path) -> None:
        found = analyzed(path, tmp_path, "verify")
        assert (found.returncode, found.stdout + found.stderr) == (0, "")

    def test_it_is_confined(self, path: Path, tmp_path: Path) -> None:
        found = analyzed(path, tmp_path, "security", "--offline=true", "--threshold=20")
        assert found.returncode == 0, found.stdout

    def test_its_command_is_one(self, path: Path) -> None:
        (command,) = unit(path)["ExecStart"]
        program, *words = shlex.split(command)
        assert program == "/opt/privkd/bin/privkd"
        parse_where_it_is(words)

    def test_it_runs_as_its_own_user_in_its_own_folder(self, path: Path) -> None:
        found = unit(path)
        assert found["User"] == found["StateDirectory"] == [path.stem]
        assert found["StateDirectoryMode"] == ["0700"]
        assert found["UMask"] == ["0077"]
        users = (ROOT / "deploy/systemd/privkd.sysusers").read_text()
        assert f"u {path.stem} - " in users

    def test_wrong_settings_do_not_start_it_for_ever(self, path: Path) -> None:
        found = unit(path)
        assert found["Restart"] == ["on-failure"]
        assert found["RestartPreventExitStatus"] == ["2"]
        assert found["MemoryMax"]


@pytest.mark.parametrize(("courier", "role"), COURIERS.items())
def test_a_courier_shares_a_socket_with_its_role_and_nothing_else(courier: str, role: str) -> None:
    mine, other = (unit(ROOT / "deploy/systemd" / f"{name}.service") for name in (courier, role))
    assert mine["SupplementaryGroups"] == other["Group"] == [role]
    assert other["RuntimeDirectoryMode"] == ["0750"]
    (command,) = mine["ExecStart"]
    assert f"--socket /run/{other['RuntimeDirectory'][0]}/" in command
    assert f"-/var/lib/{role}" in mine["InaccessiblePaths"][0].split()
    assert "-/etc/privkd" in mine["InaccessiblePaths"][0].split()


def services(kind: str) -> dict[str, Mapping[str, Any]]:
    return {name: one for name, one in COMPOSE["services"].items() if one["image"] == f"privkd-{kind}"}


def mounts(service: Mapping[str, Any]) -> dict[str, str]:
    """What a service mounts, by place."""
    plain = (each.replace("${MEMBERS:?}", "MEMBERS") for each in service["volumes"])
    return {words[1]: words[0] for words in (each.split(":") for each in plain)}


class TestCompose:
    def test_everybody_is_there(self) -> None:
        kinds = {kind: len(services(kind)) for kind in ("aggregator", "device", "cloud", "courier")}
        assert kinds == {"aggregator": AGGREGATORS, "device": DEVICES, "cloud": 1, "courier": DEVICES + 1}
        assert len(COMPOSE["services"]) == sum(kinds.values())

    def test_no_two_share_a_folder_of_members_or_a_state(self) -> None:
        own = [
            source
            for service in COMPOSE["services"].values()
            for place, source in mounts(service).items()
            if not place.startswith("/run/")
        ]
        assert len(own) == len(set(own))

    def test_a_device_and_its_courier_share_a_socket_and_no_network(self) -> None:
        for number in range(DEVICES):
            device = COMPOSE["services"][f"device-{number}"]
            courier = COMPOSE["services"][f"courier-{number}"]
            assert set(mounts(device).items()) & set(mounts(courier).items()) == {
                ("/run/privkd-device", f"link-device-{number}")
            }
            assert not set(device["networks"]) & set(courier["networks"])
            assert device["user"] != courier["user"]
            assert device["user"].split(":")[1] in courier["group_add"]

    def test_roles_run_as_different_users_and_nobody_as_root(self) -> None:
        users = {kind: {one["user"] for one in services(kind).values()} for kind in ("aggregator", "device")}
        users |= {kind: {one["user"] for one in services(kind).values()} for kind in ("cloud", "courier")}
        assert all(len(one) == 1 for one in users.values())
        assert len(set.union(*users.values())) == len(users)
        assert not any(user.startswith("0") for one in users.values() for user in one)
        for kind, (user,) in users.items():
            assert f"USER {user}" in stage(kind)

    def test_volumes_and_networks_line_up(self) -> None:
        used = {source for one in COMPOSE["services"].values() for source in mounts(one).values()}
        assert {source for source in used if not source.startswith("MEMBERS/")} == set(COMPOSE["volumes"])
        assert {net for one in COMPOSE["services"].values() for net in one["networks"]} == set(
            COMPOSE["networks"]
        )

    @pytest.mark.parametrize("name", COMPOSE["services"])
    def test_its_command_is_one_and_it_is_confined(self, name: str) -> None:
        service = COMPOSE["services"][name]
        assert service["cap_drop"] == ["ALL"]
        assert service["read_only"] is True
        assert service["build"]["target"] == service["image"].removeprefix("privkd-")
        program, *words = entrypoint(service["build"]["target"])
        assert program == "privkd"
        parse_where_it_is([*words, *service.get("command", [])])


def stage(name: str) -> str:
    """The lines of an image's stage."""
    found = re.search(rf"^FROM \S+ AS {name}\n(.*?)(?=^FROM |\Z)", IMAGES, flags=re.MULTILINE | re.DOTALL)
    assert found, name
    return found[1]


def entrypoint(name: str) -> list[str]:
    words = re.search(r"^ENTRYPOINT (\[.*\])$", stage(name), flags=re.MULTILINE)
    assert words, name
    found: list[str] = yaml.safe_load(words[1])
    return found


class TestImages:
    def test_every_path_that_is_copied_exists_and_none_holds_a_secret(self) -> None:
        lines = re.findall(r"^COPY (?!--from)(.*)$", IMAGES, flags=re.MULTILINE)
        copied = [word for line in lines for word in line.split()[:-1]]
        assert copied
        for name in copied:
            assert (ROOT / name).exists(), name
        assert not re.search(r"\b(password|token|secret|\.key|\.pem)\b", IMAGES, flags=re.IGNORECASE)

    def test_a_couriers_image_has_no_torch(self) -> None:
        lean = stage("lean")
        assert "--no-deps /wheels/" in lean
        assert not re.search(r"torch|numpy|\[", "\n".join(re.findall(r"^RUN .*$", lean, flags=re.MULTILINE)))


def test_all_of_it_is_shipped() -> None:
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert "deploy" in built["sdist"]["include"]
    assert built["wheel"]["shared-data"]["deploy"] == "share/doc/privkd/deploy"
