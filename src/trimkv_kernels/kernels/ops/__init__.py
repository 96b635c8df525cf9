"""One file per op: its declaration, its launch, and how the launch is laid out."""
