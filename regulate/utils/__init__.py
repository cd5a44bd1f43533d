"""Paths of modules, modes and random states: what all other packages may import."""
