"use strict";
const holder = document.getElementById("documents");
if (holder) {
  Bokeh.set_log_level("error");
  const [documents, item] = JSON.parse(holder.textContent);
  item.roots = Object.fromEntries(item.root_ids.map((id, number) => [id, `chart-${number}`]));
  const drawn = Bokeh.embed.embed_items(documents, [item]);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const paint = async () => {
    const style = getComputedStyle(document.documentElement);
    const text = style.getPropertyValue("--quiet").trim();
    for (const view of (await drawn).flatMap((views) => [...(views.roots ?? views)])) {
      for (const model of view.model.references()) {
        if (model.type.endsWith("Axis")) model.major_label_text_color = text;
        if (model.type === "Legend") model.label_text_color = text;
      }
    }
  };
  paint();
  dark.addEventListener("change", paint);
}
const shown = document.body.dataset.state;
if (shown) {
  setInterval(async () => {
    const answer = await fetch("/state").catch(() => null); // the server may be gone; the page stays
    if (answer?.ok && (await answer.text()) !== shown) location.reload();
  }, 5000);
}
