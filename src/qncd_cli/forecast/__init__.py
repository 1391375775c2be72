"""What a run will take before it is run (`--plan`): artifacts, memory, work, activations and
shapes, all on the meta device. No weights are loaded here.
"""
