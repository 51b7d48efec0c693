"""The loop and what feeds it."""
