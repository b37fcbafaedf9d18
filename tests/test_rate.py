"""The rating door: folders built, answered in a browser, and scored."""

import collections
import json

import numpy as np
import pytest

from imagen_jax.evaluation import ratings
from tests import browser
from tests.evaluation import folders
from tests.test_doors import call, error


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    root = tmp_path_factory.mktemp("samples")
    folders.write(root, count=8)
    return root


def build(samples, output, *more):
    models = [f"--a={samples / 'secret_one'}", f"--b={samples / 'secret_two'}"]
    return call("rate", "build", *models, f"--output={output}", *more)


@pytest.fixture(scope="module")
def study(samples, tmp_path_factory):
    """Of three rows: 3 pairs of models, 3 pictures of each, and 5 + 5 controls."""
    folder = tmp_path_factory.mktemp("study") / "study"
    done = build(samples, folder, "--count=3")
    assert done.returncode == 0, done.stderr
    assert "3 pictures of each" in done.stdout and "study.key.json" in done.stdout
    return folder


def key_of(folder):
    return json.loads(folder.with_name(f"{folder.name}.key.json").read_text())


def answer_all(folder, path, rater, choose):
    """What a rater would download who answers `choose(trial)`."""
    key = key_of(folder)
    answers = {name: choose(trial) for name, trial in key["trials"].items()}
    given = {"study": key["study"], "rater": rater, "answers": answers}
    path.write_text(json.dumps(given))
    return path


def prefers(model):
    """Answers of someone who looks, and finds one model better in all."""

    def choose(trial):
        names = {one: name for name, one in trial["pictures"].items()}
        if trial["right"]:
            return trial["right"]
        if trial["question"] == "quality":
            return names[model]
        return "yes" if model in names else "somewhat"

    return choose


def test_from_folders_to_figures(study, tmp_path):
    careful = answer_all(study, tmp_path / "1.json", "careful", prefers("a"))
    first = answer_all(study, tmp_path / "2.json", "no", lambda t: min(t["pictures"]))
    data = json.loads(first.read_text())
    for name, trial in key_of(study)["trials"].items():
        if trial["question"] == "alignment":
            data["answers"][name] = "no"
    first.write_text(json.dumps(data))
    files = [careful, first, f"--json={tmp_path / 'out.json'}"]
    done = call("rate", "score", f"--key={study}.key.json", *files)
    assert done.returncode == 0, done.stderr
    assert "2 raters, 1 left out" in done.stdout and ": no\n" in done.stdout
    report = json.loads((tmp_path / "out.json").read_text())
    means = {
        (row["question"], row["model"]): row["mean"]
        for row in report["rows"]
        if not row["category"]
    }
    assert means == {
        ("quality", "a"): 100,
        ("alignment", "a"): 100,
        ("alignment", "b"): 50,
    }
    assert report["folders"]["a"].endswith("secret_one")
    assert {row["category"] for row in report["rows"]} == {"", *folders.CATEGORIES}


def test_count_is_how_many_are_drawn(samples, tmp_path):
    captions = []
    for seed in (1, 1, 2):
        folder = tmp_path / str(len(captions))
        done = build(samples, folder, "--count=3", f"--seed={seed}")
        assert done.returncode == 0, done.stderr
        own = {
            t["caption"] for t in key_of(folder)["trials"].values() if not t["right"]
        }
        captions.append(own)
    assert captions[0] == captions[1] != captions[2]
    assert len(captions[0]) == len(captions[2]) == 3
    reference = f"--reference={samples / 'photos'}"
    done = build(samples, tmp_path / "all", "--count=200", reference)
    assert done.returncode == 0 and "8 pictures of each" in done.stdout


