"""The command: ``privkd``, and ``python -m privkd``."""

import sys

if sys.platform == "win32":
    sys.stderr.write(
        "privkd: Windows is not supported, as run folders are locked with fcntl: use Linux, macOS or WSL\n"
    )
    sys.exit(2)

from privkd.plugins import load_siblings

# At import, not in `main`: a process that is spawned imports this module and calls nothing.
load_siblings("cli")


def main() -> None:
    """Run the command line on ``sys.argv``."""
    from cli import app

    app(prog_name="privkd")


if __name__ == "__main__":
    main()
