"""The command line: parses, calls a stage, renders."""
