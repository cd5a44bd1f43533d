"""Paired experiments with regulators: data, one training loop, registered jobs, tables."""
