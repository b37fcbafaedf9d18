"""What `prepare` is asked for: the flags of the door, and the arguments of Python."""

import dataclasses
import math
from typing import Any

from imagen_jax.errors import UserError, did_you_mean
from imagen_jax.preparing.images import MAX_PIXELS
from imagen_jax.stores import check_disk
from imagen_jax.text.embeddings import DTYPES

FORMS = (
    "folder:DIR, webdataset:GLOB, parquet:GLOB_OR_DIR, coco:FILE.json, "
    "hf:NAME_OR_PATH, tfds:NAME, shapes:N or wordings:N"
)
DRAWN = "shapes:", "wordings:"
# In place of an encoder: tars of images, whose captions are embedded later.
NO_ENCODER = "none"
_RULES = ("min_side", "max_aspect", "stored_size", "max_pixels")
_CONVENTIONS = ("caption_column", "image_column", "caption_lines", "no_captions")
# Those that the written examples depend on, and no other field of the manifest says.
_RECORDED = ("source", "text_length", "image_size", "shard_examples", "seed")
_RECORDED += _RULES + _CONVENTIONS
# The kinds of source that these apply to.
_APPLIES = {
    "caption_column": ("folder", "webdataset", "parquet", "coco", "hf"),
    "image_column": ("parquet", "hf"),
    "caption_lines": ("folder", "webdataset"),
}


def _setting(help: str, default=dataclasses.MISSING, least: int | None = None) -> Any:
    metadata = {"help": help, "least": least}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Settings:
    """A job of `prepare`; each field is documented by the help of its flag."""

    source: str = _setting(FORMS)
    output: str = _setting("a folder to be, or FILE.npz")
    encoder: str = _setting(
        "the frozen text encoder (docs/text_encoders.md): tiny, t5_1_1_SIZE, "
        "t5_1_0_SIZE, hf:NAME_OR_PATH or t5x:CHECKPOINT; none: tars of pictures",
        "tiny",
    )
    encoder_weights: str = _setting("its weights, if it has none built in", "")
    encoder_dtype: str = _setting("type a T5 computes in: bfloat16 or float32", "")
    text_length: int = _setting("tokens of a caption that are kept", 128, least=1)
    embedding_dtype: str = _setting("stored type: bfloat16 or int8", "bfloat16")
    image_size: int = _setting("side of drawn scenes and in a .npz", 64, least=1)
    min_side: int = _setting("least pixels of a picture's shorter side", 1, least=1)
    max_aspect: float = _setting("longer side over shorter; 0: any", 0.0, least=0)
    stored_size: int = _setting("reduce shorter sides to it; 0: do not", 0, least=0)
    max_pixels: int = _setting("most pixels of a picture", MAX_PIXELS, least=1)
    shard_examples: int = _setting("examples in a shard; a tar is one", 1000, least=1)
    seed: int = _setting("seed of a folder's order and of drawn scenes", 0, least=0)
    max_bad_share: float = _setting("share of examples that may be bad", 0.5, least=0)
    process_index: int | None = _setting("number of this process; default: JAX's", None)
    process_count: int | None = _setting("processes that share the work", None, least=1)
    caption_column: str = _setting("column, or key of JSON, of captions", "")
    image_column: str = _setting("column of pictures", "")
    caption_lines: int = _setting("first lines of a .txt; 0: all", 0, least=0)
    no_captions: bool = _setting("pictures alone: train without text", False)
    scores: Any = _setting(  # in Python also a `scores.ScoreFunction`
        "numbers of pictures, by name or id: FILE.csv, .jsonl or .parquet", ""
    )
    runner: str = _setting("a runner of Apache Beam, with --encoder=none", "")
    runner_options: str = _setting("its options: '--project=... --region=...'", "")

    @property
    def is_npz(self) -> bool:
        """Whether the output is one file for host memory."""
        return self.output.endswith(".npz")

    @property
    def rules(self) -> dict[str, float]:
        """Which images are kept, and at what size: arguments of `images.verify`."""
        rules = {name: getattr(self, name) for name in _RULES}
        if self.is_npz:
            rules["min_side"] = max(self.min_side, self.image_size)
        return rules

    def recorded(self) -> dict[str, Any]:
        """The part of the settings that the manifest holds."""
        return {name: getattr(self, name) for name in _RECORDED}

    def check(self) -> None:
        """Raises `UserError` for values out of range and combinations without sense."""
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), field.metadata["least"]
            if None not in (value, least) and not least <= value < math.inf:
                raise UserError(f"--{field.name} is {value}; give at least {least}")
        kind = self.source.partition(":")[0]
        for name, kinds in _APPLIES.items():
            if getattr(self, name) and kind not in kinds:
                raise UserError(f"--{name} is for sources of {', '.join(kinds)}")
        if self.no_captions and (self.caption_column or self.caption_lines):
            raise UserError("--no_captions leaves no --caption_column, --caption_lines")
        if self.embedding_dtype not in DTYPES:
            hint = did_you_mean(self.embedding_dtype, DTYPES)
            raise UserError(
                f"--embedding_dtype is {self.embedding_dtype!r}{hint}; it is one of "
                f"{', '.join(DTYPES)}"
            )
        index, count = self.process_index, self.process_count
        alone, embeds = count in (None, 1), self.encoder != NO_ENCODER
        if (index is None) != (count is None) or (count and not 0 <= index < count):
            raise UserError("give --process_index=I and --process_count=N with I < N")
        if not self.output:
            raise UserError("--output='' is no folder or FILE.npz: give one")
        check_disk(self.source.partition(":")[2])
        check_disk(self.output)
        if self.is_npz and not (alone and embeds):
            raise UserError("a .npz file needs one process and an --encoder")
        if self.is_npz and 0 < self.stored_size < self.image_size:
            raise UserError("--stored_size is below --image_size of a .npz file")
        if self.scores and not embeds:
            raise UserError("--scores are kept in records, which need an --encoder")
        if self.runner and (embeds or not alone):
            raise UserError("--runner needs --encoder=none and no --process_count")
