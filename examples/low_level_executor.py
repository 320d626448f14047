"""Drive the engine with token ids: enqueue requests, take responses as they come, look at what the engine did."""

from tokenmill.checkpoints.resolve import resolve_model
from tokenmill.executor import Executor, ExecutorConfig, ModelType, OutputConfig, Request, SamplingConfig
from tokenmill.tokenization import load_tokenizer

MODEL = "smollm2:135m"
PROMPTS = ["The capital of France is", "Water boils at", "The opposite of hot is"]


def main() -> None:
    tokenizer = load_tokenizer(resolve_model(MODEL))
    stop_words = [tokenizer.encode(word, add_special_tokens=False) for word in (".", "\n")]
    with Executor(MODEL, ModelType.DECODER_ONLY, ExecutorConfig(max_batch_size=8)) as executor:
        requests = [
            Request(
                tokenizer.encode(prompt),
                max_tokens=32,
                streaming=True,
                sampling_config=SamplingConfig(temperature=0.7, top_p=0.9, seed=1),
                output_config=OutputConfig(exclude_input_from_output=True),
                stop_words=stop_words,
                client_id=number,
            )
            for number, prompt in enumerate(PROMPTS)
        ]
        answers: dict[int, list[int]] = {request_id: [] for request_id in executor.enqueue_requests(requests)}
        num_open = len(answers)
        while num_open:
            for response in executor.await_responses(timeout=30.0):
                if response.has_error():
                    print(f"request {response.client_id}: {response.error_msg}")
                else:
                    answers[response.request_id] += response.result.output_token_ids[0]
                num_open -= response.is_final
        for prompt, token_ids in zip(PROMPTS, answers.values(), strict=True):
            print(f"{prompt}{tokenizer.decode(token_ids)}")
        steps = executor.get_latest_iteration_stats()
        batch = max(stats.num_active_requests for stats in steps)
        print(f"{len(steps)} iterations, up to {batch} requests at once, the last: {steps[-1].to_json()}")


if __name__ == "__main__":
    main()
