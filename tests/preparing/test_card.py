"""A data card says what is in records: counted anew, in plain loops."""

import collections
import html.parser
import io
import itertools
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from imagen_jax import prepare
from imagen_jax.errors import UserError
from imagen_jax.preparing import card as cards
from imagen_jax.preparing.card import write_card
from imagen_jax.preparing.duplicates import NEAR, dhash
from tests.test_doors import call

OPTIONS = {"text_length": 8, "image_size": 32, "progress": False}
TEXTS = {
    "a red <b>fox</b>": "latin",
    "Ein Fuchs & ein Bär": "latin",
    "лиса": "cyrillic",
    "きつねが走る": "cjk + hiragana",
    "لثعلب": "arabic",
    "여우": "hangul",
    "αλεπού, fox": "greek + latin",
    "ﬁrst ｆｏｘ": "latin",  # a ligature and wide letters
    "1, 2, 3!": "no letters",
    "狐": "cjk",
}


def _noise(seed, height, width):
    """Blocks of 8 pixels by chance, so that the picture has looks."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return blocks.repeat(8, 0).repeat(8, 1)[:height, :width]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 pictures: of some the file or the looks are there twice."""
    folder = tmp_path_factory.mktemp("pictures")
    captions = [*TEXTS, *(f"fox number {i % 12}, isn't it" for i in range(30))]
    for i, caption in enumerate(captions):
        kind = "jpg" if i % 3 == 0 else "png"
        seed = i % 33 if i != 39 else 1000
        image = Image.fromarray(_noise(seed, 40 + 9 * (seed % 7), 33 + 11 * (seed % 5)))
        if i == 39:
            image = Image.open(folder / "10.png").resize((66, 134))
        image.save(folder / f"{i:02}.{kind}")
        (folder / f"{i:02}.txt").write_text(caption)
    return folder


