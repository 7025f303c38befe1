"""The Triton kernels; nothing here is imported before a GPU asks for it, so that importing the package loads no Triton."""
