"""Stream the answer to a conversation, word by word."""

from tokenmill import LLM, SamplingParams


def main() -> None:
    messages = [
        {"role": "system", "content": "You answer in one sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
    ]
    with LLM("smollm2:135m") as llm:
        for output in llm.chat_async(messages, SamplingParams(max_tokens=64), streaming=True):
            print(output.outputs[0].text_diff, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
