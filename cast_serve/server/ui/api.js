// Requests to this server. Addresses are relative, so that a proxy may serve the page anywhere.

// The API key: in this variable and nowhere else.
let key = null;

export function useKey(value) {
  key = value;
}

/** What the server refused, in its own words. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The response of GET `path`, or of POST with a JSON `body`. Throws ApiError unless it is good. */
export async function request(path, { body, signal } = {}) {
  const headers = {};
  if (key !== null) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const response = await fetch(path, {
    method: body === undefined ? "GET" : "POST",
    headers,
    body: body === undefined ? undefined : JSON.stringify(body),
    signal,
    cache: "no-store",
    credentials: "omit",
  });
  if (!response.ok) throw new ApiError(response.status, await reason(response));
  return response;
}

async function reason(response) {
  const text = await response.text();
  try {
    return messageOf(JSON.parse(text)) ?? text;
  } catch {
    return text || `${response.status} ${response.statusText}`;
  }
}

/** The message of an error body: OpenAI's, vLLM's 401, FastAPI's; undefined if it is none. */
export function messageOf({ error, detail }) {
  return error?.message ?? error ?? (typeof detail === "string" ? detail : undefined);
}
