"""A loaded checkpoint answers like ChatGLM2: compared with recorded logits and a reference."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.doctor import examine
from glmbatch.glm.checkpoint.load import (
    digest_tokenizer,
    digest_weights,
    load_model,
    load_weights,
    read_checkpoint,
)
from glmbatch.glm.checkpoint.shards import count_non_finite
from glmbatch.glm.engine.protocol import GenerateRequest
from glmbatch.glm.files import digest_file
from glmbatch.glm.model.layer import inverse_frequencies
from glmbatch.glm.weights import bare_model
from glmbatch.run.models import prepare_model
from glmbatch.run.work import Model
from glmbatch.settings.model import ModelConfig
from tests.unit.glm.checkpoints import (
    GOLDENS,
    VARIANTS,
    change_tensor,
    edit_config,
    make_checkpoint,
    make_variant,
    read_json,
    read_state,
    write_weights,
)
from tests.unit.glm.reference import reference_logits
from tests.unit.glm.tiny_glm import TOKENS, engine_over, whole_logits

CAUSAL = ("base-sharded", "int4")
IDS = [1001, 1003, 623, 94, 85, 627, 645, 7, 9, 333, 13, 13, 809]
BASE = GOLDENS / "base-sharded"
TOLERANCE = 1e-4  # absolute, in float32; a relative tolerance would hide a wrong epsilon


def prepare(directory: Path) -> Model:
    return prepare_model(ModelConfig(path=str(directory), dtype="float32"))


def golden(name: str) -> tuple[Any, dict[str, torch.Tensor], dict[str, Any]]:
    directory = GOLDENS / name
    arrays = {
        key: torch.from_numpy(value) for key, value in np.load(directory / "golden.npz").items()
    }
    arrays = {
        key: value.long() if value.dtype == torch.int32 else value for key, value in arrays.items()
    }
    return (
        load_model(directory),
        arrays,
        json.loads((directory / "golden.json").read_text(encoding="utf-8")),
    )


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE
) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def stored_state(directory: Path) -> dict[str, torch.Tensor]:
    state = read_state(directory)
    for file in directory.glob("*.safetensors"):
        state |= load_file(file)
    return state


@pytest.mark.parametrize("name", VARIANTS)
def test_the_engine_gets_what_the_model_of_transformers_has(name: str, tmp_path: Path) -> None:
    directory = make_variant(tmp_path, name)
    model, weights = load_model(directory), load_weights(directory)
    expected, loaded = model.state_dict(), weights.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    frequencies = inverse_frequencies(weights.config)
    assert torch.equal(frequencies, model.model.rotary_emb.inv_freq)
    stated = vars(weights.config).items()
    assert {key: getattr(model.config, key) for key, _ in stated if "rope" not in key} == {
        key: value for key, value in stated if "rope" not in key
    }


def test_layers_keep_their_order_whatever_that_of_the_files() -> None:
    model = load_model(BASE)
    backwards = dict(reversed(model.state_dict().items()))
    answers = []
    for weights in (model, bare_model(backwards, vars(load_weights(BASE).config))):
        with engine_over(weights) as engine:
            answers.append([result.ids for result in engine.generate([GenerateRequest(0, IDS, 8)])])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_logits_of_a_padded_batch_equal_the_recorded_ones(name: str) -> None:
    model, arrays, _ = golden(name)
    logits = model(
        input_ids=arrays["batch_input_ids"],
        attention_mask=arrays["batch_attention_mask"],
        position_ids=arrays["batch_position_ids"],
    ).logits
    assert_close(logits[:, -1], arrays["batch_last_logits"])


@pytest.mark.parametrize("name", CAUSAL)
def test_logits_of_every_position_equal_the_recorded_ones(name: str) -> None:
    model, arrays, recorded = golden(name)
    for row in (0, 8):
        assert_close(
            whole_logits(model, recorded["rows"][row]["input_ids"]), arrays[f"full_logits_{row}"]
        )
    long = whole_logits(model, arrays["long_input_ids"].tolist())
    assert_close(long[arrays["long_positions"]], arrays["long_logits"])


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_ids_equal_the_recorded_ones(name: str) -> None:
    model, _, recorded = golden(name)
    for row in recorded["rows"]:
        ids = list(row["input_ids"])
        while len(ids) < len(row["input_ids"]) + len(row["greedy_ids"]):
            ids.append(int(whole_logits(model, ids)[-1].argmax()))
        assert ids[len(row["input_ids"]) :] == row["greedy_ids"]


@torch.no_grad()
def test_a_trained_head_gives_the_recorded_scores() -> None:
    model, arrays, recorded = golden("classifier")
    batch = model(
        input_ids=arrays["batch_input_ids"],
        attention_mask=arrays["batch_attention_mask"],
        position_ids=arrays["batch_position_ids"],
    ).logits
    assert_close(batch, arrays["batch_class_logits"])
    alone = torch.stack([whole_logits(model, row["input_ids"]) for row in recorded["rows"]])
    assert_close(alone, arrays["alone_class_logits"])
    labels = read_checkpoint(GOLDENS / "classifier").labels
    assert [labels[int(scores.argmax())] for scores in alone] == [
        row["label"] for row in recorded["rows"]
    ]


@pytest.mark.parametrize("name", CAUSAL)
def test_the_reference_itself_equals_the_recorded_logits(name: str) -> None:
    _, arrays, recorded = golden(name)
    state, config = read_state(GOLDENS / name), read_json(GOLDENS / name / "config.json")
    assert_close(
        reference_logits(state, config, recorded["rows"][0]["input_ids"]), arrays["full_logits_0"]
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_gives_the_logits_of_the_reference(tmp_path: Path, name: str) -> None:
    directory = make_variant(tmp_path, name)
    expected = reference_logits(stored_state(directory), read_json(directory / "config.json"), IDS)
    assert_close(whole_logits(load_model(directory), IDS), expected)


@pytest.mark.parametrize("name", ["plain", "multi-head"])
@torch.no_grad()
def test_generate_from_a_padded_batch_equals_the_reference(tmp_path: Path, name: str) -> None:
    directory = make_variant(tmp_path, name)
    state, config = read_state(directory), read_json(directory / "config.json")
    batch = torch.tensor([IDS, [0] * 5 + IDS[:8]])
    written = load_model(directory).generate(
        input_ids=batch, attention_mask=(batch != 0).long(), max_new_tokens=6, do_sample=False
    )
    for row, prompt in zip(written[:, len(IDS) :].tolist(), (IDS, IDS[:8]), strict=True):
        ids = list(prompt)
        for token in row:
            ids.append(int(reference_logits(state, config, ids)[-1].argmax()))
            assert token == ids[-1]
            if token == config["eos_token_id"]:
                break


@torch.no_grad()
def test_the_models_own_forward_ignores_the_prefix(tmp_path: Path) -> None:
    directory = make_variant(tmp_path / "prefix", "prefix")
    model = load_model(directory)
    config = read_json(directory / "config.json")
    assert model.prefix_kv.shape == (
        config["num_layers"],
        2,
        2,
        config["pre_seq_len"],
        config["kv_channels"],
    )
    bare = {
        key: value for key, value in read_state(directory).items() if "prefix_encoder" not in key
    }
    del config["pre_seq_len"]
    inner = model.lm_head(model.model(input_ids=torch.tensor([IDS])).last_hidden_state)[0]
    assert_close(inner, reference_logits(bare, config, IDS))
    assert load_model(make_variant(tmp_path / "plain", "plain")).prefix_kv is None


def test_a_prefix_saved_alone_loads_beside_the_base_files(tmp_path: Path) -> None:
    """The official P-Tuning script saves its prefix as a separate pytorch_model.bin."""
    state = read_state(make_variant(tmp_path / "whole", "prefix"))
    trained = {key: value for key, value in state.items() if "prefix_encoder" in key}
    base = {key: value for key, value in state.items() if key not in trained}
    for files in ("sharded", "safetensors"):
        directory = make_variant(tmp_path / files, "prefix")
        (directory / "pytorch_model.bin").unlink()
        write_weights(directory, base, files)
        write_weights(directory, trained)
        expected = whole_logits(load_model(tmp_path / "whole"), IDS)
        assert torch.equal(whole_logits(load_model(directory), IDS), expected)


def test_a_model_is_ready_to_answer() -> None:
    model = load_model(GOLDENS / "base-sharded")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert all(tensor.device.type == "cpu" for _, tensor in tensors)
    assert model.generation_config.eos_token_id == 2
    assert model.generation_config.pad_token_id == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", torch.bfloat16])
@pytest.mark.parametrize("name", ["base-sharded", "classifier", "int4"])
def test_half_precision_stays_near_float32(name: str, dtype: str | torch.dtype) -> None:
    model, _, recorded = golden(name)
    half = load_model(GOLDENS / name, dtype=dtype)
    assert half.dtype == getattr(torch, str(dtype).removeprefix("torch."))
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    ids = recorded["rows"][0]["input_ids"]
    expected = whole_logits(model, ids)
    assert (whole_logits(half, ids).float() - expected).std() < 0.03 * expected.std()


def test_a_head_stays_float32_in_half_precision() -> None:
    head = load_model(GOLDENS / "classifier", dtype="bfloat16").score
    stored = read_state(GOLDENS / "classifier")
    assert torch.equal(head.weight, stored["classifier_head.weight"])
    assert torch.equal(head.bias, stored["classifier_head.bias"])
    assert head(torch.ones(1, 1, head.in_features, dtype=torch.bfloat16)).dtype == torch.float32


def test_unsupported_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"float64.*model\.dtype"):
        load_model(GOLDENS / "classifier", dtype="float64")
    directory = make_checkpoint(tmp_path, config={"fp32_residual_connection": True})
    load_model(directory)
    with pytest.raises(InputError, match=r"config\.json: 'fp32_residual_connection'.*model\.dtype"):
        load_model(directory, dtype="bfloat16")


def test_digests_depend_on_what_changes_answers(tmp_path: Path) -> None:
    directory = make_variant(tmp_path / "a", "sharded")
    first = digest_weights(directory)
    edit_config(
        directory, _name_or_path="elsewhere", use_cache=False, transformers_version="4.30.2"
    )
    assert (
        digest_weights(directory)
        == first
        == digest_weights(make_variant(tmp_path / "b", "sharded"))
    )
    assert digest_weights(make_variant(tmp_path / "c", "sharded", seed=1)) != first
    for key, value in {"layernorm_epsilon": 0.003, "rope_ratio": 16, "eos_token_id": 3}.items():
        directory = make_variant(tmp_path / key, "sharded")
        edit_config(directory, **{key: value})
        assert digest_weights(directory) != first
    tokenizer = digest_tokenizer(directory)
    assert tokenizer == digest_tokenizer(tmp_path / "a")
    (directory / "tokenizer.model").write_bytes(
        (GOLDENS / "classifier" / "tokenizer.model").read_bytes()
    )
    assert digest_tokenizer(directory) != tokenizer


@pytest.mark.parametrize("checks", [prepare, examine], ids=["job", "doctor"])
def test_a_file_is_checked_while_its_bytes_are_in_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checks: Callable[[Path], object]
) -> None:
    # A copy, because a process does not check the same checkpoint twice.
    directory = Path(shutil.copytree(BASE, tmp_path / "base"))
    checked = Event()
    files: list[Path] = []

    def digest(file: Path) -> str:
        if file.suffix == ".bin":
            files.append(file)
            # The last file is digested after another one has been checked.
            assert len(files) < len(list(BASE.glob("*.bin"))) or checked.wait(10)
        return digest_file(file)

    def count(tensor: torch.Tensor) -> int:
        checked.set()
        return count_non_finite(tensor)

    monkeypatch.setattr("glmbatch.glm.checkpoint.load.digest_file", digest)
    monkeypatch.setattr("glmbatch.glm.checkpoint.load.count_non_finite", count)
    checks(directory)
    assert len(files) == len(set(files)) > 1


def test_digests_equal_those_of_earlier_versions(tmp_path: Path) -> None:
    """Another digest of the same weights would recompute every published answer."""
    source = GOLDENS / "base-sharded"
    digest = "1e67d794e721d84353115041a99a8213b7b3a90d6b4d981e5275f16409ce4f0b"
    assert digest_weights(source) == digest
    stretched = shutil.copytree(source, tmp_path / "stretched")
    edit_config(stretched, rope_ratio=16)
    digest = "b0a9ffc08d160fd840253862cd68215fef97e67587f5443fe1fea3be29a0402e"
    assert digest_weights(stretched) == digest


def test_a_checkpoint_is_described(tmp_path: Path) -> None:
    base = read_checkpoint(GOLDENS / "base-sharded")
    assert (base.layout, base.has_head, base.labels, base.architecture.max_positions) == (
        "original",
        False,
        (),
        2048,
    )
    assert (base.architecture.vocab_size, base.tokenizer_size, base.parameters, base.warnings) == (
        1024,
        1005,
        224_064,
        (),
    )
    classifier = read_checkpoint(GOLDENS / "classifier")
    assert classifier.labels == ("负面", "中性", "正面")
    tuned = read_checkpoint(make_variant(tmp_path, "prefix-int4")).architecture
    assert (tuned.quantization_bit, tuned.pre_seq_len) == (4, 7)
    for directory in (GOLDENS / "base-sharded", GOLDENS / "classifier", GOLDENS / "int4"):
        model = load_model(directory)
        assert read_checkpoint(directory).parameters == sum(
            parameter.numel() for parameter in model.parameters()
        )


PEAK = """
import pathlib, sys
from glmbatch.glm.checkpoint.load import load_model
def status(key):
    text = pathlib.Path("/proc/self/status").read_text()
    return int(text.split(key + ":")[1].split()[0]) * 1024
