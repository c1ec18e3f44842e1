// The code of a view with a button that copies it; it also tells whether the page is dark.
export default {
  render({ model, el }) {
    const dark = () => {
      const told = document.body.dataset.jpThemeLight;
      const is = told ? told === "false" : matchMedia("(prefers-color-scheme: dark)").matches;
      if (model.get("dark") !== is) { model.set("dark", is); model.save_changes(); }
    };
    const watch = new MutationObserver(dark);
    watch.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light"] });
    dark();
    // the arrow keys are a control's own here; JupyterLab would take them to go to another cell
    const own = ({ target }) => target.setAttribute("data-lm-suppress-shortcuts", "true");
    const placed = new ResizeObserver(() => {
      const explorer = el.closest(".workbench-explorer");
      if (explorer) { explorer.addEventListener("focusin", own); placed.disconnect(); }
    });
    placed.observe(el);
    const details = document.createElement("details");
    const summary = document.createElement("summary");
    summary.textContent = "The same as code";
    const button = document.createElement("button");
    button.className = "jupyter-button workbench-copy";
    button.textContent = "Copy as code";
    const code = document.createElement("pre");
    code.className = "workbench-code";
    code.style.cssText = "white-space: pre-wrap; user-select: text; margin: 4px 0; padding: 8px;"
      + "border: 1px solid var(--jp-border-color2, #bbb); color: var(--jp-content-font-color1, inherit)";
    const show = () => { code.textContent = model.get("code"); };
    model.on("change:code", show);
    show();
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(model.get("code"));
        button.textContent = "Copied";
      } catch {
        details.open = true;
        getSelection().selectAllChildren(code);
        button.textContent = "Selected: press Ctrl+C";
      }
      setTimeout(() => { button.textContent = "Copy as code"; }, 2000);
    });
    details.append(summary, code);
    el.append(button, details);
    return () => { watch.disconnect(); placed.disconnect(); model.off("change:code", show); };
  },
};
