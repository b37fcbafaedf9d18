import json

import pytest

from imagen_jax.errors import UserError
from imagen_jax.preparing.job import open_source
from imagen_jax.preparing.settings import Settings
from imagen_jax.preparing.sources import Problem


def _write(root, metadata=None, **files):
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    if metadata is not None:
        text = (
            metadata
            if isinstance(metadata, str)
            else "\n".join(
                json.dumps({"file_name": name, "text": text}) for name, text in metadata
            )
        )
        (root / "metadata.jsonl").write_text(text)
    return str(root)


def _list(path):
    """(name, caption) of each image, sorted, and the problems."""
    source = open_source(Settings(f"folder:{path}", ""))
    examples = [e for k in range(source.shards) for e in source.read(k)]
    assert sorted(e.id for e in examples) == list(range(len(examples)))
    return sorted((e.name, e.caption) for e in examples), source.problems


class TestList:
    def test_metadata(self, tmp_path):
        path = _write(
            tmp_path,
            [
                ("./b.png", " two "),
                ("sub/a.JPG", "one"),
                ("gone.png", "x"),
                ("scan", "three"),
                ("c.png", " "),
                ("half.png", "\ud800"),
            ],
            b_png=b"",
            sub__a_JPG=b"",
            c_png=b"",
            scan=b"",
            half_png=b"",
            extra_png=b"",
        )
        pairs, problems = _list(path)
        assert pairs == [("b.png", "two"), ("scan", "three"), ("sub/a.JPG", "one")]
        assert problems == [
            Problem("c.png", "the caption is empty"),
            Problem("extra.png", "not in metadata.jsonl"),
            Problem("gone.png", "has a caption, but there is no such picture"),
            Problem("half.png", "the caption is not UTF-8 text"),
        ]

    def test_text_files(self, tmp_path):
        path = _write(
            tmp_path,
            a_png=b"",
            a_txt=b"one\n",
            sub__b_jpg=b"",
            sub__b_txt="zw\u00f6lf".encode(),
            c_png=b"",
            d_txt=b"four",
        )
        pairs, problems = _list(path)
        assert pairs == [("a.png", "one"), ("sub/b.jpg", "zw\u00f6lf")]
        assert problems == [
            Problem("c.png", "has no .txt or .caption file beside it"),
            Problem("d.txt", "has a caption, but there is no such picture"),
        ]

    def test_images_of_one_name_share_their_caption(self, tmp_path):
        files = {"a_png": b"", "a_jpg": b"", "a_TXT": b"x"}
        pairs, problems = _list(_write(tmp_path, **files))
        assert (pairs, problems) == ([("a.jpg", "x"), ("a.png", "x")], [])

    @pytest.mark.parametrize(
        "metadata, message",
        [
            (
                '{"file_name": "a.png", "text": "x"}\n\n{"file',
                "jsonl line 3 is no jsonl: ",
            ),
            ('{"file_name": "a.png"}', "has file_name; it needs file_name and text or"),
            ("[1]", "line 1 is no jsonl: it is no object"),
        ],
    )
    def test_wrong_metadata(self, tmp_path, metadata, message):
        path = _write(tmp_path, metadata, a_png=b"", b_png=b"")
        with pytest.raises(UserError, match=message):
            _list(path)

    def test_wrong_folders(self, tmp_path):
        with pytest.raises(UserError, match="there is no folder '.*nowhere'"):
            _list(str(tmp_path / "nowhere"))
        assert _list(str(tmp_path)) == ([], [])
        problem = Problem("a.png", "has no .txt or .caption file beside it")
        assert _list(_write(tmp_path, a_png=b"")) == ([], [problem])
        (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe")
        with pytest.raises(UserError, match="jsonl line 1 is not UTF-8"):
            _list(str(tmp_path))

    def test_captions_that_are_no_text(self, tmp_path):
        files = {"a_png": b"", "b_png": b"", "c_png": b""}
        captions = {"a_txt": b"caf\xe9", "b_txt": b" \n", "c_txt": b"\xef\xbb\xbfx"}
        pairs, problems = _list(_write(tmp_path, **files, **captions))
        assert pairs == [("c.png", "x")]
        assert problems == [
            Problem("a.png", "the caption is not UTF-8 text"),
            Problem("b.png", "the caption is empty"),
        ]
