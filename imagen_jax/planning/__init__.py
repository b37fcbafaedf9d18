"""What a stage needs on devices that may be absent."""
