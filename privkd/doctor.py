"""What this machine lacks, and the exact command that mends it."""

import importlib
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from privkd.secure.installed import CRYPTEN_COMMAND, has_crypten

_MISSING = {True: ("missing", "red"), False: ("optional", "yellow")}
_BAD = "Something is missing: run the commands above; `privkd doctor --fix` runs CrypTen's."
_GOOD = "All that is needed is here."


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``cure`` is what mends it, empty where all is well."""

    name: str
    found: str
    cure: str
    needed_for: str
    required: bool = True


def doctor_command(*, fix: bool, as_json: bool = False) -> int:
    """Print what `examine` finds, with ``fix`` after `fix_crypten`; the exit code."""
    if fix:
        fix_crypten()
    return print_findings(examine(), as_json=as_json)


def fix_crypten() -> None:
    """Install CrypTen for the running interpreter where it is missing, and print the command that does it.

    Its own dependencies are not installed, as its metadata asks for a package that no longer exists.
    """
    if has_crypten():
        sys.stdout.write("CrypTen is installed: nothing to fix\n")
        return
    command = [sys.executable, "-m", *shlex.split(CRYPTEN_COMMAND)]
    sys.stdout.write(f"{shlex.join(command)}\n")
    sys.stdout.flush()
    if subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode:
        sys.stdout.write("that failed; why stands above\n")
    importlib.invalidate_caches()


def examine() -> list[Finding]:
    """Look at everything that privkd uses."""
    findings = [_python()]
    for module, package, purpose in (
        ("torch", "torch", "all training"),
        ("opacus", "opacus", "DP-SGD"),
        ("dp_accounting", "dp-accounting", "the ledger"),
        ("cryptography", "cryptography", "noise and sealed shares"),
        ("sklearn", "'privkd[lab]'", "the embedded data, audits, figures and reports"),
        ("safetensors", "safetensors", "weights"),
    ):
        findings.append(_importable(module, f"pip install {package}", purpose))
    findings.append(_crypten())
    findings.append(
        _importable("pyarrow", "pip install 'privkd[parquet]'", "Parquet files, CIFAR-10", required=False)
    )
    findings.append(
        _importable(
            "onnxruntime", "pip install 'privkd[onnx]'", "privkd export --format onnx", required=False
        )
    )
    findings.append(
        _importable(
            "executorch",
            "pip install 'privkd[executorch]'",
            "privkd export --format executorch",
            required=False,
        )
    )
    findings.append(
        _importable(
            "kymatio", "pip install 'privkd[scatter]'", "privkd train --student scatter", required=False
        )
    )
    findings.append(_cuda())
    return findings


def print_findings(
    findings: list[Finding],
    *,
    as_json: bool = False,
    words: Mapping[bool, tuple[str, str]] = _MISSING,
    bad: str = _BAD,
    good: str = _GOOD,
) -> int:
    """Print a line for each finding; 1 where something required is not well, else 0.

    Args:
        findings: from `examine`, or about a group.
        as_json: as one JSON list instead.
        words: with its colour, what is said of a finding that is not well, by whether it is required.
        bad: last line where something required is not well.
        good: last line where nothing is.
    """
    missing = any(finding.cure and finding.required for finding in findings)
    if as_json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings]) + "\n")
        return int(missing)
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for finding in findings:
        word, style = ("ok", "green") if not finding.cure else words[finding.required]
        purpose = f" ({finding.needed_for})" if finding.cure and finding.needed_for else ""
        line = Text(f"{word:9}", style)
        line.append(f"{finding.name}{purpose}", "default")
        line.append(f": {finding.found}", "default")
        console.print(line, soft_wrap=True)
        if finding.cure:
            console.print(Text(f"{'':9}{finding.cure}"), soft_wrap=True)
    console.print(bad if missing else good, soft_wrap=True, markup=False)
    return int(missing)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    cure = "" if sys.version_info >= (3, 11) else "install Python 3.11 or newer"
    return Finding("python", version, cure, "everything")


def _importable(module: str, cure: str, purpose: str, *, required: bool = True) -> Finding:
    return _tried(
        module,
        lambda: str(getattr(importlib.import_module(module), "__version__", "found")),
        cure,
        purpose,
        required,
    )


def _crypten() -> Finding:
    if not has_crypten():
        return Finding("crypten", "not installed", CRYPTEN_COMMAND, "the secure channel")

    def load() -> str:
        importlib.import_module("privkd.secure.crypten_backend")
        return "loads"

    return _tried(
        "crypten", load, f"pip install pyyaml omegaconf && {CRYPTEN_COMMAND}", "the secure channel", True
    )


def _tried(name: str, load: Callable[[], str], cure: str, purpose: str, required: bool) -> Finding:
    try:
        return Finding(name, load(), "", purpose, required)
    except ModuleNotFoundError as error:
        return Finding(name, f"not installed ({error.name})", cure, purpose, required)
    except Exception as error:
        return Finding(name, f"does not load: {' '.join(str(error).split())}", cure, purpose, required)


def _cuda() -> Finding:
    try:
        import torch

        found = torch.cuda.get_device_name() if torch.cuda.is_available() else "none, runs use the CPU"
    except ImportError:
        found = "unknown without torch"
    return Finding("cuda", found, "", "speed", required=False)
