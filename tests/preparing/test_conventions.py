"""Where people have their captions: tables, texts, columns, data sets of others."""

import io
import json
import tracemalloc

import jax
import numpy as np
import pytest
from PIL import Image

from imagen_jax import config, prepare, sharding
from imagen_jax.data import memory
from imagen_jax.data.manifest import from_values
from imagen_jax.data.pipeline import open_records, open_sources
from imagen_jax.errors import UserError
from imagen_jax.preparing import settings
from tests import hostile, npz, tars


def _png(i=0):
    file = io.BytesIO()
    Image.fromarray(np.full((20, 24, 3), 9 * i, np.uint8)).save(file, "PNG")
    return file.getvalue()


def _tree(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())


def _captions(source, output, **options):
    """The caption of each picture, by the picture; and the manifest."""
    options = {"encoder": "none", "progress": False} | options
    manifest = prepare.prepare(source, str(output), **options)
    assert sum(manifest.account.values()) == manifest.holds
    found = []
    for path in sorted(output.glob("*.tar")):
        for picture, text in zip(*[iter(tars.read(path))] * 2):
            pixel = int(np.asarray(Image.open(io.BytesIO(picture)))[0, 0, 0])
            found.append((pixel // 9, json.loads(text)["caption"]))
    return sorted(found), manifest


def _rows(*rows):
    return "\n".join(map(json.dumps, rows))


P = {"0.png": _png(0), "1.png": _png(1)}
NAMED = [(0, "a"), (1, "b")]
CSV = 'file_name,{}\n0.png,a\n1.png,"b"\n'
LINES = "a\r\nfr: c\r\nde: d\r\n"
ROWS = [{"file_name": "0.png", "x": "a"}, {"file_name": "1.png", "x": "b"}]
LISTS = [
    {"file_name": "0.png", "text": ["a", "c"]},
    {"file_name": "1.png", "text": ["d", "b"]},
]
AGAIN = [("0.png", "a"), ("1.png", "c"), ("1.png", "b")]
FOLDERS = {
    "csv": ({"metadata.csv": CSV.format("text")}, {}),
    "csv with caption": ({"metadata.csv": CSV.format("caption")}, {}),
    "csv with prompt": ({"metadata.csv": CSV.format("prompt")}, {}),
    "csv with another": ({"metadata.csv": CSV.format("x")}, {"caption_column": "x"}),
    "jsonl with another": ({"metadata.jsonl": _rows(*ROWS)}, {"caption_column": "x"}),
    "lists": ({"metadata.jsonl": _rows(*LISTS)}, {}),
    "several rows": (
        {"metadata.jsonl": _rows(*({"file_name": f, "prompt": c} for f, c in AGAIN))},
        {},
    ),
    "texts": ({"0.txt": "a\n", "1.caption": "b"}, {}),
    "one line": ({"0.txt": LINES, "1.caption": "\ufeffb\n\nx"}, {"caption_lines": 1}),
    "two of a table": ({"metadata.csv": CSV.format("text"), "0.txt": "x"}, {}),
}


@pytest.mark.parametrize("inside", ["", "train/", "train/cats/"])
@pytest.mark.parametrize("name", FOLDERS)
def test_folders(tmp_path, name, inside):
    files, options = FOLDERS[name]
    _tree(tmp_path / "in", {f"{inside}{n}": data for n, data in (P | files).items()})
    found, manifest = _captions(f"folder:{tmp_path}/in", tmp_path / "out", **options)
    assert found == NAMED and manifest.skipped == 0
    assert manifest.holds == 2 + len(files)


def test_the_nearest_table_is_read(tmp_path):
    """As Hugging Face's image folders have them: one for each split, or one for all."""
    pair = _rows(
        {"file_name": "0.png", "text": "a"}, {"file_name": "x/1.png", "text": "c"}
    )
    files = {"0.png": P["0.png"], "x/1.png": P["1.png"], "metadata.jsonl": pair}
    _tree(tmp_path, files | {"x/metadata.csv": "file_name,text\n1.png,b"})
    assert _captions(f"folder:{tmp_path}", tmp_path / ".out")[0] == NAMED


def test_lines_are_joined_unless_told(tmp_path):
    _tree(tmp_path / "in", {"0.png": _png(0), "0.txt": LINES})
    for lines, want in ((0, LINES.strip()), (2, "a\nfr: c"), (9, "a\nfr: c\nde: d")):
        output = tmp_path / f"out{lines}"
        found, _ = _captions(f"folder:{tmp_path}/in", output, caption_lines=lines)
        assert found == [(0, want)]


TARS = {
    "a caption": ({"0.png": P["0.png"], "0.caption": b"a"}, {}),
    "a prompt": ({"0.png": P["0.png"], "0.json": b'{"prompt": "a"}'}, {}),
    "a list": ({"0.png": P["0.png"], "0.json": b'{"caption": ["a", "c"]}'}, {}),
    "a key": (
        {"0.png": P["0.png"], "0.txt": b"x", "0.json": b'{"x": "a"}'},
        {"caption_column": "x"},
    ),
    "a line": ({"0.png": P["0.png"], "0.txt": LINES.encode()}, {"caption_lines": 1}),
}


@pytest.mark.parametrize("name", TARS)
def test_tars(tmp_path, name):
    members, options = TARS[name]
    tars.write(tmp_path / "a.tar", members.items())
    found, manifest = _captions(
        f"webdataset:{tmp_path}/a.tar", tmp_path / "out", **options
    )
    assert found == [(0, "a")] and manifest.holds == len(members)


REFUSED = [
    (
        {"a.tif": b"x", "b.svg": b"x"},
        "no examples, but 1 .svg, 1 .tif; taken are pictures",
    ),
    (P, r"'0.png': has no .txt or .caption file beside it; taken are .* --no_captions"),
    (
        P | {"metadata.csv": CSV.format("title")},
        "has file_name, title; it needs .* --capt",
    ),
]


@pytest.mark.parametrize("files, message", REFUSED)
def test_a_refusal_says_what_is_taken(tmp_path, files, message):
    _tree(tmp_path / "in", files)
    with pytest.raises(UserError, match=message):
        _captions(f"folder:{tmp_path}/in", tmp_path / "out")


# COCO.
COCO = {
    "images": [{"id": 7, "file_name": "0.png"}, {"id": 3, "file_name": "1.png"}],
    "annotations": [
        {"image_id": 3, "id": 1, "caption": "c"},
        {"image_id": 7, "id": 2, "caption": "a "},
        {"image_id": 3, "id": 3, "caption": "b"},
    ],
    "info": {},
}


@pytest.mark.parametrize(
    "folder", ["val2014", "", "images", "../val2014", "../images/val2014"]
)
def test_coco(tmp_path, folder):
    values = json.loads(json.dumps(COCO))
    values["images"].append({"id": 9, "file_name": "gone.png"})
    values["annotations"].append({"image_id": 8, "caption": "x"})
    file = tmp_path / "in" / "annotations" / "captions_val2014.json"
    _tree(file.parent, {file.name: json.dumps(values)})
    _tree(file.parent / folder, P)
    found, manifest = _captions(f"coco:{file}", tmp_path / "out")
    assert found == NAMED and manifest.holds == 3
    reasons = {row["file"]: row["reason"] for row in manifest.skipped_files}
    assert reasons.pop("image 8") == "has a caption, but is not listed"
    assert reasons.pop("gone.png").startswith("is not in ") and not reasons


@pytest.mark.parametrize(
    "change, message",
    [
        ({"annotations": [{"image_id": 7, "bbox": [1]}]}, "KeyError: 'caption'"),
        ({"images": {"7": "0.png"}}, "it needs images .* but has images, annotations"),
        ({"images": [{"id": [7], "file_name": "0.png"}]}, "unhashable"),
        ({"images": [{"id": 7, "file_name": None}]}, "a file_name is no text"),
        ({"images": [{"id": 7, "file_name": "x.png"}]}, "are not beside it, in .*val"),
    ],
)
def test_other_json_than_coco(tmp_path, change, message):
    _tree(tmp_path, P | {"captions_val.json": json.dumps(COCO | change)})
    with pytest.raises(UserError, match=message):
        _captions(f"coco:{tmp_path}/captions_val.json", tmp_path / "out")


# Parquet.
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
BYTES = {
    "binary": pa.binary(),
    "large": pa.large_binary(),
    "view": pa.binary_view(),
    "struct": pa.struct({"path": pa.string(), "bytes": pa.binary_view()}),
}
STRINGS = {
    "string": pa.string(),
    "large": pa.large_string(),
    "view": pa.string_view(),
    "list of views": pa.list_(pa.string_view()),
    "fixed list": pa.list_(pa.string(), 2),
    "large list": pa.large_list(pa.large_string()),
}


@pytest.mark.parametrize("dictionary", [False, True])
@pytest.mark.parametrize("text", STRINGS)
@pytest.mark.parametrize("image", BYTES)
def test_types_of_parquet(tmp_path, image, text, dictionary):
    images = [_png(0), _png(1)]
    if image == "struct":
        images = [{"bytes": data, "path": "x"} for data in images]
    captions = [["a", "c"], ["d", "b"]] if "list" in text else ["a", "b"]
    columns = [pa.array(images, BYTES[image]), pa.array(captions, STRINGS[text])]
    if dictionary:
        columns = [
            column
            if "list" in str(column.type) or "struct" in str(column.type)
            else column.cast(str(column.type).replace("_view", "")).dictionary_encode()
            for column in columns
        ]
    pq.write_table(pa.table(columns, ["picture", "title"]), tmp_path / "x.parquet")
    options = {"image_column": "picture", "caption_column": "title"}
    found, _ = _captions(f"parquet:{tmp_path}", tmp_path / "out", **options)
    assert found == NAMED
    with pytest.raises(UserError, match="no column of pictures .* --image_column"):
        _captions(f"parquet:{tmp_path}", tmp_path / "none")


# Hugging Face's data sets.
@pytest.mark.parametrize("form", ["split", "splits", "folder", "parquet"])
def test_hugging_face(tmp_path, form, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    _tree(tmp_path / "in" / "train", P | {"metadata.csv": CSV.format("text")})
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string")}
    )
    rows = {
        "image": [str(tmp_path / "in" / "train" / n) for n in P],
        "text": ["a", "b"],
    }
    made, path = datasets.Dataset.from_dict(rows, features), tmp_path / "in"
    if form == "split":
        made.save_to_disk(path := tmp_path / "made")
    elif form == "splits":
        both = datasets.DatasetDict({"train": made, "test": made.select([0])})
        both.save_to_disk(path := tmp_path / "made")
    elif form == "parquet":
        made.to_parquet(tmp_path / "made" / "train.parquet")
        path = tmp_path / "made"
    found, manifest = _captions(f"hf:{path}", tmp_path / "out", shard_examples=1)
    assert found == NAMED and manifest.holds == 2
    if form == "splits":
        assert _captions(f"hf:{path}@test", tmp_path / "test")[0] == NAMED[:1]
        with pytest.raises(
            UserError, match="no split 'x', but train, test: add @SPLIT"
        ):
            _captions(f"hf:{path}@x", tmp_path / "x")


def test_hugging_face_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'imagen-jax\[prepare\]'"):
        _captions("hf:x", tmp_path / "out")


# Pictures alone.
@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, name, dtype",
    [
        ("folder", "out", "int8"),
        ("folder", "out.npz", "bfloat16"),
        ("webdataset", "out.npz", "int8"),
        ("parquet", "out", "bfloat16"),
        ("shapes", "out.npz", "int8"),
    ],
)
def test_no_captions(tmp_path, kind, name, dtype):
    """Training sees the null text: zeros, and a mask that is False."""
    _tree(tmp_path / "in", P | {"0.txt": "a", "2.txt": "alone"})
    if kind == "webdataset":
        tars.write(tmp_path / "in" / "a.tar", (P | {"0.txt": b"a"}).items())
    elif kind == "parquet":
        pq.write_table(pa.table({"image": list(P.values())}), tmp_path / "in/a.parquet")
    source = "shapes:2" if kind == "shapes" else f"{kind}:{tmp_path}/in"
    options = {"image_size": 16, "embedding_dtype": dtype, "progress": False}
    options |= {"no_captions": True, "text_length": 4}
    manifest = prepare.prepare(source, str(tmp_path / name), **options)
    assert (manifest.examples, manifest.skipped, manifest.text_bytes) == (2, 0, 0)
    assert manifest.tokens_max == 0
    values = {"image_size": 16, "data": {"records": str(tmp_path / name)}}
    values |= {"text": {"length": 0, "dim": 0}, "training": {"batch_size": 2}}
    model = {"channels": (8,), "num_res_blocks": (1,), "self_attention": (False,)}
    values["model"] = model | {"text_attention": (False,)}
    cfg, _ = open_sources(config.from_dict(values))
    mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    batch = next(open_records(cfg, mesh))
    assert (
        batch.text.shape == (2, 4, 64) and not np.asarray(batch.text, np.float32).any()
    )
    assert not np.asarray(batch.mask).any()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_column": "x"}, "--image_column is for sources of parquet, hf"),
        ({"source": "parquet:x", "caption_lines": 1}, "--caption_lines is for sources"),
        ({"caption_lines": -1}, "--caption_lines is -1; give at least 0"),
        ({"no_captions": True, "caption_lines": 1}, "--no_captions leaves no"),
    ],
)
def test_flags_that_do_not_apply(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        settings.Settings(**{"source": "folder:x", "output": "out"} | options).check()


# Row 18.
def test_one_long_caption_in_a_npz(tmp_path):
    """A hundred captions take no more memory than they have bytes, some times over."""
    captions = ["x" * 1_200_000, "z\u00f6lf \U0001f98a"] + ["short"] * 98
    arrays, text = hostile.records()
    arrays = {name: array for name, array in arrays.items() if name != "caption"}
    manifest = from_values(json.loads(text), "here")
    tracemalloc.start()
    memory.write(tmp_path / "a.npz", arrays, captions, manifest)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * len(captions[0])
    assert npz.captions(tmp_path / "a.npz") == captions
    # As release 0.2 wrote them.
    old = {"caption": np.array(["a", "\U0001f98a"]), "manifest": np.array(text)}
    np.savez_compressed(tmp_path / "old.npz", **arrays, **old)
    for path in ("a.npz", "old.npz"):
        read = memory.read(str(tmp_path / path), manifest)
        assert read.keys() == arrays.keys()
        assert all((read[name] == arrays[name]).all() for name in arrays)
