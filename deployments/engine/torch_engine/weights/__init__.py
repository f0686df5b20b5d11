"""From files on disk to filled models."""
