"""One pure run(...) per stage of the pipeline."""
