"""Data sets of Hugging Face's `datasets`: saved, in a folder, or by name."""

import os
from collections.abc import Iterator

from imagen_jax.errors import UserError
from imagen_jax.preparing import parquet, sources
from imagen_jax.preparing.sources import (
    USUAL,
    Conventions,
    Example,
    Problem,
    Rest,
    Source,
)


def open_huggingface(argument: str, size: int, how: Conventions = USUAL) -> Source:
    """The rows of "PATH_OR_NAME" or "PATH_OR_NAME@SPLIT"; `size` make a shard.

    A path is what `save_to_disk` wrote, or any other folder that `load_dataset` reads;
    only a name may be downloaded. Columns are those of `parquet.open_parquet`.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            "--source=hf: needs Hugging Face's datasets: pip install "
            "'imagen-jax[prepare]'"
        ) from None
    name, split = argument, ""
    if "@" in argument and not os.path.exists(argument):
        name, _, split = argument.rpartition("@")
    saved = ("state.json", "dataset_dict.json")
    is_saved = any(os.path.exists(os.path.join(name, file)) for file in saved)
    try:
        opened = (datasets.load_from_disk if is_saved else datasets.load_dataset)(name)
    # It raises errors of many kinds, and those of what it loads with.
    except Exception as error:
        brief = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"hf:{name} cannot be opened: {brief}") from None
    if isinstance(opened, datasets.Dataset):
        opened = {split or "train": opened}
    split = split or "train"
    if split not in opened:
        found = ", ".join(opened)
        raise UserError(f"hf:{name} has no split {split!r}, but {found}: add @SPLIT")
    rows = opened[split].with_format("arrow")
    columns = parquet.find_columns(rows.features.arrow_schema, f"hf:{name}", how)
    count = len(rows)

    def read(shard: int) -> Iterator[Example | Problem]:
        stop = min((shard + 1) * size, count)
        for start in range(shard * size, stop, parquet.ROWS):
            table = rows[start : min(start + parquet.ROWS, stop)]
            for id, values in enumerate(zip(*map(table.column, columns)), start):
                place = f"{split}[{id}]"
                yield parquet.make_row(id, place, values, how, follow_paths=True)

    sha256 = sources.sha256_of([opened[split]._fingerprint, split, count])
    times = [os.stat(file["filename"]).st_mtime_ns for file in rows.cache_files]
    return Source(-(-count // size), read, count, [], sha256, times, Rest(count))
