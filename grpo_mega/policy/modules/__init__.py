"""Modules of the policy that replace or extend Megatron-Core's, inserted through its layer specs.

Start reading at `policy_model.py`.
"""
