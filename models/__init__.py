"""What is computed: plain torch modules, and what a config alone says of them."""

from . import hf_config  # noqa: F401  which reads `model.from`
