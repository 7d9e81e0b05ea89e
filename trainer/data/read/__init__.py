"""From token shards to micro-batches, in an order that is a pure function of the seed."""
