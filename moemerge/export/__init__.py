"""A checkpoint as a GGUF file, for llama.cpp and what is built on it: written, made smaller, described to Ollama."""
