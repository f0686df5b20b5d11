"""SGLang behind the engine seam; ``runtime``, ``hicache_backend`` and ``self_check`` touch it."""
