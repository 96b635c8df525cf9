"""The torch implementation of every op. A CPU uses it, and ``impl="torch"`` anywhere."""
