"""The modules that are added to a network: cells and regulators, and how they start."""
