"""Compiled kernels for windowed attention on CPUs and GPUs; depend only on torch. Importing registers no model."""
