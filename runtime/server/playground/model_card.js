// What a model's card from /v1/models says, in words.

const GRANULARITY = { tensor: "a tensor", channel: "a channel", token: "a token" };
const HADAMARD = { ffn: "FFN Hadamard", full: "full Hadamard" };

/** The facts that fit into one line. */
export function facts(card) {
  const parts = [card.precision];
  if (card.scheme) {
    const granularities = new Set(sites(card.scheme).filter(([name]) => name !== "head").map(([, site]) => site.weight_granularity));
    parts.push(granularities.size > 1 ? "mixed scales" : `one scale ${GRANULARITY[[...granularities][0]]}`);
    if (card.scheme.hadamard !== "none") parts.push(HADAMARD[card.scheme.hadamard] ?? card.scheme.hadamard);
  }
  return [...parts, `${card.engine} engine`, `context ${count(card.max_model_len)}`];
}

/** What was measured when the checkpoint was made. */
export function quality(card) {
  const recorded = card.quality;
  const full = recorded?.perplexity_16bit;
  if (typeof full !== "number") return "no recorded quality";
  const own = typeof recorded.perplexity === "number" ? recorded.perplexity : full;
  const ratio = own === full ? "" : ` = ${(own / full).toFixed(3)} × ${full.toFixed(2)} at 16 bits`;
  const text = recorded.tokens ? `, on ${count(recorded.tokens)} tokens of ${[recorded.text].flat().join(", ")}` : "";
  return `perplexity ${own.toFixed(2)}${ratio}${text}`;
}

/** Rows of (site, weights, activations) of the scheme; none at full precision. */
export function schemeRows(card) {
  if (!card.scheme) return [];
  const rows = [];
  for (const [name, site] of sites(card.scheme)) {
    const weights = bits(site.weight_bits, site.weight_granularity);
    const activations = bits(site.activation_bits, site.activation_granularity);
    const last = rows.at(-1);
    if (last && last[1] === weights && last[2] === activations) last[0] += ` ${name}`;
    else rows.push([name, weights, activations]);
  }
  return [...rows, ["embedding", `${card.scheme.embedding_bits} bits`, ""], ["KV cache", "", `${card.scheme.kv_bits} bits`]];
}

/** (name, scheme) of the linear sites. */
function sites(scheme) {
  return Object.entries(scheme).filter(([, site]) => typeof site === "object");
}

export function count(number) {
  return number.toLocaleString("en");
}

function bits(width, granularity) {
  return width === 16 ? "16 bits" : `${width} bits, one scale ${GRANULARITY[granularity] ?? granularity}`;
}
