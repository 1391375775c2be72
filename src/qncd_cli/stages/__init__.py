"""The stages of the pipeline, one pure `run` each: calibrate, quantize, sample, evaluate; and the
pipeline that skips what still holds. They meet in artifacts; none imports another but the
pipeline.
"""
