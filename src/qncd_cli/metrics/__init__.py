"""Quality: image metrics through torch-fidelity, tensor metrics, the report."""
