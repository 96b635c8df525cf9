"""The kernels against their rivals on one GPU: ``make gpu OUT=folder``."""
