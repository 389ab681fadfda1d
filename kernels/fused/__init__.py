"""Triton kernels and their launchers, imported when the first operator runs on a device that can use them."""
