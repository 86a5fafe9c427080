// The server's HTTP API, as much of it as the page uses. Addresses are relative: the page may lie behind a path of a proxy.

/** An answer that is no answer; its message is the server's own. */
export class ServerError extends Error {
  /** @param {string} message @param {number} status the HTTP status; 0 where there was none */
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export class Server {
  /** @type {string} sent with every request; empty: none is */
  key = "";

  /** The cards of the models that are served. */
  async models() {
    return (await (await this.#fetch("v1/models")).json()).data;
  }

  /** All metrics, in Prometheus's text format. */
  async metrics() {
    return (await this.#fetch("metrics")).text();
  }

  /**
   * Posts a body and yields the events of the streamed answer as they come.
   *
   * Throws a ServerError where the server refuses, where it fails midway, and where the stream breaks off.
   *
   * @param {string} path @param {object} body @param {AbortSignal} signal
   */
  async *events(path, body, signal) {
    const response = await this.#fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal,
    });
    let complete = false;
    // To the end of the connection, and not to the last event: to leave before would be to hang up.
    for await (const data of eventData(response.body)) {
      complete ||= data === "[DONE]";
      if (complete) continue;
      const event = JSON.parse(data);
      if (event.error) throw new ServerError(event.error.message, response.status);
      yield event;
    }
    if (!complete) throw new ServerError("the connection ended before the answer did", response.status);
  }

  async #fetch(path, options = {}) {
    const headers = { ...options.headers, ...(this.key && { Authorization: `Bearer ${this.key}` }) };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("the server cannot be reached", 0);
    }
    if (!response.ok) throw new ServerError(await refusal(response), response.status);
    return response;
  }
}

/** What a response that is not 2xx says; a proxy in between may say it in other words than the server. */
async function refusal(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return `${response.status} ${response.statusText}`.trim();
  }
}

/** The data of server-sent events, each of one line, as the server writes them. */
async function* eventData(bytes) {
  const reader = bytes.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) yield event.replace(/^data: /, "");
    }
  } finally {
    // Leaving early must close the connection: the server then ends the generation.
    await reader.cancel().catch(() => undefined);
  }
}
