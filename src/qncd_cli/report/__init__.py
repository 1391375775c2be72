"""Something to read: pages and charts.

Numbers come from metrics.
"""
