"""Typed fields of a model of random weights: how many answers are wrong in form, and how fast.

    python benchmarks/extract.py --rows 100000                       max_tokens from the least up
    python benchmarks/extract.py --rows 600 --shape mid --part 20    beside free texts as long

Each schema gets its share of the rows. An answer is wrong if jsonschema, which shares no code with
the engine, refuses it, or if it has more chosen tokens than allowed. Some rows are asked again, in
another order and with other slots, and must have the same values. Free texts have the same prompts
and as many tokens, of which none is forced. Times are the CPU seconds of all threads on a CPU, and
wall seconds on a GPU. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from environments import SCRIPTS
from jsonschema import Draft202012Validator
from workload import SHAPES

from glmbatch.glm.engine.protocol import GenerateRequest
from glmbatch.glm.engine.worker import TorchEngine
from glmbatch.glm.tokenizer import Tokenizer, load_tokenizer
from glmbatch.ledger.rowkeys import row_key
from glmbatch.settings.job import ExtractStep
from glmbatch.steps.extract import Extraction, ask_extractions
from glmbatch.steps.prompt import NoPrompt, Prompt, build_prompts

sys.path.insert(0, str(SCRIPTS))
from models import make_model

SCHEMAS: list[dict[str, Any]] = [
    {"wish": "text"},
    {"rating": {"type": "integer", "minimum": 1, "maximum": 5}, "why": "text"},
    {"tags": {"type": "list", "items": "text", "max_items": 3}, "done": "boolean"},
    {"day": "date", "note": {"type": "text", "max_length": 20, "nullable": True}},
    {"price": {"type": "number", "minimum": -2.5, "maximum": 99.99, "decimals": 2}},
    {"code": {"type": "text", "pattern": "[A-Z]{2}-[0-9]{1,3}"}, "title": "text"},
    {"mood": {"choices": ['say "good"', "bad\\", "好"], "nullable": True}, "why": "text"},
    {"days": {"type": "list", "items": "date", "nullable": True}, "left": "integer"},
    {"kinds": {"type": "list", "items": {"choices": ["x", "xy", "好"]}}, "flag": "boolean"},
    {"产品": "text", "愿望": {"type": "text", "nullable": True}, "评分": {"choices": ["高", "低"]}},
]
WORDS = ("the", "lamp", "is", "bright", '"', "\\", "{", "}", "好", "坏", "\U0001f600", "\n", "3.5")
# Tokens of a schema beyond the least.
MORE_TOKENS = [0, 1, 3, 8, 20, 60]


class Bench:
    """An engine over random weights, and the counts of its answers."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.tokenizer = load_tokenizer(options.tokenizer)
        self._config = SHAPES[options.shape].config() | {"vocab_size": self.tokenizer.vocab_size}
        self._dtype = getattr(torch, options.dtype)
        self._device = options.device
        self._on_gpu = options.device.startswith("cuda")
        self.counts: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()

    def engine(self, slots: int) -> TorchEngine:
        """An engine over these weights; it is closed by the caller."""
        model = make_model("causal", self._config, 0, self._dtype, self._device)
        model.prefix_kv = None
        return TorchEngine(
            model,
            eos_id=self.tokenizer.eos_id,
            token_count=self.tokenizer.vocab_size,
            max_slots=slots,
        )

    def now(self) -> float:
        """Seconds of the clock."""
        return time.perf_counter() if self._on_gpu else time.process_time()

    def extract(
        self, step: ExtractStep, prompts: dict[bytes, Prompt], engine: Any
    ) -> dict[Any, Any]:
        """The answers, judged and counted."""
        began = self.now()
        answers = dict(ask_extractions(step, prompts, engine, self.tokenizer))
        self.seconds["fields"] += self.now() - began
        validator = Draft202012Validator(exact(schema_of(step)))
        for answer in answers.values():
            self.counts["rows"] += 1
            if not isinstance(answer, Extraction):
                self.counts["failed"] += 1
                continue
            self.counts["cut"] += answer.finish_reason == "length"
            self.counts["chosen_tokens"] += answer.completion_tokens
            # As decimal numbers: 0.57 is no multiple of 0.01 as a float.
            values = json.loads(answer.text, parse_float=Decimal)
            self.counts["invalid"] += not validator.is_valid(values)
            self.counts["too_long"] += answer.completion_tokens > step.max_tokens
        return answers

    def free(
        self, prompts: Mapping[bytes, Prompt], answers: Mapping[bytes, Any], engine: Any
    ) -> None:
        """Texts of as many tokens as the answers, written one by one; and the prompts alone."""
        lengths = {}
        for key, answer in answers.items():
            lengths[key] = len(self.tokenizer.encode_plain([answer.text])[0])
        self.counts["answer_tokens"] += sum(lengths.values())
        self._write("free", prompts, lengths, engine)
        self._write("prompts", prompts, dict.fromkeys(prompts, 1), engine)

    def _write(
        self, name: str, prompts: Mapping[bytes, Prompt], lengths: Mapping[bytes, int], engine: Any
    ) -> None:
        requests = []
        for at, (key, prompt) in enumerate(prompts.items()):
            tokens = lengths[key]
            requests.append(GenerateRequest(at, prompt.ids, tokens, min_tokens=tokens))
        began = self.now()
        assert not any(result.error for result in engine.generate(requests))
        self.seconds[name] += self.now() - began


