"""``paceline fetch``: brings a model's weights to this machine."""

from __future__ import annotations

from cluster.commands.options import ConfigOption  # noqa: TC001 - typer reads it at run time
from cluster.config_loader import load_config
from cluster.console import out, steps


def fetch(config: ConfigOption = None) -> None:
    """Download the configured model; does nothing when it is already here."""
    settings = load_config(config)
    with steps() as report:
        report(f"looking for {settings.engine.model}")
        # Imported late: they bring torch.
        from deployments.engine.config import DEFAULT_MODEL
        from deployments.engine.torch_engine.weights.builtin import prepare_builtin
        from deployments.engine.torch_engine.weights.loader import find_model_folder

        if settings.engine.model == DEFAULT_MODEL:
            folder = prepare_builtin(settings.cache_dir, report)
        else:
            folder = find_model_folder(settings.engine.model, settings.cache_dir)
    out.print(f"{settings.engine.model} is in {folder}")
