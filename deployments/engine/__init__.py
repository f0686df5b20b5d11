"""Token ids in, token ids out. No Ray, no HTTP."""
