"""PyTorch's files without PyTorch: archives, regions of tensors, pickles read as data."""
