"""A merged LoRA adapter answers as with peft; an invalid one is refused with one message."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GlmForSequenceClassification

from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.load import (
    digest_weights,
    load_model,
    read_checkpoint,
    save_checkpoint,
)
from tests.unit.glm.adapters import make_original_adapter, peft_model
from tests.unit.glm.checkpoints import (
    LABELS,
    TOKENIZER,
    edit_config,
    make_checkpoint,
    make_variant,
    read_json,
    read_state,
    write_json,
)
from tests.unit.glm.reference import LayerWeights, reference_logits
from tests.unit.glm.tiny_glm import whole_logits

# peft 0.21 still uses attributes of a model that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

IDS = [1001, 1003, 623, 94, 85, 627, 645, 7, 9, 333, 13, 13, 809]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QUERY = "base_model.model.transformer.encoder.layers.1.self_attention.query_key_value"


def logits_of(model: Any) -> torch.Tensor:
    """Logits in float64: in float32, peft's merged and unmerged models differ by 1.5e-5."""
    return whole_logits(model.double(), IDS).double()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def native_classifier(directory: Path, labels: int = 3) -> Any:
    """What `GlmForSequenceClassification.from_pretrained` returns for a checkpoint with no head."""
    base = load_model(directory)
    base.config.num_labels = labels
    model = GlmForSequenceClassification(base.config)  # type: ignore[no-untyped-call]
    model.model.load_state_dict(base.model.state_dict())
    return model.eval()


def merged_state(
    directory: Path, products: Mapping[str, torch.Tensor], scale: float
) -> dict[str, torch.Tensor]:
    """The published tensors in float32, with an adapter added by hand to the fused weights."""
    state, config = read_state(directory), read_json(directory / "config.json")
    for module, product in products.items():
        layer, name = (
            module.rsplit(".", 2)[0] + ".",
            ".".join(module.rsplit(".", 2)[1:]) + ".weight",
        )
        base = LayerWeights(state, layer, config.get("quantization_bit") or 0)(name)
        state[f"{module}.weight"] = base + scale * product
    return state


@pytest.mark.parametrize(
    "settings",
    [
        {"task_type": "CAUSAL_LM"},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {
            "rank_pattern": {r"layers\.0\..*q_proj": 2},
            "alpha_pattern": {"layers.1.mlp.down_proj": 16, "o_proj": 1},
        },
        {"layers_to_transform": [1], "exclude_modules": ["down_proj"]},
        {
            "target_modules": r".*layers\.1\.(mlp|self_attn)\.(gate_up_proj|k_proj)",
            "init_lora_weights": "gaussian",
        },
        {
            "modules_to_save": ["lm_head", "embed_tokens", "post_attention_layernorm"],
            "target_modules": ["down_proj"],
        },
    ],
    ids="-".join,
)
@pytest.mark.parametrize("name", ["plain", "multi-head", "no-qkv-bias"])
def test_merged_logits_equal_those_of_peft(
    tmp_path: Path, name: str, settings: dict[str, Any]
) -> None:
    directory = make_variant(tmp_path / "base", name)
    adapted = peft_model(load_model(directory), **settings)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    expected = logits_of(adapted)
    assert (expected - logits_of(load_model(directory))).abs().max() > 0.1
    assert_close(logits_of(load_model(directory, adapter=tmp_path / "adapter")), expected)


@pytest.mark.parametrize("base", ["original", "native"])
def test_a_head_saved_with_the_adapter_makes_a_classifier(tmp_path: Path, base: str) -> None:
    directory = make_variant(tmp_path / "original", "plain")
    if base == "native":
        load_model(directory).save_pretrained(tmp_path / "native")
        directory = tmp_path / "native"
    adapted = peft_model(native_classifier(directory), task_type="SEQ_CLS")
    adapted.save_pretrained(tmp_path / "adapter")
    model = load_model(directory, adapter=tmp_path / "adapter")
    assert_close(logits_of(model), logits_of(adapted))
    half = load_model(directory, "bfloat16", adapter=tmp_path / "adapter")
    assert (half.model.norm.weight.dtype, half.score.weight.dtype) == (
        torch.bfloat16,
        torch.float32,
    )
    checkpoint = read_checkpoint(directory, adapter=tmp_path / "adapter")
    assert checkpoint.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert any("does not name its labels" in warning for warning in checkpoint.warnings)
    assert checkpoint.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_labels_come_from_the_adapter_or_the_base(tmp_path: Path) -> None:
    directory, adapter = make_variant(tmp_path / "base", "plain"), tmp_path / "adapter"
    peft_model(native_classifier(directory), task_type="SEQ_CLS").save_pretrained(adapter)
    before = digest_weights(directory, adapter)
    edit_config(directory, id2label={"0": "a", "1": "b", "2": "c"})
    assert read_checkpoint(directory, adapter=adapter).labels == ("a", "b", "c")
    write_json(adapter / "config.json", {"id2label": dict(enumerate(LABELS))})
    checkpoint = read_checkpoint(directory, adapter=adapter)
    assert (checkpoint.labels, checkpoint.warnings) == (LABELS, ())
    assert load_model(directory, adapter=adapter).config.id2label == dict(enumerate(LABELS))
    assert digest_weights(directory, adapter) != before
    write_json(adapter / "config.json", {"id2label": {"0": "no", "1": "yes"}})
    with pytest.raises(InputError, match=r"config\.json: 'id2label'.* 3 labels"):
        read_checkpoint(directory, adapter=adapter)


