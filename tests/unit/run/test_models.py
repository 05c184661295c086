"""A checkpoint in an object store is fetched to a local directory, completely and once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from glmbatch.errors import InputError, TransientError
from glmbatch.run.models import locate_model, prepare_model
from glmbatch.settings.job import ModelConfig, RuntimeConfig
from tests.stores import Store
from tests.support import CAUSAL
from tests.unit.glm.adapters import make_original_adapter
from tests.unit.glm.checkpoints import read_json

SHARDS = sorted(path.name for path in CAUSAL.glob("*.bin"))


@pytest.fixture
def runtime(tmp_path: Path) -> RuntimeConfig:
    return RuntimeConfig(device="cpu", cache=str(tmp_path / "cache"))


@pytest.fixture
def model(store: Store) -> ModelConfig:
    for path in CAUSAL.iterdir():
        store.path(f"base/{path.name}").upload(path)
    store.path("base/modeling_chatglm.py").write_bytes(b"raise SystemExit")
    store.requests.clear()
    return ModelConfig(path=store.url("base"))


def fetched(store: Store) -> list[str]:
    names = [
        request.key.removeprefix("base/")
        for request in store.requests
        if request.method == "GET" and request.key
    ]
    store.requests.clear()
    return sorted(names)


def test_a_model_is_fetched_once_without_its_code(
    store: Store, model: ModelConfig, runtime: RuntimeConfig
) -> None:
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(locate_model, [model, model], [runtime, runtime])
    assert one == other
    assert (
        prepare_model(one).identity
        == prepare_model(locate_model(ModelConfig(path=str(CAUSAL)), runtime)).identity
    )
    names = fetched(store)
    assert set(SHARDS) <= set(names)
    assert len(names) == len(set(names))
    assert not list(Path(one.path).glob("*.py"))
    assert locate_model(model, runtime) == one
    assert fetched(store) == []


def test_an_interrupted_fetch_resumes(
    store: Store, model: ModelConfig, runtime: RuntimeConfig
) -> None:
    store.harm = lambda request: (
        "cut" if request.key == f"base/{SHARDS[1]}" and request.method == "GET" else None
    )
    with pytest.raises(TransientError, match=f"{SHARDS[1]}: the store cannot be reached now"):
        locate_model(model, runtime)
    store.calm()
    located = locate_model(model, runtime)
    names = fetched(store)
    assert SHARDS[1] in names
    assert SHARDS[0] not in names
    assert (Path(located.path) / SHARDS[1]).read_bytes() == (CAUSAL / SHARDS[1]).read_bytes()
    assert not list(Path(located.path).glob(".*"))


def test_a_changed_checkpoint_gets_another_directory(
    store: Store, model: ModelConfig, runtime: RuntimeConfig
) -> None:
    first = locate_model(model, runtime)
    store.path("base/config.json").write_bytes((CAUSAL / "config.json").read_bytes() + b"\n")
    assert locate_model(model, runtime).path != first.path


def test_an_adapter_is_fetched_too(
    store: Store, model: ModelConfig, runtime: RuntimeConfig, tmp_path: Path
) -> None:
    make_original_adapter(tmp_path / "adapter", read_json(CAUSAL / "config.json"))
    for path in (tmp_path / "adapter").iterdir():
        store.path(f"lora/{path.name}").upload(path)
    adapted = locate_model(model.model_copy(update={"adapter": store.url("lora")}), runtime)
    here = ModelConfig(path=str(CAUSAL), adapter=str(tmp_path / "adapter"))
    assert prepare_model(adapted).identity == prepare_model(locate_model(here, runtime)).identity


def test_a_failed_fetch_names_the_setting(
    store: Store, model: ModelConfig, runtime: RuntimeConfig
) -> None:
    refused = {
        "no such folder in the store.*Set model\\.path": ModelConfig(path=store.url("nothing")),
        "no such folder in the store.*Set model\\.adapter": model.model_copy(
            update={"adapter": store.url("nothing")}
        ),
        "has no revision 'main'": model.model_copy(update={"revision": "main"}),
    }
    for message, settings in refused.items():
        with pytest.raises(InputError, match=message):
            locate_model(settings, runtime)
    store.harm = lambda request: 403
    with pytest.raises(InputError, match=r"refuses it.*Or set model\.path\."):
        locate_model(model, runtime)
