"""Generate for a batch of prompts. The script is TensorRT-LLM's quick start with another import."""

from tokenmill import LLM, SamplingParams


def main() -> None:
    prompts = ["Hello, my name is", "The capital of France is", "The future of AI is"]
    sampling_params = SamplingParams(temperature=0.8, top_p=0.95, seed=1, max_tokens=24)
    with LLM(model="smollm2:135m") as llm:
        for output in llm.generate(prompts, sampling_params):
            print(f"Prompt: {output.prompt!r}, generated: {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
