"""The caller's side of an engine: requests go in ahead, results come out. Runs in its thread.

Knows neither the model nor where it runs. No tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from glmbatch.errors import GlmbatchError
from glmbatch.glm.engine.protocol import (
    ClassifyRequest,
    ClassifyResult,
    GenerateRequest,
    GenerateResult,
)
from glmbatch.glm.engine.queue import Call
from glmbatch.glm.engine.validate import ModelLimits, sort_out

# Requests of one call in the engine at once: enough to pack batches well, few enough for memory.
LOOK_AHEAD = 4096
# A call submits at least this many requests between two results, so that the engine stays busy
# while results are waiting to be read.
STRIDE = 16

Request = TypeVar("Request", ClassifyRequest, GenerateRequest)
Result = TypeVar("Result", ClassifyResult, GenerateResult)


def serve(
    requests: Iterable[Request],
    call: Call[Result],
    limits: ModelLimits,
    submit: Callable[[Request], None],
    flush: Callable[[], None] = lambda: None,
) -> Iterator[Result]:
    """Yield the result of each request as `call` gets it. Closing the iterator cancels the call.

    What the `limits` refuse is answered at once. `submit` hands the rest to the engine.
    It may keep some back to send them together: `flush` sends these before the caller waits.
    """
    source = iter(requests)
    in_engine = 0
    more = True
    try:
        while True:
            taken = 0
            while more and in_engine < LOOK_AHEAD and (taken < STRIDE or call.results.empty()):
                request = next(source, None)
                more = request is not None
                if request is not None:
                    valid, refused = sort_out(request, limits)
                    for result in refused:
                        call.deliver(result)
                    if valid is not None:
                        submit(valid)
                        in_engine += 1 + len(valid.beside)
                    in_engine += len(refused)
                    taken += 1
            if not in_engine:
                return
            if in_engine < LOOK_AHEAD or call.results.empty():
                flush()
            result = call.results.get()
            if isinstance(result, Exception):
                try:
                    raise result
                finally:
                    del result  # its traceback has this frame, so both would stay, with the engine
            in_engine -= 1
            yield result
    finally:
        call.cancelled = True


def copy_of(error: GlmbatchError) -> GlmbatchError:
    """A copy of `error`, because each thread that raises it adds its own traceback."""
    copy = type(error)(*error.args)
    copy.__cause__ = error.__cause__
    return copy
