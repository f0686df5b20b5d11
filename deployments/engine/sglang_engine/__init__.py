"""SGLang behind the engine seam. Only ``runtime`` and ``self_check`` touch SGLang itself."""
