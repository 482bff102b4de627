"""Compiled kernels of windowed attention, for CPUs and GPUs. They know torch alone; importing registers no model."""
