"""One KV page from an engine's buffer to another replica."""
