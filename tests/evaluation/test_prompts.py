"""Prompts: the same from every kind of file, known sets, and what is no prompts."""

import json

import numpy as np
import pytest

from imagen_jax.errors import UserError
from imagen_jax.evaluation.prompts import DRAWBENCH, Prompt, read_prompts

WANT = [Prompt('a "red" car, parked', "Colors"), Prompt("два кота", "Counting")]
LINES = [{"prompt": p.text, "category": p.category} for p in WANT]
CSV = 'Prompt,Category\n"a ""red"" car, parked",Colors\nдва кота,Counting \n'
TSV = 'Prompt\tCategory\tNote\na "red" car, parked\tColors\t\n два кота\tCounting\tx\n'
FILES = {
    "a.csv": CSV,
    "windows.CSV": "\ufeff" + CSV.replace("\n", "\r\n"),
    "quoted.csv": CSV.replace("Prompt,Category", '" prompt ","CATEGORY"'),
    "empty rows.csv": CSV + ",\n\n,\n",
    "a.tsv": TSV,
    "bom.tsv": "\ufeff" + TSV,
    "a.jsonl": "".join(f"{json.dumps(line)}\n" for line in LINES),
    # What is downloaded often has no ending.
    "export": CSV,
    "export.txt": TSV,
}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize("name", FILES)
def test_the_same_from_every_table(tmp_path, name):
    assert read_prompts(write(tmp_path / name, FILES[name])) == WANT


def test_lines_are_prompts_as_they_are(tmp_path):
    text = 'Prompt,Colour\n {"prompt": "a"}\t\n\n"quoted"\n'
    want = ["Prompt,Colour", '{"prompt": "a"}', '"quoted"']
    assert read_prompts(write(tmp_path / "a.txt", text)) == [Prompt(t) for t in want]


def test_quotes_of_a_tsv_are_text(tmp_path):
    """As PartiPrompts has them, at the beginning of a prompt, too."""
    text = 'Prompt\tCategory\n"G I G G L E" painted on a wall\tWriting\n"\tWriting\n'
    found = read_prompts(write(tmp_path / "a.tsv", text))
    assert [p.text for p in found] == ['"G I G G L E" painted on a wall', '"']


def test_a_prompt_of_two_lines(tmp_path):
    path = write(tmp_path / "a.csv", 'caption\n"one\ntwo"\nthree\n')
    assert [p.text for p in read_prompts(path)] == ["one\ntwo", "three"]


def test_columns(tmp_path):
    text = "text,Prompt,file_name,my words\na,b,c.jpg,d\n"
    path = write(tmp_path / "a.csv", text)
    assert read_prompts(path) == [Prompt("b", "", "c.jpg")]
    assert read_prompts(path, "My Words") == [Prompt("d", "", "c.jpg")]
    with pytest.raises(
        UserError, match=r"line 2 has no my wrods \(did you mean 'my words'\?\), but"
    ):
        read_prompts(path, "my wrods")
    with pytest.raises(UserError, match="--prompt_column=x: .*b.txt has no columns"):
        read_prompts(write(tmp_path / "b.txt", "a\n"), "x")


