"""GGUF files and Hugging Face folders, from a model, a plan and what was measured."""
