"""Models as qncd sees them: loading, topology, pipelines, the packaged zoo."""
