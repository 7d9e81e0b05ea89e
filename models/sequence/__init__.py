"""Networks on sequences other than the decoder."""
