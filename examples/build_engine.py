"""Compile a model to an engine, keep it, and generate from the directory: no checkpoint and no model code is needed."""

from pathlib import Path
from tempfile import TemporaryDirectory

from tokenmill import LLM, BuildConfig, SamplingParams, build


def main() -> None:
    with TemporaryDirectory() as folder:
        engine_dir = Path(folder) / "engine"
        build("smollm2:135m", BuildConfig(max_batch_size=8, max_seq_len=1024)).save(engine_dir)
        with LLM(engine_dir) as llm:
            output = llm.generate("The capital of France is", SamplingParams(temperature=0.0, max_tokens=16))
            print(output.outputs[0].text)


if __name__ == "__main__":
    main()
