"""The operations as Triton kernels: one op a file, each a `@triton.jit` kernel and the function that launches it.

The launchers take what `neuron_sparsity.kernels` has validated, return what `kernels.reference` returns, and add to
the same state. Under `TRITON_INTERPRET=1`, set before the first import, the same kernels run on CPU tensors.
"""
