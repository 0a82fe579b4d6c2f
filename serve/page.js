// The live page: takes pictures, shows how far their scores are, and adds their cards to those of the report's script.
(() => {
  const find = (selector, root = document) => root.querySelector(selector);
  const AT_A_TIME = 2; // one is scored while the next is on its way
  const queue = [];
  let busy = 0;
  let number = 0;
  const COLOURS = find("main").dataset.colours.match(/../g).map((two) => parseInt(two, 16)); // red, green, blue, red, …
  const [drop, files, cards] = [find("#drop"), find("#files"), find("#cards")];

  function add(list) {
    const pictures = [...list].filter((file) => file.type.startsWith("image/") || !file.type);
    find("#said").textContent = pictures.length < list.length ? "Only pictures can be scored." : "";
    for (const file of pictures) {
      const item = document.createElement("li");
      const [image, name, state, progress] = ["img", "bdi", "span", "progress"].map((tag) => document.createElement(tag));
      image.alt = "";
      image.src = URL.createObjectURL(file);
      image.onload = image.onerror = () => URL.revokeObjectURL(image.src);
      name.textContent = file.name;
      state.textContent = "waits";
      state.className = "quiet";
      progress.setAttribute("aria-label", `Score of ${file.name}`);
      progress.value = 0;
      const sights = document.createElement("div");
      sights.className = "sights";
      item.append(image, name, state, progress, sights);
      find("#waiting").append(item);
      queue.push({ file, item, image, state, progress, maps: [] });
    }
    next();
  }

  function next() {
    while (busy < AT_A_TIME && queue.length) {
      busy += 1;
      const one = queue.shift();
      score(one)
        .catch((error) => fail(one, error.message || "The service does not answer."))
        .finally(() => {
          busy -= 1;
          next();
        });
    }
  }

  async function score(one) {
    const address = new URLSearchParams(location.search);
    address.set("name", one.file.name);
    let answer;
    for (;;) {
      answer = await fetch(`/page/card?${address}`, { method: "POST", body: one.file });
      if (answer.status !== 503 && answer.status !== 429) break;
      one.state.textContent = "waits for its turn";
      await new Promise((done) => setTimeout(done, 1000 * Number(answer.headers.get("Retry-After") || 5)));
    }
    if (!answer.ok) throw new Error((await answer.json()).error);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const events = (text + value).split("\n\n");
      text = events.pop();
      for (const event of events) await take(one, JSON.parse(event.slice(event.indexOf("data: ") + 6)));
    }
    if (one.item.isConnected && !one.failed) throw new Error("The service broke off; try again.");
  }

  async function take(one, told) {
    if (told.error) fail(one, told.error);
    else if (told.card) show(one, told.card);
    else {
      one.state.textContent = told.steps ? `step ${Math.min(told.done, told.steps)} of ${told.steps}` : "waits for its turn";
      one.progress.max = told.steps || 1;
      one.progress.value = Math.min(told.done, told.steps);
      if (told.size) await look(one, told);
    }
  }

  // What a score shows before it is there: the state of its restoration, and the maps of the crops judged so far.
  async function look(one, told) {
    if (told.state) {
      const picture = new Image();
      picture.src = `data:image/jpeg;base64,${told.state.jpeg}`;
      await picture.decode();
      one.restored ??= drawn(one, "The restoration so far", told.size);
      lay(one.restored, picture, told.state.at);
    }
    if (!told.maps.length) return;
    one.maps.push(...told.maps.map((map) => ({ ...map, index: atob(map.index) })));
    one.judged ??= drawn(one, "The score so far, place by place", told.size);
    const low = Math.min(...one.maps.map((map) => map.low));
    const span = Math.max(...one.maps.map((map) => map.high)) - low || 1;
    for (const map of one.maps) {
      const values = [...map.index].map((letter) => letter.charCodeAt(0)); // of 254; 255 is no number
      const pixels = values.flatMap((value) => {
        const unit = (map.low + ((map.high - map.low) * value) / 254 - low) / span;
        const at = 3 * Math.round(254 * Math.min(1, unit));
        return [...COLOURS.slice(at, at + 3), value < 255 ? 255 : 0];
      });
      const small = document.createElement("canvas");
      [small.width, small.height] = [map.columns, values.length / map.columns];
      small.getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(pixels), map.columns), 0, 0);
      lay(one.judged, small, map.at);
    }
  }

  function drawn(one, name, [height, width]) {
    const [figure, canvas, caption] = ["figure", "canvas", "figcaption"].map((tag) => document.createElement(tag));
    const scale = Math.min(1, 512 / Math.max(height, width));
    [canvas.width, canvas.height] = [width, height].map((side) => Math.max(1, Math.round(side * scale)));
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${name}, of ${one.file.name}`);
    caption.textContent = name;
    figure.append(canvas, caption);
    find(".sights", one.item).append(figure);
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    if (one.image.naturalWidth) lay(context, one.image, [0, 0, 1, 1]); // not every browser reads every format
    return context;
  }

  function lay(context, picture, [top, left, tall, wide]) {
    const { width, height } = context.canvas;
    context.drawImage(picture, left * width, top * height, wide * width, tall * height);
  }

  function fail(one, why) {
    one.failed = true;
    one.progress.remove();
    one.state.className = "bad";
    one.state.textContent = why;
  }

  function show(one, html) {
    one.item.remove();
    const holder = document.createElement("template");
    holder.innerHTML = html; // of our own service, where every text is escaped
    const card = find(".card", holder.content);
    number += 1;
    card.id = `image-${number}`;
    card.dataset.order = number;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "compare";
    button.textContent = "Compare";
    button.setAttribute("aria-pressed", "false");
    button.setAttribute("aria-label", `Compare ${card.dataset.name} with another`);
    button.addEventListener("click", () => choose(card));
    find("p.score", card).append(button);
    cards.append(card);
    card.dispatchEvent(new Event("card", { bubbles: true }));
    find("#said").textContent = `${card.dataset.name} has a score of ${find("p.score b", card).textContent}.`;
  }

  // Two cards side by side, and by how much their scores differ.
  let chosen = [];
  function choose(card) {
    chosen = chosen.includes(card) ? chosen.filter((other) => other !== card) : [...chosen, card].slice(-2);
    pair();
  }
  function pair() {
    for (const card of cards.children) {
      card.toggleAttribute("aria-current", chosen.includes(card));
      const button = find(".compare", card);
      if (button) button.setAttribute("aria-pressed", String(chosen.includes(card)));
    }
    const two = chosen.length === 2;
    document.documentElement.classList.toggle("two", two);
    find("#pair").hidden = !two;
    if (!two) return;
    const [better, worse] = [...chosen].sort((a, b) => b.dataset.score - a.dataset.score);
    const by = (better.dataset.score - worse.dataset.score).toFixed(4);
    find("#pair p").textContent = `${better.dataset.name} has the higher score, by ${by}, than ${worse.dataset.name}.`;
    find("#pair").scrollIntoView();
  }
  find("#unpair").addEventListener("click", () => {
    chosen = [];
    pair();
  });

  files.addEventListener("change", () => {
    add(files.files);
    files.value = "";
  });
  addEventListener("paste", (event) => add(event.clipboardData.files));
  for (const kind of ["dragover", "dragleave", "drop"]) {
    addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", kind === "dragover");
      if (kind === "drop") add(event.dataTransfer.files);
    });
  }
})();
