"""Corrections of the noise that accumulates over the sampling steps: the run-time estimate,
offline statistics, and the baseline of the full-precision model. They see predictions, no
model.
"""
