"""Write a checkpoint as a GGUF file for llama.cpp and what is built on it, quantise it, and describe it to Ollama."""
