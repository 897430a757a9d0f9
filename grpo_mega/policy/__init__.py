"""The trained model; the only importer of Megatron."""
