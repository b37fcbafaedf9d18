"""Captioned images to records for training."""
