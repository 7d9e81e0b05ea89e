"""From raw text to micro-batches: preparation of token shards and the deterministic reader."""
