"""Published models: families, their folders and GGUF files read and written, their tokenizers and chat templates."""
