"""Composition root: what runs where, and how many."""
