import json

from imagen_jax import prepare
from imagen_jax.preparing import estimate, webdataset
from imagen_jax.preparing import sources as originals
from imagen_jax.preparing.captions import Embedder
from imagen_jax.preparing.images import Rules
from imagen_jax.preparing.job import Job
from imagen_jax.text import encoders as text


def _job(folder, source):
    opened = originals.open_originals(source, 16, 0, 1000)
    embedder = Embedder(text.load_encoder("tiny"), 8, "int8")
    return Job(folder, source, opened, Rules(), embedder, 0.5)


def test_near_what_is_written(tmp_path):
    expected = estimate.estimate(_job(tmp_path, "shapes:300"))
    manifest = prepare.prepare(
        "shapes:300",
        str(tmp_path / "out"),
        text_length=8,
        embedding_dtype="int8",
        image_size=16,
        progress=False,
    )
    assert expected.examples == manifest.examples == 300
    # A mean of 64, whose deviation is below a half of it.
    for mean, total in (
        (expected.image_bytes, manifest.image_bytes),
        (expected.text_bytes, manifest.text_bytes),
    ):
        assert abs(300 * mean / total - 1) < 4 * 0.5 / 64**0.5


def test_of_tars_the_number_is_estimated(tmp_path):
    png = originals.open_originals("shapes:1", 8, 0, 1).read(0).__next__().read()
    rows = [(f"{i}", "png", png if i % 2 else b"", {"caption": "x"}) for i in range(8)]
    webdataset.write_tar(tmp_path / "0.tar", rows)
    job = _job(tmp_path / "none" / "yet", f"webdataset:{tmp_path}/*.tar")
    expected = estimate.estimate(job)
    # Half of the eight pictures in the only tar are broken.
    assert (expected.examples, expected.exact) == (4, False)
    assert expected.image_bytes == len(png)
    # "x" and the end, each 64 int8 and a scale.
    assert expected.text_bytes == 2 * 68
    assert "for about 4 examples" in str(expected)
    (tmp_path / "0_stats.json").write_text(json.dumps({"successes": 8}))
    job = _job(tmp_path, f"webdataset:{tmp_path}/*.tar")
    expected = estimate.estimate(job)
    assert (expected.examples, expected.exact) == (4, True)


def test_says_that_it_does_not_fit():
    tight = estimate.Estimate(64, 1000, True, 1e6, 1e3, 10**9)
    assert "1 GB for 1,000 examples (1 MB a picture, 1 kB a caption)" in str(tight)
    assert str(tight).endswith("THIS DOES NOT FIT")
    unknown = estimate.Estimate(64, None, False, 1e6, 1e3, 10**9)
    assert str(unknown).endswith("has room for 999 examples")
    assert "NOT FIT" not in str(estimate.Estimate(64, 999, True, 1e6, 0, 10**9))


def test_sizes():
    sizes = {0: "0 B", 999: "999 B", 999.9: "1 kB", 12_345: "12.3 kB", 3e12: "3.0 TB"}
    for count, want in sizes.items():
        assert estimate.size(count) == want
