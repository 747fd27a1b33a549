"""Kernels for CPUs, in C++: attention through a cache, and products of tokens with weights."""
