"""The embedded engine: a paged, continuously batched torch engine on CPU or CUDA."""

import os

# Torch's threads spin for some milliseconds behind everything they did together, on the processors
# that the compiled layers and the KV tier want by then. A third of libgomp's own number: with a
# fifteenth decoding gains little more, and prefills, whose parts follow each other within a
# millisecond, lose. Libgomp reads it when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "100000")
