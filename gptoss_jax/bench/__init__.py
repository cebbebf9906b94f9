"""Measures kernels and whole steps on the devices that are here, each beside what those devices can do at most."""
