"""Transports that move buckets between ranks: process groups (gloo, NCCL), shared memory, CUDA IPC.

Each implements `base.Transport`; `factory.py` chooses one for each kind of link. A transport knows no tensor names.
"""
