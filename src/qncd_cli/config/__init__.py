"""What can be set: the schema, presets, and how a configuration is read.

Nothing is loaded, seeded or asked of a device.
"""
