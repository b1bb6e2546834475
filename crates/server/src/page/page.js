"use strict";
// The page of `bevel serve`: conversations with a model, kept in this browser.

const $ = (id) => document.getElementById(id);
const PARAMETERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];
const SETTINGS = [...PARAMETERS, "system", "theme", "key"];

// What is kept. A browser that keeps nothing still has the conversation until the page is closed.
const store = {
  read(name, usual) {
    try {
      return JSON.parse(localStorage.getItem(`bevel.${name}`)) ?? usual;
    } catch {
      return usual;
    }
  },
  write(name, value) {
    try {
      localStorage.setItem(`bevel.${name}`, JSON.stringify(value));
    } catch {
      note("This browser has no room for the conversation; it is gone when the page is closed.");
    }
  },
};

let settings = store.read("settings", {});
let chats = store.read("chats", []);
let chat = chats[0] ?? newChat();
// Of the answer that is being written: what stops it.
let writing = null;

function newChat() {
  return { id: crypto.randomUUID?.() ?? String(Math.random()), messages: [] };
}

function save() {
  if (!chat.messages.length) return;
  chats = [chat, ...chats.filter((other) => other.id !== chat.id)];
  store.write("chats", chats);
  showChats();
}

// ---- Showing

function showChats() {
  $("chat-list").replaceChildren(...chats.map((other) => {
    const item = document.createElement("li");
    if (other.id === chat.id) item.setAttribute("aria-current", "true");
    const open = document.createElement("button");
    open.textContent = other.messages.find((m) => m.role === "user")?.content.slice(0, 60) || "Conversation";
    open.onclick = () => {
      stop();
      chat = other;
      show();
      showChats();
    };
    const remove = document.createElement("button");
    remove.textContent = "✕";
    remove.setAttribute("aria-label", `Delete “${open.textContent}”`);
    remove.onclick = () => {
      if (!confirm(`Delete “${open.textContent}”?`)) return;
      chats = chats.filter((kept) => kept.id !== other.id);
      store.write("chats", chats);
      if (chat.id === other.id) {
        stop();
        chat = chats[0] ?? newChat();
        show();
      }
      showChats();
    };
    item.append(open, remove);
    return item;
  }));
}

function show() {
  const list = $("messages");
  list.replaceChildren(...chat.messages.map(messageItem));
  if (!chat.messages.length) {
    const empty = document.createElement("li");
    empty.className = "empty";
    empty.textContent = "What is on your mind?";
    list.append(empty);
  }
  list.scrollTop = list.scrollHeight;
}

function messageItem(message, index) {
  const item = $("message-template").content.firstElementChild.cloneNode(true);
  item.classList.add(message.role);
  item.classList.toggle("failed", Boolean(message.failed));
  item.querySelector("h3").textContent = message.role === "user" ? "You" : message.model ?? "Model";
  fill(item, message);
  const action = (label, act) => {
    const button = document.createElement("button");
    button.textContent = label;
    button.onclick = act;
    item.querySelector(".actions").append(button);
  };
  action("Copy", () => copy(message.content));
  if (message.role === "user") {
    action("Edit", () => edit(item, index));
  } else {
    action("Retry", () => answer(index));
  }
  return item;
}

function fill(item, message, isWriting = false) {
  const content = item.querySelector(".content");
  if (message.role === "user") {
    content.classList.add("plain");
    content.textContent = message.content;
  } else {
    content.replaceChildren(...thoughtsOf(item, message), ...(message.failed ? [message.failed] : markdown(message.content)));
    for (const block of content.querySelectorAll("pre")) {
      const button = document.createElement("button");
      button.textContent = "Copy";
      button.onclick = () => copy(block.querySelector("code").textContent);
      block.append(button);
    }
  }
  content.classList.remove("waiting");
  if (isWriting) (content.lastElementChild ?? content).classList.add("waiting");
  item.querySelector(".figures").textContent = message.figures ?? "";
}

