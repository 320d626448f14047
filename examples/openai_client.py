"""Talk to `tokenmill serve` with the official OpenAI client (pip install openai).

Start the server first: tokenmill serve smollm2:135m --port 8000
"""

from openai import OpenAI


def main() -> None:
    client = OpenAI(base_url="http://localhost:8000/v1", api_key="unused")
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Name three colours."}],
        max_tokens=48,
        stream=True,
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
