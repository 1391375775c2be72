"""The method between mathematics and stage: which layer gets which bits, ranges, smoothing and
rounding, from calibration inputs. Formulas are in quant, files in store.
"""
