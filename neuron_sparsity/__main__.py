"""`python -m neuron_sparsity` is `neuron-sparsity`."""

from __future__ import annotations

from neuron_sparsity.cli import main

if __name__ == "__main__":
    main()
