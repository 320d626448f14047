"""OpenAI's endpoints: chat completions, completions, models. One router a file; `create_app` mounts them."""
