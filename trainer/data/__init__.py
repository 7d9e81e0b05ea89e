"""From raw text and images to micro-batches: preparation of token shards, and deterministic readers."""
