"""Structured output: which tokens the form of an output leaves open, at every step."""
