"""Block-scaled FP8 and MXFP4: quantized values, their scales, and which layouts leave blocks whole.

Pure tensor arithmetic and rules; reads no files and starts no process. Start reading at `block_fp8.py`.
"""
