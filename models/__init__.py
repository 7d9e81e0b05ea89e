"""What is computed: plain torch modules, and what a config alone says of them."""

from .hf import config_json  # noqa: F401  which reads `model.from`
