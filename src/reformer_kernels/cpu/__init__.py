"""The C++ kernels: compiled on first use, called through ctypes, registered as torch ops."""