// What the model thought before it answered, folded up once it does.
function thoughtsOf(item, message) {
  if (!message.thoughts) return [];
  const details = document.createElement("details");
  const shown = item.querySelector("details.thoughts");
  details.className = "thoughts";
  details.open = shown?.dataset.chosen ? shown.open : !message.content;
  if (shown?.dataset.chosen) details.dataset.chosen = "yes";
  const summary = document.createElement("summary");
  summary.textContent = message.content ? "Thoughts" : "Thinking…";
  summary.onclick = () => { details.dataset.chosen = "yes"; };
  details.append(summary, ...markdown(message.thoughts));
  return [details];
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    note("Copied.");
  } catch {
    note("This browser does not let pages copy.");
  }
}

let noteTimer;
function note(text) {
  const hint = document.querySelector(".hint");
  hint.dataset.usual ??= hint.textContent;
  hint.textContent = text;
  clearTimeout(noteTimer);
  noteTimer = setTimeout(() => { hint.textContent = hint.dataset.usual; }, 4000);
}

function edit(item, index) {
  const field = document.createElement("textarea");
  field.value = chat.messages[index].content;
  field.rows = Math.min(12, field.value.split("\n").length + 1);
  field.setAttribute("aria-label", "Edit the message; Enter sends it, Esc leaves it as it was");
  item.querySelector(".content").replaceChildren(field);
  field.onkeydown = (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      show();
    } else if (event.key === "Enter" && !event.shiftKey && field.value.trim()) {
      event.preventDefault();
      chat.messages[index].content = field.value.trim();
      answer(index + 1);
    }
  };
  field.focus();
}

// ---- Asking

function headers() {
  const all = { "content-type": "application/json" };
  if (settings.key) all.authorization = `Bearer ${settings.key}`;
  return all;
}

function requestOf(messages) {
  const request = { model: $("model").value, stream: true, stream_options: { include_usage: true } };
  for (const name of PARAMETERS) {
    if (settings[name] !== undefined && settings[name] !== "") request[name] = Number(settings[name]);
  }
  const system = settings.system?.trim() ? [{ role: "system", content: settings.system.trim() }] : [];
  request.messages = [...system, ...messages.map(({ role, content }) => ({ role, content }))];
  return request;
}

