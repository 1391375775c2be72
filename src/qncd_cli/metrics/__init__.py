"""Numbers of image sets: distances, fidelity, references and feature networks.

No run directories.
"""