def coco(count=40):
    """Two captions each of pictures, as captions_val2014.json has them."""
    names = [f"COCO_val2014_{i:012d}.jpg" for i in range(count // 2)]
    return {
        "info": {"year": 2014},
        "images": [{"id": 7 * i, "file_name": n} for i, n in enumerate(names)],
        "annotations": [
            {"image_id": i // 2 * 7, "id": i, "caption": f"Caption {i}. \n"}
            for i in range(count)
        ],
    }


def test_cocos_captions_name_their_pictures(tmp_path):
    path = write(tmp_path / "captions_val2014.json", json.dumps(coco()))
    found = read_prompts(path)
    assert len(found) == 40
    assert found[5] == ("Caption 5.", "", "COCO_val2014_000000000002.jpg")
    assert found[5].known() == {"image": "COCO_val2014_000000000002.jpg"}


def test_a_draw_is_the_documented_one(tmp_path):
    """Captions without replacement, in the order of the draw."""
    path = write(tmp_path / "a.json", json.dumps(coco()))
    drawn = read_prompts(path, count=30, seed=3)
    order = np.random.default_rng(3).choice(40, 30, replace=False)
    assert [p.text for p in drawn] == [f"Caption {i}." for i in order]
    assert len(set(drawn)) == 30 and drawn != read_prompts(path, count=30, seed=4)
    # Not one per picture.
    assert len({p.image for p in drawn}) < 20 <= 30
    assert {*read_prompts(path, count=40)} == {*read_prompts(path)}
    with pytest.raises(UserError, match="holds 40 prompts, not --count=41"):
        read_prompts(path, count=41)


def drawbench(**changes):
    """A table of its categories, with the space that one of them ends in."""
    counts = DRAWBENCH | changes
    spaced = {
        name: "Gary Marcus et al. " if "Gary" in name else name for name in counts
    }
    rows = [
        f"{name} {i},{spaced[name]}" for name, n in counts.items() for i in range(n)
    ]
    return "\n".join(["Prompt,Category", *rows, ""])


def test_drawbench_is_counted(tmp_path):
    # Saharia et al., App. C: 11 categories, 200 prompts.
    assert (len(DRAWBENCH), sum(DRAWBENCH.values())) == (11, 200)
    found = read_prompts(write(tmp_path / "DrawBench Prompts.csv", drawbench()))
    assert len(found) == 200
    assert sum(p.category == "Gary Marcus et al." for p in found) == 10
    other = drawbench(Text=20, Colours=1)
    message = r"differs \(Text 20 for 21, Colours 1 for 0\): copy it again"
    with pytest.raises(UserError, match=message):
        read_prompts(write(tmp_path / "drawbench.csv", other))
    assert len(read_prompts(write(tmp_path / "mine.csv", other))) == 200
    lines = "".join(f"{i}\n" for i in range(199))
    with pytest.raises(UserError, match="prompts 199 for 200"):
        read_prompts(write(tmp_path / "draw_bench.txt", lines))


def test_partiprompts_are_counted(tmp_path):
    rows = [f'"{i}" is written\tAbstract\tBasic\t' for i in range(1632)]
    head = "Prompt\tCategory\tChallenge\tNote"
    path = write(tmp_path / "PartiPrompts.tsv", "\n".join([head, *rows]))
    assert len(read_prompts(path)) == 1632
    assert len(read_prompts(path, count=100)) == 100
    path = write(tmp_path / "parti-prompts.tsv", "\n".join([head, *rows[1:]]))
    with pytest.raises(UserError, match="differs .prompts 1,631 for 1,632."):
        read_prompts(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "holds 0 prompts"),
        ("a.csv", "", "holds 0 prompts"),
        ("a.csv", "Prompt,Category\n", "holds 0 prompts"),
        ("a.csv", "\ufeff", "holds 0 prompts"),
        (
            "a.csv",
            "Prompt;Category\na;b\n",
            "no prompt or caption or text, but prompt;c",
        ),
        (
            "a.csv",
            "Category\na\n",
            "line 2 has no prompt or caption or text, but categ",
        ),
        ("a.csv", "Prompt,Category\na, b,c\n", "line 2 has more or fewer values"),
        ("a.csv", "Prompt,Category\na,b\nc\n", "line 3 has more or fewer values"),
        ("a.tsv", "Prompt\tCategory\na\tb\tc\n", "line 2 has more or fewer values"),
        ("a.csv", "Prompt,Category\n,b\n", "line 2 has no text for a prompt"),
        ("a.csv", 'Prompt\n"a" b\n', "line 2 is no csv"),
        ("a.csv", 'Prompt\n"a\nb', "is no csv: unexpected end of data"),
        ("a.csv", "Prompt\ncafé\n".encode("cp1252"), "line 2 is not UTF-8 .*0xe9"),
        ("a.csv", "Prompt\na\n".encode("utf-16"), "line 1 is not UTF-8"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', "line 2 has no text for a pro"),
        ("a.jsonl", '{"prompt": ["a"]}\n', "line 1 has no text for a prompt"),
        ("a.jsonl", '{"prompt": "a", "category": 3}\n', "line 1 has no text"),
        ("a.jsonl", '{"prompt": "a"\n', "line 1 is no jsonl"),
        ("a.jsonl", '["a"]\n', "line 1 is no jsonl: it is no object"),
        ("a.jsonl", '{"prompt": "\\ud83d"}\n', "has a prompt that is no text"),
        ("a.json", '["a"]', "it holds no JSON object"),
        ("a.json", '{"prompts": ["a"]}', "KeyError: 'images'.*in .jsonl"),
        ("a.json", '{"images": [], "annotations": [{"caption": 3}]}', "AttributeErr"),
        ("a.json", '{"prompt": "a"}\n{"prompt": "b"}\n', "Extra data"),
        ("a.csv", None, "does not exist"),
    ],
)
def test_what_is_no_prompts_is_one_line(tmp_path, name, content, message):
    path = str(tmp_path / name) if content is None else write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as raised:
        read_prompts(path)
    assert str(tmp_path / name) in str(raised.value)
    assert "\n" not in str(raised.value)
