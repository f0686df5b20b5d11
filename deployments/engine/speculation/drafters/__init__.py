"""Drafters: one file each, all behind ``base.Drafter``."""
