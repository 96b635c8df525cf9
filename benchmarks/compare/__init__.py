"""What policies still know of a text, and how far the model strays: `make compare`."""
