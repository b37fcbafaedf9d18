"""The mathematics of diffusion: pure functions of arrays that know no network."""
