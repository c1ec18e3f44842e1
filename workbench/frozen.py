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
    # the last three: of JSON that is no notebook at all, which nbformat takes for an old one
    except (OSError, ValueError, AttributeError, TypeError, nbformat.ValidationError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"freeze: cannot read {path} as a notebook ({reason})") from None
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

    An explorer that never drew, for something was lacking, leaves the line that says so.

    Returns:
        How many explorers were found. Outputs of other widgets are left as they are.
    """
    from nbformat.v4 import new_output

    state = notebook.metadata.pop("widgets", {}).get(STATE, {}).get("state", {})
    found = 0
    for cell in notebook.cells:
        kept = []
        for output in cell.get("outputs", []):
            top = output.get("data", {}).get(VIEW, {}).get("model_id", "")
            if not _is_explorer(top, state):
                kept.append(output)
                continue
            found += 1
            kept += [new_output("display_data", data=part) for part in _parts(top, state)]
        if "outputs" in cell:
            cell.outputs = kept
    return found


def _values(name: str, state: dict) -> dict:
    return state.get(name.removeprefix("IPY_MODEL_"), {}).get("state", {})


def _is_explorer(name: str, state: dict) -> bool:
    """Whether it is a box that ends in the code of its view, as only explorers do."""
    below = [_values(child, state) for child in _values(name, state).get("children") or ()]
    return bool(below) and {"code", "dark"} <= set(below[-1])


def _parts(name: str, state: dict):
    """What a widget shows, from top to bottom, as the data of outputs."""
    values = _values(name, state)
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
    for child in values.get("children") or ():
        yield from _parts(child, state)
