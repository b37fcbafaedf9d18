"""Files as people have them, from public bug reports of this field: kind by kind.

What a source holds is used, named in the quarantine, or passed over by kind.
"""

import os
import subprocess
import tarfile

import numpy as np
import pytest

from imagen_jax import prepare
from imagen_jax.data import start_tensorflow
from imagen_jax.errors import UserError
from imagen_jax.preparing.job import open_source
from imagen_jax.preparing.settings import Settings
from imagen_jax.preparing.sources import Example, Problem, Rest, expand_braces
from tests.people import JPEG, PNG, outcome, png, tar, tree
from tests.test_doors import call

LINK, SOFT = tarfile.LNKTYPE, tarfile.SYMTYPE

# Row 1. Members; captions of those used; quarantine; others; used, quarantined.
PAIR = [("00002.png", PNG), ("00002.txt", b"two")]
TARS = {
    "adjacent pairs of one key": (PAIR + PAIR, ["two", "two"], {}, {}, 4, 0),
    "pictures before their texts": (
        [("1.png", PNG), ("1.txt", b"a"), *PAIR[:1] * 2, *PAIR[1:] * 2],
        ["a"],
        {
            "00002": "has no .txt",
            "00002.png": "00002.txt is there twice",
            "00002.txt": "",
        },
        {},
        *(2, 4),
    ),
    "names with dots": (
        [("00000.v2.png", PNG), ("00000.v2.txt", b"a"), ("d.d/x.y.z.png", PNG)]
        + [("d.d/x.y.z.JSON", b'{"caption": "b"}')],
        ["a", "b"],
        {},
        {},
        *(4, 0),
    ),
    "a png beside a jpg": (
        [("1.jpg", JPEG), ("1.png", PNG), ("1.txt", b"a")],
        ["a", "a"],
        {},
        {},
        *(3, 0),
    ),
    "links": (
        [
            *PAIR,
            ("3.png", LINK, "00002.png"),
            ("3.txt", b"x"),
            ("4.txt", SOFT, "3.txt"),
        ],
        ["two"],
        {"3.png": "is a link", "3": "has a caption, but", "4.txt": "is a link"},
        {},
        *(2, 3),
    ),
    "a mask": (
        [("1.jpg", JPEG), ("1.seg.png", PNG), ("1.txt", b"a")],
        ["a"],
        {"1.seg": "has no .txt or .caption or .json file beside it"},
        {},
        *(2, 1),
    ),
    "one picture, then another of its name": (
        [("1.png", PNG), ("1.txt", b"a"), ("1.png", PNG), ("2.txt", b"b")],
        ["a"],
        {"1": "has no .txt", "2": "has a caption, but"},
        {},
        *(2, 2),
    ),
    "many of one key": (
        [
            (f"shot.{i:03}.{e}", d)
            for i in range(99)
            for e, d in (("txt", b"a"), ("png", PNG))
        ],
        ["a"] * 99,
        {},
        {},
        *(198, 0),
    ),
    "what else lies about": (
        [
            ("./", tarfile.DIRTYPE, ""),
            ("./a.png", PNG),
            ("./a.txt", b"a"),
            ("./a.ogg", b""),
        ]
        + [("./._a.png", b"x"), (".git/b.png", b"x"), ("a.svg", b""), ("README", b"x")]
        + [
            ("./c.png", PNG),
            ("./c.json", b"{}"),
            ("./c.caption", b"c"),
            ("./c.txt", b"d"),
        ],
        ["a", "d"],
        {},
        {"folders": 1, ".ogg": 1, "hidden": 2, ".svg": 1, "other": 1}
        | {".json": 1, ".caption": 1},
        *(4, 0),
    ),
}


@pytest.mark.parametrize("name", TARS)
def test_members_of_a_tar(tmp_path, name):
    members, captions, reasons, others, used, lost = TARS[name]
    source = tar(tmp_path / "a.tar", members)
    found = outcome(source, tmp_path / "out")
    assert found[0] == captions and found[2] == others
    assert found[3] == (used, lost, len(members))
    assert {f"a.tar/{name}" for name in reasons} == found[1].keys()
    assert all(found[1][f"a.tar/{n}"].startswith(r) for n, r in reasons.items())


