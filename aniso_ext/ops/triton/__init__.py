"""The Triton kernels. Nothing here is imported before rows on a GPU need it: importing the package loads no Triton."""
