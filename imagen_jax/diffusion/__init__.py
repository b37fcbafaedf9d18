"""The mathematics of diffusion: pure functions of arrays, without any network."""
