"""Run several requests at once in an event loop, and cancel one of them."""

import asyncio

from tokenmill import LLM, SamplingParams


async def main() -> None:
    with LLM("smollm2:135m") as llm:
        poem = llm.generate_async("A poem about rivers:", SamplingParams(max_tokens=200), streaming=True)
        facts = [
            llm.generate_async(f"A fact about {thing}:", SamplingParams(max_tokens=24))
            for thing in ("salt", "iron", "wool")
        ]
        async for output in poem:
            if output.outputs[0].length >= 20:
                poem.abort()
        print("poem:", output.outputs[0].finish_reason, "after", output.outputs[0].length, "tokens")
        for output in await asyncio.gather(*(fact.aresult() for fact in facts)):
            print(f"{output.prompt} {output.outputs[0].text.strip()}")


if __name__ == "__main__":
    asyncio.run(main())
