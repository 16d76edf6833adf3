"""Triton kernels; this version of svdk ships none yet."""
