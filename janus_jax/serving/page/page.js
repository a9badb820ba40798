// The page: a client of the server's own API, and of nothing else.

const $ = (id) => document.getElementById(id);
const SEEDS = 2 ** 32;
const AT_ONCE = 5; // a browser opens six connections to a server: one is left for the chat
const PATIENCE = 300; // seconds for which a full queue is waited for
const LARGE = 3 << 20, SIDE = 2048; // larger files are sent smaller: the model sees 384 pixels a side

function make(tag, about = {}, ...children) {
  const made = Object.assign(document.createElement(tag), about);
  made.append(...children);
  return made;
}

function say(place, message) {
  place.textContent = message;
  place.hidden = !message;
}

// ---------------------------------------------------------------- the API

let key = sessionStorage.getItem("key") ?? "";

/** An answer; `busy` is told how many seconds a full queue makes it wait, and 0 when it asks again. */
async function call(path, body, signal, busy) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const how = { headers, signal };
  if (body) {
    headers["Content-Type"] = "application/json";
    Object.assign(how, { method: "POST", body: JSON.stringify(body) });
  }
  const until = performance.now() + 1000 * PATIENCE;
  for (;;) {
    let answer;
    try {
      answer = await fetch(path, how);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The server cannot be reached. Is it still running?");
    }
    if (answer.ok) return answer;
    const told = await answer.json().catch(() => null);
    if (answer.status === 401) askForKey();
    const seconds = answer.status === 429 && busy ? Number(answer.headers.get("Retry-After")) : 0;
    if (!(seconds > 0 && performance.now() + 1000 * seconds < until)) {
      throw new Error(told?.error?.message ?? `The server answered with status ${answer.status}.`);
    }
    busy(seconds);
    await pause(1000 * seconds, signal);
    busy(0);
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal.removeEventListener("abort", stop);
      resolve();
    }, milliseconds);
    signal.addEventListener("abort", stop);
  });
}

const busyFor = (seconds) => `The server is busy. Asking again in ${seconds} s.`;

/** The data of each server-sent event of an answer; throws the error of one that is an error. */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      held.push(value);
      // Events end with an empty line; the end of one may come in two pieces, so the pieces are joined first.
      if (!value.includes("\n")) continue;
      const parts = held.join("").split("\n\n");
      held = [parts.pop()];
      for (const part of parts) {
        const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
        if (!data) continue;
        if (data === "[DONE]") yield data;
        else {
          const event = JSON.parse(data);
          if (event.error) throw new Error(event.error.message);
          yield event;
        }
      }
    }
  } catch (error) {
    if (error instanceof TypeError) throw new Error("The connection to the server broke off.");
    throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
}

function askForKey() {
  $("key-form").hidden = false;
  say($("key-error"), key ? "The server does not take this key." : "");
  $("key").focus();
}

async function findModels() {
  try {
    const { data } = await (await call("v1/models")).json();
    $("model").replaceChildren(...data.map(({ id }) => make("option", { textContent: id })));
    $("models").hidden = data.length < 2;
    $("key-form").hidden = true;
    say($("server-error"), "");
  } catch (error) {
    if ($("key-form").hidden) say($("server-error"), error.message);
  }
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  sessionStorage.setItem("key", key);
  findModels();
});

/** The number in an input; undefined for none, so that JSON leaves it out. */
const numberOf = (id) => ($(id).value === "" ? undefined : Number($(id).value));

// ---------------------------------------------------------------- tabs, sliders, keys

const tabs = [...document.querySelectorAll("[role=tab]")];

function select(name) {
  for (const tab of tabs) {
    const chosen = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !chosen;
  }
}

for (const tab of tabs) {
  const other = tabs.find((each) => each !== tab);
  tab.addEventListener("click", () => select(tab.getAttribute("aria-controls")));
  tab.addEventListener("keydown", ({ key }) => {
    if (key !== "ArrowLeft" && key !== "ArrowRight") return;
    other.focus();
    other.click();
  });
}

for (const output of document.querySelectorAll("output")) {
  const slider = $(output.htmlFor.value);
  const show = () => { output.value = slider.value; };
  slider.addEventListener("input", show);
  show();
}

for (const area of document.querySelectorAll("textarea")) {
  area.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    area.form.requestSubmit();
  });
}

// ---------------------------------------------------------------- chat

let conversation = []; // messages as the API takes them
let pictures = []; // data URLs of the question that is being written
let answering = null; // the AbortController of an answer under way

