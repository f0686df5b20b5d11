"""Stands in for torchvision, whose published wheels are CUDA builds that a CPU torch cannot load.

SGLang and transformers import its transforms on the way to every model, and use them for images
alone.
"""

__version__ = "0.28.0"