def exact(schema: dict[str, Any]) -> dict[str, Any]:
    """`schema` with decimal numbers."""
    exact_schema: dict[str, Any] = json.loads(json.dumps(schema), parse_float=Decimal)
    return exact_schema


def schema_of(step: ExtractStep) -> dict[str, Any]:
    """The JSON schema of an answer as one object."""
    return {
        "type": "object",
        "properties": {field.name: field.json_schema() for field in step.fields},
        "required": [field.name for field in step.fields],
        "additionalProperties": False,
    }


def prompts_of(
    step: ExtractStep, texts: Sequence[str], tokenizer: Tokenizer
) -> Sequence[Prompt | NoPrompt]:
    """The prompt of each text, or why there is none."""
    return build_prompts(
        step,
        [{"text": text} for text in texts],
        tokenizer,
        chat=True,
        max_input_tokens=1500,
        texts=["text"],
    )


def parts(
    rows: int, part: int, more_tokens: list[int], words: int, tokenizer: Tokenizer
) -> Iterator[tuple[ExtractStep, dict[bytes, Prompt]]]:
    """Steps with the prompts of some rows: schemas and max_tokens in turn."""
    rng = random.Random(1)
    for number in range(-(-rows // part)):
        fields = SCHEMAS[number % len(SCHEMAS)]
        more = more_tokens[number // len(SCHEMAS) % len(more_tokens)]
        plain: dict[str, Any] = {"name": "facts", "fields": fields, "max_tokens": 32_768}
        least = sum(field.least_tokens for field in ExtractStep(**plain).fields)
        sampled = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if number % 2 else {}
        step = ExtractStep(**{**plain, **sampled, "max_tokens": max(1, least + more)})
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(2, words))) for _ in range(part)]
        texts = texts[: rows - number * part]
        prompts = {}
        for prompt in prompts_of(step, texts, tokenizer):
            if isinstance(prompt, Prompt):  # some texts are blank
                prompts[row_key(str(number), prompt.text)] = prompt
        yield step, prompts


def main() -> None:
    """Run the benchmark and print its counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--part", type=int, default=200, help="rows of one schema at once")
    parser.add_argument("--words", type=int, default=40, help="words of a row's text, at most")
    parser.add_argument(
        "--more", type=int, nargs="+", default=MORE_TOKENS, help="max_tokens beyond the least"
    )
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--tokenizer", type=Path, default=Path("sample_data/tiny-chatglm2"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--again", type=int, default=10, help="one part in so many is asked again")
    parser.add_argument("--no-free", action="store_true", help="write no free texts beside")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    engine = bench.engine(options.slots)
    work = parts(options.rows, options.part, options.more, options.words, bench.tokenizer)
    for step, prompts in parts(len(SCHEMAS), 1, [8], 9, bench.tokenizer):  # what is loaded once
        bench.free(prompts, bench.extract(step, prompts, engine), engine)
    bench.counts.clear()
    bench.seconds.clear()
    for number, (step, prompts) in enumerate(work):
        answers = bench.extract(step, prompts, engine)
        if not options.no_free:
            bench.free(prompts, answers, engine)
        if number % options.again == number // options.again % min(options.again, 10):
            other = bench.engine(5)
            backwards = dict(reversed(prompts.items()))
            again = dict(ask_extractions(step, backwards, other, bench.tokenizer))
            other.close()
            bench.counts["asked_again"] += len(again)
            for key, answer in answers.items():
                bench.counts["differ"] += answer.text != again[key].text
    engine.close()
    report(bench)


def report(bench: Bench) -> None:
    """Print the counts and rates."""
    counts = {name: bench.counts[name] for name in sorted(bench.counts)}
    for name in ("failed", "invalid", "too_long", "differ"):
        counts.setdefault(name, 0)
    line: dict[str, Any] = {**counts, "rows_per_second": counts["rows"] / bench.seconds["fields"]}
    if bench.seconds["free"]:
        tokens = counts["answer_tokens"]
        line["tokens_per_second"] = tokens / bench.seconds["fields"]
        line["free_tokens_per_second"] = tokens / bench.seconds["free"]
        line["times_free"] = bench.seconds["free"] / bench.seconds["fields"]
        writing = [bench.seconds[name] - bench.seconds["prompts"] for name in ("free", "fields")]
        line["times_free_without_prompts"] = writing[0] / writing[1]
    for name, value in line.items():
        print(f"{name:24}{value:12,.2f}" if isinstance(value, float) else f"{name:24}{value:12,}")
    print(json.dumps(line))


if __name__ == "__main__":
    main()
