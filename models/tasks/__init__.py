"""What is learned from what: the interface of a task, the table of tasks, and the tasks that come with muster."""
