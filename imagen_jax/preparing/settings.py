"""What `prepare` is asked for: the flags of the door, and the arguments of Python."""

import dataclasses
from typing import Any

from imagen_jax.errors import UserError
from imagen_jax.preparing.images import Rules
from imagen_jax.preparing.sources import FORMS
from imagen_jax.text import embeddings

# In place of an encoder: tars of images, whose captions are embedded later.
NO_ENCODER = "none"
# Those that the written examples depend on, and no other field of the manifest says.
_RECORDED = ("source", "text_length", "image_size", "shard_examples", "seed")
_RECORDED += ("min_side", "max_aspect", "stored_size")


def _setting(
    help: str, default: Any = dataclasses.MISSING, least: int | None = None
) -> Any:
    metadata = {"help": help, "least": least}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Settings:
    """A job of `prepare`; each field is documented by the help of its flag."""

    source: str = _setting(FORMS)
    output: str = _setting("a folder to be, or FILE.npz")
    encoder: str = _setting(
        "the frozen text encoder: tiny, t5_1_1_SIZE, t5_1_0_SIZE, hf:NAME_OR_PATH or "
        "t5x:CHECKPOINT (docs/text_encoders.md); none: tars of pictures without "
        "embeddings, from which records are prepared with --source=webdataset:",
        "tiny",
    )
    encoder_weights: str = _setting("its weights, if it has none built in", "")
    encoder_dtype: str = _setting("type a T5 computes in: bfloat16 or float32", "")
    text_length: int = _setting("tokens of a caption that are kept", 128, least=1)
    embedding_dtype: str = _setting(
        "type of stored embeddings: bfloat16 or int8", "bfloat16"
    )
    image_size: int = _setting(
        "pixels of a side of drawn scenes and of pictures in a .npz", 64, least=1
    )
    min_side: int = _setting("least pixels of a picture's shorter side", 1, least=1)
    max_aspect: float = _setting(
        "longer side over shorter at most; 0: no limit", 0.0, least=0
    )
    stored_size: int = _setting(
        "pixels to which the shorter side is reduced; 0: as it is", 0, least=0
    )
    shard_examples: int = _setting(
        "examples in one file of records, unless the source decides", 1000, least=1
    )
    seed: int = _setting("seed of a folder's order and of drawn scenes", 0, least=0)
    max_bad_share: float = _setting(
        "share of examples that may be unusable; more stop the job", 0.5, least=0
    )
    process_index: int | None = _setting("number of this process; default: JAX's", None)
    process_count: int | None = _setting("processes that share the work", None, least=1)
    runner: str = _setting("a runner of Apache Beam, with --encoder=none", "")
    runner_options: str = _setting("its options: '--project=... --region=...'", "")

    @property
    def is_npz(self) -> bool:
        """Whether the output is one file for host memory."""
        return self.output.endswith(".npz")

    @property
    def rules(self) -> Rules:
        """Which images are kept, and at what size."""
        least = max(self.min_side, self.image_size) if self.is_npz else self.min_side
        return Rules(least, self.max_aspect, self.stored_size)

    def recorded(self) -> dict[str, Any]:
        """The part of the settings that the manifest holds."""
        return {name: getattr(self, name) for name in _RECORDED}

    def check(self) -> None:
        """Raises `UserError` for values out of range and combinations without sense."""
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), field.metadata["least"]
            if None not in (value, least) and value < least:
                raise UserError(
                    f"--{field.name} is {value}; it must be at least {least}"
                )
        embeddings.check_dtype(self.embedding_dtype)
        if fault := self._fault():
            raise UserError(fault)

    def _fault(self) -> str:
        index, count = self.process_index, self.process_count
        pictures_only, several = self.encoder == NO_ENCODER, (count or 1) > 1
        if self.max_bad_share > 1:
            return f"--max_bad_share is {self.max_bad_share:g}; give 0 to 1"
        if 0 < self.max_aspect < 1:
            return f"--max_aspect is {self.max_aspect}; give 1 or more, or 0: no limit"
        if self.is_npz and 0 < self.stored_size < self.image_size:
            return (
                f"--stored_size is {self.stored_size}, less than --image_size="
                f"{self.image_size}, the pictures' size in a .npz file: leave it out"
            )
        if (index is None) != (count is None):
            return "--process_index and --process_count go together: give both"
        if count and not 0 <= index < count:
            return f"--process_index is {index}; it is one of 0 to {count - 1}"
        if not self.output:
            return "--output is empty: give a folder to be, or FILE.npz"
        if "://" in self.output:
            return (
                f"--output is {self.output!r}: mount the bucket (gcsfuse, s3fs) and "
                "give the folder"
            )
        if self.is_npz and (several or pictures_only):
            return (
                f"--output={self.output!r} is written by one process and has "
                "embeddings: give a folder for several processes or --encoder=none"
            )
        if self.runner and (several or not pictures_only):
            return (
                f"--runner={self.runner} prepares pictures only, by itself: give "
                "--encoder=none and no --process_count, then embed the captions with "
                "--source=webdataset:OUTPUT/*.tar"
            )
        return ""