@pytest.mark.parametrize("saved", [[], ["score"]])
def test_an_adapter_keeps_or_replaces_a_trained_head(tmp_path: Path, saved: list[str]) -> None:
    directory = make_variant(tmp_path / "base", "classifier")
    adapted = peft_model(load_model(directory), modules_to_save=saved)
    adapted.save_pretrained(tmp_path / "adapter")
    assert_close(logits_of(load_model(directory, adapter=tmp_path / "adapter")), logits_of(adapted))
    assert read_checkpoint(directory, adapter=tmp_path / "adapter").labels == LABELS


def test_a_replaced_head_may_have_other_labels(tmp_path: Path) -> None:
    directory = make_variant(tmp_path / "base", "classifier-int4")
    head = {"classifier_head.weight": torch.randn(5, 32), "classifier_head.bias": torch.randn(5)}
    make_original_adapter(
        tmp_path / "adapter", whole=head, modules_to_save=["classifier_head"], task_type="SEQ_CLS"
    )
    model = load_model(directory, "bfloat16", adapter=tmp_path / "adapter")
    assert torch.equal(model.score.weight, head["classifier_head.weight"])
    assert torch.equal(model.score.bias, head["classifier_head.bias"])
    assert len(read_checkpoint(directory, adapter=tmp_path / "adapter").labels) == 5


@pytest.mark.parametrize("rank_stabilized", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "multi-head",
        "sharded",
        "int8",
        "int4-sharded",
        "multi-head-int8",
        "classifier",
        "prefix-int4",
    ],
)
def test_an_original_adapter_is_added_to_the_fused_weights(
    tmp_path: Path, name: str, rank_stabilized: bool
) -> None:
    directory = make_variant(tmp_path / "base", name)
    config = read_json(directory / "config.json")
    products = make_original_adapter(tmp_path / "adapter", config, use_rslora=rank_stabilized)
    state = merged_state(directory, products, 6 / (2 if rank_stabilized else 4))
    # The same tolerance as without an adapter: the reference computes in float32.
    actual = logits_of(load_model(directory, adapter=tmp_path / "adapter"))
    torch.testing.assert_close(
        actual, reference_logits(state, config, IDS).double(), atol=1e-4, rtol=0
    )


def test_an_original_adapter_equals_the_same_one_split(tmp_path: Path) -> None:
    """Compared with peft's result for the split matrices, with the shared one in all three."""
    directory = make_variant(tmp_path / "base", "plain")
    make_original_adapter(tmp_path / "adapter")
    names = {
        "query_key_value": None,
        "dense": "self_attn.o_proj",
        "dense_h_to_4h": "mlp.gate_up_proj",
        "dense_4h_to_h": "mlp.down_proj",
    }
    split: dict[str, torch.Tensor] = {}
    for key, tensor in load_file(tmp_path / "adapter" / WEIGHTS).items():
        layer, module, matrix = key.split(".")[5], key.split(".")[7], key.split(".")[8]
        prefix = f"base_model.model.model.layers.{layer}"
        if names[module]:
            split[f"{prefix}.{names[module]}.{matrix}.weight"] = tensor
            continue
        rows = [tensor] * 3 if matrix == "lora_A" else list(tensor.split([64, 32, 32]))
        for part, piece in zip("qkv", rows, strict=True):
            split[f"{prefix}.self_attn.{part}_proj.{matrix}.weight"] = piece.clone()
    adapted = peft_model(load_model(directory))
    adapted.save_pretrained(tmp_path / "split")
    save_file(split, tmp_path / "split" / WEIGHTS)
    from peft import PeftModel

    expected = logits_of(PeftModel.from_pretrained(load_model(directory), tmp_path / "split"))
    assert_close(logits_of(load_model(directory, adapter=tmp_path / "adapter")), expected)
    assert_close(logits_of(load_model(directory, adapter=tmp_path / "split")), expected)


