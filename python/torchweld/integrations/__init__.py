"""The kernels of attention in torch's own SDPA registry and in Hugging Face transformers."""
