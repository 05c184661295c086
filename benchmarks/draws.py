"""What several texts for a row cost when what they share is read once, beside reading it for each.

    python benchmarks/draws.py                 5 draws of 16 prompts of 500 tokens, the `mid` shape
    python benchmarks/draws.py --ending 12     5 steps: each has 12 tokens behind the same 500

Both ways draw the same texts on one engine and one core, in turns; figures are medians of CPU
seconds. Weights and prompts are random. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from environments import SCRIPTS
from workload import SHAPES

from glmbatch.glm.engine.protocol import GenerateRequest
from glmbatch.glm.engine.worker import TorchEngine
from glmbatch.glm.model.network import Network

sys.path.insert(0, str(SCRIPTS))
from models import make_model


class CountingNetwork(Network):
    """A network that counts its forwards and the tokens in them."""

    forwards = tokens = 0

    def forward(self, ids_T: torch.Tensor, *rest: Any) -> torch.Tensor:
        """As that of a network."""
        CountingNetwork.forwards += 1
        CountingNetwork.tokens += len(ids_T)
        return super().forward(ids_T, *rest)


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    shape = SHAPES[options.shape]
    counter = CountingNetwork
    model = make_model("causal", shape.config(), 0, torch.float32, "cpu")
    with patch("glmbatch.glm.engine.worker.Network", CountingNetwork):
        engine = TorchEngine(model, eos_id=-1, token_count=shape.vocabulary)
    rng = random.Random(0)
    prompts = []
    for _ in range(options.rows):
        prompts.append([rng.randrange(3, shape.vocabulary) for _ in range(options.tokens)])
    seconds: dict[bool, list[float]] = {True: [], False: []}
    result: dict[str, Any] = {key: getattr(options, key) for key in ("draws", "answer", "ending")}
    texts = {}
    for _ in range(options.rounds):
        for together in (True, False):
            forwards, tokens, began = counter.forwards, counter.tokens, time.process_time()
            drawn = engine.generate(_requests(prompts, options, together=together))
            texts[together] = {one.index: one.ids for one in drawn}
            seconds[together].append(time.process_time() - began)
            way = "together" if together else "apart"
            result[f"{way}_forwards"] = counter.forwards - forwards
            result[f"{way}_tokens"] = counter.tokens - tokens
    engine.close()
    for together, way in ((True, "together"), (False, "apart")):
        result[f"{way}_seconds"] = round(statistics.median(seconds[together]), 3)
    ratios = [one / other for one, other in zip(seconds[True], seconds[False], strict=True)]
    result["ratio"] = round(statistics.median(ratios), 3)
    result["different_texts"] = sum(texts[True][at] != ids for at, ids in texts[False].items())
    print(json.dumps(result))


def _requests(
    prompts: list[list[int]], options: argparse.Namespace, *, together: bool
) -> Iterator[GenerateRequest]:
    for place, prompt in enumerate(prompts):
        draws = []
        for draw in range(options.draws):
            index = place * options.draws + draw
            ending = [3 + (draw + at) % 50 for at in range(options.ending)]
            ids = [*prompt, *ending]
            draws.append(GenerateRequest(index, ids, options.answer, 0.8, seed=index))
        if together:
            yield replace(draws[0], beside=tuple(draws[1:]))
        else:
            yield from draws


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--answer", type=int, default=8)
    parser.add_argument("--ending", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