load_model(sys.argv[1])
before = status("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")
model = load_model(sys.argv[2], dtype=sys.argv[3])
copy = sum(p.numel() * p.element_size() for p in model.parameters())
print((status("VmHWM") - before) / copy, (status("VmRSS") - before) / copy)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads Linux's own peak of resident memory"
)
@pytest.mark.parametrize(
    ("files", "dtype"), [("bin", "float16"), ("safetensors", "float32"), ("sharded", "float32")]
)
def test_loading_peaks_near_one_copy_of_the_weights(tmp_path: Path, files: str, dtype: str) -> None:
    wide = {
        "hidden_size": 1024,
        "ffn_hidden_size": 3424,
        "kv_channels": 64,
        "num_attention_heads": 16,
        "num_layers": 8,
    }
    directory = make_checkpoint(tmp_path, config=wide | {"padded_vocab_size": 4096}, files=files)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(GOLDENS / "base-sharded"), str(directory), dtype],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    peak, held = map(float, done.stdout.split())
    assert peak < 1.4
    assert held < 1.15, "the file's pages are still held"


@pytest.mark.parametrize(
    ("variant", "key"),
    [
        ("safetensors-sharded", "transformer.encoder.layers.0.input_layernorm.weight"),
        ("int4", "transformer.encoder.layers.1.self_attention.dense.weight_scale"),
        ("int8", "transformer.encoder.layers.0.mlp.dense_h_to_4h.weight_scale"),
        ("prefix", "transformer.prefix_encoder.embedding.weight"),
        ("prefix-projection", "transformer.prefix_encoder.trans.2.bias"),
        ("classifier", "classifier_head.bias"),
        ("bfloat16", "transformer.output_layer.weight"),
        ("legacy", "transformer.embedding.word_embeddings.weight"),
    ],
)
def test_non_finite_weights_are_named(tmp_path: Path, variant: str, key: str) -> None:
    directory = make_variant(tmp_path, variant)
    change_tensor(directory, key, lambda tensor: tensor.view(-1)[:1].fill_(torch.nan))
    (problem,) = examine(directory).problems
    with pytest.raises(InputError) as refused:
        load_model(directory)
    assert str(refused.value) == problem
    assert f"'{key}' has 1 of" in problem
    assert len(problem) - len(str(tmp_path)) < 300


