"""The embedded engine: a paged, continuously batched torch engine on CPU or CUDA."""

import os

# Torch's threads spin for some milliseconds behind everything they did together, on the processors
# that the compiled layers and the KV tier want by then. Libgomp reads this when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
