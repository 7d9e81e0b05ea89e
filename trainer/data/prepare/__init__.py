"""From raw records to token shards."""
