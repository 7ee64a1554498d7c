"""Where other libraries look for attention: torch's own SDPA registry, and Hugging Face transformers."""
