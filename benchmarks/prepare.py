"""Pictures and captions a second of `prepare`, and what int8 costs and saves.

python -m benchmarks.prepare shapes:20000 'webdataset:TARS/*.tar' 'folder:DIR'
"""

import os
import pathlib
import sys
import tempfile
import time

from imagen_jax.data import start_tensorflow
from imagen_jax.prepare import prepare
from imagen_jax.preparing.job import open_source
from imagen_jax.preparing.settings import Settings
from imagen_jax.preparing.sources import Example
from imagen_jax.text import encoders as text

WAYS = {
    "pictures only": {"encoder": "none"},
    "pictures only, stored at 64": {"encoder": "none", "stored_size": 64},
    "with bfloat16 embeddings": {"encoder": "tiny"},
    "with int8 embeddings": {"encoder": "tiny", "embedding_dtype": "int8"},
}
LENGTH = 32


def captions_of(source: str) -> list[str]:
    """All captions of a source, without opening its pictures."""
    opened = open_source(Settings(source, ""))
    items = (item for number in range(opened.shards) for item in opened.read(number))
    return [item.caption for item in items if isinstance(item, Example)]


def main() -> None:
    """Measures each source of the command line in each way; the second of two runs."""
    start_tensorflow()
    print(f"{os.cpu_count()} cores")
    encoder = text.load_encoder("tiny")
    for source in sys.argv[1:]:
        captions = list(dict.fromkeys(captions_of(source)))
        encoder.encode(captions, LENGTH)  # compiles
        start = time.perf_counter()
        encoder.encode(captions, LENGTH)
        rate = len(captions) / (time.perf_counter() - start)
        print(f"\n{source}: {len(captions)} different captions, {rate:,.0f} a second")
        for name, options in WAYS.items():
            with tempfile.TemporaryDirectory() as folder:
                for run in ("first", "second"):
                    output = str(pathlib.Path(folder) / run)
                    start = time.perf_counter()
                    done = prepare(
                        source, output, text_length=LENGTH, progress=False, **options
                    )
                    seconds = time.perf_counter() - start
            n = done.examples
            print(
                f"{name:28} {n / seconds:7,.0f} pictures/s, "
                f"{done.image_bytes / n:8,.0f} bytes a picture, "
                f"{done.text_bytes / n:6,.0f} a caption, cosine error "
                f"{done.cosine_error['mean']:.2e}, at worst "
                f"{done.cosine_error['worst']:.2e}"
            )


if __name__ == "__main__":
    main()
