"""What ``privkd compare`` does, between the command line's parsing and the comparison."""

from pathlib import Path

from privkd.errors import InputError
from privkd.stdout import print_json


def compare_command(first: Path, second: Path, *, as_json: bool) -> None:
    """Print two runs, or two curves, side by side.

    Raises:
        InputError: they cannot be compared; the message says why.
        RunError: a folder is neither, or damaged.
    """
    from audits.comparison.console import print_curves, print_runs
    from audits.comparison.curves import compare_curves
    from audits.comparison.runs import compare_runs
    from audits.comparison.tree import curves_tree, runs_tree
    from audits.evidence.reading import read_run
    from audits.sweeps.grid import is_sweep
    from audits.sweeps.sweep import read_sweep

    kinds = is_sweep(first), is_sweep(second)
    if kinds[0] != kinds[1]:
        raise InputError(f"{first} and {second}: one is a curve and the other is not; compare two of a kind")
    if all(kinds):
        curves = compare_curves(read_sweep(first), read_sweep(second))
        if as_json:
            print_json(curves_tree(curves))
        else:
            print_curves(curves)
        return
    runs = compare_runs(read_run(first), read_run(second))
    if as_json:
        print_json(runs_tree(runs))
    else:
        print_runs(runs)
