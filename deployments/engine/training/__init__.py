"""Trains draft models for a target: features in, a checkpoint that engines load out."""
