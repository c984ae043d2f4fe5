"""Runs: from options to a training run, its costs, checks, logs and end."""
