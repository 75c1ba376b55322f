// The charts of what the server is doing, read from /metrics, where no key is asked for.

import { request } from "./api.js";
import { chart } from "./chart.js";
import { percent, seconds, short } from "./format.js";
import { between, buckets, max, parse, quantile, sum } from "./prometheus.js";

const EVERY = 2;
const SPAN = 300;
// Rates over fewer seconds jump about; latencies need requests to be counted.
const RATE_WINDOW = 6;
const LATENCY_WINDOW = 60;

const COUNTERS = ["vllm:generation_tokens_total", "vllm:prompt_tokens_total"];
const LATENCIES = ["vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds"];

/** Fill `container` with charts and keep them going; `report` is told whether the server answers. */
export function watch(container, report) {
  const span = SPAN;
  const charts = [
    [chart({ title: "Requests", names: ["running", "waiting"], span, write: short }), requests],
    [chart({ title: "Tokens a second", names: ["written", "prompt"], span, write: short }), rates],
    [chart({ title: "KV cache", names: ["in use"], span, write: percent, top: 1 }), cache],
    [chart({ title: "Time to first token", names: ["p50", "p95"], span, write: seconds }), latency(0)],
    [chart({ title: "Time between tokens", names: ["p50", "p95"], span, write: gap }), latency(1)],
  ];
  container.append(...charts.map(([{ root }]) => root));
  let readings = [];
  let asking = false;

  async function poll() {
    // A server that is slow to answer is not asked again meanwhile.
    if (asking) return;
    asking = true;
    try {
      const reading = read(await (await request("metrics")).text(), performance.now() / 1000);
      // Counters that go down: the server was started anew.
      const last = readings[readings.length - 1];
      if (last && reading.counters.some((count, i) => count < last.counters[i])) readings = [];
      readings = readings.filter(({ time }) => time > reading.time - SPAN - LATENCY_WINDOW);
      readings.push(reading);
      reading.values = charts.map(([, values]) => values(readings, reading));
      const shown = readings.filter(({ time }) => time > reading.time - SPAN);
      charts.forEach(([{ update }], i) =>
        update(shown.map(({ time, values }) => ({ time, values: values[i] }))),
      );
      report(true);
    } catch {
      report(false);
    }
    asking = false;
  }

  function tick() {
    // A page that nobody sees asks nothing.
    if (!document.hidden) poll();
  }
  setInterval(tick, 1000 * EVERY);
  document.addEventListener("visibilitychange", tick);
  tick();
}

function read(text, time) {
  const samples = parse(text);
  return {
    time,
    running: sum(samples, "vllm:num_requests_running"),
    waiting: sum(samples, "vllm:num_requests_waiting"),
    cache: max(samples, "vllm:kv_cache_usage_perc"),
    counters: COUNTERS.map((name) => sum(samples, name)),
    latencies: LATENCIES.map((name) => buckets(samples, name)),
  };
}

/** vLLM's first bucket ends at 10 ms; what lies inside it is not known. */
const gap = (value) => (value < 0.01 ? "< 10 ms" : seconds(value));

const requests = (readings, now) => [now.running, now.waiting];

const cache = (readings, now) => [now.cache];

function rates(readings, now) {
  const before = since(readings, now, RATE_WINDOW);
  return now.counters.map((count, i) =>
    before === now || count === null
      ? null
      : (count - before.counters[i]) / (now.time - before.time),
  );
}

const latency = (which) => (readings, now) => {
  const before = since(readings, now, LATENCY_WINDOW);
  const counted = between(before.latencies[which], now.latencies[which]);
  return [quantile(0.5, counted), quantile(0.95, counted)];
};

/** The earliest reading at most `window` seconds before `now`. */
function since(readings, now, window) {
  return readings.find(({ time }) => time >= now.time - window - EVERY / 2);
}
