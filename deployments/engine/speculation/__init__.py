"""Speculation without an engine: drafts, coupled noise, outcome tables, acceptance, transport."""
