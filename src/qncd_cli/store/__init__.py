"""What is on disk: artifacts, which only this room reads and writes, files written whole or not at
all, digests and the run directory.
"""
