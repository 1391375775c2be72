"""The command line: options, calls of the stages, and what is shown of their results.

Nothing is decided about a model here, and nothing heavy is imported before a command needs it.
"""
