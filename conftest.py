"""What is not collected: the Triton kernels where Triton cannot be installed (it is offered for Linux only)."""

from importlib.util import find_spec

collect_ignore_glob = (
    [] if find_spec("triton") else ["neuron_sparsity/kernels/triton/*.py", "tests/kernels/wrong_kernels.py"]
)
