"""The networks: they know no diffusion."""
