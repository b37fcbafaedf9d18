"""Captioned pictures: preparing them, and turning them into batches."""
