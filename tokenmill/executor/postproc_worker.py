"""`PostprocWorker`: turns tokens into text in a process of its own, away from engines and callers.

Started by the proxy when `num_postprocess_workers` is 1 or more. A request's tokens all go to the same one. It imports
no torch.
"""

from __future__ import annotations

from tokenmill.errors import ProtocolError
from tokenmill.executor.child import Child
from tokenmill.executor.messages import (
    Forget,
    Heartbeat,
    OpenRequest,
    PostprocBatch,
    Ready,
    Shutdown,
    StartPostproc,
    StepOutputs,
)
from tokenmill.executor.postproc import Postprocessor
from tokenmill.tokenization import load_tokenizer


class PostprocWorker:
    """Answers the proxy.

    Args:
        postprocessor: does the work.
        child: the connection to the proxy.
    """

    def __init__(self, postprocessor: Postprocessor, child: Child) -> None:
        self._postprocessor = postprocessor
        self._child = child

    def serve(self, heartbeat_interval: float) -> None:
        """Take tokens until the proxy says `Shutdown`."""
        self._child.beat(heartbeat_interval, lambda: Heartbeat(self._postprocessor.num_requests > 0))
        while True:
            match self._child.receive():
                case PostprocBatch(deltas, ended):
                    result = self._postprocessor.process(deltas, ended)
                    if result.outputs or result.ended or result.stop_hits:
                        self._child.send(StepOutputs(result.outputs, result.ended, result.stop_hits))
                case OpenRequest(attempt, sampling, prompt_token_ids):
                    self._postprocessor.open(attempt, sampling, prompt_token_ids)
                case Forget(attempt):
                    self._postprocessor.forget(attempt)
                case Shutdown():
                    return
                case message:
                    raise ProtocolError(f"A postprocessing worker cannot answer {type(message).__name__}.")


def run_postproc_worker(child: Child) -> None:
    """The job of a postprocessing worker: load the tokenizer and serve."""
    start = child.receive()
    assert isinstance(start, StartPostproc), f"{start} is no start"
    try:
        location = start.tokenizer
        tokenizer = None if location is None else load_tokenizer(location.path, mode=location.mode)
    except Exception as error:  # whatever is wrong with a tokenizer is the proxy's to tell
        child.start_failed(error)
        return
    child.send(Ready(None))
    PostprocWorker(Postprocessor(tokenizer), child).serve(start.heartbeat_interval)
