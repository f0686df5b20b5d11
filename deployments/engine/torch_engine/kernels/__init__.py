"""Compiled code for CPUs, made by numba when it is first called: no C compiler is needed.

``narrow_forward`` runs the whole model for a few tokens in one call. A decode or verify step
multiplies every weight with a handful of rows, so it is bound by how fast weights come from memory
and by what else is done per layer. Here nothing else is done: activations stay in float32, weights
are read once in the form they are kept in, and the layers run one behind the other on all threads.
Longer forwards go through the modules of ``models``.
"""
