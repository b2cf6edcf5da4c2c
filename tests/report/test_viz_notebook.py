"""ns.viz in a notebook: run, and exported to HTML. `make notebooks` has what it takes, and runs this."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

BUNDLE = "DecompressionStream"  # once a notebook, packed

CELLS = [
    "import neuron_sparsity as ns\nfrom pathlib import Path",
    "ns.viz.text(['a', ' b'], [[1.0], [-2.0]], measured='two words')",
    "ns.viz.text(['c', ' d'], [[1.0], [-2.0]], measured='two more')",
    "ns.viz.text(['c', ' d'], [[1.0], [-2.0]]).figure()",
]


def test_an_exported_notebook_has_the_bundle_once(tmp_path: Path) -> None:
    pytest.importorskip("ipykernel", reason="needs the extra notebooks: make notebooks")
    import nbclient
    import nbconvert
    import nbformat

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    outputs = [cell["outputs"][0]["data"] for cell in notebook.cells[1:]]
    assert ["text/html" in data for data in outputs] == [True, True, False]
    assert "image/png" in outputs[2], "a figure is shown without pyplot"
    assert json.dumps(outputs).count(BUNDLE) == 1
    html, _ = nbconvert.HTMLExporter(embed_images=True).from_notebook_node(notebook)
    assert html.count(BUNDLE) == 1
    assert html.count('class="ns-view"') == 2
