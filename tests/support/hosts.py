"""Folders that stand for hosts, and the page for three hosts and five devices, followed on them."""

import contextlib
import io
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from pages import ROOT, commands_of

from cli import app
from privkd.secure.certificates import Role, role_of

PARTIES = ("a", "b", "t")
"""The hosts of the aggregators and of the third party, by rank."""


@dataclass(frozen=True)
class Answer:
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str


def privkd(*arguments: object) -> Answer:
    """The command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
        app([str(argument) for argument in arguments])
    code = left.value.code
    return Answer(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())


def done(*arguments: object) -> str:
    """What a command that succeeds says."""
    answer = privkd(*arguments)
    assert answer.code == 0, answer.err or answer.out
    return answer.out


def free_ports(count: int) -> list[int]:
    """Ports of this machine at which nobody listens."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def secret_places(base: Path) -> dict[Path, set[Path]]:
    """Each secret key below ``base``, and the folders in which 32 bytes of it are, in PEM or as they are."""
    held = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    found = {}
    for secret, text in held.items():
        if secret.suffix not in (".key", ".noise"):
            continue
        core = b"".join(text.splitlines()[1:-1])[30:62] if text.startswith(b"-----") else text
        assert len(core) == 32
        assert secret.stat().st_mode & 0o777 == 0o600
        places = (
            path.parent for path, data in held.items() if core in data.replace(b"\n", b"") or core in data
        )
        found[secret] = set(places)
    return found


class Section:
    """One section of the page: its commands and its files, by their order."""

    def __init__(self, number: int) -> None:
        page = (ROOT / "docs" / "deployment.md").read_text()
        (self.text,) = re.findall(rf"^## {number}\. (.*?)^## ", page, flags=re.MULTILINE | re.DOTALL)
        self.commands = commands_of(self.text)
        self.files = [tomllib.loads(each) for each in re.findall(r"```toml\n(.*?)```", self.text, re.DOTALL)]


def edit(path: Path, *changes: Mapping[str, Any]) -> None:
    """Have settings in a file as somebody does who goes through it with the page beside it."""
    tree = tomllib.loads(path.read_text())
    for change in changes:
        _merge(tree, change)
    path.write_text(tomli_w.dumps(tree))


def _merge(tree: dict[str, Any], change: Mapping[str, Any]) -> None:
    for name, value in change.items():
        if isinstance(value, Mapping):
            _merge(tree.setdefault(name, {}), value)
        else:
            tree[name] = value


@dataclass
class Hosts:
    """Commands are run in the folders, and files carried from one to another.

    Attributes:
        base: where the folders are.
        boxes: the devices' names, each a host.
        running: the processes that were started.
    """

    base: Path
    boxes: Sequence[str] = tuple(f"device-{i}" for i in range(5))
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    def run(self, host: str, words: Sequence[str]) -> str:
        """What a command of the page says, run on a host in this process."""
        assert words[0] == "privkd"
        folder = self.base / host
        folder.mkdir(exist_ok=True)
        with contextlib.chdir(folder):
            return done(*words[1:])

    def start(self, host: str, words: Sequence[str]) -> subprocess.Popen[str]:
        """The same as a process of its own, which `ended` ends."""
        assert words[0] == "privkd"
        with (self.base / f"{host}.log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *words],
                cwd=self.base / host,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.running.append(process)
        return process

    @contextlib.contextmanager
    def ended(self) -> Iterator[None]:
        """Every process that is started within is ended."""
        try:
            yield
        finally:
            for process in self.running:
                process.terminate()
            for process in self.running:
                process.communicate(timeout=60)

    def carry(self, source: str, target: str) -> None:
        """To a file, or into a folder that ends in a slash."""
        file = self.base / target / (Path(source).name if target.endswith("/") else "")
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.base / source, file)

    def own_folders(self) -> dict[str, str]:
        """Each member by the name of its certificate: its own folder on its host."""
        found = {f"party-{rank}": f"{letter}/party" for rank, letter in enumerate(PARTIES)}
        return found | {"cloud": "cloud/cloud"} | {box: f"{box}/device" for box in self.boxes}


def enrolled(hosts: Hosts, place: Callable[[str], Sequence[str]], peers: Mapping[str, Any]) -> dict[str, Any]:
    """Follow sections 1 to 5; the table ``[aggregators]`` of the last.

    Args:
        hosts: on which.
        place: what a party's command says for ``--host NAME.example``.
        peers: changes to what the page says in ``party.toml``.
    """
    for command in Section(1).commands:
        hosts.run("home", command)
    _make_keys(hosts, place)
    _approve(hosts)
    section = Section(5)
    fill, table = section.commands
    for host in (*PARTIES, "cloud", *hosts.boxes):
        for rank, letter in enumerate(PARTIES):
            hosts.carry(f"{letter}/party/member-{rank}.toml", f"{host}/")
    for letter in PARTIES:
        hosts.run(letter, fill)
        edit(hosts.base / letter / "party" / "party.toml", *section.files, peers)
    found: dict[str, Any] = tomllib.loads(hosts.run("cloud", table))
    return found


def _make_keys(hosts: Hosts, place: Callable[[str], Sequence[str]]) -> None:
    section = Section(2)
    (first,) = section.commands
    assert "`--rank 1 --host b.example` and `--rank 2 --host t.example`" in section.text
    *words, option, named = first
    assert (option, named) == ("--host", "a.example")
    for rank, letter in enumerate(PARTIES):
        hosts.run(letter, [*(str(rank) if word == "0" else word for word in words), *place(letter)])
    cloud, device = Section(3).commands
    hosts.run("cloud", cloud)
    for box in hosts.boxes:
        hosts.run(box, [box if word == "device-0" else word for word in device])


def _approve(hosts: Hosts) -> None:
    command = dict(zip(Role, reversed(Section(4).commands), strict=True))
    for name, folder in hosts.own_folders().items():
        hosts.carry(f"{folder}/{name}.csr", "home/")
        asked = command[role_of(name)]
        hosts.run("home", [*asked[:3], f"{name}.csr", *asked[4:]])
        for file in (f"issued/{name}.pem", "ca.pem", *(["crl.pem"] if name.startswith("party") else [])):
            hosts.carry(f"home/authority/{file}", f"{folder}/")
