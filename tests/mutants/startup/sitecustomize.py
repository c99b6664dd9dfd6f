"""Puts the fault that the environment names into a party's worker, and does nothing in any other process."""

import os
import sys

if "privkd.secure.protocol" in sys.orig_argv:
    from mutants.parties import FAULTS, VARIABLE

    FAULTS[os.environ[VARIABLE]](setattr)
