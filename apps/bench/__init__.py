"""Benchmarks: what a stream costs, measured, with the machine that it was measured on."""
