// When the tokens of one answer came, by this browser's clock.

// The server sends an event every 20 ms at most, and a busy browser gets several in a heap. Of less time than this, the
// speed would be that of unpacking a heap.
const SHORTEST_MS = 20;

export class Timing {
  #start = performance.now();
  #first = null;
  #tokensAtFirst = 0;
  #last = null;
  tokens = 0;

  /** Takes note that the answer has so many tokens by now. */
  arrived(tokens) {
    if (tokens === this.tokens) return;
    this.tokens = tokens;
    this.#last = performance.now();
    if (this.#first !== null) return;
    this.#first = this.#last;
    this.#tokensAtFirst = tokens;
  }

  /** Milliseconds from the start to the first token; null before it. */
  get ttft() {
    return this.#first === null ? null : this.#first - this.#start;
  }

  /** Tokens a second since the first event with one; null while there is no telling. */
  get rate() {
    const elapsed = this.#last - this.#first;
    return elapsed < SHORTEST_MS ? null : ((this.tokens - this.#tokensAtFirst) * 1000) / elapsed;
  }
}
