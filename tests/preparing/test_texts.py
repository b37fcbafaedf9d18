"""Lines that are not lines, text that is not text: one line of the quarantine each."""

import json
import os

import pytest

from imagen_jax.errors import UserError
from imagen_jax.files import read_lines, split_lines
from tests.people import PNG, outcome, png, tar, tree

# Files that say nothing wrong; the captions; what is in the quarantine.
ODD = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh"
TEXTS = {
    "lines that are not lines": (
        {
            "metadata.jsonl": "\n".join(
                json.dumps({"file_name": f"{i}.png", "text": ODD}, ensure_ascii=False)
                for i in range(2)
            ).encode()
        },
        [ODD, ODD],
        {},
    ),
    "a table of Windows": (
        {
            "metadata.csv": "\ufefffile_name,text\r\n0.png,zw\u00f6lf\r\n"
            '1.png,"a\r\nb"\r\n'.encode()
        },
        ["a\nb", "zw\u00f6lf"],
        {},
    ),
    "odd lines in a table": (
        {"metadata.csv": f'file_name,text\n0.png,"{ODD}"\n1.png,{ODD[:-2]}\n'.encode()},
        [ODD[:-2], ODD],
        {},
    ),
    "half a character": (
        {
            "metadata.jsonl": b'{"file_name": "0.png", "text": "\\ud83d x"}\n'
            b'{"file_name": "1.png", "text": "x"}\n'
            b'{"file_name": "\\udcff", "text": "y"}'
        },
        ["x"],
        {
            "0.png": "the caption is not UTF-8 text",
            "\udcff": "has a caption, but there",
        },
    ),
    "no text": (
        {
            "metadata.jsonl": b'{"file_name": "0.png", "text": null}\n'
            b'{"file_name": "1.png", "text": 3}\n{"file_name": null, "text": "x"}\n'
            b'{"text": "y"}\n{"file_name": "0.png", "text": [null, "z"]}'
        },
        ["z"],
        {"1.png": "the caption is no text"}
        | {f"metadata.jsonl line {n}": "has no file_name" for n in (3, 4)},
    ),
    "a comma too many": (
        {"metadata.csv": b'file_name,text\n0.png,a, b\n1.png,"c, d"\n'},
        ["c, d"],
        {"metadata.csv line 2": "has more values", "0.png": "not in metadata.csv"},
    ),
    "names that are no text": (
        {b"\xff.png": PNG, b"\xff.txt": b"x", b"\xfe.png": b"broken", b"\xfe.txt": b"y"}
        | {"0.txt": b"caf\xe9", "1.txt": b"\xef\xbb\xbfone"},
        ["one", "x"],
        {"0.png": "the caption is not UTF-8", "\udcfe.png": "it is no picture"},
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_that_is_no_text(tmp_path, name):
    files, captions, reasons = TEXTS[name]
    pictures = {"0.png": PNG, "1.png": png(1)}
    found = outcome(tree(tmp_path / "pics", pictures | files), tmp_path / "out")
    assert found[0] == captions and found[1].keys() == reasons.keys()
    assert all(found[1][name].startswith(reason) for name, reason in reasons.items())


def test_json_in_a_tar_that_is_no_caption(tmp_path):
    texts = [
        b'{"caption": "\\udc80"}',
        b'{"caption": null}',
        b"[" * 99_999,
        b"7",
        b"\xff",
    ]
    texts += [b'{"caption": {"a": 1}}', b'{"caption": ["x"]}', b"9" * 9_999]
    members = []
    for i, text in enumerate(texts):
        members += [(f"{i}.png", PNG), (f"{i}.json", text)]
    members += [(os.fsdecode(b"\xff.png"), PNG), (os.fsdecode(b"\xff.txt"), b"y")]
    found = outcome(tar(tmp_path / "a.tar", members), tmp_path / "out")
    assert found[0] == ["x", "y"] and found[3] == (4, 14, 18)
    assert set(found[1].values()) == {
        *(
            "the caption is not UTF-8 text",
            "the caption is empty",
            "the caption is no text",
        )
    }


@pytest.mark.parametrize(
    "table, message",
    [
        (
            {"metadata.jsonl": b'{"file_name": "0.png", "text": "caf\xe9"}'},
            "line 1 is not UTF-8",
        ),
        (
            {"metadata.csv": b"file_name,text\n0.png,\x96"},
            "line 2 is not UTF-8 .byte 7 is 0x96",
        ),
        ({"metadata.jsonl": "\ufeff{}\n{".encode("utf-16")}, "line 1 is not UTF-8"),
        (
            {"metadata.jsonl": b"{}\n" + b"[" * 99_999},
            "line 2 is no jsonl: ",
        ),
        ({"metadata.csv": b'file_name,text\n0.png,"x'}, "line 2 is no csv: "),
        (
            {"metadata.csv": b"file;titel\n0.png;x"},
            "has file;titel; it needs file_name and text or",
        ),
    ],
)
def test_tables_that_are_none(tmp_path, table, message):
    source = tree(tmp_path / "pics", {"0.png": PNG} | table)
    with pytest.raises(UserError, match=message):
        outcome(source, tmp_path / "out")


@pytest.mark.parametrize(
    "text, lines",
    [
        (b"", []),
        (b"\n", [""]),
        (b"a", ["a"]),
        (b"a\r\nb\n\nc\n", ["a", "b", "", "c"]),
        (b"\xef\xbb\xbfa\n\xef\xbb\xbfb", ["a", "\ufeffb"]),
        (ODD.encode(), [ODD]),
        (b"\xef\xbb\xbf", []),
        (b"a\r\r\nb\r", ["a\r", "b\r"]),
    ],
)
def test_lines(tmp_path, text, lines):
    (tmp_path / "a").write_bytes(text)
    assert read_lines(tmp_path / "a", "captions") == lines
    assert len(split_lines(text)) >= len(lines)


def test_lines_of_no_text(tmp_path):
    (tmp_path / "a").write_bytes("a\nna\u00efve \u2013\n".encode("cp1252"))
    with pytest.raises(
        UserError, match="a line 2 is not UTF-8 .byte 3 is 0xef.: save c"
    ):
        read_lines(tmp_path / "a", "captions")
    with pytest.raises(UserError, match="b does not exist; it should hold captions"):
        read_lines(tmp_path / "b", "captions")
    with pytest.raises(UserError, match="is not captions: it is no file"):
        read_lines(tmp_path, "captions")
