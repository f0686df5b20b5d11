"""Every name is a class that has every attribute and does nothing."""

from torchvision._stand_in import __getattr__  # noqa: F401 - a module's own hook
