"""Measurements, each one command that writes a JSON file into benchmarks/results; README.md says what they mean."""
