"""Functions on tensors: hashing, layouts, attention and its backends, random numbers. They know torch alone."""
