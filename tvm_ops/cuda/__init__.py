"""Kernels of GPUs that are written out, statement by statement: matrix products of bits or floats, and packings."""
