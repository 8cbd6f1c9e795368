"""Triton kernels, each with its naive twin in the same file. Importing a kernel needs Triton, the package itself does not."""