def test_non_finite_tensors_are_counted(tmp_path: Path) -> None:
    directory = make_variant(tmp_path, "plain")
    for layer in (0, 1):
        key = f"transformer.encoder.layers.{layer}.mlp.dense_4h_to_h.weight"
        change_tensor(directory, key, lambda tensor: tensor.fill_(-torch.inf))
    with pytest.raises(InputError, match=r"1,792 of 1,792 values .*; 1 more tensors have such"):
        load_model(directory)


def test_weights_that_do_not_fit_the_dtype_are_named(tmp_path: Path) -> None:
    directory = make_variant(tmp_path, "bfloat16")
    key = "transformer.encoder.layers.0.mlp.dense_4h_to_h.weight"
    change_tensor(directory, key, lambda tensor: tensor.fill_(1e6))
    assert load_model(directory, "bfloat16")
    with pytest.raises(InputError, match=r"'model\.layers\.0\.mlp.* does not fit torch\.float16"):
        load_model(directory, "float16")


@pytest.mark.parametrize("variant", ["prefix", "prefix-projection"])
def test_a_prefix_works_in_any_transformers_version(tmp_path: Path, variant: str) -> None:
    """transformers renamed the argument for a filled cache, and ignores unknown arguments."""
    model = load_model(make_variant(tmp_path, variant))
    behind = whole_logits(model, IDS)
    expected = reference_logits(read_state(tmp_path), read_json(tmp_path / "config.json"), IDS)
    torch.testing.assert_close(behind, expected, atol=TOLERANCE, rtol=0)
    with engine_over(model) as engine:
        (first,) = engine.generate([GenerateRequest(0, IDS, 1)])
    assert first.ids == (int(expected[-1, :TOKENS].argmax()),)
    model.prefix_kv = None
    assert (whole_logits(model, IDS) - behind).abs().max() > 1
