"""Kill a study with SIGKILL again and again, take it up again each time, and let it end.

    python -m tests.integration.study_killing TEXT FOLDER DEATHS

Every attempt is a fork that dies before a random one of its operations on files, later ones the more often: so deaths
fall on every step, from the tokenizer to `study.json`.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import torch

import neuron_sparsity.study.grid
import neuron_sparsity.study.training  # noqa: F401 (loaded once, before the forks)
from tests.integration.killing import attempt
from tests.studies import a_config, run


def main() -> None:
    text, folder, deaths = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)  # a fork has no threads but its own
    config = a_config(text)

    def work(progress: Any) -> None:
        run(config, folder)

    plan = random.Random(5)
    for number in range(deaths):
        die_at = plan.randint(1, 60) + 40 * (number > 0)
        done, _ = attempt(work, folder, die_at, None)
        assert not done, f"attempt {number} was over before its operation {die_at} came"
    done, _ = attempt(work, folder, None, None)
    assert done
    print(f"finished after {deaths} deaths")


if __name__ == "__main__":
    main()
