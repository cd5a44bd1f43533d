"""Paths of modules, modes and random states, and spans of time: what all other packages may import."""
