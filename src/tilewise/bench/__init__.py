"""Figures: what tilewise costs beside the textbook formula and other libraries.

A figure is printed only after the results it times were compared with float64.
"""
