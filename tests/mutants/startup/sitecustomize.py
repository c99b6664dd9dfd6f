"""Puts the fault that the environment names into an aggregator's process, and does nothing in any other."""

import os
import sys

_PARTIES = ("privkd.secure.aggregator", "privkd.secure.seat")

if any(module in sys.orig_argv for module in _PARTIES):
    from mutants.parties import FAULTS, VARIABLE

    FAULTS[os.environ[VARIABLE]](setattr)