def test_members_in_any_order(tmp_path):
    """Nothing is lost of tars that nobody has thought of; a cut one's rest is named."""
    rng = np.random.default_rng(0)
    names = [
        "a.png",
        "a.jpg",
        "a.txt",
        "a.TXT",
        "a.json",
        "a.v.png",
        "a.v.txt",
        "b.png",
    ]
    names += ["b.txt", ".b.txt", "b/c.caption", "b/c.png", "b.mp3"]
    for trial in range(200):
        members = [(name, b"x") for name in rng.choice(names, rng.integers(1, 12))]
        tar(tmp_path / "a.tar", members)
        cut = trial % 4 == 0
        if cut:
            with open(tmp_path / "a.tar", "r+b") as file:
                file.truncate(len(members) * 1024)
        opened = open_source(Settings(f"webdataset:{tmp_path}/a.tar", ""))
        *items, rest = opened.read(0)
        parts = [i.parts for i in items if isinstance(i, Example | Problem)]
        assert isinstance(rest, Rest) and rest.holds == len(members)
        assert sum(parts) + sum(rest.counts.values()) == len(members)
        assert any(i.name == "a.tar" for i in items) == cut


# Row 2.
@pytest.mark.parametrize(
    "pattern, names",
    [
        ("{00009..00011}.tar", ["00009.tar", "00010.tar", "00011.tar"]),
        ("{9..11}.tar", ["10.tar", "11.tar", "9.tar"]),
        ("{3..1}", ["1", "2", "3"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("x{a,{0..1}b}", ["x0b", "x1b", "xa"]),
        ("{08..10}{,.gz}", ["08", "08.gz", "09", "09.gz", "10", "10.gz"]),
        ("{x}{}[0-9]{a..c}", ["{x}{}[0-9]{a..c}"]),
    ],
)
def test_braces(pattern, names):
    """As bash expands them: `printf '%s\\n' PATTERN | sort`."""
    assert sorted(expand_braces(pattern)) == names


@pytest.mark.slow
def test_braces_of_a_source(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(4):
        tar(
            tmp_path / "in" / f"{i:05}.tar",
            [(f"{i}.png", PNG), (f"{i}.txt", b"%d" % i)],
        )
    source = f"webdataset:{tmp_path}/in/{{00000..00002}}.tar"
    assert outcome(source, tmp_path / "out")[0] == ["0", "1", "2"]
    for wrong in ("{00002..00004}.tar", "{0..9}{0..999999}.tar", "{0..99999999999}"):
        with pytest.raises(UserError, match="00004.tar'|stands for over 1,000,000"):
            outcome(f"webdataset:{tmp_path}/in/{wrong}", tmp_path / "none")
    assert outcome(f"webdataset:{tmp_path}/in", tmp_path / "folder")[3] == (8, 0, 8)
    os.rename(tmp_path / "in/00003.tar", tmp_path / "in/{0..1}[3].tar")
    source = f"webdataset:{tmp_path}/in/{{0..1}}[3].tar"
    assert outcome(source, tmp_path / "literal")[0] == ["3"]


@pytest.mark.parametrize(
    "words, message",
    [
        ("--source=webdataset:d/{00000..00003}.tar", "--source is given 4 times"),
        ("--source webdataset:d/{0..3}.tar", "is no flag (and 2 more)"),
        ("--source=folder:a --no_captions --nono_captions", "--no_captions is given"),
    ],
)
def test_an_unquoted_source(tmp_path, words, message):
    """As the shell hands it on."""
    command = ["bash", "-c", f"printf '%s\\n' {words} --output={tmp_path}/out"]
    given = subprocess.run(command, capture_output=True, text=True).stdout
    done = call("prepare", *given.splitlines())
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


# Row 3. Files; captions; quarantine; others; used, quarantined.
FOLDERS = {
    "a linked folder": (
        {"pics/link": "../more", "pics/a.png": PNG, "pics/a.txt": b"a"}
        | {"more/b.png": PNG, "more/b.txt": b"b", "pics/c.png": "../more/b.png"}
        | {"pics/c.txt": b"c"},
        ["a", "b", "c"],
        {},
        {},
        *(6, 0),
    ),
    "loops": (
        {"pics/up": "..", "pics/self": ".", "pics/a/b/loop": "../../a", "pics/x": "x"}
        | {"pics/a/b/c.png": PNG, "pics/a/b/c.txt": b"c", "pics/gone.png": "nowhere"}
        | {"pics/again": "a/b", "pics/whole": "/"},
        ["c"],
        {
            "up": "leads to",
            "self": "leads to",
            "a/b/loop": "leads to",
            "x": "is no file",
        }
        | {"gone.png": "is no file", "again": "leads to", "whole": "leads to"},
        {},
        *(2, 7),
    ),
    "hidden": (
        {"pics/.ipynb_checkpoints/a-checkpoint.png": PNG, "pics/a.png": PNG}
        | {"pics/a.txt": b"a", "pics/.cache/b/b.png": PNG, "pics/.cache/b/b.txt": b"b"}
        | {"pics/._a.png": b"x", "pics/.loop": "."},
        ["a"],
        {},
        {"hidden": 5},
        *(2, 0),
    ),
    "sounds and drawings": (
        {
            "pics/a/b.png": PNG,
            "pics/a/b.txt": b"b",
            "pics/a/b.ogg": b"",
            "pics/b.SVG": b"",
        }
        | {"pics/Makefile": b"", "pics/b.TXT": b"x", "pics/c.webp": png(3, "WEBP")},
        ["b"],
        {
            "b.TXT": "has a caption, but",
            "c.webp": "has no .txt or .caption file beside",
        },
        {".ogg": 1, ".svg": 1, "other": 1},
        *(2, 2),
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_what_a_folder_lists(tmp_path, name):
    files, captions, reasons, others, used, lost = FOLDERS[name]
    tree(tmp_path, files)
    found = outcome(f"folder:{tmp_path}/pics", tmp_path / "out")
    assert found[0] == captions and found[2] == others
    assert found[3] == (used, lost, used + lost + sum(others.values()))
    assert found[1].keys() == reasons.keys()
    assert all(found[1][name].startswith(reason) for name, reason in reasons.items())


# Row 4.
@pytest.mark.parametrize("output", ["out", "out.npz"])
def test_what_training_cannot_read(tmp_path, output):
    """It is stored in another way, or named."""
    files = {
        "png": PNG[:-12],
        "jpg": JPEG[:-2],
        "chunk": PNG[:-10] + b"XEND" + PNG[-6:],
    }
    files |= {"half": PNG[: len(PNG) // 2], "jpeg": JPEG[:200], "more": PNG + b"more"}
    files |= {"sum": PNG.replace(b"IDAT", b"IDAT", 1)[:-13] + b"\0" + PNG[-12:]}
    pictures = {f"{name}.png": data for name, data in files.items()}
    texts = {f"{name}.txt": name.encode() for name in files}
    source = tree(tmp_path / "pics", pictures | texts)
    options = {"max_bad_share": 1.0, "image_size": 16, "progress": False}
    manifest = prepare.prepare(source, str(tmp_path / output), **options)
    assert manifest.examples + manifest.skipped == len(files)
    assert {"half.png", "jpeg.png"} <= {s["file"] for s in manifest.skipped_files}
    start_tensorflow()
    import tensorflow as tf

    from imagen_jax.data import preprocess

    for path in (tmp_path / "out").glob("*.tfrecord"):
        for data in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            feature = tf.train.Example.FromString(data).features.feature
            picture = preprocess.decode(feature["image"].bytes_list.value[0])
            assert picture.shape == (20, 24, 3)