@pytest.mark.parametrize("name", ["plain", "int4"])
def test_in_half_precision_only_the_sum_is_rounded(tmp_path: Path, name: str) -> None:
    directory = make_variant(tmp_path / "base", name)
    make_original_adapter(tmp_path / "adapter")
    exact = load_model(directory, adapter=tmp_path / "adapter").state_dict()
    half = load_model(directory, "bfloat16", adapter=tmp_path / "adapter").state_dict()
    assert all(torch.equal(half[key], exact[key].bfloat16()) for key in exact)


def test_a_merged_model_can_be_saved(tmp_path: Path) -> None:
    directory = make_variant(tmp_path / "base", "plain")
    make_original_adapter(tmp_path / "adapter")
    merged = load_model(directory, adapter=tmp_path / "adapter")
    save_checkpoint(merged, tmp_path / "merged", tokenizer_model=TOKENIZER, dtype="float32")
    assert torch.equal(logits_of(load_model(tmp_path / "merged")), logits_of(merged))


def test_an_adapter_of_zeros_changes_nothing(tmp_path: Path) -> None:
    directory = make_variant(tmp_path / "base", "plain")
    adapter = tmp_path / "adapter"
    make_original_adapter(adapter)
    reshape(lambda state: [tensor.zero_() for tensor in state.values()])(adapter)
    expected = load_model(directory).state_dict()
    merged = load_model(directory, adapter=adapter).state_dict()
    assert all(torch.equal(merged[key], expected[key]) for key in expected)


