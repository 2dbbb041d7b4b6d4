"""The best skip-list within a budget: damage of a list, groups, and the exact 0/1 search."""
