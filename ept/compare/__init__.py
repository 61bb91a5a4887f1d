"""Comparisons: a table of methods, tasks and seeds, made from training runs."""
