"""Worst-case inputs through the mechanisms of a run, on the path that the run takes."""
