"""Runnable experiments: one readable script per algorithm, `python -m experiments.grpo --help`."""
