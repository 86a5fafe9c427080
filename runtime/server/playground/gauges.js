// The load of the server's models, out of Prometheus's text format.

const GAUGES = {
  osp_num_requests_running: "running",
  osp_num_requests_waiting: "waiting",
  osp_kv_cache_usage_perc: "kv",
};
const SAMPLE = /^(\w+)\{(.*)\} (\S+)$/gm;
const MODEL_NAME = /(?:^|,)model_name="((?:[^"\\]|\\.)*)"/;

/**
 * By model name: sequences that run, sequences that wait, and the share of KV blocks in use (0 to 1).
 *
 * @param {string} exposition
 * @returns {Map<string, {running?: number, waiting?: number, kv?: number}>}
 */
export function gaugesByModel(exposition) {
  const models = new Map();
  for (const [, metric, labels, value] of exposition.matchAll(SAMPLE)) {
    const name = MODEL_NAME.exec(labels);
    if (!(metric in GAUGES) || name === null) continue;
    const model = unescaped(name[1]);
    models.set(model, { ...models.get(model), [GAUGES[metric]]: Number(value) });
  }
  return models;
}

function unescaped(label) {
  return label.replace(/\\(.)/g, (_, sign) => (sign === "n" ? "\n" : sign));
}
