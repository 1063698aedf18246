"""Say what this installation can do, and what a model costs."""