// Writes message `index` anew; what came after it is gone.
async function answer(index) {
  stop();
  chat.messages.length = index;
  const of = chat;
  const message = { role: "assistant", content: "", model: $("model").value };
  const request = requestOf(of.messages.filter((m) => !m.failed));
  of.messages.push(message);
  save();
  show();
  const list = $("messages");
  const item = list.lastElementChild;
  const control = new AbortController();
  writing = control;
  busy(true);
  fill(item, message, true);
  const start = performance.now();
  let first = null;
  let frame = null;
  const draw = () => {
    frame = null;
    const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 80;
    fill(item, message, writing === control);
    if (atEnd) list.scrollTop = list.scrollHeight;
  };
  try {
    const response = await fetch("v1/chat/completions", { method: "POST", headers: headers(), body: JSON.stringify(request), signal: control.signal });
    if (!response.ok) throw new Error(await problemOf(response));
    for await (const chunk of eventsOf(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      const { content: text, reasoning_content: thought } = chunk.choices[0]?.delta ?? {};
      if (text || thought) {
        first ??= performance.now();
        message.content += text ?? "";
        if (thought) message.thoughts = (message.thoughts ?? "") + thought;
        frame ??= requestAnimationFrame(draw);
      }
      if (chunk.usage) {
        const { completion_tokens: tokens, prompt_tokens: read, prompt_tokens_details: details } = chunk.usage;
        const speed = tokens > 1 && first ? ((tokens - 1) * 1000) / (performance.now() - first) : 0;
        message.figures = `${tokens} tokens${speed ? `, ${speed.toFixed(1)} a second` : ""}; first after ${((first ?? start) - start).toFixed(0)} ms, `
          + `${read} read${details?.cached_tokens ? ` (${details.cached_tokens} cached)` : ""}`;
      }
    }
  } catch (error) {
    if (error.name === "AbortError") {
      message.figures = "stopped";
    } else {
      message.failed = error instanceof TypeError ? "The server does not answer." : error.message;
    }
  }
  if (writing === control) {
    writing = null;
    busy(false);
  }
  if (frame) cancelAnimationFrame(frame);
  item.classList.toggle("failed", Boolean(message.failed));
  draw();
  if (chat === of) save(); else store.write("chats", chats);
}

function stop() {
  writing?.abort();
  writing = null;
  busy(false);
}

function busy(isBusy) {
  $("stop").hidden = !isBusy;
  $("send").hidden = isBusy;
  $("messages").setAttribute("aria-busy", String(isBusy));
}

async function problemOf(response) {
  try {
    const { error } = await response.json();
    if (response.status === 401) {
      toggle("settings", true);
      $("key").focus();
    }
    return error.message;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

// The data of a stream's events.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

// ---- The server now

let before = null;
async function showLive() {
  if ($("live").hidden || document.visibilityState !== "visible") return;
  let text;
  try {
    const response = await fetch("metrics", { headers: headers() });
    if (!response.ok) return;
    text = await response.text();
  } catch {
    return;
  }
  const sum = (name) => text.split("\n").filter((line) => line.startsWith(`${name}{`))
    .reduce((total, line) => total + Number(line.slice(line.lastIndexOf(" ") + 1)), 0);
  const now = { at: performance.now(), tokens: sum("vllm:generation_tokens_total") };
  if (before) $("live-speed").textContent = ((now.tokens - before.tokens) * 1000 / (now.at - before.at)).toFixed(1);
  before = now;
  $("live-queue").textContent = `${sum("vllm:num_requests_running")}, ${sum("vllm:num_requests_waiting")}`;
  const [used, all] = [sum("bevel:kv_blocks_used"), sum("bevel:kv_blocks")];
  $("live-blocks").textContent = `${used} / ${all}`;
  $("live-meter").value = all ? used / all : 0;
  const [hits, queries] = [sum("vllm:prefix_cache_hits_total"), sum("vllm:prefix_cache_queries_total")];
  $("live-hits").textContent = queries ? `${((100 * hits) / queries).toFixed(0)} %` : "–";
}

// ---- Beginning

function toggle(panel, open) {
  const element = $(panel);
  element.hidden = open === undefined ? !element.hidden : !open;
  const button = $(`toggle-${panel}`);
  button.setAttribute(button.hasAttribute("aria-pressed") ? "aria-pressed" : "aria-expanded", String(!element.hidden));
  return !element.hidden;
}

function applySettings() {
  for (const name of SETTINGS) $(name).value = settings[name] ?? "";
  document.documentElement.dataset.theme = settings.theme ?? "";
}

async function showModels() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) {
      note(await problemOf(response));
      return;
    }
    const { data } = await response.json();
    $("model").replaceChildren(...data.map(({ id }) => new Option(id, id)));
    if (data.some(({ id }) => id === settings.model)) $("model").value = settings.model;
  } catch {
    note("The server does not answer.");
  }
}

function grow() {
  const field = $("composer");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

function send() {
  const text = $("composer").value.trim();
  if (!text || writing) return;
  $("composer").value = "";
  grow();
  chat.messages.push({ role: "user", content: text });
  answer(chat.messages.length);
}

$("composer-form").onsubmit = (event) => {
  event.preventDefault();
  send();
};
$("composer").oninput = grow;
$("composer").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !$("composer").value) {
    const index = chat.messages.findLastIndex((message) => message.role === "user");
    if (index >= 0) edit($("messages").children[index], index);
  }
};
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
$("stop").onclick = stop;
$("new-chat").onclick = () => {
  stop();
  chat = newChat();
  show();
  showChats();
  $("composer").focus();
};
$("toggle-chats").onclick = () => toggle("chats");
$("toggle-settings").onclick = () => toggle("settings");
$("toggle-live").onclick = () => {
  settings.live = toggle("live");
  store.write("settings", settings);
  showLive();
};
for (const name of SETTINGS) {
  $(name).onchange = () => {
    settings[name] = $(name).value;
    store.write("settings", settings);
    applySettings();
    if (name === "key") showModels();
  };
}
$("model").onchange = () => {
  settings.model = $("model").value;
  store.write("settings", settings);
};
$("reset").onclick = () => {
  settings = {};
  store.write("settings", settings);
  applySettings();
};
document.addEventListener("visibilitychange", showLive);
setInterval(showLive, 1000);

applySettings();
toggle("live", Boolean(settings.live));
toggle("chats", matchMedia("(min-width: 1100px)").matches && chats.length > 0);
showModels();
showChats();
show();
showLive();
$("composer").focus();
