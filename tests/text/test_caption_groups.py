import numpy as np

from imagen_jax.text import caption_groups


def test_captions_come_back_in_their_order_without_padding():
    shapes = []

    def run(ids, mask):
        shapes.append(ids.shape)
        assert not ids[~mask].any()
        # No token's embedding tells more than the token and how many there are.
        return np.stack([ids, np.broadcast_to(mask.sum(1)[:, None], ids.shape)], -1)

    tokens = [[5, 1], [7] * 16 + [1], [0, 1], [5, 1], [9] * 200 + [1]]
    rows = caption_groups.encode_groups(tokens, run, rows=2)
    for caption, row in zip(tokens, rows, strict=True):
        assert row.dtype == "bfloat16"
        np.testing.assert_array_equal(row[:, 0].astype(int), caption)
        assert (row[:, 1] == len(caption)).all()
    # [5, 1] once only; a group for each padded length.
    assert shapes == [(2, 16), (2, 32), (2, 256)]


def test_what_is_cut_keeps_its_end():
    assert caption_groups.cut([4, 5, 6, 1], 4) == [4, 5, 6, 1]
    assert caption_groups.cut([4, 5, 6, 1], 3) == [4, 5, 1]
    assert caption_groups.cut([4, 1], 1) == [1]
