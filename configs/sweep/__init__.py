"""What a sweep is: the runs it is made of, and the rules that their sizes, budgets and learning rates follow."""
