"""SCAO for Axolotl: ``plugins: [axolotl_plugin.SCAOPlugin]`` and ``optimizer: scao`` in the YAML."""

from axolotl_plugin.plugin import SCAOPlugin

__all__ = ["SCAOPlugin"]