@pytest.fixture(scope="module", params=["out", "out.npz"])
def records(request, folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("records") / request.param

    def score(picture, caption):
        return {"red": picture[..., 0].mean() if "fox" in caption else np.nan}

    prepare.prepare(
        f"folder:{folder}", str(output), scores=score, shard_examples=7, **OPTIONS
    )
    return output


def card_of(records):
    return json.loads(write_card(str(records)).with_suffix(".json").read_text())


def _stored(records):
    """Images, captions and scores, as other programs read them."""
    if records.suffix == ".npz":
        values = np.load(records)
        ends = values["caption_offset"]
        texts = [values["caption"][a:b].tobytes() for a, b in itertools.pairwise(ends)]
        files = []
        for pixels in values["image"]:
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            files.append(file.getvalue())
        return files, [text.decode() for text in texts], values["scores"][:, 0]
    import tensorflow as tf

    files, texts, scores = [], [], []
    for name in sorted(records.glob("*.tfrecord")):
        for data in tf.data.TFRecordDataset(str(name)).as_numpy_iterator():
            fields = tf.train.Example.FromString(data).features.feature
            files.append(fields["image"].bytes_list.value[0])
            texts.append(fields["caption"].bytes_list.value[0].decode())
            scores.append(fields["scores/red"].float_list.value[0])
    return files, texts, np.array(scores)


def _sums(counts, values, step):
    """Counts by label as they must be, from the labels themselves."""
    found = collections.Counter()
    for value in values:
        for label in counts:
            low, high = -np.inf, np.inf
            if match := re.fullmatch("under (.+)", label):
                high = float(match[1].replace(",", ""))
            elif match := re.fullmatch("(.+) or more", label):
                low = float(match[1].replace(",", ""))
            else:
                low, high = (float(x.replace(",", "")) for x in label.split(" to "))
                high += step
            found[label] += low <= value < high
    return dict(found)


def test_numbers_are_those_of_plain_loops(records):
    card = card_of(records)
    files, texts, scores = _stored(records)
    images = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    pictures, captions = card["pictures"], card["captions"]
    assert pictures["number"] == len(files) == 40 and pictures["not_decoded"] == 0
    sizes = [image.size for image in images]
    words = [re.findall(r"[\w'’]+", text.lower()) for text in texts]
    for measure, values, step in (
        (pictures["shorter_side"], [min(size) for size in sizes], 1),
        (pictures["width_by_height"], [w / h for w, h in sizes], 0),
        (captions["words"], [len(own) for own in words], 1),
    ):
        assert measure["counts"] == _sums(measure["counts"], values, step)
        assert sum(measure["counts"].values()) == 40
        for share in (0, 50, 100):
            have = measure["quantiles"][f"{share} %"]
            assert have == pytest.approx(np.percentile(values, share), rel=1e-3)
    total = collections.Counter(itertools.chain(*words))
    frequent = captions["frequent_words"]["counts"]
    assert all(total[word] == n for word, n in frequent.items())
    assert list(frequent.values()) == [n for _, n in total.most_common(20)]
    known = scores[~np.isnan(scores)]
    red = card["scores"]["red"]
    assert red["unknown"] == len(scores) - len(known) > 0
    assert sum(red["counts"].values()) == len(known)
    assert red["quantiles"]["25 %"] == pytest.approx(np.percentile(known, 25), rel=1e-3)


def test_duplicates_are_those_of_a_loop_over_all_pairs(records):
    card = card_of(records)
    files, texts, _ = _stored(records)
    same = card["duplicates"]
    assert same["equal_files"] == len(files) - len({*files}) > 0
    counted = collections.Counter(texts)
    assert same["equal_captions"] == len(texts) - len(counted) == 18
    looks = {f: dhash(Image.open(io.BytesIO(f)).convert("L")) for f in {*files}}
    near = [
        (a, b)
        for a, b in itertools.combinations(looks, 2)
        if (looks[a] ^ looks[b]).bit_count() <= NEAR
    ]
    assert same["near_pairs"] == len(near) > 0
    assert same["near_pictures"] == len({file for pair in near for file in pair})


def test_scripts_are_those_of_the_letters(records):
    card = card_of(records)
    expected = collections.Counter(TEXTS.values())
    expected["latin"] += 30
    assert card["captions"]["scripts"]["counts"] == dict(expected)
    assert {text: cards._scripts(text) for text in TEXTS} == TEXTS


class Parser(html.parser.HTMLParser):
    """Tags that were opened, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = collections.Counter(), ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1

    def handle_data(self, data):
        self.text += data


def test_the_page_says_the_same_and_quotes_captions(records):
    card, page = card_of(records), write_card(str(records))
    parser = Parser(page.read_text())
    # 24 pictures, and those of the near pairs; captions open no tag.
    pairs = card["duplicates"]["near_pairs"]
    assert parser.tags["img"] == 24 + 2 * pairs and parser.tags["b"] == 0
    for text in ("cjk + hiragana", "isn't", "red", "folder:"):
        assert text in parser.text
    assert "http" not in page.read_text()


def test_where_it_is_written(records, tmp_path):
    name = "r.npz" if records.suffix == ".npz" else "r"
    if name == "r.npz":
        shutil.copy(records, tmp_path / name)
    else:
        cards_made = shutil.ignore_patterns("card.*")
        shutil.copytree(records, tmp_path / name, ignore=cards_made)
    before = {path.name for path in tmp_path.rglob("*")}
    page = write_card(str(tmp_path / name))
    new = {path.name for path in tmp_path.rglob("*")} - before
    if name == "r":
        assert new == {"card.html", "card.json"} and page.parent.name == "r"
    else:
        assert new == {"r.card.html", "r.card.json"}
    # With a card they are still records.
    assert card_of(tmp_path / name)["pictures"]["number"] == 40


def test_the_door(records):
    done = call("prepare", f"--report={records}")
    assert done.returncode == 0, done.stderr
    assert "card.html" in done.stdout
    both = call("prepare", f"--report={records}", "--source=shapes:3")
    assert both.returncode == 2 and "or --report alone" in both.stderr


def test_a_record_that_does_not_decode_is_counted(folder, tmp_path):
    from imagen_jax.data import records as writer

    output = tmp_path / "out"
    prepare.prepare(f"folder:{folder}", str(output), **OPTIONS)
    path = output / "records-00000.tfrecord"
    import tensorflow as tf

    rows = []
    for data in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
        fields = tf.train.Example.FromString(data).features.feature
        row = {n: fields[n].bytes_list.value[0] for n in ("image", "caption", "text")}
        row |= {n: fields[n].int64_list.value[0] for n in ("id", "side")}
        rows.append(row)
    rows[0]["image"] = b"no picture"
    rows[1]["image"] = rows[1]["image"][:30]
    writer.write_shard(path, rows)
    card, page = card_of(output), write_card(str(output))
    assert "not decoded<td>2" in page.read_text()
    assert card["pictures"]["not_decoded"] == 2
    assert sum(card["pictures"]["shorter_side"]["counts"].values()) == 38


@pytest.mark.parametrize("damage", ["cut", "empty", "byte"])
def test_damaged_records(folder, tmp_path, damage):
    output = tmp_path / "out"
    prepare.prepare(f"folder:{folder}", str(output), **OPTIONS)
    path = output / "records-00000.tfrecord"
    data = path.read_bytes()
    if damage == "byte":
        path.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    else:
        path.write_bytes(data[:5000] if damage == "cut" else b"")
    with pytest.raises(UserError, match="are damaged|has only 0 of 40 records"):
        write_card(str(output))


def test_rare_words_are_forgotten_when_there_are_too_many(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(cards, "_MOST_WORDS", 6)
    monkeypatch.setattr(cards, "_CHUNK", 5)
    output = tmp_path / "out.npz"
    prepare.prepare(f"folder:{folder}", str(output), **OPTIONS)
    words = card_of(output)["captions"]["frequent_words"]["counts"]
    assert len(words) < 20 and words["fox"] >= 29


def test_no_records(tmp_path):
    with pytest.raises(UserError, match="there is no"):
        write_card(str(tmp_path / "none"))


BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="there is no Chromium")
@pytest.mark.parametrize("width", [420, 1200])
def test_it_fits_its_window(records, tmp_path, width):
    shutil.copy(write_card(str(records)), tmp_path / "page.html")
    (tmp_path / "outer.html").write_text(
        f'<iframe src="page.html" width="{width}" height="900" frameborder="0" '
        'onload="d = this.contentDocument; document.title = [d.images.length, '
        'd.images[0].naturalWidth > 9, d.documentElement.scrollWidth]"></iframe>'
    )
    command = [BROWSER, "--headless", "--no-sandbox", "--hide-scrollbars"]
    command += ["--allow-file-access-from-files", "--window-size=1400,1000"]
    shown = subprocess.run(
        [*command, "--dump-dom", str(tmp_path / "outer.html")],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    assert re.search(rf"<title>\d+,true,{width}</title>", shown), shown[:500]