SAME = ["--samples={tmp}", "--samples={tmp}/key.json"]


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 2, "there is no ''; build, score, page"),
        (["scor"], 2, "there is no 'scor' (did you mean 'score'?)"),
        (["build", "x"], 2, "'x' is no flag"),
        (["score", "--a=x"], 2, "--a is not for `rate score`"),
        (["build", "--count=0"], 2, "--count=0"),
        (["build", "--output={tmp}/new"], 1, "give --a, and what it is compared with"),
        (["build", "--a=x", "--b=x"], 1, "--output=: name a new folder"),
        (["build", "--output={tmp}"], 1, "name a new folder, in one that exists"),
        (["build", "--a={tmp}", "--b=x", "--output={tmp}/new"], 1, "does not exist"),
        (["score", "x.json"], 1, "give --key=DIR.key.json"),
        (["score", "--key=x", "x.json"], 1, "does not exist"),
        (["score", "--key={tmp}/key.json"], 1, "and files of answers"),
        (["score", "--key={tmp}/key.json", "{tmp}/key.json"], 1, "no answers to this"),
        (["page", "--output={tmp}/new", "--samples={tmp}"], 1, "two or more --samples"),
        (
            ["page", "--output={tmp}/new", *SAME, "--scores=x"],
            1,
            "--scores once for ea",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(tmp_path, words, status, message):
    (tmp_path / "key.json").write_text('{"study": "s", "trials": {}}')
    done = call("rate", *(word.format(tmp=tmp_path) for word in words))
    assert done.returncode == status and message in error(done)
    assert error(done).count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["key.json"]


def test_a_key_is_not_written_over(samples, study, tmp_path):
    """Answers to it may still be on their way."""
    (tmp_path / "s.key.json").write_text("mine")
    done = build(samples, tmp_path / "s")
    assert done.returncode == 1 and "is the key of another folder" in error(done)
    assert (tmp_path / "s.key.json").read_text() == "mine"


def test_side_by_side(samples, tmp_path):
    scores = tmp_path / "one.json"
    found = {"categories": {"One": {"CLIP score": 0.2612}}}
    scores.write_text(json.dumps({"results": [found]}))
    (tmp_path / "none.json").write_text('{"results": [{"categories": {}}]}')
    given = [f"--samples={samples / name}" for name in ("secret_one", "secret_two")]
    given += [f"--scores={tmp_path / name}" for name in ("one.json", "none.json")]
    done = call("rate", "page", *given, f"--output={tmp_path / 'page'}")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "page" / "index.html").read_text()
    assert folders.SCRIPT not in text and "&lt;script&gt;alert(1)" in text
    assert text.index("<h2>One</h2>") < text.index("<h2>Two &amp; &lt;b&gt;</h2>")
    assert "<h2>One</h2>\n<p>secret_one: CLIP score 0.2612</p>\n<div" in text
    assert text.count("<p>secret") == 1
    for model in ("secret_one", "secret_two"):
        for i in range(8):
            name = f"{model}/{i:04d}.png"
            assert text.count(f'src="{name}"') == 1
            whole = (samples / name).read_bytes()
            assert (tmp_path / "page" / name).read_bytes() == whole
    assert "http" not in text
    for other in ({"FID": 7.27}, {"results": [{"FID": 7}]}, {"results": [found] * 2}):
        scores.write_text(json.dumps(other))
        done = call("rate", "page", *given, f"--output={tmp_path / 'other'}")
        assert done.returncode == 1 and "one.json has no figures by cate" in error(done)
        assert not (tmp_path / "other").exists()


SHOWN = "document.querySelector('section:not([hidden])')"
READY = f"!{SHOWN}.inert"
# The question, and the pictures that are seen, by their names.
TRIAL = (
    f"[{SHOWN}.id, [...{SHOWN}.querySelectorAll('img')].map(one => "
    "one.src.split('/').pop()), document.querySelector('#caption').textContent]"
)


def rate(page, key, choose, most=1000):
    """Answers with clicks until there are no more questions; the trials in order."""
    asked = {
        (frozenset(t["pictures"]), t["question"]): (n, t)
        for n, t in key["trials"].items()
    }
    seen = []
    page.click("#go")
    while len(seen) < most:
        page.until(READY)
        kind, pictures, caption = page.value(TRIAL)
        if kind == "text":
            if page.value("document.querySelector('#go').hidden"):
                break
            page.click("#go")
            continue
        name, trial = asked[frozenset(pictures), kind]
        if kind == "alignment":
            assert caption == trial["caption"]
        seen.append((name, *pictures))
        answer = choose(trial)
        buttons = dict(zip(pictures, ("left", "right")))
        page.click(f"#{buttons.get(answer, answer)}")
    return seen


