"""The messages of an engine process, without one."""

from __future__ import annotations

import pickle
import threading
from multiprocessing import Pipe
from queue import SimpleQueue

from glmbatch.errors import TransientError
from glmbatch.glm.engine.serving import STOPPED, Outbox, _send_all


def test_nothing_follows_the_news_of_the_end() -> None:
    here, there = Pipe()
    outbox: Outbox = SimpleQueue()
    # The second is an answer to a request that came when the engine had stopped.
    news = [(7, "result"), (STOPPED, "reason"), (7, TransientError("stopped"))]
    for pair in news:
        outbox.put(pair)
    sender = threading.Thread(target=_send_all, args=(there, outbox), daemon=True)
    sender.start()
    sender.join(10)
    assert not sender.is_alive()
    assert pickle.loads(here.recv_bytes()) == news[:2]
