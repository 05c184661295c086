"""What the GPU's own kernels reach at the shapes of a model: the limits of the engine's design.

    python benchmarks/kernels.py                     attention, products, head and sampling of 6B
    python benchmarks/kernels.py --shape tiny --device cpu --rows 8        on a CPU, to try it

Each reading is printed when it is made, and with --out it is added to a file of JSON lines.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from report import write_line
from torch.nn.functional import linear, scaled_dot_product_attention
from workload import SAMPLING, SHAPES, Shape

from glmbatch.glm.model.flash import FlashCall, SingleQueries
from glmbatch.glm.model.sampling import RowSampling, next_tokens

READINGS = 20
ROWS = (1, 8, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
# Rows of a decode step, and the keys of the longest of them.
STEPS = ((512, 512), (512, 1024), (64, 512), (8, 2048))


class Bench:
    """The device, the model's shape, and where readings go."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.shape: Shape = SHAPES[options.shape]
        self.device: str = options.device
        self.on_gpu = options.device.startswith("cuda")
        self.dtype = getattr(torch, options.dtype)
        self.out: Path | None = options.out
        self.most = options.rows

    def random(self, *sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, device=self.device, dtype=self.dtype)

    def milliseconds(self, work: Callable[[], Any]) -> float:
        """Median time of a run on the device, after three runs that do not count."""
        times = []
        for number in range(READINGS + 3):
            milliseconds = self._once(work)
            if number >= 3:
                times.append(milliseconds)
            if not self.on_gpu and number == 4:
                break
        return statistics.median(times)

    def seconds(self, work: Callable[[], Any]) -> float:
        """Wall time of one run until the device has finished, such as the first of a shape."""
        start = time.perf_counter()
        work()
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def say(self, part: str, **reading: Any) -> None:
        """Print a reading and write it."""
        facts = [f"{name} {_short(value)}" for name, value in reading.items()]
        print(f"{part}: {', '.join(facts)}", flush=True)
        write_line(self.out, {"part": part, **reading})

    def _once(self, work: Callable[[], Any]) -> float:
        if not self.on_gpu:
            return self.seconds(work) * 1000
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))


def products(bench: Bench) -> None:
    """The four products of a layer, by the number of tokens in a forward."""
    shape = bench.shape
    qkv = (shape.heads + 2 * shape.groups) * shape.head_size
    sizes = {
        "qkv": (shape.hidden, qkv),
        "out": (shape.heads * shape.head_size, shape.hidden),
        "gate_up": (shape.hidden, 2 * shape.inner),
        "down": (shape.inner, shape.hidden),
    }
    weights = {name: bench.random(after, before) for name, (before, after) in sizes.items()}
    for rows in ROWS:
        if rows > bench.most:
            break
        tflops = {}
        total = 0.0
        for name, weight in weights.items():
            states = bench.random(rows, weight.shape[1])
            milliseconds = bench.milliseconds(partial(linear, states, weight))
            total += milliseconds
            tflops[f"{name}_tflops"] = 2 * rows * weight.numel() / milliseconds / 1e9
        body = total * shape.layers
        bench.say(
            "products", rows=rows, body_ms=body, tokens_per_second=rows / body * 1e3, **tflops
        )


