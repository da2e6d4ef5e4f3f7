"""CHLO composites that are kept whole (being written)."""
