"""Captioned drawn scenes, and a judge of pictures of them."""
