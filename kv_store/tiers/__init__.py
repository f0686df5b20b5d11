"""Tiers: places that hold opaque page blobs. Each file is one kind of place."""
