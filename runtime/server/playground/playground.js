// The page: a form, one or two panes, and what goes on between them and the server.

import { gaugesByModel } from "./gauges.js";
import { Pane } from "./pane.js";
import { parameters } from "./request.js";
import { Server, ServerError } from "./server.js";

const KEY = "osp-api-key";
const REFRESH_MS = 1000;
/** Where form and panes stand side by side. */
const WIDE = matchMedia("(min-width: 60rem)");

const part = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));
const server = new Server();
const panes = [];
let cards = [];
/** What stops the requests that are running; null: none is. @type {AbortController | null} */
let running = null;
let wantsKey = false;

const mode = () => new FormData(part.composer).get("mode");

// --- Connection ---

/** Keeps models and load up to date, as long as somebody looks. */
async function watch() {
  while (true) {
    if (!document.hidden && !wantsKey) await refresh();
    await new Promise((resolve) => setTimeout(resolve, REFRESH_MS));
  }
}

async function refresh() {
  try {
    if (cards.length === 0) offer(await server.models());
    const gauges = gaugesByModel(await server.metrics());
    for (const pane of panes) pane.showGauges(gauges.get(pane.card?.id));
    sayConnection(cards.length === 1 ? "1 model" : `${cards.length} models`, "connected");
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    if (error.status === 401) askForKey();
    // Whatever comes back may serve other models. Answers that are under way tell by themselves what becomes of them.
    if (running === null) offer([]);
    sayConnection(error.message, "trouble");
  }
}

function sayConnection(text, state) {
  part.connection.textContent = text;
  part.connection.className = state;
}

function askForKey() {
  wantsKey = true;
  part.access.hidden = false;
  part.key.focus();
}

async function useKey() {
  server.key = part.key.value.trim();
  sessionStorage.setItem(KEY, server.key);
  wantsKey = false;
  cards = [];
  await refresh();
  if (!wantsKey) part.prompt.focus();
}

// --- Models ---

function offer(offered) {
  cards = offered;
  if (cards.length > 0) panes.forEach((pane, index) => pane.offer(cards, index));
  part["compare-field"].hidden = cards.length < 2;
  if (cards.length === 1 && part.compare.checked) part.compare.click();
  showModes();
  showRunning();
}

function addPane() {
  const pane = new Pane();
  pane.onpick = showModes;
  pane.onprogress = showSpeeds;
  panes.push(pane);
  part.panes.append(pane.element);
  if (cards.length > 0) pane.offer(cards, panes.length - 1);
}

function showCompared() {
  part["in-turn"].disabled = !part.compare.checked;
  if (part.compare.checked) addPane();
  else panes.pop().element.remove();
  part.comparison.textContent = "";
  showModes();
}

/** Chat is offered where every model has a template for it. */
function showModes() {
  const mute = panes.map((pane) => pane.card).filter((card) => card && !card.chat);
  const [completion, chat] = part.composer.elements.mode;
  chat.disabled = mute.length > 0 || cards.length === 0;
  if (chat.disabled) completion.checked = true;
  part["chat-note"].hidden = mute.length === 0;
  part["chat-note"].textContent = `There is no chat template in ${[...new Set(mute.map((card) => card.id))].join(" and ")}.`;
  showMode();
}

function showMode() {
  const chat = mode() === "chat";
  part["system-field"].hidden = part.restart.hidden = !chat;
  part["prompt-label"].textContent = chat ? "Message" : "Prompt";
}

// --- Requests ---

async function run() {
  if (running !== null || cards.length === 0) return;
  running = new AbortController();
  part.comparison.textContent = "";
  showRunning();
  if (!WIDE.matches) panes[0].element.scrollIntoView({ block: "nearest" });
  const { signal } = running;
  const answer = answerer();
  try {
    const ended = part.compare.checked && part["in-turn"].checked ? await inTurn(answer, signal) : await atOnce(answer, signal);
    if (mode() === "completion" && panes.length > 1 && ended.every(Boolean)) compare();
  } finally {
    running = null;
    showRunning();
  }
}

/** What each pane is to do, with the form as it is now. */
function answerer() {
  const [text, system, fields] = [part.prompt.value, part.system.value.trim(), parameters()];
  if (mode() === "completion") return (pane, signal) => pane.complete(server, text, fields, signal);
  part.prompt.value = "";
  return (pane, signal) => pane.converse(server, system, text, fields, signal);
}

function atOnce(answer, signal) {
  return Promise.all(panes.map((pane) => answer(pane, signal)));
}

async function inTurn(answer, signal) {
  panes[1].clear();
  const ended = [];
  for (const pane of panes) ended.push(!signal.aborted && (await answer(pane, signal)));
  return ended;
}

function stop() {
  running?.abort();
}

function showRunning() {
  part.run.disabled = running !== null || cards.length === 0;
  part.stop.disabled = running === null;
  part["compare-field"].disabled = part.restart.disabled = running !== null;
  for (const pane of panes) pane.locked = running !== null;
}

function showSpeeds() {
  const fastest = Math.max(...panes.map((pane) => pane.rate ?? 0), Number.MIN_VALUE);
  for (const pane of panes) pane.showSpeed((pane.rate ?? 0) / fastest);
}

/** Says how far the two answers agree, and marks it. */
function compare() {
  const [a, b] = panes.map((pane) => [...pane.answer]);
  const parting = a.findIndex((sign, index) => sign !== b[index]);
  const shared = parting < 0 ? a : a.slice(0, parting);
  for (const pane of panes) pane.markShared(shared.join("").length);
  if (shared.length === Math.max(a.length, b.length)) part.comparison.textContent = "Both answers are the same.";
  else if (shared.length === 0) part.comparison.textContent = "The answers differ from the first character on.";
  else part.comparison.textContent = `The answers agree for ${shared.length} characters, which are marked.`;
}

// --- Wiring ---

part.composer.addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
part.stop.addEventListener("click", stop);
part.restart.addEventListener("click", () => panes.forEach((pane) => pane.clear()));
part.compare.addEventListener("change", showCompared);
part["use-key"].addEventListener("click", useKey);
part.key.addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  useKey();
});
for (const choice of part.composer.elements.mode) choice.addEventListener("change", showMode);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run();
  if (event.key === "Escape") stop();
});

part.parameters.open = WIDE.matches;
part.key.value = server.key = sessionStorage.getItem(KEY) ?? "";
part.access.hidden = server.key === "";
addPane();
watch();
