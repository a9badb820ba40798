"""OpenAI's HTTP API over the engine; it needs the extra `serve`."""
