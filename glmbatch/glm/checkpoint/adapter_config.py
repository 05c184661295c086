"""Reads and checks a LoRA adapter's adapter_config.json as peft writes it. No tensors, no files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, TypeVar

from glmbatch.errors import InputError
from glmbatch.glm.checkpoint.config_check import ConfigCheck

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """How a LoRA adapter was trained. Modules are named as in the model that was trained.

    `targets` is None if a regular expression chose the modules; then only the weights show which
    they are. `layers` is None for all layers. `saved` names the modules that were trained in full
    and saved whole. `ranks` and `alphas` have the exceptions, the first match counts. `unknown` has
    the keys that are not read here.
    """

    rank: int
    alpha: float
    rank_stabilized: bool
    ranks: tuple[tuple[re.Pattern[str], int], ...]
    alphas: tuple[tuple[re.Pattern[str], float], ...]
    targets: tuple[str, ...] | None
    excluded: tuple[str, ...]
    layers: frozenset[int] | None
    saved: tuple[str, ...]
    classifies: bool
    unknown: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        """Rank of the two matrices of `module`."""
        for pattern, rank in self.ranks:
            if pattern.match(module):
                return rank
        return self.rank

    def scale_of(self, module: str) -> float:
        """The factor of the product of the two matrices of `module`.

        alpha / rank, or alpha / sqrt(rank) for rank-stabilized LoRA (arXiv:2312.03732).
        """
        rank = self.rank_of(module)
        return self._alpha_of(module) / (sqrt(rank) if self.rank_stabilized else rank)

    def _alpha_of(self, module: str) -> float:
        for pattern, alpha in self.alphas:
            if pattern.match(module):
                return alpha
        return self.alpha

    def adapts(self, module: str) -> bool:
        """Whether the adapter must have two matrices for the linear `module`.

        False if the config alone does not tell.
        """
        if self.targets is None or not _is_named(module, self.targets):
            return False
        if _is_named(module, (*self.excluded, *self.saved)):
            return False
        layer = re.search(r"\.(\d+)\.", module)
        return self.layers is None or (layer is not None and int(layer[1]) in self.layers)

    def saves(self, module: str) -> bool:
        """Whether `module` was trained in full and saved whole."""
        return module.endswith(self.saved)


def _is_named(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


# fmt: off
# Each of these changes what the two matrices mean, or the base weights that they belong to.
_UNSUPPORTED = (
    "use_dora", "lora_bias", "fan_in_fan_out", "use_qalora", "use_bdlora", "layer_replication",
    "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "arrow_config",
    "kasa_config", "monteclora_config", "megatron_config",
)
_READ = frozenset({
    "peft_type", "bias", "init_lora_weights", "r", "lora_alpha", "use_rslora", "rank_pattern",
    "alpha_pattern", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "modules_to_save", "task_type",
})
# Bookkeeping and training settings.
_HARMLESS = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "velora_config",
})
# fmt: on
# The other initializations (pissa, olora, corda, loftq, ...) change the base weights too, so that
# the adapter does not belong to the published ones. peft converts it back when it is saved with
# `path_initial_model_for_weight_conversion`.
_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")
_MAX_RANK = 2**14
_MAX_ALPHA = 2.0**24
# A pattern is an untrusted regular expression. Within these limits it cannot take ages to match.
_MAX_PATTERN_LENGTH = 256
_MAX_REPEATS = 3


def read_adapter_config(config: Mapping[str, Any], where: str) -> AdapterConfig:
    """The settings in `config`, the content of an adapter_config.json.

    Raises InputError, naming `where` and the key, if such an adapter cannot be merged.
    """
    check = ConfigCheck(config, where)
    if config.get("peft_type") != "LORA":
        check.refuse("peft_type", "'LORA', the only kind that can be merged into the weights")
    check.choice("bias", ("none",), default="none")
    check.choice("init_lora_weights", _INITIALIZATIONS, default=True)
    for key in _UNSUPPORTED:
        if config.get(key):
            check.refuse(key, "empty or false: such an adapter cannot be merged into the weights")
    targets = _module_names(check, "target_modules")
    excluded = _module_names(check, "exclude_modules")
    unknown = config.keys() - _READ - _HARMLESS - set(_UNSUPPORTED)
    stated = AdapterConfig(
        rank=check.integer("r", 1, _MAX_RANK),
        alpha=check.real("lora_alpha", _MAX_ALPHA),
        rank_stabilized=check.flag("use_rslora", default=False),
        ranks=_by_pattern(check, "rank_pattern", _read_rank),
        alphas=_by_pattern(check, "alpha_pattern", _read_alpha),
        targets=None if excluded is None else targets,
        excluded=excluded or (),
        layers=_layers(check),
        saved=_module_names(check, "modules_to_save") or (),
        classifies=config.get("task_type") == "SEQ_CLS",
        unknown=tuple(sorted(key for key in unknown if config[key])),
    )
    if check.problems:
        raise InputError(f"{check.problems[0]} Set model.adapter to another adapter.")
    return stated


def _read_rank(check: ConfigCheck, key: str) -> int:
    return check.integer(key, 1, _MAX_RANK)


def _read_alpha(check: ConfigCheck, key: str) -> float:
    return check.real(key, _MAX_ALPHA)


def _module_names(check: ConfigCheck, key: str) -> tuple[str, ...] | None:
    """The module names under `key`; None when it is a regular expression."""
    names = check.config.get(key) or []
    if isinstance(names, str):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        check.refuse(key, "a list of module names")
        return ()
    return tuple(names)


def _layers(check: ConfigCheck) -> frozenset[int] | None:
    stated = check.config.get("layers_to_transform")
    if stated is None:
        return None
    layers = stated if isinstance(stated, list) else [stated]
    if any(not isinstance(layer, int) or isinstance(layer, bool) for layer in layers):
        check.refuse("layers_to_transform", "a list of layer numbers")
        return None
    return frozenset(layers) or None


def _by_pattern(
    check: ConfigCheck, key: str, read: Callable[[ConfigCheck, str], Number]
) -> tuple[tuple[re.Pattern[str], Number], ...]:
    """The numbers that `key` gives, each with the pattern for names of modules, in order."""
    stated = check.config.get(key) or {}
    if not isinstance(stated, dict):
        check.refuse(key, "an object with a number for each module")
        return ()
    inner = ConfigCheck(stated, f"{check.where}: {key}", check.problems)
    return tuple((_pattern(inner, name), read(inner, name)) for name in stated)


def _pattern(check: ConfigCheck, name: str) -> re.Pattern[str]:
    """The pattern that peft compiles from a module's name, which may be a regular expression.

    One that could take ages to match is refused.
    """
    repeats = re.findall(r"(?<!\()[*+?{]", name)  # the ? of (?:...) repeats nothing
    simple = len(name) <= _MAX_PATTERN_LENGTH and len(repeats) <= _MAX_REPEATS
    if simple and not re.search(r"\)[*+?{]", name):
        try:
            return re.compile(rf"(.*\.)?({name})$")
        except (re.error, RecursionError, OverflowError, Warning):
            pass
    check.problems.append(
        f"{check.where}: {name[:60]!r} is neither a module's name nor a simple regular expression."
    )
    return re.compile("")
