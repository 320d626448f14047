"""`tokenmill run`: one question, one streamed answer. The answer alone goes to stdout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenmill.cli.answer import stream_answer
from tokenmill.cli.command import EXIT_INTERRUPTED, command, examples
from tokenmill.cli.console import print_note, write_answer
from tokenmill.cli.conversation import Message
from tokenmill.cli.loading import loaded_llm
from tokenmill.cli.options import DEFAULT_MODEL, ONE_SEQUENCE, ModelOptions, SamplingOptions
from tokenmill.cli.prompting import chat_token_ids, has_chat_template, sampling_for_room
from tokenmill.errors import InvalidParameterError, UserError

if TYPE_CHECKING:
    from tokenmill.llm import LLM

_EPILOG = examples(
    ("Ask the demo model", 'tokenmill run "Why is the sky blue?"'),
    ("Ask another model, freely", 'tokenmill run Qwen/Qwen3-0.6B "Tell me a story." --temperature 0.8'),
    (
        "Read the prompt from a pipe, keep the answer",
        "cat notes.txt | tokenmill run --system Summarize. - > summary.txt",
    ),
    ("Continue a text instead of answering", 'tokenmill run --raw "Once upon a time" --max-tokens 64'),
)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "run", epilog=_EPILOG)(run)


def run(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[MODEL] PROMPT",
            help="What to ask; - reads it from standard input. With one argument the demo model answers.",
            show_default=False,
        ),
    ],
    *,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="MODEL", help="The model to ask.", show_default=DEFAULT_MODEL),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message: how to answer.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without chat template.")] = False,
    sampling: SamplingOptions,
    model_options: ModelOptions,
) -> None:
    """Ask a model one question and stream the answer to standard output.

    A model with a chat template gets the prompt as a user's message, others (and --raw) continue it. Without
    sampling options decoding is greedy: the answer is the same every time.
    """
    model, prompt = _model_and_prompt(words, model)
    if raw and system is not None:
        raise InvalidParameterError("--system needs the chat template, which --raw leaves out.", field="system")
    values = sampling.sampling_parameters()
    arguments = model_options.llm_arguments(model, **ONE_SEQUENCE)
    prompt = _read_stdin() if prompt == "-" else prompt
    with loaded_llm(arguments) as llm:
        interrupted = _answer(llm, prompt, system, values, raw=raw)
    if interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)


def _model_and_prompt(words: list[str], model: str | None) -> tuple[str | None, str]:
    """Split the arguments; the prompt is the last one.

    Raises:
        UserError: there are too many, or the one that there is names a model.
    """
    if len(words) > 2 or (model is not None and len(words) > 1):
        raise UserError(
            f"{len(words)} arguments are too many: {' '.join(words[:4])!r}.",
            remedy="Put the prompt in quotation marks.",
        )
    if len(words) == 2:
        return words[0], words[1]
    if model is None and _names_model(words[0]):
        raise UserError(f"{words[0]!r} is a model; the prompt is missing.", remedy=f"Try: tokenmill chat {words[0]}")
    return model, words[0]


def _names_model(word: str) -> bool:
    if word == DEFAULT_MODEL:
        return True
    if len(word) > 1024 or "\n" in word:
        return False
    path = Path(word)
    return (path.suffix == ".gguf" and path.is_file()) or (path / "config.json").is_file()


def _read_stdin() -> str:
    try:
        prompt = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InvalidParameterError(f"Standard input is not text: {error}.", field="prompt") from None
    if not prompt.strip():
        raise InvalidParameterError("Standard input holds no prompt.", field="prompt", remedy="Pipe some text into it.")
    return prompt


def _answer(llm: LLM, prompt: str, system: str | None, values: dict[str, Any], *, raw: bool) -> bool:
    """Stream the answer; whether Ctrl-C ended it."""
    if raw or not has_chat_template(llm):
        if system is not None:
            raise InvalidParameterError(
                f"--system needs a chat template, and {llm.model_name} has none.",
                field="system",
                remedy="Leave it out.",
            )
        if llm.tokenizer is None:
            raise UserError("The model was loaded without a tokenizer.", field="skip_tokenizer_init")
        token_ids = llm.tokenizer.encode(prompt)
    else:
        messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        token_ids = chat_token_ids(llm, [*messages, {"role": "user", "content": prompt}])
    result = llm.generate_async(token_ids, sampling_for_room(llm, values, len(token_ids)), streaming=True)
    answer = stream_answer(result, write_answer)
    write_answer("\n")
    if sys.stderr.isatty():
        print_note(answer.summary())
    return answer.interrupted
