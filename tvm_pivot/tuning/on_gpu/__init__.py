"""What is copied to a machine with a GPU, to measure candidates there: NumPy is all it needs."""
