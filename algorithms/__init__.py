"""Losses as plain functions of per-token log-probs: tensors in, tensors out; no model, no rank, no optimizer."""
