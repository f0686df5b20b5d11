"""The embedded engine: a paged, continuously batched torch engine on CPU or CUDA."""
