"""Transfer of weights from the policy to the engines, with verification by digests."""
