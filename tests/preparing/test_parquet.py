import io

import numpy as np
import pytest
from PIL import Image

from imagen_jax import prepare
from imagen_jax.errors import UserError
from imagen_jax.preparing import parquet
from imagen_jax.preparing.job import open_source
from imagen_jax.preparing.settings import Settings
from imagen_jax.preparing.sources import Example, Problem

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def _png(i):
    file = io.BytesIO()
    Image.fromarray(np.full((9, 8, 3), i, np.uint8)).save(file, "PNG")
    return file.getvalue()


PICTURES = [_png(i) for i in range(10)]
CAPTIONS = [f"grey {i}" for i in range(10)]
STRUCTS = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(PICTURES)]
LAYOUTS = {
    "datasets": {"text": CAPTIONS, "image": STRUCTS},
    "img2dataset": {"caption": CAPTIONS, "url": CAPTIONS, "jpg": PICTURES},
    "laion": {"image": PICTURES, "TEXT": CAPTIONS},
    "large": {
        "image": pa.array(PICTURES, pa.large_binary()),
        "caption": pa.array(CAPTIONS, pa.large_string()),
    },
    "several": {
        "image": PICTURES,
        "captions": [["x", "y", "z"][: i % 3] + [c] for i, c in enumerate(CAPTIONS)],
    },
}


def _write(path, columns, **options):
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def _open(pattern, size=100):
    return open_source(Settings(f"parquet:{pattern}", "", shard_examples=size))


def _read(pattern, size=100):
    opened = _open(pattern, size)
    return [item for k in range(opened.shards) for item in opened.read(k)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    items = _read(_write(tmp_path / "a.parquet", LAYOUTS[layout]))
    assert [item.read() for item in items] == PICTURES
    assert [item.id for item in items] == list(range(10))
    assert items[3].name == "a.parquet/3"
    captions = [item.caption for item in items]
    if layout == "several":
        # Of 1, 2, 3, 1, ... captions the 0 % 1, 1 % 2, 2 % 3, 3 % 1, ...-th.
        want = [*"grey 0,grey 1,grey 2,grey 3,x,grey 5".split(",")]
        assert captions[:6] == want
    else:
        assert captions == CAPTIONS


@pytest.mark.parametrize("group", [3, 4, 100])
@pytest.mark.parametrize("size", [1, 4, 7, 100])
def test_shards_and_row_groups(tmp_path, group, size):
    """However rows are grouped, each is in one shard, in order."""
    for name, rows in (("a", 10), ("b", 5)):
        columns = {"image": PICTURES[:rows], "text": CAPTIONS[:rows]}
        _write(tmp_path / f"{name}.parquet", columns, row_group_size=group)
    opened = _open(tmp_path / "*.parquet", size)
    assert opened.count == 15 and opened.shards == -(-10 // size) + -(-5 // size)
    shards = [list(opened.read(k)) for k in range(opened.shards)]
    assert all(len(shard) <= size for shard in shards)
    items = [item for shard in shards for item in shard]
    assert [item.id for item in items] == list(range(15))
    assert [item.caption for item in items] == CAPTIONS + CAPTIONS[:5]
    assert [item.read() for item in items] == PICTURES + PICTURES[:5]


def test_rows_that_cannot_be_used(tmp_path):
    # Arrow does not look whether a string is UTF-8.
    text = pa.array([b"one", b"caf\xe9", b"", None, b"five"], pa.binary())
    text = text.cast(pa.binary()).view(pa.string())
    columns = {"image": [PICTURES[0], PICTURES[1], PICTURES[2], PICTURES[3], None]}
    items = _read(_write(tmp_path / "a.parquet", columns | {"text": text}))
    assert isinstance(items[0], Example) and items[0].caption == "one"
    assert items[1:] == [
        Problem("a.parquet/1", "the caption is not UTF-8 text"),
        Problem("a.parquet/2", "the caption is empty"),
        Problem("a.parquet/3", "the caption is empty"),
        Problem("a.parquet/4", "has no picture"),
    ]
    structs = [{"bytes": None, "path": "x.png"}, None]
    items = _read(
        _write(
            tmp_path / "b.parquet",
            {
                "image": pa.array(
                    structs, pa.struct({"bytes": pa.binary(), "path": pa.string()})
                ),
                "text": ["one", "two"],
            },
        )
    )
    assert [item.reason for item in items] == ["has no picture"] * 2


@pytest.mark.parametrize("image", [b"", None, {"path": None}, {"path": ""}])
def test_rows_of_hugging_face_without_a_picture(image):
    row = (pa.scalar(image), pa.scalar("one"))
    if isinstance(image, dict):
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        row = (pa.scalar(image, kind), row[1])
    found = parquet._example(Settings("hf:x", ""), 0, "x", row, follow_paths=True)
    assert found == Problem("x", "has no picture")


def test_damaged_files(tmp_path):
    path = tmp_path / "b.parquet"
    noise = np.random.default_rng(0).bytes
    rows = [noise(3000) for _ in range(40)]
    columns = {"image": rows, "text": [f"{i}" for i in range(40)]}
    _write(path, columns, row_group_size=20, use_dictionary=False)
    whole = path.read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    # The second row group's pages: their headers make no sense any more.
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    path.write_bytes(whole[:start] + b"\xff" * 64 + whole[start + 64 :])
    opened = _open(tmp_path / "*.parquet")
    (cut,) = opened.problems
    assert cut.name == "a.parquet" and "Arrow" in cut.reason
    *good, bad = opened.read(0)
    assert [item.read() for item in good] == rows[: len(good)] and len(good) <= 20
    assert bad.name == f"b.parquet/{len(good)}"
    assert bad.reason.endswith(f"rows {len(good)} to 39 are lost")
    pattern = f"parquet:{tmp_path}/a*"
    with pytest.raises(UserError, match="1 of 1 examples .* first 'a.parquet': Arrow"):
        prepare.prepare(pattern, str(tmp_path / "out"))


@pytest.mark.parametrize(
    "columns, message",
    [
        (
            {"url": ["x"], "text": ["y"]},
            "no column of pictures .*url .string.,",
        ),
        ({"image": ["x"], "text": ["y"]}, "no column of pictures"),
        ({"image": [b"x"], "text": [3]}, r"no column of captions .*text \(int64\)"),
    ],
)
def test_wrong_columns(tmp_path, columns, message):
    with pytest.raises(UserError, match=message):
        _read(_write(tmp_path / "a.parquet", columns))


def test_prepared(tmp_path):
    pattern = _write(tmp_path / "a.parquet", LAYOUTS["datasets"])
    output = tmp_path / "out"
    manifest = prepare.prepare(
        f"parquet:{pattern}", str(output), shard_examples=4, progress=False
    )
    assert [shard["examples"] for shard in manifest.shards] == [4, 4, 2]
