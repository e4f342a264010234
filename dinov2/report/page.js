"use strict";
const holder = document.getElementById("documents");
if (holder) {
  Bokeh.set_log_level("error");
  const [documents, item] = JSON.parse(holder.textContent);
  item.roots = Object.fromEntries(item.root_ids.map((id, number) => [id, `chart-${number}`]));
  const drawn = Bokeh.embed.embed_items(documents, [item]);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const models = async () => (await drawn).flatMap((views) => [...(views.roots ?? views)]).flatMap((view) => [...view.model.references()]);
  const paint = async () => {
    const text = getComputedStyle(document.documentElement).getPropertyValue("--quiet").trim();
    for (const model of await models()) {
      if (model.type.endsWith("Axis")) model.major_label_text_color = text;
    }
  };
  paint();
  dark.addEventListener("change", paint);
  for (const box of document.querySelectorAll("[data-run]")) {
    box.addEventListener("change", async () => {
      for (const model of await models()) {
        if (model.type === "GlyphRenderer" && model.name === box.dataset.run) model.visible = box.checked;
      }
    });
  }
}
const shown = document.body.dataset.state;
if (shown) {
  setInterval(async () => {
    const answer = await fetch("/state").catch(() => null); // the server may be gone; the page stays
    if (answer?.ok && (await answer.text()) !== shown) location.reload();
  }, 5000);
}
