"""Models: plain torch modules, and what can be derived from a config alone."""

from .hf import config_json  # noqa: F401  which reads `model.from`
