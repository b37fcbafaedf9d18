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


def clip(folder, steps=0):
    """A small CLIP as transformers stores it, trained to tell colours apart."""
    import json

    import torch
    import transformers

    torch.manual_seed(0)
    half = {"num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *letters,
        *(f"{x}</w>" for x in letters),
    ]
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = {"vocab_size": len(words), "max_position_embeddings": 16, **ids}
    config = transformers.CLIPConfig(
        text_config=half | text | {"num_hidden_layers": 1},
        vision_config=half
        | {"image_size": 16, "patch_size": 4, "num_hidden_layers": 1},
        projection_dim=16,
    )
    model = transformers.CLIPModel(config)
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    processor = transformers.CLIPImageProcessorPil(**sizes)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    tokens = tokenizer(list(COLOURS), padding=True, return_tensors="pt")
    for step in range(steps):
        pictures = np.stack([coloured(name, step) for name in COLOURS])
        inputs = {**tokens, **processor(list(pictures), return_tensors="pt")}
        loss = model(**inputs, return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 180, 60),
    "blue": (30, 60, 220),
    "yellow": (240, 220, 40),
    "black": (10, 10, 10),
    "white": (245, 245, 245),
}


def coloured(name, seed):
    """A noisy picture of one colour, `[32, 32, 3]` uint8."""
    random = np.random.default_rng(seed * 100 + len(name))
    noise = random.normal(size=(32, 32, 3)) * 20 + random.normal(size=3) * 8
    return (COLOURS[name] + noise).round().clip(0, 255).astype(np.uint8)
