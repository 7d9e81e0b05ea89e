"""What a sweep is: its runs, and the rules for their sizes, budgets and learning rates."""
