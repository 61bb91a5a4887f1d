"""Comparisons: one table of methods, tasks and seeds, made of training runs."""
