"""Benchmarks: kernels against their peers, whole training steps, and the report that gathers both."""
