"""What is learned from what: the contract of a task, the table of tasks, and the tasks that come with muster."""
