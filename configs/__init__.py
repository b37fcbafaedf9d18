"""Configs: the paper's stages, the demo, small images. In the package as a link."""
