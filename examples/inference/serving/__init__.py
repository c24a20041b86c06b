"""A batch server: continuous batching over a paged cache, and OpenAI's completions over HTTP."""
