// The live page: takes pictures, shows how far their scores are, and adds their cards to those of the report's script.
(() => {
  const find = (selector, root = document) => root.querySelector(selector);
  const AT_A_TIME = 2; // one is scored while the next is on its way
  const queue = [];
  let busy = 0;
  let number = 0;
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
      item.append(image, name, state, progress);
      find("#waiting").append(item);
      queue.push({ file, item, state, progress });
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
      for (const event of events) take(one, JSON.parse(event.slice(event.indexOf("data: ") + 6)));
    }
    if (one.item.isConnected && !one.failed) throw new Error("The service broke off; try again.");
  }

  function take(one, told) {
    if (told.error) fail(one, told.error);
    else if (told.card) show(one, told.card);
    else {
      one.state.textContent = told.steps ? `step ${Math.min(told.done, told.steps)} of ${told.steps}` : "waits for its turn";
      one.progress.max = told.steps || 1;
      one.progress.value = Math.min(told.done, told.steps);
    }
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
