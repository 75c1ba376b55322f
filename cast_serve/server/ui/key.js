// The dialog that asks for the API key.

import { ApiError, request, useKey } from "./api.js";
import { byId } from "./dom.js";

const dialog = byId("key-dialog");
const field = byId("key");
const fault = byId("key-error");

byId("key-cancel").addEventListener("click", () => dialog.close());

// Also after Escape.
dialog.addEventListener("close", () => {
  field.value = "";
  fault.textContent = "";
});

/** Ask until a key fits, or the user would rather not. Resolves to whether there is one. */
export function askForKey() {
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    const done = new AbortController();
    const { signal } = done;
    async function attempt(event) {
      event.preventDefault();
      useKey(field.value);
      try {
        await request("v1/models");
      } catch (error) {
        useKey(null);
        const refused = error instanceof ApiError && error.status === 401;
        fault.textContent = refused ? "The server refuses this key." : error.message;
        field.select();
        return;
      }
      resolve(true);
      dialog.close();
    }
    byId("key-form").addEventListener("submit", attempt, { signal });
    dialog.addEventListener(
      "close",
      () => {
        done.abort();
        resolve(false);
      },
      { signal },
    );
  });
}
