"""The table of presets and corrections on the same seeds: its variants, rows and rendering."""
