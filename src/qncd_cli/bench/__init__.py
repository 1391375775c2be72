"""The table of speed, memory and size: its rows, how they are timed and shown.

No image quality.
"""
