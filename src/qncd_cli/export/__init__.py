"""The quantized model for other programs: graphs and folders.

What loads them is `qncd_cli.exported`.
"""
