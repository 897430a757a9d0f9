"""What is optimised: advantages, loss per token, KL, aggregation. Imports only torch, `types` and `interfaces`."""
