"""What a run was made from and whether it still holds: stages, sample sets, measurements.

Little here needs torch.
"""
