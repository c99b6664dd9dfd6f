"""A device's student with its preprocessing as one artefact, in the form that a device runs."""
