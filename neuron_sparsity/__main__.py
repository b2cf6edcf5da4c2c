"""`python -m neuron_sparsity` is `neuron-sparsity`."""

from __future__ import annotations

import sys

from neuron_sparsity.cli import main

if __name__ == "__main__":
    sys.exit(main())
