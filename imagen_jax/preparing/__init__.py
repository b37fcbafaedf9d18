"""Captioned pictures to records for training."""
