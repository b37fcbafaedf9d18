"""What the doors and users of the library share."""
