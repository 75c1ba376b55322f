// Answers as they are written: server-sent events, and what they say.

import { ApiError, messageOf, request } from "./api.js";

/**
 * Ask for an answer, and yield its pieces.
 *
 * A piece has the `time` it arrived at, `text`, `reasoning`, and as far as they are known by then
 * `tokens` (all written so far), `promptTokens` and `finish`.
 */
export async function* answer(mode, body, signal) {
  const path = mode === "chat" ? "v1/chat/completions" : "v1/completions";
  const options = { include_usage: true, continuous_usage_stats: true };
  const response = await request(path, {
    body: { ...body, stream: true, stream_options: options },
    signal,
  });
  for await (const { data, time } of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.code, messageOf(chunk));
    yield { time, ...piece(chunk) };
  }
  throw new ApiError(0, "The connection ended before the answer did.");
}

function piece({ choices: [choice], usage }) {
  const delta = choice?.delta ?? {};
  return {
    text: delta.content ?? choice?.text ?? "",
    reasoning: delta.reasoning ?? delta.reasoning_content ?? "",
    tokens: usage?.completion_tokens,
    promptTokens: usage?.prompt_tokens,
    finish: choice?.finish_reason ?? undefined,
  };
}

/** The events of a byte stream: their data, and when it arrived, alike for what came at once. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const time = performance.now();
      rest += value;
      // An end may come in two pieces, "\r" and "\n": what is not ended by a blank line waits.
      const whole = rest.split(/\r?\n\r?\n/);
      rest = whole.pop();
      for (const event of whole) {
        const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
        if (lines.length) yield { data, time };
      }
    }
  } finally {
    // Also when whoever reads stops: the server then stops writing.
    reader.cancel().catch(() => {});
  }
}
