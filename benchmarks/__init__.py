"""Benchmarks: kernels against their alternatives, whole training steps, and the report that gathers both."""
