"""A device's student with its preprocessing as one artefact, in the form that a device runs.

`export.export_model` is what a device calls; `export.export_student` takes the student of a simulation;
`register` adds a format of your own.
"""

from privkd.export.formats import register

__all__ = ["register"]
