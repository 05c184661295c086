"""Stop texts are seen once they are complete, also by a check that another process loads."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from glmbatch.errors import InputError
from glmbatch.glm.stop_texts import stop_at
from glmbatch.glm.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from tests.support import CAUSAL


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(CAUSAL)


@pytest.mark.parametrize("stop", ["END", "停", "\n\n问：", "🎉"])
def test_a_stop_text_is_seen_once_it_is_complete(tokenizer: Tokenizer, stop: str) -> None:
    check = stop_at(["never", stop], tokenizer)
    assert check is not None
    loaded = pickle.loads(pickle.dumps(check))
    (ids,) = tokenizer.encode_plain([f"一些文字 and words {stop} and more"])
    seen = next(count for count in range(len(ids) + 1) if check(ids[:count]))
    assert stop in tokenizer.decode(ids[:seen])
    assert stop not in tokenizer.decode(ids[: seen - 1])
    assert (loaded(ids[: seen - 1]), loaded(ids[:seen])) == (False, True)


def test_without_stop_texts_there_is_no_check(tokenizer: Tokenizer) -> None:
    assert stop_at([], tokenizer) is None


def test_a_pickled_tokenizer_is_read_from_its_file_once(tokenizer: Tokenizer) -> None:
    pickled = pickle.dumps(tokenizer)
    assert len(pickled) < 1000, "the path, not the vocabulary"
    first, second = pickle.loads(pickled), pickle.loads(pickled)
    assert first is second
    assert first.encode(["很好"]) == tokenizer.encode(["很好"])


def test_a_pickled_tokenizer_refuses_a_changed_file(tmp_path: Path) -> None:
    file = tmp_path / TOKENIZER_FILE
    file.write_bytes((Path(CAUSAL) / TOKENIZER_FILE).read_bytes())
    pickled = pickle.dumps(load_tokenizer(tmp_path))
    file.write_bytes(file.read_bytes() + b"\xc0\x0c\x00")  # a field that is not read
    with pytest.raises(InputError, match="was changed after this run read it"):
        pickle.loads(pickled)
