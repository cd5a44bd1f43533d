"""Plans as values: names and numbers, without torch.fx and without modules."""
