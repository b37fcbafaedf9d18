"""Pictures in, numbers out: how good samples are, by measures and by people."""
