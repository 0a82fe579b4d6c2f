"use strict";
// The page is complete without this script; it adds sorting, filters, the enlarged view and the theme button.
// It keeps no copy of the data: everything is read from the page's own elements.
(() => {
  const find = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const short = (value) => String(Number(value.toPrecision(3))).replace("-", "−");

  const page = document.documentElement;
  const controls = find("#controls");
  const cards = all(".card");
  const failures = find("#failures");
  const table = find("#table");
  page.classList.add("js");

  // Light and dark: the system's choice until the button says otherwise.
  const theme = find("#theme");
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (page.dataset.theme ? page.dataset.theme === "dark" : systemDark.matches);
  const nameTheme = () => (theme.textContent = isDark() ? "Light" : "Dark");
  theme.addEventListener("click", () => {
    page.dataset.theme = isDark() ? "light" : "dark";
    nameTheme();
  });
  systemDark.addEventListener("change", nameTheme);
  nameTheme();
  theme.hidden = false;

  // Sorting. Rows of the table and cards are the same images in the same order.
  const rows = new Map(table ? all("tbody tr", table).map((row) => [row.dataset.order, row]) : []);
  const collator = new Intl.Collator(undefined, { numeric: true });
  const number = (card, key) => (card.dataset[key] === undefined ? NaN : Number(card.dataset[key]));
  function compare(a, b, key, direction) {
    if (key === "name") return direction * collator.compare(a.dataset.name, b.dataset.name);
    const [x, y] = [number(a, key), number(b, key)];
    // Images without this number come last in either direction.
    if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y);
    return direction * (x - y);
  }
  let order = cards;
  function sort() {
    const [key, direction] = [controls.key.value, Number(controls.direction.value)];
    const byOrder = (a, b) => number(a, "order") - number(b, "order");
    order = [...cards].sort((a, b) => compare(a, b, key, direction) || byOrder(a, b));
    find("#cards").append(...order);
    if (!table) return;
    find("tbody", table).append(...order.map((card) => rows.get(card.dataset.order)));
    for (const head of all("thead th", table)) {
      if (head.dataset.key === key) head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    }
  }
  for (const head of table ? all("thead th", table) : []) {
    const key = head.dataset.key;
    if (!all("option", controls.key).some((option) => option.value === key)) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const again = controls.key.value === key;
      controls.direction.value = again ? String(-Number(controls.direction.value)) : "1";
      controls.key.value = key;
      sort();
    });
  }

  // Filters.
  function filter() {
    const text = controls.text.value.trim().toLocaleLowerCase();
    const [low, high] = [controls.low, controls.high].map((input) => input.valueAsNumber);
    const onlyFailures = controls.failures.checked;
    const named = (item) => item.dataset.name.toLocaleLowerCase().includes(text);
    let count = 0;
    for (const card of cards) {
      const score = number(card, "score");
      const fits = named(card) && (isNaN(low) || score >= low) && (isNaN(high) || score <= high);
      card.hidden = !fits || onlyFailures;
      if (table) rows.get(card.dataset.order).hidden = card.hidden;
      if (!card.hidden) count += 1;
    }
    let message = `${count} of ${cards.length} images shown`;
    if (failures) {
      const failed = all("tbody tr", failures);
      for (const row of failed) row.hidden = !named(row);
      const left = failed.filter((row) => !row.hidden).length;
      failures.hidden = left === 0;
      if (onlyFailures) message = `${left} of ${failed.length} failures shown, above`;
    }
    find("#numbers").hidden = onlyFailures;
    find("#shown").textContent = message;
  }
  controls.addEventListener("input", (event) => {
    if (["key", "direction"].includes(event.target.name)) sort();
    else if (event.target.name === "range") recolour();
    else if (event.target.name === "overlay") overlay();
    else filter();
  });
  controls.addEventListener("reset", () => {
    // The fields change after this event.
    setTimeout(() => {
      sort();
      filter();
      recolour();
      overlay();
    });
  });
  controls.addEventListener("submit", (event) => event.preventDefault());

  // The histogram: a bar tells its count, and clicked shows its images.
  const told = find("#bar");
  const hint = told && told.textContent;
  for (const bin of all(".bin")) {
    const tell = () => (told.textContent = `Score ${bin.getAttribute("aria-label")}`);
    const rest = () => (told.textContent = hint);
    bin.setAttribute("role", "button");
    bin.addEventListener("pointerenter", tell);
    bin.addEventListener("pointerleave", rest);
    bin.addEventListener("focus", tell);
    bin.addEventListener("blur", rest);
    const choose = () => {
      controls.low.value = bin.dataset.low;
      controls.high.value = bin.dataset.high;
      filter();
      find("#images").scrollIntoView();
    };
    bin.addEventListener("click", choose);
    bin.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      choose();
    });
  }

  // Maps are PNGs whose palette colours indices into the map's own range: replacing the palette changes the range of
  // the colours, and a palette of greys gives the indices back.
  const colours = find("main").dataset.colours.match(/../g).map((byte) => parseInt(byte, 16));
  const greys = Array.from({ length: colours.length }, (_, i) => Math.floor(i / 3));
  const PALETTE = 37; // signature, header chunk and length come before: here begins the palette's chunk type
  const crcTable = Uint32Array.from({ length: 256 }, (_, n) => {
    for (let bit = 0; bit < 8; bit += 1) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
    return n;
  });
  function withPalette(source, palette) {
    const bytes = Uint8Array.from(atob(source.split(",")[1]), (character) => character.charCodeAt(0));
    bytes.set(palette, PALETTE + 4);
    const end = PALETTE + 4 + 768;
    let crc = 0xffffffff;
    for (let i = PALETTE; i < end; i += 1) crc = crcTable[(crc ^ bytes[i]) & 255] ^ (crc >>> 8);
    new DataView(bytes.buffer).setUint32(end, ~crc >>> 0);
    let text = "";
    for (const byte of bytes) text += String.fromCharCode(byte);
    return `data:image/png;base64,${btoa(text)}`;
  }
  // A live page's maps come each in its own range; the range that they share grows as they come.
  const live = "live" in find("main").dataset;
  function shared(kind) {
    const figures = all(`figure.map[data-kind="${kind}"]`);
    return [Math.min(...figures.map((f) => f.dataset.low)), Math.max(...figures.map((f) => f.dataset.high))];
  }
  function spread(figure, low, high) {
    const [from, to] = [Number(figure.dataset.low), Number(figure.dataset.high)];
    const last = colours.length / 3 - 1;
    return Uint8Array.from(colours, (_, i) => {
      const value = from + ((to - from) * Math.floor(i / 3)) / last;
      return colours[3 * Math.round((last * (value - low)) / (high - low || 1)) + (i % 3)];
    });
  }
  const originals = new Map(); // figure → its picture and legend as written
  function recolour() {
    const own = controls.range.value === "own";
    for (const figure of all("figure.map")) {
      const [image, low, high] = [find("img", figure), find(".low", figure), find(".high", figure)];
      if (!originals.has(figure)) originals.set(figure, [image.src, low.textContent, high.textContent]);
      let [source, lowText, highText] = originals.get(figure);
      if (live) {
        const ends = shared(figure.dataset.kind);
        source = withPalette(source, spread(figure, ...ends));
        [lowText, highText] = ends.map(short);
      }
      image.src = own ? withPalette(source, colours) : source;
      low.textContent = own ? short(Number(figure.dataset.low)) : lowText;
      high.textContent = own ? short(Number(figure.dataset.high)) : highText;
    }
  }

  function overlay() {
    const over = controls.overlay.value === "yes";
    for (const base of all(".base")) {
      base.toggleAttribute("data-over", over);
      base.style.backgroundImage = over ? `url("${originalOf(base).src}")` : "";
    }
  }

  // The enlarged view.
  const viewer = find("#viewer");
  const frame = find(".frame", viewer);
  const [under, over] = [find(".under", viewer), find(".over", viewer)];
  const blend = find("#blend");
  const value = find("#viewer-value");
  const pixels = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  let shown = null; // the figure
  let readable = null; // the figure whose indices are on the canvas
  const cardOf = (figure) => figure.closest(".card");
  const originalOf = (element) => find('figure[data-kind="dis"] img', cardOf(element));
  const visibleCards = () => order.filter((card) => !card.hidden && find("figure", card));

  function show(figure) {
    shown = figure;
    const card = cardOf(figure);
    const kind = figure.dataset.kind;
    const image = find("img", figure);
    const about = find(`.reading [data-about="${kind}"]`);
    const isMap = figure.classList.contains("map");
    find("#viewer-title bdi").textContent = card.dataset.name;
    const size = `${card.dataset.width} × ${card.dataset.height} pixels`;
    const reduced = Number(image.getAttribute("width")) < Number(card.dataset.width);
    const kept = reduced ? `, reduced to ${image.getAttribute("width")} × ${image.getAttribute("height")}` : "";
    find("#viewer-score").textContent = `Score ${find("p.score b", card).textContent}. ${size}${kept}.`;
    find("#viewer-picture").replaceChildren(...find("b", figure).cloneNode(true).childNodes);
    find("#viewer-about").textContent = about ? find("dd", about).textContent : "";
    frame.classList.toggle("map", isMap);
    frame.style.setProperty("--ratio", card.dataset.width / card.dataset.height);
    under.src = originalOf(figure).src;
    over.src = image.src;
    over.alt = image.alt;
    find(".legend", viewer).hidden = !isMap;
    value.textContent = isMap ? "Point at the map to read a value." : "";
    find(".blend", viewer).hidden = kind === "dis";
    if (isMap) {
      find(".low", viewer).textContent = find(".low", figure).textContent;
      find(".high", viewer).textContent = find(".high", figure).textContent;
      readIndices(figure);
    }
    setBlend(isMap && controls.overlay.value ? 60 : 100);
    if (!viewer.open) viewer.showModal();
  }
  function setBlend(percent) {
    blend.value = percent;
    over.style.opacity = percent / 100;
    // In grey under a map, so that all colour is the map's.
    under.style.filter = frame.classList.contains("map") && percent > 0 ? "grayscale(1)" : "";
  }
  function readIndices(figure) {
    readable = null;
    const image = new Image();
    image.onload = () => {
      if (shown !== figure) return;
      pixels.canvas.width = image.naturalWidth;
      pixels.canvas.height = image.naturalHeight;
      pixels.drawImage(image, 0, 0);
      readable = figure;
    };
    image.src = withPalette(find("img", figure).src, greys);
  }
  frame.addEventListener("pointermove", (event) => {
    if (!shown || readable !== shown) return;
    const box = frame.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
    if (x < 0 || y < 0 || x >= 1 || y >= 1) return;
    const { width, height } = pixels.canvas;
    const [index, , , alpha] = pixels.getImageData(Math.floor(x * width), Math.floor(y * height), 1, 1).data;
    const [low, high] = [Number(shown.dataset.low), Number(shown.dataset.high)];
    const card = cardOf(shown);
    const place = `at ${Math.floor(x * card.dataset.width)}, ${Math.floor(y * card.dataset.height)}`;
    value.textContent = alpha ? `${short(low + ((high - low) * index) / 254)} ${place}` : `No value ${place}`;
  });
  // Left and right go through all pictures of all images shown, up and down through one kind of picture.
  function step(by) {
    const figures = visibleCards().flatMap((card) => all("figure", card));
    const next = figures[figures.indexOf(shown) + by];
    if (next) show(next);
  }
  function stepImage(by) {
    const near = visibleCards();
    const card = near[near.indexOf(cardOf(shown)) + by];
    if (card) show(find(`figure[data-kind="${shown.dataset.kind}"]`, card) || find("figure", card));
  }
  const acts = {
    back: () => step(-1),
    on: () => step(1),
    up: () => stepImage(-1),
    down: () => stepImage(1),
    flip: () => setBlend(Number(blend.value) > 50 ? 0 : 100),
    close: () => viewer.close(),
  };
  const keys = { ArrowLeft: "back", ArrowRight: "on", ArrowUp: "up", ArrowDown: "down", o: "flip", O: "flip" };
  viewer.addEventListener("keydown", (event) => {
    const act = keys[event.key];
    if (!act || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.target === blend && event.key.startsWith("Arrow")) return; // the slider's own keys
    event.preventDefault();
    acts[act]();
  });
  viewer.addEventListener("click", (event) => {
    const button = event.target.closest("[data-act]");
    if (button) acts[button.dataset.act]();
  });
  blend.addEventListener("input", () => setBlend(blend.value));
  viewer.addEventListener("close", () => {
    if (viewer.open) return; // the event comes late: the next picture is already shown
    if (shown) find("img", shown).focus(); // where the arrow keys have led, not where they began
    shown = null;
  });
  function openable(root) {
    for (const image of all("figure img", root)) {
      image.tabIndex = 0;
      image.setAttribute("role", "button");
      image.setAttribute("aria-haspopup", "dialog");
    }
  }
  openable(document);
  find("#cards").addEventListener("card", (event) => {
    cards.push(event.target);
    openable(event.target);
    arrange();
    recolour();
    overlay();
  });
  find("#cards").addEventListener("click", (event) => {
    if (event.target.matches("figure img")) show(event.target.closest("figure"));
  });
  find("#cards").addEventListener("keydown", (event) => {
    if (!event.target.matches("figure img") || (event.key !== "Enter" && event.key !== " ")) return;
    event.preventDefault();
    show(event.target.closest("figure"));
  });

  // Paper shows what is folded away, and shows it folded again afterwards.
  let unfolded = [];
  addEventListener("beforeprint", () => {
    unfolded = all("details:not([open])").filter((details) => !details.closest(".card, .distribution"));
    for (const details of unfolded) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of unfolded) details.open = false;
  });

  function arrange() {
    find(".check.failures").hidden = !failures;
    find(".maps").hidden = !find("figure.map");
    controls.hidden = cards.length + (failures ? 1 : 0) < 2;
    sort();
    filter();
  }
  arrange();
})();
