"""Networks with drawn weights, saved as files: none comes with a package."""

import numpy as np


def draw(network, seed=0):
    """Redraws all weights so that features are of about one size at any depth."""
    import torch

    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if value.ndim > 1:
                fan = value[0].numel()
                value.copy_(
                    torch.randn(value.shape, generator=random) * (2 / fan) ** 0.5
                )
            elif name.endswith("bias") or name.endswith("running_mean"):
                value.copy_(torch.randn(value.shape, generator=random) / 10)
    return network


def inception(path, seed=0):
    """Weights of FID's Inception, as torch-fidelity stores them."""
    from unittest import mock

    import torch
    from torch_fidelity import feature_extractor_inceptionv3 as library

    kind = library.FeatureExtractorInceptionV3
    nothing = mock.patch.object(kind, "load_state_dict")
    with nothing, mock.patch.object(library, "load_state_dict_from_url"):
        network = draw(kind("inception-v3-compat", ["2048"]), seed)
    torch.save(network.state_dict(), path)
    return str(path)


def of_timm(path, name, seed=0):
    """Weights of a network of timm, as .pth or .safetensors."""
    import safetensors.torch
    import timm
    import torch

    weights = draw(timm.create_model(name), seed).state_dict()
    save = torch.save
    if path.suffix == ".safetensors":
        save = safetensors.torch.save_file
    save(weights, path)
    return str(path)


def pictures(count, size=32, seed=0):
    """Drawn scenes with a bit of noise, `[count, size, size, 3]` uint8."""
    from imagen_jax.shapes import scenes

    random = np.random.default_rng(seed)
    drawn = [scenes.draw(scene, size) for scene in scenes.generate(count, seed)]
    noisy = np.stack(drawn) + random.normal(size=(count, size, size, 3)) * 3
    return noisy.round().clip(0, 255).astype(np.uint8)