@browser.needs_browser
@pytest.mark.slow
def test_raters_in_a_browser(study, tmp_path):
    """From a disk, without a server: one stops, and goes on; both are scored."""
    key, files = key_of(study), []
    address = (study / "index.html").as_uri()
    with browser.opened(tmp_path / "profile") as page:
        page.open(address)
        assert "You see 19 images" in page.value("document.body.innerText")
        first = rate(page, key, prefers("a"), most=4)
        # Another answer to the last one, then the page is closed and opened again.
        page.until(READY)
        page.click("#back")
        page.until(READY)
        assert page.value("document.querySelectorAll('.chosen').length") == 1
        # A new process of a busy Chromium may find nothing at first.
        for _ in range(5):
            page.open(address)
            title = page.value("document.querySelector('#title').innerText")
        assert title == "Welcome back."
        assert page.value("document.querySelector('#count').innerText") == "4 of 19"
        rest = rate(page, key, prefers("a"))
        names = [name for name, *_ in first + rest]
        assert sorted(names) == sorted(key["trials"])
        # The batch of one question is done before that of the other.
        kinds = [key["trials"][name]["question"] for name in names]
        assert sum(one != two for one, two in zip(kinds, kinds[1:])) == 1
        files.append(page.download("#save"))
        page.open(f"{address}?rater=careless")
        assert page.value("document.querySelector('#count').innerText") == "0 of 19"
        always = {"quality": lambda t: min(t["pictures"]), "alignment": lambda t: "no"}
        other = rate(page, key, lambda t: always[t["question"]](t))
        files.append(page.download("#save"))
        # Order and side belong to the rater.
        assert [name for name, *_ in other] != names
        sides = {name: pair for name, *pair in first + rest}
        differ = [sides[name] != pair for name, *pair in other if len(pair) == 2]
        assert 0 < sum(differ) < len(differ)
    assert files[1].name == "answers-careless.json"
    done = call("rate", "score", f"--key={study}.key.json", *files)
    assert done.returncode == 0, done.stderr
    given = [json.loads(path.read_text()) for path in files]
    report = ratings.score(
        key, ratings.read_answers(key, dict(zip(map(str, files), given)))
    )
    assert [one["kept"] for one in report["raters"].values()] == [True, False]
    means = [row["mean"] for row in report["rows"] if not row["category"]]
    assert means == [100, 50, 100]  # alignment of a and b, quality


@browser.needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [420, 1200])
def test_it_fits_its_window(study, tmp_path, width):
    """Answers by keys; a caption stays text; no picture is lost below the window."""
    key = key_of(study)
    key_names = {"yes": "1", "somewhat": "2", "no": "3"}
    heights = collections.Counter()
    with browser.opened(tmp_path, width, 800) as page:
        page.open((study / "index.html").as_uri())
        page.click("#go")
        for _ in key["trials"]:
            page.until(READY)
            kind, _, caption = page.value(TRIAL)
            if kind == "text":
                page.click("#go")
                page.until(READY)
                kind, _, caption = page.value(TRIAL)
            fits = "[innerWidth, document.documentElement.scrollWidth]"
            assert page.value(fits) == [width, width]
            heights[kind] = page.value("document.documentElement.scrollHeight")
            page.press("ArrowLeft" if kind == "quality" else key_names["somewhat"])
        page.until("document.querySelector('#title').textContent === 'Thank you.'")
        counted = page.value("Object.values(kept.answers).filter(a => a == 'somewhat')")
        assert len(counted) == 11
        # Sides are as a coin falls.
        coins = "[...Array(4000).keys()].map(i => (state = i, shuffled([0, 1])[0]))"
        assert abs(np.mean(page.value(coins)) - 0.5) < 4 * 0.5 / 4000**0.5
    assert max(heights.values()) <= 800
