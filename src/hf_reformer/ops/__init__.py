"""Functions on tensors: hashing, layouts, attention and its backends, random numbers. They depend only on torch."""
