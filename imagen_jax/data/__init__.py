"""Prepared records, read as training batches."""
