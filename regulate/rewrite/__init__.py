"""From a plan to a regulated network: the only code that edits modules."""
