"""The Gluon kernels of attention on Hopper."""
