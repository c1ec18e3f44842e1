"""Explorers without a kernel: their last state, as plain outputs that any page can show."""

from __future__ import annotations

import html
import json
from pathlib import Path

from workbench.table import InputError, whole_file

VIEW = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"
PLOTLY = "application/vnd.plotly.v1+json"


def freeze(path: str | Path, out: str | Path = "") -> Path:
    """Write a notebook that shows its explorers as they were when it was saved.

    Args:
        path: A notebook saved by JupyterLab with Settings > Save Widget State Automatically.
        out: Where it goes; empty: beside it, ``NAME-frozen.ipynb``.

    Returns:
        Where it went.

    Raises:
        InputError: No notebook, or none that holds the state of an explorer.
    """
    import nbformat

    path = Path(path)
    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, ValueError) as error:
        raise InputError(f"freeze: cannot read {path} as a notebook ({error})") from None
    if not freeze_widgets(notebook):
        raise InputError(
            f"freeze: {path} holds no state of an explorer; switch on Settings > Save Widget State "
            "Automatically in JupyterLab, run the notebook and save it again"
        )
    target = Path(out) if str(out) else path.with_name(f"{path.stem}-frozen.ipynb")
    with whole_file(target) as file:
        file.write_text(nbformat.writes(notebook), encoding="utf-8")
    return target


def freeze_widgets(notebook) -> int:
    """Put figures and words in place of explorers, and drop the state of all widgets.

    Returns:
        How many explorers were found. Other widgets are left as they are.
    """
    from nbformat.v4 import new_output

    state = notebook.metadata.pop("widgets", {}).get(STATE, {}).get("state", {})
    found = 0
    for cell in notebook.cells:
        kept = []
        for output in cell.get("outputs", []):
            top = output.get("data", {}).get(VIEW, {}).get("model_id", "")
            parts = list(_parts(top, state))
            if not any(PLOTLY in part for part in parts):
                kept.append(output)
                continue
            found += 1
            kept += [new_output("display_data", data=part) for part in parts]
        if "outputs" in cell:
            cell.outputs = kept
    return found


def _parts(name: str, state: dict):
    """What a widget shows, from top to bottom, as the data of outputs."""
    model = state.get(name.removeprefix("IPY_MODEL_"), {})
    values = model.get("state", {})
    if values.get("frame"):
        yield {
            PLOTLY: {"data": json.loads(values["traces"]), "layout": json.loads(values["frame"])}
        }
    elif "code" in values and "dark" in values:
        if values["code"]:
            yield {"text/html": f"<pre>{html.escape(values['code'])}</pre>"}
    elif values.get("_model_name") == "HTMLModel" and values.get("value"):
        yield {"text/html": values["value"]}
    elif values.get("description") and "value" in values:
        shown = f"{values['description']}: {values['value']}"
        yield {"text/html": f"<div>{html.escape(shown)}</div>"}
    elif values.get("description") and values.get("_options_labels") and "index" in values:
        index = values["index"]
        chosen = [index] if isinstance(index, int) else index or ()
        labels = ", ".join(str(values["_options_labels"][i]) for i in chosen)
        yield {
            "text/html": f"<div>{html.escape(values['description'])}: {html.escape(labels)}</div>"
        }
    for child in values.get("children", ()):
        yield from _parts(child, state)