def head(bench: Bench) -> None:
    """The product of the language head, at the exact and at a rounded number of tokens."""
    # The vocabulary of ChatGLM2 has 64,794 tokens, of which its head serves more.
    exact = bench.shape.vocabulary - 486 if bench.shape.vocabulary > 65_000 else 250
    for rows in (64, 256, 512, 1024):
        count = min(rows, bench.most)
        states = bench.random(count, bench.shape.hidden)
        for tokens in (exact, -(-exact // 128) * 128):
            weight = bench.random(tokens, bench.shape.hidden)
            milliseconds = bench.milliseconds(partial(linear, states, weight))
            bench.say("head", rows=count, tokens=tokens, ms=milliseconds)


def sampling(bench: Bench) -> None:
    """Choosing the next tokens: greedy, with top_k and top_p, and with top_p alone."""
    vocabulary = bench.shape.vocabulary
    ways: dict[str, dict[str, Any]] = {
        "greedy": {},
        "top_k and top_p": SAMPLING,
        "top_p alone": SAMPLING | {"top_k": 0},
    }
    for rows in (512, 1024):
        count = min(rows, bench.most)
        logits = torch.randn(count, vocabulary, device=bench.device) * 3
        for name, way in ways.items():
            drawn = range(count) if way else ()
            asked = [RowSampling(row, uniform=row / count, **way) for row in drawn]
            milliseconds = bench.milliseconds(partial(next_tokens, logits, asked))
            bench.say("sampling", rows=count, way=name, ms=milliseconds)


def attention(bench: Bench) -> None:
    """A decode step's attention: padded with a mask, and over each row's own keys in one arena."""
    shape = bench.shape
    groups, size = shape.groups, shape.head_size
    generator = torch.Generator().manual_seed(0)
    for rows, most in STEPS:
        count = min(rows, bench.most)
        lengths = torch.randint(most // 8, most // 2, (count,), generator=generator)
        lengths[0] = most
        q_RHD = bench.random(count, shape.heads, size)
        k_RGTD = bench.random(count, groups, most, size)
        v_RGTD = torch.randn_like(k_RGTD)
        hidden_RT = torch.arange(most) >= lengths[:, None]
        mask_R11T = torch.zeros(count, 1, 1, most).masked_fill(hidden_RT[:, None, None], -torch.inf)
        mask_R11T = mask_R11T.to(bench.device, bench.dtype)
        grouped_RGHD = q_RHD.view(count, groups, -1, size)

        masked = partial(
            scaled_dot_product_attention, grouped_RGHD, k_RGTD, v_RGTD, attn_mask=mask_R11T
        )

        reading = {"rows": count, "longest": most, "keys": int(lengths.sum())}
        first = bench.seconds(masked)
        bench.say("masked", **reading, first_s=first, ms=bench.milliseconds(masked))
        if bench.on_gpu:
            for way, run in _flash(bench, q_RHD, k_RGTD, lengths).items():
                first = bench.seconds(run)
                bench.say(way, **reading, first_s=first, ms=bench.milliseconds(run))


def _flash(
    bench: Bench, q_RHD: torch.Tensor, k_RGTD: torch.Tensor, lengths: torch.Tensor
) -> dict[str, Callable[[], Any]]:
    """Torch's flash call over rows that lie one after the other, each with its own keys.

    By lengths, the call folds the heads of a group itself; by group, nothing is copied.
    """
    bounds = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    bounds[1:] = lengths.cumsum(0)
    groups, size = k_RGTD.shape[1::2]
    keys_GPD = bench.random(groups, int(bounds[-1]), size)
    starts = bounds.to(bench.device)
    used = lengths.to(bench.device, torch.int32)
    ends = torch.arange(len(lengths) + 1, device=bench.device, dtype=torch.int32)
    longest = int(lengths.max())
    ways = {
        "flash by lengths": FlashCall(ends, starts, used, 1, longest),
        "flash by group": SingleQueries(starts, used, longest),
    }
    given = (q_RHD, keys_GPD, keys_GPD, size**-0.5)
    return {way: partial(call.attend, *given) for way, call in ways.items()}


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) and value < 1000 else f"{value}"


PARTS = {"attention": attention, "products": products, "head": head, "sampling": sampling}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--shape", choices=SHAPES, default="6b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=ROWS[-1], help="no more rows than these")
    parser.add_argument("--out", type=Path, help="add each reading as a JSON line")
    options = parser.parse_args()
    torch.manual_seed(0)
    bench = Bench(options)
    if bench.on_gpu:
        print(torch.__version__, torch.cuda.get_device_name(options.device), flush=True)
    with torch.inference_mode():
        for name in options.part or PARTS:
            PARTS[name](bench)


if __name__ == "__main__":
    main()
