"""The order that puts off rows like others, and the mix with those drawn by lot."""

from __future__ import annotations

from glmbatch.view.spread import LOT, spread, with_lot

CODES = ["your code is 1234", "your code is 4321", "your code is 9999"]


def test_copies_come_after_all_others() -> None:
    texts = [*CODES, "where is my parcel?", "包裹在哪里？", ""]
    order = list(spread(texts, [1.0, 0.99, 0.98, 0.5, 0.4, 0.3]))
    assert order == [0, 3, 4, 5, 1, 2]


def test_numbers_of_any_length_are_alike() -> None:
    texts = ["7 of 9 parcels came", "12 of 3,481 parcels came", "the lid is torn"]
    assert list(spread(texts, [0.9, 0.8, 0.1])) == [0, 2, 1]


def test_texts_that_share_half_their_words_do_not_step_back() -> None:
    texts = [
        "the delivery was late and the parcel was torn",
        "the delivery was late but I like the colour",
        "包裹破了",
    ]
    assert list(spread(texts, [0.9, 0.8, 0.7])) == [0, 1, 2]


def test_texts_like_known_ones_come_last() -> None:
    texts = [*CODES, "where is my parcel?"]
    assert next(spread(texts, [1.0, 0.9, 0.8, 0.5], ["your code is 7777"])) == 3


def test_unlike_texts_stay_in_the_order_of_worth() -> None:
    texts = ["quick", "brown fox", "jumps over", "a lazy dog", "x", "\ud800"]
    assert list(spread(texts, [0.9, 0.7, 0.5, 0.3, 0.2, 0.1])) == list(range(6))
    assert list(spread(texts, [0.0] * 6)) == list(range(6))
    assert list(spread([], [])) == []


def test_every_tenth_is_drawn_and_none_shown_twice() -> None:
    mixed = list(with_lot(range(50), [3, 49, 77]))
    assert mixed[LOT - 1] == 49  # 3 was shown before
    assert mixed[2 * LOT - 1] == 77
    assert sorted(mixed) == [*range(50), 77]
