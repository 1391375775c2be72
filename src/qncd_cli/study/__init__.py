"""A blinded study with human raters: its trials, the page that raters open, the tally of answers.

Which side of a trial is which stays with the experimenter.
"""