def test_the_digest_depends_on_what_changes_answers(tmp_path: Path) -> None:
    directory, adapter = make_variant(tmp_path / "base", "plain"), tmp_path / "adapter"
    make_original_adapter(adapter)
    bare, first = digest_weights(directory), digest_weights(directory, adapter)
    assert bare != first
    edit(base_model_name_or_path="elsewhere", lora_dropout=0.5, peft_version="0.1")(adapter)
    (adapter / "README.md").write_text("nothing of this is read")
    assert digest_weights(directory, adapter) == first
    edit(lora_alpha=7)(adapter)
    assert digest_weights(directory, adapter) != first
    edit(lora_alpha=6)(adapter)
    content = bytearray((adapter / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (adapter / WEIGHTS).write_bytes(content)
    assert len({digest_weights(directory, adapter), first, bare}) == 3
    assert digest_weights(directory) == bare


def edit(**changes: Any) -> Callable[[Path], None]:
    """Change keys of adapter_config.json."""

    def spoil(adapter: Path) -> None:
        write_json(adapter / CONFIG, read_json(adapter / CONFIG) | changes)

    return spoil


def reshape(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Change the tensors."""

    def spoil(adapter: Path) -> None:
        state = load_file(adapter / WEIGHTS)
        change(state)
        save_file(state, adapter / WEIGHTS)

    return spoil


def pickled(adapter: Path) -> None:
    torch.save(load_file(adapter / WEIGHTS), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def spoil(adapter: Path) -> None:
        (adapter / name).unlink()
        make(adapter / name)

    return spoil


A, B = f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"
# The change to a valid adapter, and what the message must name.
FAULTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "another method": (edit(peft_type="PREFIX_TUNING"), [CONFIG, "'peft_type'", "'PREFIX_TUNING'"]),
    "no method": (edit(peft_type=None), [CONFIG, "'peft_type'"]),
    "dora": (edit(use_dora=True), [CONFIG, "'use_dora'"]),
    "trained biases": (edit(bias="lora_only"), [CONFIG, "'bias'", "'lora_only'"]),
    "pissa": (edit(init_lora_weights="pissa_niter_4"), [CONFIG, "'init_lora_weights'", "pissa"]),
    "trained tokens": (edit(trainable_token_indices=[1, 2]), [CONFIG, "'trainable_token_indices'"]),
    "no rank": (edit(r=0), [CONFIG, "'r'", "is 0"]),
    "another rank": (edit(r=8), [WEIGHTS, "lora_A", "[4, ", "[8, "]),
    "rank of one module": (edit(rank_pattern={"dense": 2}), [WEIGHTS, ".dense.lora_A", "[2, 64]"]),
    "alpha that is text": (edit(lora_alpha="6"), [CONFIG, "'lora_alpha'"]),
    "alpha that is true": (edit(lora_alpha=True), [CONFIG, "'lora_alpha'"]),
    "patterns that are a list": (edit(alpha_pattern=["dense"]), [CONFIG, "'alpha_pattern'"]),
    "pattern that takes for ever": (
        edit(rank_pattern={r"(\w+)*x": 4}),
        [CONFIG, "rank_pattern", "regular expression"],
    ),
    "pattern that is none": (
        edit(alpha_pattern={"(dense": 4}),
        [CONFIG, "alpha_pattern", "'(dense'"],
    ),
    "targets that are numbers": (edit(target_modules=[1]), [CONFIG, "'target_modules'"]),
    "layers that are text": (edit(layers_to_transform=["1"]), [CONFIG, "'layers_to_transform'"]),
    "no head of a classifier": (edit(task_type="SEQ_CLS"), [CONFIG, "'SEQ_CLS'"]),
    "head that is not there": (
        edit(modules_to_save=["classifier_head"]),
        [WEIGHTS, "classifier_head.weight"],
    ),
    "unknown module": (
        reshape(
            lambda state: state.update(
                {"base_model.model.transformer.other.lora_A.weight": torch.zeros(4, 4)}
            )
        ),
        [WEIGHTS, "transformer.other.lora_A"],
    ),
    "names without peft's beginning": (
        reshape(lambda state: state.update({"x": state.pop(A)})),
        [WEIGHTS, "'x'"],
    ),
    "more layers": (
        reshape(lambda state: state.update({A.replace(".1.", ".7."): state[A].clone()})),
        [WEIGHTS, "layers.7."],
    ),
    "fewer layers": (
        reshape(lambda state: [state.pop(key) for key in list(state) if ".layers.1." in key]),
        [WEIGHTS, "layers.1.", "7 more"],
    ),
    "no partner": (reshape(lambda state: state.pop(B)), [WEIGHTS, B]),
    "another width": (
        reshape(lambda state: state.update({A: torch.zeros(4, 31)})),
        [WEIGHTS, A, "[4, 31]", "[4, 32]"],
    ),
    "a flat matrix": (
        reshape(lambda state: state.update({B: torch.zeros(512)})),
        [WEIGHTS, B, "[512]"],
    ),
    "whole numbers": (
        reshape(lambda state: state.update({A: state[A].long()})),
        [WEIGHTS, A, "int64"],
    ),
    "nan": (reshape(lambda state: state[B].fill_(torch.nan)), [WEIGHTS, B, "finite"]),
    "infinity": (reshape(lambda state: state[A][0, 0].fill_(torch.inf)), [WEIGHTS, A, "finite"]),
    "sum past all numbers": (
        reshape(lambda state: (state[A].fill_(1e38), state[B].fill_(1e38))),
        ["1.self_attn.q_proj", "model.dtype"],
    ),
    "nothing": (reshape(lambda state: state.clear()), [WEIGHTS, "no weights"]),
    "a whole module that the config does not save": (
        reshape(lambda state: state.update({QUERY + ".bias": torch.zeros(128)})),
        [WEIGHTS, "query_key_value.bias"],
    ),
    "pickled weights": (pickled, ["adapter_model.bin", "safetensors.torch.save_file"]),
    "no config": (lambda adapter: (adapter / CONFIG).unlink(), [CONFIG, "no such file"]),
    "no weights": (lambda adapter: (adapter / WEIGHTS).unlink(), [WEIGHTS, "no such file"]),
    "config that is a list": (
        lambda adapter: (adapter / CONFIG).write_text("[]"),
        [CONFIG, "list"],
    ),
    "config of depth": (
        lambda adapter: (adapter / CONFIG).write_text("[" * 99_999),
        [CONFIG, "JSON"],
    ),
    "link to nowhere": (
        replaced(WEIGHTS, lambda file: file.symlink_to("gone")),
        [WEIGHTS, "no such file"],
    ),
    "link to itself": (
        replaced(CONFIG, lambda file: file.symlink_to(file)),
        [CONFIG, "no such file"],
    ),
    "link to a device": (
        replaced(CONFIG, lambda file: file.symlink_to("/dev/zero")),
        [CONFIG, "no such file"],
    ),
    "a pipe": (replaced(WEIGHTS, os.mkfifo), [WEIGHTS, "no such file"]),
    "a folder": (replaced(WEIGHTS, Path.mkdir), [WEIGHTS, "no such file"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_invalid_adapter_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    directory, adapter = make_variant(tmp_path / "base", "plain"), tmp_path / "adapter"
    make_original_adapter(adapter)
    load_model(directory, adapter=adapter)
    spoil, named = FAULTS[fault]
    spoil(adapter)
    with pytest.raises(InputError) as refusal:
        load_model(directory, adapter=adapter)
    message = str(refusal.value)
    assert "\n" not in message
    assert "Set model." in message or "set model." in message or "JSON" in message
    assert [name for name in named if name not in message] == []


def test_an_adapter_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    directory = make_variant(tmp_path / "base", "plain")
    for adapter in (tmp_path / "nothing", directory / "config.json", Path("a\0b")):
        with pytest.raises(InputError, match=r"not a directory\. Set model\.adapter"):
            load_model(directory, adapter=adapter)


def test_fused_rows_of_unknown_order_are_refused(tmp_path: Path) -> None:
    load_model(make_variant(tmp_path / "original", "multi-head")).save_pretrained(
        tmp_path / "native"
    )
    make_original_adapter(tmp_path / "adapter", read_json(tmp_path / "original" / "config.json"))
    load_model(tmp_path / "original", adapter=tmp_path / "adapter")
    with pytest.raises(InputError, match=r"original classes.*Set model\.path"):
        load_model(tmp_path / "native", adapter=tmp_path / "adapter")


def test_an_unknown_config_key_is_a_warning(tmp_path: Path) -> None:
    directory = make_variant(tmp_path / "base", "plain")
    make_original_adapter(tmp_path / "adapter", novelty=True, dormant=None)
    assert read_checkpoint(directory, adapter=tmp_path / "adapter").warnings == (
        f"{CONFIG}: 'novelty' is unknown and has no effect",
    )


RUBBISH = (
    None,
    True,
    False,
    0,
    -1,
    1e400,
    10**30,
    "",
    "x",
    ".*",
    "(" * 50,
    [],
    [[]],
    [None],
    {},
    {"": {}},
    {"[[a": 1},
)


def test_a_damaged_adapter_is_refused_or_loads(tmp_path: Path) -> None:
    small = {
        "num_layers": 1,
        "hidden_size": 8,
        "ffn_hidden_size": 8,
        "kv_channels": 4,
        "padded_vocab_size": 1010,
    }
    directory, adapter = make_checkpoint(tmp_path / "base", config=small), tmp_path / "adapter"
    head = {"classifier_head.weight": torch.ones(2, 8)}
    make_original_adapter(
        adapter, small, whole=head, modules_to_save=["classifier_head"], rank_pattern={"dense": 4}
    )
    edit(
        use_dora=False,
        exclude_modules=None,
        layers_to_transform=None,
        alpha_pattern={},
        use_rslora=False,
    )(adapter)
    write_json(adapter / "config.json", {"id2label": {"0": "a", "1": "b"}, "num_labels": 2})
    sound = {file: file.read_bytes() for file in sorted(adapter.iterdir())}
    outcomes = {True: 0, False: 0}
    for seed in range(400):
        dice = random.Random(seed)
        file = dice.choice(list(sound))
        if file.suffix == ".json" and dice.random() < 0.6:
            config = json.loads(sound[file])
            for key in dice.sample(sorted(config), dice.choice((1, 1, min(3, len(config))))):
                config[key] = dice.choice(RUBBISH)
            file.write_text(json.dumps(config))
        else:
            spoiled = bytearray(sound[file])
            if dice.random() < 0.3:
                del spoiled[dice.randrange(len(spoiled)) :]
            else:
                for _ in range(dice.choice((1, 1, 20))):
                    # The header is at the beginning; most of the file is numbers.
                    place = int(
                        dice.choice((dice.expovariate(1 / 600), dice.randrange(len(spoiled))))
                    )
                    spoiled[min(place, len(spoiled) - 1)] = dice.randrange(256)
            file.write_bytes(spoiled)
        try:
            load_model(directory, adapter=adapter)
            outcomes[True] += 1
        except InputError as error:
            assert "\n" not in str(error)
            outcomes[False] += 1
        file.write_bytes(sound[file])
    assert min(outcomes.values()) > 40
