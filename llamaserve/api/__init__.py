"""The HTTP resources: parse, validate, call, format. Knows nothing of llama.cpp."""
