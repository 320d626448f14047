"""`LLM`: load a model and generate with it. Named and shaped as TensorRT-LLM's LLM API.

Example:
    with LLM("smollm2:135m") as llm:
        for output in llm.generate(["Hello, my name is", "The sky is"], SamplingParams(temperature=0.8, top_p=0.95)):
            print(output.outputs[0].text)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

from tokenmill.checkpoints.resolve import resolve_model, resolve_tokenizer
from tokenmill.config import LlmArgs
from tokenmill.errors import InvalidParameterError, QueueFullError, UnknownParameterError, UnsupportedFeatureError
from tokenmill.executor.description import EngineDescription
from tokenmill.executor.executor import GenerationExecutor
from tokenmill.executor.health import ExecutorHealth
from tokenmill.executor.result import GenerationResult
from tokenmill.executor.tokenizer_source import TokenizerSource
from tokenmill.inputs import (
    ChatMessages,
    PreparedRequest,
    PromptInput,
    is_single_conversation,
    is_single_prompt,
)
from tokenmill.outputs import RequestOutput
from tokenmill.program.engine_config import is_engine, read_config
from tokenmill.progress import generation_progress, loading_progress
from tokenmill.sampling_params import SamplingParams
from tokenmill.telemetry.stats import EngineStats, IterationStats
from tokenmill.tokenization import Tokenizer


class LLM:
    """A model, ready to generate.

    Threads, worker processes and memory are given back by `shutdown`, at the end of a `with` block, when the process
    ends, and when nothing refers to the object any more. Results of requests under way count as references, finished
    ones do not. `del llm` does not wait for the end, the next `LLM` does.

    Args:
        model: a directory in Hugging Face format, a `.gguf` file, a hub id or an alias such as `smollm2:135m`.
        tokenizer: a path, hub id or tokenizer object to use instead of the model's own.
        kwargs: the other fields of `tokenmill.config.LlmArgs`; each is documented there.

    Raises:
        UserError: a parameter or the model cannot be used; `field` names the parameter.
        OutOfMemoryError: the model or its cache does not fit.
    """

    def __init__(self, model: str | Path, tokenizer: Any = None, **kwargs: Any) -> None:
        self.args = _checked_arguments(model=model, tokenizer=tokenizer, **kwargs)
        self.model_name = str(model)
        path = resolve_model(model, revision=self.args.revision)
        source = _tokenizer_source(self.args, path)
        self._local_args = local_args = self.args.model_copy(update={"model": path})
        with loading_progress(self.model_name) as on_progress:
            self._executor = GenerationExecutor.create(local_args, source, on_progress)
        self.tokenizer: Tokenizer | None = None if source is None else source.load()
        self._inputs = self._executor.inputs

    def __repr__(self) -> str:
        found = self.description
        return (
            f"LLM({self.model_name!r}, backend={found.backend!r}, device={found.device!r}, "
            f"max_batch_size={found.max_batch_size}, max_seq_len={found.max_seq_len})"
        )

    # ---- generate --------------------------------------------------------------------------------------------

    @overload
    def generate(
        self,
        inputs: str | dict[str, Any],
        sampling_params: SamplingParams | None = None,
        use_tqdm: bool = True,
        *,
        priority: float = 0.5,
        timeout: float | None = None,
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        inputs: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: float = 0.5,
        timeout: float | None = None,
    ) -> Any: ...

    def generate(
        self,
        inputs: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: float = 0.5,
        timeout: float | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Generate for one prompt or many, and wait.

        Args:
            inputs: one prompt (text, token ids, a dictionary or chat messages) or a list of prompts of any kinds.
            sampling_params: one for all, or one for each prompt.
            use_tqdm: show a progress bar on a terminal.
            priority: for the priority queue; higher runs first.
            timeout: seconds that each request may take from when it is queued; None: any time.

        Returns:
            One output for one prompt, a list in the prompts' order for many.

        Raises:
            UserError: a prompt or parameter is wrong; nothing of the batch is left running.
            TokenmillError: a request failed.
        """
        single = is_single_prompt(inputs)
        prompts: list[Any] = [inputs] if single else list(inputs)
        params = _params_for_each(sampling_params, len(prompts))
        pairs = zip(prompts, params, strict=True)
        requests = [self._inputs.make_request(self._executor.next_request_id(), *pair, priority) for pair in pairs]
        outputs = self._run_all(requests, use_tqdm and not single, timeout)
        return outputs[0] if single else outputs

    def generate_async(
        self,
        inputs: PromptInput,
        sampling_params: SamplingParams | None = None,
        *,
        streaming: bool = False,
        priority: float = 0.5,
        timeout: float | None = None,
    ) -> GenerationResult:
        """Queue one prompt and return at once.

        Args:
            inputs: one prompt.
            sampling_params: None: greedy, 32 tokens.
            streaming: iterate over the result for one output a step.
            priority: for the priority queue; higher runs first.
            timeout: seconds from now, after which it ends with `RequestTimeoutError`; None: any time.

        Returns:
            A result to await, to iterate over, or to wait for with `result()`.

        Raises:
            UserError: the prompt or a parameter is wrong.
            QueueFullError: too many requests wait.
            ExecutorShutdownError: after `shutdown`.
        """
        return self._executor.generate_async(
            inputs, sampling_params, streaming=streaming, priority=priority, timeout=timeout
        )

    def chat(
        self,
        messages: ChatMessages | Sequence[ChatMessages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: float = 0.5,
        timeout: float | None = None,
        **template: Any,
    ) -> RequestOutput | list[RequestOutput]:
        """Answer one conversation or many, and wait.

        Args:
            messages: a list of {"role", "content"} dictionaries, or a list of such lists.
            sampling_params, use_tqdm, priority, timeout: as in `generate`.
            template: passed to `Tokenizer.apply_chat_template` (`add_generation_prompt`, `chat_template`, ...).

        Raises:
            InvalidParameterError: `messages` is malformed, or the model has no chat template.
        """
        if is_single_conversation(messages):
            conversation: Any = messages
            prompt = {"prompt_token_ids": self._inputs.apply_chat_template(conversation, template)}
            return self.generate(prompt, _single(sampling_params), use_tqdm, priority=priority, timeout=timeout)
        conversations: Sequence[Any] = messages
        prompts = [{"prompt_token_ids": self._inputs.apply_chat_template(one, template)} for one in conversations]
        outputs: list[RequestOutput] = self.generate(
            prompts, sampling_params, use_tqdm, priority=priority, timeout=timeout
        )
        return outputs

    def chat_async(
        self,
        messages: ChatMessages,
        sampling_params: SamplingParams | None = None,
        *,
        streaming: bool = False,
        priority: float = 0.5,
        timeout: float | None = None,
        **template: Any,
    ) -> GenerationResult:
        """Queue one conversation and return at once. See `chat` and `generate_async`."""
        prompt = {"prompt_token_ids": self._inputs.apply_chat_template(messages, template)}
        return self.generate_async(prompt, sampling_params, streaming=streaming, priority=priority, timeout=timeout)

    def save(self, path: str | Path) -> Path:
        """Write the model as an engine directory, which `LLM(path)` starts from without the checkpoint.

        Args:
            path: a new or empty directory, or an engine that is replaced.

        Raises:
            UnsupportedFeatureError: the model runs on the torch backend.
            InvalidParameterError: nothing can be written there.
        """
        if self.description.backend != "engine":
            raise UnsupportedFeatureError(
                "A model on the torch backend has no engine to save.", field="backend", remedy="Use backend='engine'."
            )
        return GenerationExecutor.save_engine(self._local_args, self.description, Path(path))

    def abort(self, request: GenerationResult | int) -> bool:
        """Cancel a request; False when it had ended already, however often.

        Raises:
            InvalidParameterError: `request` is neither a result nor an id.
        """
        request_id = request.request_id if isinstance(request, GenerationResult) else request
        if not isinstance(request_id, int):
            raise InvalidParameterError(
                f"request is of type {type(request).__name__}, not a result or its id.", field="request"
            )
        return self._executor.abort_request(request_id)

    # ---- state -----------------------------------------------------------------------------------------------

    @property
    def description(self) -> EngineDescription:
        """What runs: architecture, types, limits, memory plan."""
        return self._executor.description

    @property
    def max_seq_len(self) -> int:
        """Longest prompt plus answer, in tokens."""
        return self._executor.description.max_seq_len

    def stats(self) -> EngineStats:
        """Counters and gauges of the engine; reading them changes nothing."""
        return self._executor.stats()

    def get_stats(self, timeout: float = 0.0) -> list[IterationStats]:
        """Records of the engine's steps since the last call, oldest first; waits up to `timeout` seconds for one."""
        return self._executor.get_iteration_stats(timeout)

    def check_health(self) -> None:
        """Raise why no request can be run, if none can."""
        self._executor.check_health()

    def check_ready(self) -> None:
        """Raise why a request would not be taken now, if it would not: as `check_health`, or `QueueFullError`."""
        self._executor.check_ready()

    def health(self) -> ExecutorHealth:
        """What is known about the engine, or the worker processes, at this moment."""
        return self._executor.health()

    def check_integrity(self) -> None:
        """Assert that no cache block or slot is lost. Cheap; meant for tests and for support."""
        self._executor.check_integrity()

    def shutdown(self, grace_period: float | None = None) -> None:
        """Let running requests finish, end the rest with `ExecutorShutdownError`, free the model. Twice is harmless.

        Args:
            grace_period: seconds for running requests; None: `worker_config.grace_period`.
        """
        self._executor.shutdown(grace_period)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._executor.__exit__(exc_type, exc, traceback)

    # ---- many requests ---------------------------------------------------------------------------------------

    def _run_all(
        self, requests: list[PreparedRequest], show_progress: bool, timeout: float | None
    ) -> list[RequestOutput]:
        """Submit all, as fast as the queue takes them, and wait. An error or Ctrl-C cancels the rest."""
        outputs: list[RequestOutput] = []
        waiting: deque[GenerationResult] = deque()
        with generation_progress(len(requests), show_progress) as on_output:

            def wait_for_oldest() -> None:
                outputs.append(waiting[0].result())
                waiting.popleft()
                on_output(outputs[-1])

            try:
                for request, text in requests:
                    while True:
                        try:
                            waiting.append(self._executor.submit(request, prompt=text, timeout=timeout))
                            break
                        except QueueFullError:
                            if not waiting:
                                raise
                            wait_for_oldest()
                while waiting:
                    wait_for_oldest()
            except BaseException:
                for result in waiting:
                    result.abort()
                raise
        return outputs


def _checked_arguments(**values: Any) -> LlmArgs:
    try:
        return LlmArgs(**values)
    except UnknownParameterError as error:
        if error.field not in values or error.field not in SamplingParams.model_fields:
            raise
        raise UnknownParameterError(
            error.message,
            field=error.field,
            remedy=f"It is one of SamplingParams, which a request has: SamplingParams({error.field}=...).",
        ) from None


def _tokenizer_source(args: LlmArgs, model_path: Path) -> TokenizerSource | None:
    if args.skip_tokenizer_init:
        return None
    if args.tokenizer is None:
        return TokenizerSource(_own_tokenizer(model_path), args.tokenizer_mode)
    if isinstance(args.tokenizer, (str, Path)):
        path = resolve_tokenizer(args.tokenizer, revision=args.tokenizer_revision)
        return TokenizerSource(path, args.tokenizer_mode)
    return TokenizerSource(tokenizer=args.tokenizer)


def _own_tokenizer(model_path: Path) -> Path:
    """Where the tokenizer of a model or of a built engine is.

    Raises:
        InvalidParameterError: the engine was built without one.
    """
    if not is_engine(model_path):
        return model_path
    name = read_config(model_path).tokenizer
    if name is None:
        raise InvalidParameterError(
            f"The engine at {model_path} has no tokenizer.",
            field="tokenizer",
            remedy="Give one with tokenizer=..., or set skip_tokenizer_init.",
        )
    return model_path / name


def _params_for_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None:
        return [SamplingParams()] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    given: Any = params
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise InvalidParameterError(
            f"sampling_params is of type {type(given).__name__}, not SamplingParams or a list of them.",
            field="sampling_params",
        )
    if len(params) != count:
        raise InvalidParameterError(
            f"{len(params)} sampling_params for {count} prompts.",
            field="sampling_params",
            remedy="Pass one for all, or one for each prompt.",
        )
    return list(params)


def _single(params: SamplingParams | Sequence[SamplingParams] | None) -> SamplingParams | None:
    return params if params is None or isinstance(params, SamplingParams) else _params_for_each(params, 1)[0]
