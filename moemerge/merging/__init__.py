"""The merge itself: into a folder, to the Hub, or into one GGUF file."""
