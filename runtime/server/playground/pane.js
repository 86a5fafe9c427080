// One model on the page: its card, its answer as it comes, the figures of the answer and the load of the model.

import { count, facts, quality, schemeRows } from "./model_card.js";
import { ServerError } from "./server.js";
import { Timing } from "./timing.js";

const ENDS = { stop: "finished", length: "finished: max tokens" };
const USAGE = { include_usage: true, continuous_usage_stats: true };

export class Pane {
  element = document.getElementById("pane").content.firstElementChild.cloneNode(true);
  /** Called when another model is picked. */
  onpick = () => undefined;
  /** Called when a piece of an answer has come. */
  onprogress = () => undefined;

  #cards = [];
  #timing = null;
  #usage = undefined;
  #answer = new Text();
  #undrawn = "";
  #frame = 0;
  #messages = [];

  constructor() {
    this.#part("select").addEventListener("change", () => {
      this.clear();
      this.#describe();
      this.onpick();
    });
  }

  /** The card of the model that is picked; undefined before there are any. */
  get card() {
    return this.#cards[this.#part("select").selectedIndex];
  }

  /** The text of the answer so far. */
  get answer() {
    return this.#answer.data;
  }

  /** Tokens a second of the answer; null where there is no such figure. */
  get rate() {
    return this.#timing?.rate ?? null;
  }

  /** Offers models; the one that was picked stays so if it is still there. */
  offer(cards, index) {
    const before = this.card?.id;
    this.#cards = cards;
    const select = this.#part("select");
    select.replaceChildren(...cards.map((card) => new Option(card.id)));
    const kept = cards.findIndex((card) => card.id === before);
    select.selectedIndex = kept >= 0 ? kept : Math.min(index, cards.length - 1);
    this.#describe();
  }

  /** Forgets answer and conversation. */
  clear() {
    this.#messages = [];
    this.#answer = new Text();
    this.#timing = null;
    this.#usage = undefined;
    this.#part(".output").replaceChildren();
    this.#say("");
    this.#showFigures();
  }

  /** Continues a prompt, until it ends or is stopped. Whether it came to its end. */
  async complete(server, prompt, parameters, signal) {
    this.clear();
    this.#part(".output").append(written("span", "prompt", prompt), this.#answer);
    const body = { prompt, ...parameters };
    return this.#generate(server, "v1/completions", body, (choice) => choice.text, signal);
  }

  /** Answers a message in the conversation so far, which grows by both. Whether the answer came to its end. */
  async converse(server, system, message, parameters, signal) {
    const asked = { role: "user", content: message };
    if (this.#messages.length === 0) this.clear();
    const turn = written("div", "turn assistant", "");
    turn.append((this.#answer = new Text()));
    this.#part(".output").append(written("div", "turn user", message), turn);
    const instructions = system === "" ? [] : [{ role: "system", content: system }];
    const body = { messages: [...instructions, ...this.#messages, asked], ...parameters };
    const ended = await this.#generate(server, "v1/chat/completions", body, (choice) => choice.delta.content, signal);
    // What was said before a stop counts as said.
    if (this.answer !== "") this.#messages.push(asked, { role: "assistant", content: this.answer });
    return ended;
  }

  /** Marks the answer's first `length` code units, which another answer has too. */
  markShared(length) {
    if (length === 0) return;
    this.#answer.before(written("span", "shared", this.#answer.data.slice(0, length)));
    this.#answer.deleteData(0, length);
  }

  /** Shows the load of the model; undefined: it is unknown. */
  showGauges({ running, waiting, kv } = {}) {
    this.#show("[data-gauge=running]", running);
    this.#show("[data-gauge=waiting]", waiting);
    this.#show("[data-gauge=kv]", kv === undefined ? undefined : `${(kv * 100).toFixed(kv < 0.1 ? 1 : 0)} %`);
  }

  /** Draws the speed as a share of the fastest pane's. */
  showSpeed(share) {
    this.#part(".speed > div").style.width = `${(share * 100).toFixed(1)}%`;
  }

  /** Keeps the model from being changed while it answers. */
  set locked(locked) {
    this.#part("select").disabled = locked;
  }

  async #generate(server, path, body, textOf, signal) {
    this.#timing = new Timing();
    this.#busy(true);
    this.#say("waiting for the first token…");
    try {
      let reason = null;
      const request = { ...body, model: this.card.id, stream: true, stream_options: USAGE };
      for await (const { choices: [choice], usage } of server.events(path, request, signal)) {
        reason = choice?.finish_reason ?? reason;
        this.#take(choice ? (textOf(choice) ?? "") : "", usage);
      }
      this.#say(ENDS[reason] ?? "finished");
      return true;
    } catch (error) {
      if (error.name === "AbortError") this.#say("stopped");
      else if (error instanceof ServerError) this.#say(error.message, true);
      else throw error;
      return false;
    } finally {
      this.#draw();
      this.#busy(false);
    }
  }

  /** Notes a piece, and draws it with the next frame: drawing each one would keep the clock from seeing the next. */
  #take(text, usage) {
    if (this.#timing.tokens === 0 && usage.completion_tokens > 0) this.#say("answering…");
    this.#timing.arrived(usage.completion_tokens);
    this.#usage = usage;
    this.#undrawn += text;
    this.#frame ||= requestAnimationFrame(() => this.#draw());
  }

  #draw() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    const output = this.#part(".output");
    const atEnd = output.scrollHeight - output.scrollTop - output.clientHeight < 40;
    this.#answer.appendData(this.#undrawn);
    this.#undrawn = "";
    // Whoever has scrolled back to read stays there.
    if (atEnd) output.scrollTop = output.scrollHeight;
    this.#showFigures();
    this.onprogress();
  }

  #describe() {
    const card = this.card;
    const name = card?.id ?? "no model";
    this.element.setAttribute("aria-label", name);
    this.#part(".output").setAttribute("aria-label", `Answer of ${name}`);
    if (!card) return;
    this.#part(".facts").replaceChildren(...facts(card).map((fact) => written("span", "", fact)));
    this.#part(".quality").textContent = quality(card);
    const rows = schemeRows(card);
    this.#part(".scheme").hidden = rows.length === 0;
    this.#part("tbody").replaceChildren(...rows.map(tableRow));
  }

  #showFigures() {
    const usage = this.#usage;
    const { ttft = null, rate = null, tokens = 0 } = this.#timing ?? {};
    const cached = usage?.prompt_tokens_details?.cached_tokens;
    this.#show("[data-figure=ttft]", ttft === null ? undefined : `${ttft.toFixed(ttft < 10 ? 1 : 0)} ms`);
    this.#show("[data-figure=rate]", rate === null ? undefined : rate.toFixed(rate < 100 ? 1 : 0));
    this.#show("[data-figure=tokens]", tokens === 0 ? undefined : count(tokens));
    this.#show("[data-figure=prompt]", usage && `${count(usage.prompt_tokens)}${cached ? `, ${count(cached)} cached` : ""}`);
  }

  #say(text, isError = false) {
    const status = this.#part(".status");
    status.textContent = text;
    status.classList.toggle("error", isError);
  }

  #busy(busy) {
    this.element.classList.toggle("busy", busy);
    this.#part(".output").setAttribute("aria-busy", String(busy));
  }

  #show(selector, value) {
    this.#part(selector).textContent = value ?? "–";
  }

  #part(selector) {
    return this.element.querySelector(selector);
  }
}

function written(tag, className, text) {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

function tableRow([site, weights, activations]) {
  const row = document.createElement("tr");
  const head = written("th", "", site);
  head.scope = "row";
  row.append(head, written("td", "", weights), written("td", "", activations));
  return row;
}
