"""The flat parameter space: layout of tensors in parts, dtypes and rounding, block-wise
safetensors.
"""
