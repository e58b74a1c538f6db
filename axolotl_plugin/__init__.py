"""SCAO for Axolotl: ``plugins: [axolotl_plugin.SCAOPlugin]`` and ``optimizer: scao`` in the YAML."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from axolotl_plugin.plugin import SCAOPlugin

__all__ = ["SCAOPlugin"]


def __getattr__(name: str) -> Any:
    """The plugin, imported when it is asked for: scao-hf plan reads the rules where Axolotl is not installed."""
    if name not in __all__:
        raise AttributeError(name)
    from axolotl_plugin import plugin

    return getattr(plugin, name)
