"""What several draws of a row cost when its prompt is read once, beside reading it for each.

    python benchmarks/draws.py                 5 draws of 16 prompts of 500 tokens, the `mid` shape
    python benchmarks/draws.py --draws 2 --answer 4

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

import torch
from environments import SCRIPTS
from workload import SHAPES

from glmbatch.glm.engine.protocol import GenerateRequest
from glmbatch.glm.engine.worker import TorchEngine
from glmbatch.glm.model.network import Network

sys.path.insert(0, str(SCRIPTS))
from models import make_model


class Counter:
    """Counts the forwards of a network and the tokens in them."""

    def __init__(self) -> None:
        self.forwards = self.tokens = 0
        run = Network.forward

        def counted(network: Network, ids_T: torch.Tensor, *rest: Any) -> torch.Tensor:
            self.forwards += 1
            self.tokens += len(ids_T)
            return run(network, ids_T, *rest)

        Network.forward = counted  # type: ignore[method-assign]


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    shape = SHAPES[options.shape]
    counter = Counter()
    model = make_model("causal", shape.config(), 0, torch.float32, "cpu")
    engine = TorchEngine(model, eos_id=-1, token_count=shape.vocabulary)
    rng = random.Random(0)
    prompts = []
    for _ in range(options.rows):
        prompts.append([rng.randrange(3, shape.vocabulary) for _ in range(options.tokens)])
    seconds: dict[bool, list[float]] = {True: [], False: []}
    result: dict[str, Any] = {"draws": options.draws, "answer": options.answer}
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
            draws.append(GenerateRequest(index, prompt, options.answer, 0.8, seed=index))
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
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
