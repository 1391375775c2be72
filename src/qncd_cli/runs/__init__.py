"""The four stages of a run directory: what holds is kept, the rest is made; one function each.

The command line and Python call the same functions. Nothing is printed here, no option parsed.
"""
