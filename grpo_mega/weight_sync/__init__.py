"""Weights from the policy to the engines, with their proof."""
