"""The SGLang engine: SGLang in processes beside the training processes."""
