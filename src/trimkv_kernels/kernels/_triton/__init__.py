"""Triton code only. Nothing here is imported before an op runs on Triton."""
