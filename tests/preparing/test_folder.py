import json

import pytest

from imagen_jax.errors import UserError
from imagen_jax.preparing import folder
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


class TestList:
    def test_metadata(self, tmp_path):
        path = _write(
            tmp_path,
            [
                ("./b.png", " two "),
                ("sub/a.JPG", "one"),
                ("gone.png", "x"),
                ("c.png", " "),
            ],
            b_png=b"",
            sub__a_JPG=b"",
            c_png=b"",
            extra_png=b"",
        )
        pairs, problems = folder.list_folder(path)
        assert pairs == [("b.png", "two"), ("sub/a.JPG", "one")]
        assert problems == [
            Problem("c.png", "the caption is empty"),
            Problem("extra.png", "not in metadata.jsonl"),
            Problem("gone.png", "has a caption, but there is no such picture"),
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
        pairs, problems = folder.list_folder(path)
        assert pairs == [("a.png", "one"), ("sub/b.jpg", "zw\u00f6lf")]
        assert problems == [
            Problem("c.png", "has no .txt file beside it"),
            Problem("d.txt", "has a caption, but there is no such picture"),
        ]

    def test_images_of_one_name_share_their_caption(self, tmp_path):
        files = {"a_png": b"", "a_jpg": b"", "a_TXT": b"x"}
        pairs, problems = folder.list_folder(_write(tmp_path, **files))
        assert (pairs, problems) == ([("a.jpg", "x"), ("a.png", "x")], [])

    @pytest.mark.parametrize(
        "metadata, message",
        [
            (
                '{"file_name": "a.png", "text": "x"}\n\n{"file',
                "jsonl' line 3 is not valid JSON",
            ),
            ('{"file_name": "a.png"}', 'line 1 must be an object with "file_name"'),
            ('{"file_name": "a.png", "text": 3}', "line 1 must be .* both strings"),
            ("[1]", "line 1 must be an object"),
            (
                [("a.png", "x"), ("b.png", "y"), ("./a.png", "z")],
                "line 3 captions 'a.png' a second time",
            ),
        ],
    )
    def test_wrong_metadata(self, tmp_path, metadata, message):
        path = _write(tmp_path, metadata, a_png=b"", b_png=b"")
        with pytest.raises(UserError, match=message):
            folder.list_folder(path)

    def test_wrong_folders(self, tmp_path):
        with pytest.raises(UserError, match="there is no folder '.*nowhere'"):
            folder.list_folder(str(tmp_path / "nowhere"))
        with pytest.raises(UserError, match="has no pictures"):
            folder.list_folder(str(tmp_path))
        _write(tmp_path, a_png=b"")
        with pytest.raises(
            UserError, match="pictures but no captions: give it a metadata"
        ):
            folder.list_folder(str(tmp_path))
        (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe")
        with pytest.raises(UserError, match="metadata.jsonl' is not UTF-8 text"):
            folder.list_folder(str(tmp_path))

    def test_captions_that_are_no_text(self, tmp_path):
        files = {"a_png": b"", "b_png": b"", "c_png": b""}
        captions = {"a_txt": b"caf\xe9", "b_txt": b" \n", "c_txt": b"\xef\xbb\xbfx"}
        pairs, problems = folder.list_folder(_write(tmp_path, **files, **captions))
        assert pairs == [("c.png", "x")]
        assert problems == [
            Problem("a.png", "the caption is not UTF-8 text"),
            Problem("b.png", "the caption is empty"),
        ]
