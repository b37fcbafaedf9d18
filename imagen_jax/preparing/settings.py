"""What `prepare` is asked for: the flags of the door, and the arguments of Python."""

import dataclasses
import pathlib
from typing import Any

from imagen_jax.errors import UserError
from imagen_jax.preparing.images import Rules
from imagen_jax.preparing.sources import FORMS
from imagen_jax.text import embeddings

# In place of an encoder: tars of images, whose captions are embedded later.
NO_ENCODER = "none"


def _setting(help: str, default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Settings:
    """A job of `prepare`; each field is documented by the help of its flag."""

    source: str = _setting(FORMS)
    output: str = _setting("a folder to be, or FILE.npz")
    encoder: str = _setting(
        "the frozen text encoder: tiny, t5_1_1_SIZE, t5_1_0_SIZE, hf:NAME_OR_PATH or "
        "t5x:CHECKPOINT (docs/text_encoders.md); none: tars of pictures without "
        "embeddings, a source of their own",
        "tiny",
    )
    encoder_weights: str = _setting("its weights, if it has none built in", "")
    encoder_dtype: str = _setting(
        "the type that a T5 computes in: bfloat16 (default) or float32", ""
    )
    text_length: int = _setting("tokens of a caption that are kept", 128)
    embedding_dtype: str = _setting(
        "the type of stored embeddings: bfloat16 or int8", "bfloat16"
    )
    image_size: int = _setting(
        "pixels of a side of drawn scenes, and of pictures in a .npz file", 64
    )
    min_side: int = _setting("pixels that the shorter side has at least", 1)
    max_aspect: float = _setting("longer side over shorter at most; 0: no limit", 0.0)
    stored_size: int = _setting(
        "pixels to which the shorter side is reduced; 0: as it is", 0
    )
    shard_examples: int = _setting(
        "examples in one file of records, where the source does not decide it", 1000
    )
    seed: int = _setting("seed of a folder's order, and of drawn scenes", 0)
    max_bad_share: float = _setting(
        "share of the examples that may be unusable; more stop the job", 0.5
    )
    process_index: int | None = _setting(
        "number of this process; by default JAX's", None
    )
    process_count: int | None = _setting(
        "processes that share the work; by default JAX's", None
    )
    runner: str = _setting("a runner of Apache Beam, with --encoder=none", "")
    runner_options: str = _setting(
        "options of the runner: '--project=... --region=...'", ""
    )

    @property
    def path(self) -> pathlib.Path:
        """The output."""
        return pathlib.Path(self.output)

    @property
    def is_npz(self) -> bool:
        """Whether the output is one file for host memory."""
        return self.path.suffix == ".npz"

    @property
    def rules(self) -> Rules:
        """Which images are kept, and at what size."""
        return Rules(self.min_side, self.max_aspect, self.stored_size)

    def recorded(self) -> dict[str, Any]:
        """The settings that the written examples depend on, for the manifest.

        The encoder and the type of embeddings have fields of their own there.
        """
        names = ("source", "text_length", "image_size", "shard_examples", "seed")
        return {n: getattr(self, n) for n in names} | dataclasses.asdict(self.rules)

    def check(self) -> None:
        """Raises `UserError` for values out of range and combinations without sense."""
        for name in ("text_length", "image_size", "shard_examples", "min_side"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"--{name} is {getattr(self, name)}; it must be above zero"
                )
        for name in ("seed", "stored_size", "max_aspect"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"--{name} is {getattr(self, name)}; it must not be negative"
                )
        if 0 < self.max_aspect < 1:
            raise UserError(
                f"--max_aspect is {self.max_aspect}; the longer side is at least as "
                "long as the shorter: give 1 or more, or 0 for no limit"
            )
        if 0 < self.stored_size < self.min_side:
            raise UserError(
                f"--stored_size is {self.stored_size}, less than "
                f"--min_side={self.min_side}"
            )
        if self.is_npz and 0 < self.stored_size < self.image_size:
            raise UserError(
                f"--stored_size is {self.stored_size}, less than "
                f"--image_size={self.image_size}, the pictures' size in a .npz file: "
                "leave it out"
            )
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"--max_bad_share is {self.max_bad_share:g}; give 0 to 1")
        embeddings.check_dtype(self.embedding_dtype)
        self._check_output()

    def _check_output(self) -> None:
        index, count = self.process_index, self.process_count
        if (index is None) != (count is None):
            raise UserError(
                "--process_index and --process_count go together: give both"
            )
        if count is not None and not 0 <= index < count:
            raise UserError(
                f"--process_index is {index}; with --process_count={count} it is one "
                f"of 0 to {count - 1}"
            )
        if not self.output:
            raise UserError("--output is empty: give a folder to be, or FILE.npz")
        if "://" in self.output:
            raise UserError(
                f"--output is {self.output!r}: mount the bucket (gcsfuse, s3fs) and "
                "give the folder"
            )
        several = (count or 1) > 1
        if self.is_npz and (several or self.encoder == NO_ENCODER):
            raise UserError(
                f"--output={self.output!r} is written by one process and has "
                "embeddings: give a folder for several processes or --encoder=none"
            )
        if self.runner and (several or self.encoder != NO_ENCODER):
            raise UserError(
                f"--runner={self.runner} prepares pictures only, by itself: give "
                f"--encoder={NO_ENCODER} and no --process_count, then embed the "
                "captions with --source=webdataset:OUTPUT/*.tar"
            )
