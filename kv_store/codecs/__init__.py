"""Codecs: how a page's bytes are packed. Lossless ones keep the ``exact`` fidelity."""