function showPictures() {
  $("pictures").replaceChildren(...pictures.map((url, index) => {
    const remove = make("button", { type: "button", textContent: "×", ariaLabel: `Remove picture ${index + 1}` });
    remove.addEventListener("click", () => {
      pictures = pictures.filter((_, each) => each !== index);
      showPictures();
      $("question").focus();
    });
    return make("li", {}, make("img", { src: url, alt: `Picture ${index + 1}` }), remove);
  }));
}

const asDataUrl = (blob) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(blob);
});

async function pictureOf(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || "What was added"} is not a picture that this browser can read.`);
  }
  if (file.size <= LARGE) {
    bitmap.close();
    return asDataUrl(file);
  }
  const scale = Math.min(1, SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = make("canvas", { width: Math.round(bitmap.width * scale), height: Math.round(bitmap.height * scale) });
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas.toDataURL("image/jpeg", 0.95);
}

async function addFiles(files) {
  say($("chat-error"), "");
  for (const file of files) {
    try {
      pictures.push(await pictureOf(file));
    } catch (error) {
      say($("chat-error"), error.message);
    }
  }
  showPictures();
}

$("files").addEventListener("change", async () => {
  await addFiles($("files").files);
  $("files").value = ""; // so that the same file can be chosen again
});
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (!files.length) return;
  event.preventDefault();
  select("chat");
  addFiles(files);
});
// Anywhere on the page: a picture dropped beside the chat would replace the page otherwise.
document.addEventListener("dragover", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  select("chat");
  $("chat").classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("chat").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  $("chat").classList.remove("over");
  addFiles(event.dataTransfer.files);
});

function turn(role, text, images = []) {
  const shown = images.map((url, index) => make("img", { src: url, alt: `Picture ${index + 1} of the question` }));
  const made = make("div", { className: `turn ${role}` }, ...shown, make("p", { textContent: text }));
  $("log").append(made);
  made.scrollIntoView({ block: "nearest" });
  return made;
}

function answeringNow(controller) {
  answering = controller;
  $("ask").disabled = Boolean(controller);
  $("stop-answer").hidden = !controller;
  $("log").setAttribute("aria-busy", Boolean(controller)); // screen readers tell the answer, not its pieces
}

async function ask(text, images) {
  const parts = images.map((url) => ({ type: "image_url", image_url: { url } }));
  const content = images.length ? [...parts, { type: "text", text }] : text;
  const asked = [...conversation, { role: "user", content }];
  const own = turn("user", text, images), reply = turn("assistant busy", "");
  const words = reply.querySelector("p"), controller = new AbortController();
  answeringNow(controller);
  say($("chat-status"), "Answering …");
  let said = "", reason = "";
  try {
    if (!$("model").value) await findModels(); // the server was away when the page was opened
    const answer = await call("v1/chat/completions", {
      model: $("model").value,
      messages: asked,
      stream: true,
      temperature: numberOf("chat-temperature"),
      top_p: Math.max(numberOf("chat-top-p"), 1e-6), // 0 is the most likely token, as in the reference demo
      seed: numberOf("chat-seed"),
      max_tokens: numberOf("chat-tokens"),
    }, controller.signal, (seconds) => {
      if (own.isConnected) say($("chat-status"), seconds ? busyFor(seconds) : "Answering …");
    });
    for await (const event of events(answer)) {
      const choice = event.choices?.[0];
      said += choice?.delta.content ?? "";
      reason = choice?.finish_reason ?? reason;
      words.textContent = said;
      reply.scrollIntoView({ block: "nearest" });
    }
    if (!reason) throw new Error("The answer broke off.");
    say($("chat-status"), reason === "length" ? "The answer is cut off at the tokens allowed." : "");
  } catch (error) {
    if (!own.isConnected) return; // a new conversation has begun
    const stopped = error.name === "AbortError";
    say($("chat-status"), stopped ? "Stopped." : "");
    if (!stopped) say($("chat-error"), error.message);
    if (!stopped || !said) {
      // The question goes back to where it can be mended, and is no part of the conversation.
      own.remove();
      reply.remove();
      $("question").value ||= text;
      pictures = [...images, ...pictures];
      showPictures();
      return;
    }
  } finally {
    reply.classList.remove("busy");
    if (answering === controller) answeringNow(null);
  }
  if (own.isConnected) conversation = [...asked, { role: "assistant", content: said }];
}

$("chat-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("question").value.trim();
  if (answering) return;
  if (!text) {
    say($("chat-error"), "Write a question first.");
    $("question").focus();
    return;
  }
  say($("chat-error"), "");
  const images = pictures;
  pictures = [];
  $("question").value = "";
  showPictures();
  ask(text, images);
});
$("stop-answer").addEventListener("click", () => answering?.abort());
$("new").addEventListener("click", () => {
  answering?.abort();
  answeringNow(null);
  conversation = [];
  for (const each of document.querySelectorAll(".turn")) each.remove();
  say($("chat-status"), "");
  say($("chat-error"), "");
  $("question").focus();
});

// ---------------------------------------------------------------- drawing

let drawing = null;

/** A figure that shows one image as it grows. */
function figureOf(prompt, seed) {
  const image = make("img", { alt: "", hidden: true }), bar = make("progress", { max: 4, ariaLabel: `Progress of seed ${seed}` });
  const caption = make("figcaption", { textContent: `Seed ${seed}` });
  const figure = make("figure", {}, make("div", { className: "frame" }, image), bar, caption);
  const show = (url) => Object.assign(image, { src: url, hidden: false });
  return {
    figure,
    grow(url, quarters) {
      show(url);
      image.alt = `${prompt} (under way)`;
      bar.value = quarters;
    },
    finish(url) {
      show(url);
      image.alt = prompt;
      bar.remove();
      const again = make("button", { type: "button", textContent: "Use seed", ariaLabel: `Use seed ${seed}` });
      again.addEventListener("click", () => {
        $("prompt").value = prompt;
        $("draw-seed").value = seed;
        $("prompt").focus();
      });
      const about = make("button", { type: "button", textContent: "Ask about it", ariaLabel: `Ask about the image of seed ${seed}` });
      about.addEventListener("click", () => {
        pictures.push(url);
        showPictures();
        select("chat");
        $("question").focus();
      });
      const download = make("a", { className: "button", href: url, download: `janus-${seed}.png`, textContent: "Download", ariaLabel: `Download the image of seed ${seed}` });
      caption.append(make("div", { className: "row" }, download, again, about));
    },
  };
}

async function drawOne(prompt, seed, how, signal, busy) {
  const shown = figureOf(prompt, seed);
  $("gallery").append(shown.figure);
  try {
    if (!$("model").value) await findModels();
    const asked = { ...how, model: $("model").value, prompt, seed, stream: true, partial_images: 3 };
    const answer = await call("v1/images/generations", asked, signal, busy);
    for await (const event of events(answer)) {
      const url = `data:image/png;base64,${event.b64_json}`;
      if (event.type.endsWith("partial_image")) shown.grow(url, event.partial_image_index + 1);
      else return shown.finish(url);
    }
    throw new Error("The drawing broke off.");
  } catch (error) {
    shown.figure.remove();
    throw error;
  }
}

async function draw() {
  const prompt = $("prompt").value.trim(), count = numberOf("count");
  const first = numberOf("draw-seed") ?? crypto.getRandomValues(new Uint32Array(1))[0];
  const how = {
    guidance: numberOf("guidance"),
    temperature: numberOf("draw-temperature"),
    size: $("size").value,
  };
  const controller = new AbortController(), began = performance.now();
  drawing = controller;
  $("start").disabled = true;
  $("stop-drawing").hidden = false;
  say($("draw-error"), "");
  $("gallery").replaceChildren();
  let done = 0, next = 0;
  const tell = (seconds = 0) => say($("draw-status"), `Drawing: ${done} of ${count} done. ${seconds ? busyFor(seconds) : ""}`);
  tell();
  // Each image has a seed of its own, by which it alone can be drawn again.
  const worker = async () => {
    while (next < count && !controller.signal.aborted) {
      await drawOne(prompt, (first + next++) % SEEDS, how, controller.signal, tell);
      done += 1;
      tell();
    }
  };
  const workers = Array.from({ length: Math.min(count, AT_ONCE) }, worker);
  $("gallery").firstChild.scrollIntoView({ block: "nearest" }); // on a phone it is below the controls
  const ends = await Promise.allSettled(workers);
  const wrong = ends.find(({ reason }) => reason && reason.name !== "AbortError");
  if (wrong) say($("draw-error"), wrong.reason.message);
  const seconds = ((performance.now() - began) / 1000).toFixed(1);
  say($("draw-status"), done ? `${done} of ${count} drawn in ${seconds} s.` : controller.signal.aborted ? "Stopped." : "");
  drawing = null;
  $("start").disabled = false;
  $("stop-drawing").hidden = true;
}

$("draw-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!drawing) draw();
});
$("stop-drawing").addEventListener("click", () => drawing?.abort());

findModels();
