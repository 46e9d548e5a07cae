"""Text generation with llama.cpp, the only place that calls it. Knows nothing of HTTP, JSON, chat or other files."""
