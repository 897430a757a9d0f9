"""Model families as tables: how each Megatron parameter is made of Hugging Face tensors."""
