"""Everything below the seam: loading, sharding, attention, the head that turns hidden states into per-token log-probs."""
