"""The kernels of attention: one walk over tiles, and a body for each pass."""
