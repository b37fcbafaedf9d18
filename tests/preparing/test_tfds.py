"""TensorFlow Datasets as a source, without downloading."""

import io

import numpy as np
from PIL import Image

from imagen_jax.data import start_tensorflow

start_tensorflow()
import tensorflow_datasets as tfds  # noqa: E402

from imagen_jax.preparing.job import open_source  # noqa: E402
from imagen_jax.preparing.settings import Settings  # noqa: E402

COUNT = 6


def _picture(i):
    file = io.BytesIO()
    ramp = np.linspace(0, 255, 40 * 30).reshape(30, 40)
    Image.fromarray(np.uint8(ramp / (i + 1))).convert("RGB").save(file, "JPEG")
    return file.getvalue()


class Noted(tfds.core.GeneratorBasedBuilder):
    """Pictures with one caption, some unusable, in three files."""

    VERSION = tfds.core.Version("1.0.0")
    # Beside it tfds would look for checksums, with a package that it does not require.
    code_path = None

    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {"image": tfds.features.Image(), "text": tfds.features.Text()}
            )
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        for i in range(COUNT):
            caption = {2: "", 3: b"caf\xe9"}.get(i, f"picture {i}")
            yield i, {"image": io.BytesIO(_picture(i)), "text": caption}


def test_a_data_set_on_the_disk(tmp_path, monkeypatch):
    builder = Noted(data_dir=str(tmp_path))
    config = tfds.download.DownloadConfig(num_shards=3)
    builder.download_and_prepare(download_config=config)
    assert len(builder.info.splits["train"].filenames) == 3
    monkeypatch.setattr(tfds, "builder", lambda name: builder)
    for size in (2, 4, 100):
        opened = open_source(Settings("tfds:noted@test", "", shard_examples=size))
        assert opened.count == COUNT and opened.shards == -(-COUNT // size)
        items = [item for k in range(opened.shards) for item in opened.read(k)]
        names = [f"test[{i}]" for i in range(COUNT)]
        assert [item.name for item in items] == names
        reasons = [item.reason for item in items if hasattr(item, "reason")]
        assert sorted(reasons) == [
            "the caption is empty",
            "the caption is not UTF-8 text",
        ]
        good = [item for item in items if not hasattr(item, "reason")]
        by_caption = {item.caption: item.read() for item in good}
        # tfds shuffles when it writes; the file's own bytes are kept.
        assert by_caption == {
            f"picture {i}": _picture(i) for i in range(COUNT) if i not in (2, 3)
        }
