"""Other words for drawn scenes: what they mean, and that some are never trained on."""

import itertools
import re

import numpy as np
import pytest

from benchmarks.claims import colours
from imagen_jax.shapes import scenes, wordings
from imagen_jax.shapes.judge import judge

WORDS = wordings.words()
MEANINGS = ("colours", "shapes", "sizes", "counts", "relations")
FORMS = ("one", "several", "related")
# Every training caption of one seed; others say the same with other words.
TRAINED = list(wordings.generate(3000, seed=0))
# Without which no sentence can do.
FUNCTION_WORDS = {"a", "of"}


def tokens(text):
    return set(re.findall(r"[\w']+", text.lower()))


def said(kind, count=400):
    for i, scene in enumerate(scenes.generate(count, seed=5)):
        yield scene, wordings.say(scene, kind, np.random.default_rng(i))


def phrases(text, section):
    """`(meaning, word)` of all words of a section that stand in a caption."""
    for meaning, choice in WORDS[section].items():
        for word in itertools.chain(*choice):
            forms = {word, wordings.plural_of(word)} if section == "shapes" else {word}
            forms = {form for form in forms if form in text}
            if any(re.search(rf"\b{re.escape(form)}\b", text) for form in forms):
                yield meaning, word


def test_every_meaning_has_words_of_both_kinds():
    names = {
        "colours": tuple(scenes.COLOURS),
        "shapes": scenes.SHAPES,
        "sizes": ("small", "large"),
        "counts": ("two", "three"),
        "relations": scenes.RELATIONS,
    }
    assert set(WORDS) == {*names, *FORMS}
    for section, meanings in names.items():
        assert tuple(WORDS[section]) == meanings
        for meaning, choice in WORDS[section].items():
            assert choice.trained[0] == meaning and choice.never
    every = [word for s in MEANINGS for c in WORDS[s].values() for w in c for word in w]
    assert len(every) == len(set(every)) > 350, "a word has two meanings"
    for word in ("crimson", "disc", "azure", "box"):
        assert any(word in c.never for s in MEANINGS for c in WORDS[s].values())


def test_the_plain_names_can_be_judged():
    """Colours, shapes, sizes and relations are those that scenes.py can parse."""
    for colour, shape in itertools.product(WORDS["colours"], WORDS["shapes"]):
        assert scenes.parse(f"a small {colour} {shape}")


@pytest.mark.parametrize("meaning", [c for c in scenes.COLOURS if c != "black"])
def test_a_colour_word_has_the_hue_that_is_drawn(meaning):
    """Of all words that are in the survey of xkcd, by the hue of CIELAB."""

    def hue(rgb):
        _, a, b = colours.lab(rgb)
        return np.arctan2(b, a)

    asked = 0
    for word in itertools.chain(*WORDS["colours"][meaning]):
        if word in colours.named():
            own = hue(colours.named()[word])
            turns = {
                name: abs(np.angle(np.exp(1j * (own - hue(rgb)))))
                for name, rgb in scenes.COLOURS.items()
                if name != "black"
            }
            assert min(turns, key=turns.get) == meaning, word
            asked += 1
    assert asked >= 5


def test_black_words_are_dark_and_without_hue():
    for word in itertools.chain(*WORDS["colours"]["black"]):
        if word in colours.named():
            lightness, *ab = colours.lab(colours.named()[word])
            assert lightness < 25 and np.hypot(*ab) < 12, word


def test_new_words_are_in_no_training_caption():
    """Neither whole nor in part: no token of one is a token of what is trained on."""
    learnt = set().union(*(tokens(text) for _, text in TRAINED))
    for section in (*MEANINGS, *FORMS):
        for choice in WORDS[section].values():
            learnt = learnt.union(*map(tokens, choice.trained))
    for section in MEANINGS:
        for choice in WORDS[section].values():
            for word in choice.never:
                new = tokens(word) | tokens(wordings.plural_of(word))
                assert not (new - FUNCTION_WORDS) & learnt, word
    assert {"crimson", "disc", "azure", "box", "tiny"}.isdisjoint(learnt)


def test_captions_of_new_words_say_no_trained_colour_or_shape():
    for scene, text in said("words"):
        for section in ("colours", "shapes"):
            found = list(phrases(text, section))
            assert found, text
            for meaning, word in found:
                assert word in WORDS[section][meaning].never, (word, text)
            drawn = {getattr(item, section[:-1]) for item in scene.items}
            assert {meaning for meaning, _ in found} == drawn, text


def test_new_wordings_are_of_trained_words_and_never_trained_on():
    learnt = set().union(*(tokens(text) for _, text in TRAINED))
    for choice in WORDS["shapes"].values():
        learnt = learnt.union(*(tokens(wordings.plural_of(w)) for w in choice.trained))
    trained = {text for _, text in TRAINED}
    new = list(said("wordings"))
    for _, text in new:
        assert text not in trained
        for section in ("colours", "shapes"):
            for meaning, word in phrases(text, section):
                assert word in WORDS[section][meaning].trained
    # Their sentences bring words of no meaning: "you can see", "on white paper".
    said_new = set().union(*(tokens(text) for _, text in new)) - learnt
    frames = set().union(*(tokens(f) for s in FORMS for f in WORDS[s][""].never))
    assert said_new <= frames


def test_pairs_that_are_kept_are_a_fifth_and_never_trained_on():
    pairs = [
        (colour, shape)
        for c in WORDS["colours"].values()
        for s in WORDS["shapes"].values()
        for colour, shape in itertools.product(c.trained, s.trained)
    ]
    kept = {pair for pair in pairs if wordings.is_kept(*pair)}
    # 4 standard deviations of a share of 17,000 are below 0.013.
    assert len(pairs) > 15_000
    assert len(kept) / len(pairs) == pytest.approx(0.2, abs=0.013)
    said = {text for _, text in TRAINED}
    plain = {pair for pair in pairs if " ".join(("a", *pair)) in said}
    assert len(plain) > 20 and not plain & kept


def test_training_has_thousands_of_wordings_that_depend_on_seed_and_index():
    texts = [text for _, text in TRAINED]
    assert len(set(texts)) > 2900
    assert list(wordings.generate(20, seed=0)) == TRAINED[:20]
    assert [s for s, _ in TRAINED[:50]] == list(scenes.generate(50, seed=0))
    assert [t for _, t in wordings.generate(20, seed=1)] != texts[:20]
    # 32 tokens hold all of them; the tiny encoder takes words, and one for the end.
    assert max(len(re.findall(r"\w+|[^\w\s]", text)) for text in texts) <= 31


@pytest.mark.parametrize("kind", wordings.KINDS)
def test_captions_are_english(kind):
    for _, text in said(kind, 300):
        assert "  " not in text and text == text.strip() and "{" not in text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text
        assert "the a " not in text


def test_plain_captions_judge_the_scenes():
    for scene, _ in TRAINED[:50]:
        verdict = judge(scenes.draw(scene, 32), scenes.caption(scene))
        assert verdict.colour and verdict.shape


@pytest.mark.parametrize(
    ("one", "several"),
    [("box", "boxes"), ("cross", "crosses"), ("penny", "pennies"), ("disc", "discs")]
    + [("toy block", "toy blocks"), ("ring with a hole", "rings with a hole")]
    + [("square on its tip", "squares on its tip"), ("key ring", "key rings")],
)
def test_plural(one, several):
    assert wordings.plural_of(one) == several
