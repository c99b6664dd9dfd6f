"""Deliberate faults in the product, and how a run that has one must end: see `mutants.registry`."""
