// Starts the page: the key if one is needed, then models and facts; charts need neither.

import { ApiError, request } from "./api.js";
import { byId, element } from "./dom.js";
import { askForKey } from "./key.js";
import { watch } from "./live.js";
import { modelPanel } from "./model.js";
import { startPlayground } from "./playground.js";

const status = byId("status");
const unlock = byId("unlock");
let locked = false;
let answers = true;

function showStatus() {
  status.textContent = !answers ? "no answer" : locked ? "locked" : "ready";
  status.dataset.state = answers && !locked ? "good" : "bad";
  unlock.hidden = !locked;
  byId("send").disabled = locked;
}

async function open() {
  try {
    const { data } = await (await request("v1/models")).json();
    byId("model").replaceChildren(...data.map(({ id }) => element("option", { value: id }, id)));
    locked = false;
  } catch (error) {
    if (!(error instanceof ApiError && error.status === 401)) {
      answers = false;
      // The charts' polling finds out when it is back.
      return;
    }
    locked = true;
    return;
  } finally {
    showStatus();
  }
  byId("model-panel").replaceChildren(...(await describe()));
}

async function describe() {
  try {
    const info = await (await request("v1/cast/info")).json();
    byId("about").textContent = info.model.name;
    document.title = `${info.model.name} · cast-serve`;
    return modelPanel(info);
  } catch (error) {
    return [element("p", { class: "quiet" }, error.message)];
  }
}

async function enterKey() {
  locked = true;
  showStatus();
  if (await askForKey()) await open();
  byId(locked ? "unlock" : "prompt").focus();
}

async function start() {
  await open();
  if (locked) await enterKey();
  else byId("prompt").focus();
}

unlock.addEventListener("click", enterKey);
startPlayground(enterKey);
watch(byId("charts"), async (does) => {
  const returned = does && !answers;
  answers = does;
  showStatus();
  if (returned) await open();
});
start();
