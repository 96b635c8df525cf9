"""The torch path of every op: what a CPU runs, and a backend in its own right."""
